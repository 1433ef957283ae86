"""What trackers are told, that a missing one is named, and each tool itself where it is installed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

from beholder.config import STAGES
from beholder.config.run import TrackerName
from beholder.evidence.catalogue import CATALOGUE, quantity
from beholder.train.tracking import GUIDE, TRACKERS, Opening, Trackers, check_installed, named, numbers
from beholder.types import UserError


def test_the_config_offers_what_there_is() -> None:
    assert list(get_args(TrackerName)) == list(TRACKERS)


def test_a_line_of_the_log_gives_its_finite_numbers_and_those_of_monitors_and_candidates() -> None:
    line: dict[str, Any] = {
        "step": 3, "loss": 0.5, "grad_norm": None, "eta_s": math.nan, "rejected": [["a", "gone"]], "whole": True,
        "monitors": {"ood.hallucination": 0.25}, "monitor_data": {"ood": {"n": 4}},
        "candidate": {"step": 3, "delta_shuffled": 0.1, "collapse": None, "monitors": {"ood.hallucination": 0.25}},
    }  # fmt: skip

    assert numbers(line) == {"loss": 0.5, "ood.hallucination": 0.25, "candidate.delta_shuffled": 0.1}
    assert numbers({**line, "baseline_run": "outputs/other"}) == {}, "what another run read is not this run's"


@pytest.mark.parametrize(("own", "guide"), [
    ({"loss": 2.0, "sft_loss": 1.0, "distill_loss": 4.0, "teacher_kl": 0.5},
     {"stage2/total_loss": 2.0, "stage2/sft_loss": 1.0, "stage2/distill_loss": 4.0, "stage2/teacher_kl_div": 0.5}),
    ({"lr.connector": 2e-4, "lr.lora": 5e-5}, {"stage2/lr.connector": 2e-4, "stage2/learning_rate": 5e-5}),
    ({"lr.connector": 2e-4}, {"stage2/learning_rate": 2e-4}),
    ({"vqa.accuracy": 0.6, "vqa.accuracy/yes/no": 0.7, "answer.accuracy.correct": 0.5},
     {"stage2/vqa_accuracy": 0.6, "stage2/vqa_accuracy/yes/no": 0.7, "stage2/answer.accuracy.correct": 0.5}),
    ({"answer.accuracy.correct": 0.5}, {"stage2/vqa_accuracy": 0.5}),
    ({"teacher.kl": 0.5}, {"stage2/teacher_kl_div": 0.5}),
    ({"instruct.score.correct": 0.8}, {"stage2/instruct_score": 0.8}),
    ({"ablation.delta.shuffled": 0.1}, {"stage2/ablation.delta.shuffled": 0.1}),
])  # fmt: skip
def test_numbers_have_the_guides_names_where_it_has_one(own: dict[str, float], guide: dict[str, float]) -> None:
    assert named(own, "stage2") == guide


def test_the_guides_names_are_of_measurements_that_there_are() -> None:
    measured = [name for ours in GUIDE.values() for name in ours if "." in name and not name.startswith("lr.")]
    assert len(measured) == 4 and not [name for name in measured if quantity(name)[0] not in CATALOGUE]


def test_every_stage_has_a_prefix_of_its_own_kind() -> None:
    assert {stage.name: stage.tracked_as for stage in STAGES.values()} == {
        "align": "stage1", "instruct": "stage2", "multi": "stage3", "distill": "stage2",
    }  # fmt: skip


def test_what_is_asked_for_and_not_installed_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "wandb").mkdir()  # as a run of it leaves behind
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    for module in ("wandb", "mlflow"):
        monkeypatch.delitem(__import__("sys").modules, module, raising=False)

    with pytest.raises(UserError, match=r"wandb, mlflow are not installed\. Install with: pip install wandb mlflow"):
        check_installed(["wandb", "mlflow"])
    check_installed([])


VALUES: Mapping[str, float] = {
    "loss": 2.0,
    "eval_exact": 0.5,
    "eval_exact/yes/no": 0.25,
    "eval_exact/what colour?": 1.0,
}


def two_parts(tracker: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """A run that logs steps 1 to 4, goes on from step 2, and ends at 3."""
    told: list[str] = []
    ids: dict[str, str] = {}
    for start, steps in ((0, (1, 2, 3, 4)), (2, (3,))):
        trackers = Trackers("stage2", told.append)
        ids = trackers.open([tracker], folder, "a-run", start, ids)
        for step in steps:
            trackers.log({"step": step, **VALUES, "loss": float(10 * start + step)})
        if start:
            trackers.finish(2, {"vqa.accuracy": 0.75})  # of the best checkpoint, an earlier step
        else:
            trackers.close()
    return told, ids


def test_tensorboard_has_one_curve_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

    assert two_parts("tensorboard", tmp_path)[0] == []

    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("stage2/total_loss")] == [(1, 1.0), (2, 2.0), (3, 23.0)]
    assert [(e.step, e.value) for e in read.Scalars("stage2/vqa_accuracy")] == [(2, 0.75)]
    assert "stage2/eval_exact/yes/no" in read.Tags()["scalars"]


@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_below_the_run_folder_offline_and_goes_on_as_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)

    told, ids = two_parts("wandb", tmp_path)

    assert told == []
    runs = sorted((tmp_path / "wandb").glob(f"offline-run-*-{ids['wandb']}/run-*.wandb"))
    assert runs and all(b"stage2/total_loss" in path.read_bytes() for path in runs)
    assert any(b"stage2/vqa_accuracy" in path.read_bytes() for path in runs)


@pytest.mark.filterwarnings("ignore")
def test_mlflow_keeps_a_local_store_and_goes_on_as_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)

    told, ids = two_parts("mlflow", tmp_path)

    assert told == []
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    assert client.get_run(ids["mlflow"]).info.status == "FINISHED"
    history = [(m.step, m.value) for m in client.get_metric_history(ids["mlflow"], "stage2/total_loss")]
    assert history == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (3, 23.0)]
    names = client.get_run(ids["mlflow"]).data.metrics
    assert {"stage2/eval_exact", "stage2/eval_exact.yes.no", "stage2/eval_exact.what colour_"} <= names.keys()


@pytest.mark.filterwarnings("ignore")
def test_trackio_goes_on_as_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

    told, ids = two_parts("trackio", tmp_path)

    assert told == []
    rows = SQLiteStorage.get_logs("beholder", ids["trackio"])
    assert [r["step"] for r in rows if "stage2/total_loss" in r] == [1, 2, 3, 4, 3]
    assert [r["stage2/vqa_accuracy"] for r in rows if "stage2/vqa_accuracy" in r] == [0.75]


def test_an_opening_that_goes_on_knows_what_the_run_was_called() -> None:
    seen: list[Opening] = []

    class Kept:
        id = "run-7"

        def __init__(self, o: Opening) -> None:
            seen.append(o)

        def log(self, step: int, values: Mapping[str, float]) -> None: ...

        def close(self, done: bool) -> None: ...

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRACKERS, "tensorboard", type(TRACKERS["wandb"])("json", Kept))
        ids = Trackers("stage1", print).open(["tensorboard"], Path("f"), "a", 0, {"tensorboard": "of an earlier start"})
        Trackers("stage1", print).open(["tensorboard"], Path("f"), "a", 5, ids)

    assert [(o.step, o.known) for o in seen] == [(0, None), (5, "run-7")]
