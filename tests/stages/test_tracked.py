"""A whole run with a tracker: it hears everything, and whatever it does, the run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.conftest import MakeConfig

from beholder.evidence import load_evidence
from beholder.runs import RunDir
from beholder.stages import run_stage
from beholder.stages.session import Session
from beholder.train.distributed import Dist
from beholder.train.tracking import TRACKERS, Opening, Tracker, Writer
from beholder.types import Status, UserError


class Planted:
    """Keeps what it is told; raises where it is asked to."""

    id = "run-7"

    def __init__(self, o: Opening, fails: str = "") -> None:
        self.fails = fails
        self.told: list[tuple[int, dict[str, float]]] = []
        self.done: list[bool] = []
        self._maybe("open")

    def _maybe(self, where: str) -> None:
        if where == self.fails:
            raise OSError(f"no {where} today")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.told.append((step, dict(values)))
        self._maybe("log")

    def close(self, done: bool) -> None:
        self.done.append(done)
        self._maybe("close")


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Planted]]:
    def plant(fails: str) -> list[Planted]:
        opened: list[Planted] = []

        def open(o: Opening) -> Writer:
            opened.append(Planted(o, fails))
            return opened[-1]

        monkeypatch.setitem(TRACKERS, "tensorboard", Tracker("json", open))
        return opened

    return plant


def losses_of(folder: Path) -> list[float]:
    return [r["loss"] for r in RunDir(folder / "run").metrics() if "loss" in r]


@pytest.mark.parametrize("fails", ["", "log", *(pytest.param(f, marks=pytest.mark.slow) for f in ("open", "close"))])
def test_a_tracker_that_fails_never_stops_a_run(
    fails: str, plant: Callable[[str], list[Planted]], tiny_config: MakeConfig, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    opened = plant(fails)

    outcome = run_stage(tiny_config(tmp_path, tracking=["tensorboard"]))

    assert outcome.status == Status.SUCCEEDED and len(losses_of(tmp_path)) == 4
    gaps = [gap for gap in load_evidence(tmp_path / "run").gaps if gap.startswith("Tracking")]
    told = capsys.readouterr().out.count("[tracking] WARNING")
    assert len(gaps) == told == bool(fails), gaps
    if fails:
        assert f"no {fails} today" in gaps[0] and "tensorboard" in gaps[0]
    if fails == "log":
        assert len(opened[0].told) == 1, "it is asked once and then never again"
    if fails in ("", "close"):
        assert opened[0].done == [True]


def test_a_tracker_hears_every_line_of_the_log_and_the_final_measurements(
    plant: Callable[[str], list[Planted]], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    opened = plant("")
    run_stage(tiny_config(tmp_path, tracking=["tensorboard"]))

    told = opened[0].told
    assert [v["stage1/total_loss"] for _, v in told if "stage1/total_loss" in v] == losses_of(tmp_path)
    assert [step for step, v in told if "stage1/learning_rate" in v] == [1, 2, 3, 4]
    lines = [r for r in RunDir(tmp_path / "run").metrics() if r["step"] <= 4]
    assert len(told) == len(lines) + 1, "every line, and the measurements at the end"
    evidence = load_evidence(tmp_path / "run")
    last = told[-1][1]
    assert last["stage1/eval.loss"] == evidence.metrics()["eval.loss"]
    assert last["stage1/ablation.delta.shuffled"] == evidence.metrics()["ablation.delta.shuffled"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["tracked"] == {"tensorboard": "run-7"}


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    monkeypatch.setitem(TRACKERS, "mlflow", Tracker("no_such_package", Planted))
    cfg = tiny_config(tmp_path, **{"tracking": ["mlflow"], "model.llm.name_or_path": "nobody/never-fetched"})

    with pytest.raises(UserError, match="pip install no_such_package"):
        run_stage(cfg)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_run_that_crashes_closes_its_tracker_as_not_done(
    plant: Callable[[str], list[Planted]], tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = plant("")
    monkeypatch.setattr("beholder.stages.run.measure", _crash)

    with pytest.raises(RuntimeError, match="planted"):
        run_stage(tiny_config(tmp_path, tracking=["tensorboard"]))
    assert opened[0].done == [False]


def _crash(*_: object, **__: object) -> None:
    raise RuntimeError("planted")


def test_only_the_main_process_of_a_job_writes(
    plant: Callable[[str], list[Planted]], tiny_config: MakeConfig, tmp_path: Path
) -> None:
    opened = plant("")
    other: Any = SimpleNamespace(cfg=tiny_config(tmp_path, tracking=["tensorboard"]), dist=Dist(rank=1), run=None)

    Session.track(other, 0)

    assert not opened


def test_a_resumed_run_is_one_curve_in_tensorboard(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

    cfg = tiny_config(tmp_path, tracking=["tensorboard"])
    with monkeypatch.context() as patch:
        patch.setattr("beholder.stages.run.measure", _crash)
        with pytest.raises(RuntimeError, match="planted"):
            run_stage(cfg)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_4")
    run_stage(cfg)

    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    curve = [(e.step, e.value) for e in read.Scalars("stage1/total_loss")]
    assert [step for step, _ in curve] == [1, 2, 3, 4]
    assert [value for _, value in curve] == pytest.approx(losses_of(tmp_path), rel=1e-6)
    assert not any("Tracking" in gap for gap in load_evidence(tmp_path / "run").gaps)
