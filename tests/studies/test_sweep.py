"""A sweep for real: tiny parts, a process a run, killed, interrupted, continued, and its summary checked by hand."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from rich.console import Console
from tests.conftest import MakeConfig
from tests.studies.conftest import GRID, WriteSweep

from beholder.config import SweepConfig
from beholder.config.file import config_hash, load_config
from beholder.evidence import load_evidence
from beholder.runs import held
from beholder.studies import runner
from beholder.studies.points import _points, check_folders, points_of
from beholder.studies.record import SweepRecord, titles, word
from beholder.studies.sweep import SweepResult, run_sweep
from beholder.types import UserError

COMMAND = "import sys; from beholder.studies import run_sweep; sys.exit(run_sweep(sys.argv[1]).exit_code)"


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "summary.csv").read_text(encoding="utf-8"))))


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ---------------------------------------------------------------------------------------------------------------
# The points


def test_every_combination_is_a_run_on_one_split_and_one_golden_set(write_sweep: WriteSweep, tmp_path: Path) -> None:
    points = points_of(write_sweep(tmp_path, seeds=(7, 8)), ["seed=5"])

    assert [r.name for r in points.runs][:3] == [
        "lr0.001_vision_ln0_s7",
        "lr0.001_vision_ln0_s8",
        "lr0.001_vision_ln1_s7",
    ]
    assert len({r.name for r in points.runs}) == 8
    for run in points.runs:
        assert run.cfg.train.lr.connector == run.settings["train.lr.connector"]
        assert run.cfg.model.connector.vision_ln is run.settings["model.connector.vision_ln"]
        assert run.cfg.seed in (7, 8) and run.name.endswith(f"_s{run.cfg.seed}")
        assert run.cfg.measure_seed == 5 and run.cfg.sweep is None
        assert run.cfg.eval.golden_set_path == str(tmp_path / "sweep" / "golden.jsonl")
        assert run.cfg.run_dir == str(tmp_path / "sweep" / run.name) and run.cfg.run_name == run.name
    assert not (tmp_path / "sweep").exists(), "planning writes nothing"


def test_without_seeds_every_run_has_the_configs_own(write_sweep: WriteSweep, tmp_path: Path) -> None:
    points = points_of(write_sweep(tmp_path, **{"eval.golden_set_path": "own.jsonl"}), ["data.split_seed=9"])

    assert {r.cfg.seed for r in points.runs} == {42} and {r.cfg.measure_seed for r in points.runs} == {9}
    assert {r.name for r in points.runs} == {r.point for r in points.runs}
    assert {r.cfg.eval.golden_set_path for r in points.runs} == {"own.jsonl"}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (5e-5, "5e-5"), (0.0001, "1e-4"), (1.25e-5, "1.25e-5"), (0.003, "0.003"), (2.0, "2.0"), (-2e-6, "-2e-6"),
        (0.0, "0.0"), (True, "1"), (False, "0"), (16, "16"), ("parts/llm", "llm"), ("perceiver", "perceiver"),
    ],
)  # fmt: skip
def test_values_in_names(value: bool | int | float | str, told: str) -> None:
    assert word(value) == told


def test_settings_of_the_same_last_name_go_by_their_full_names() -> None:
    assert titles(["train.lr.connector", "model.connector.vision_ln"]) == {
        "train.lr.connector": "lr", "model.connector.vision_ln": "vision_ln",
    }  # fmt: skip
    same = ["model.llm.precision", "train.precision", "train.weight_decay.lora"]
    assert titles(same) == {same[0]: same[0], same[1]: same[1], same[2]: "weight_decay"}


def test_values_whose_words_are_the_same_are_numbered() -> None:
    sweep = SweepConfig(grid={"model.vision.name_or_path": ("a/x y", "b/x y", "c/z")})

    assert list(_points(sweep)) == ["name_or_pathx-y-1", "name_or_pathx-y-2", "name_or_pathz-3"]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"seed": [1, 2]}, "sweep.seeds"),
        ({"eval.golden_size": [1, 2]}, "eval.golden_size; runs of a sweep must be measured on the same samples"),
        ({"data.split_seed": [1, 2]}, "data.split_seed"),
        ({"gates.learned.enable": [True]}, "gates.learned.enable"),
        ({"train.lr.conector": [1e-3]}, "no such setting in train.lr; nearest: connector"),
        ({"train.train_steps": [0, 2]}, "train_steps0: .*expected"),
        ({"model.connector.resampler.kind": ["mean_pool", "perceiver"]}, "kindmean_pool: .*1 visual token"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_by_name(
    write_sweep: WriteSweep, tmp_path: Path, grid: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        points_of(write_sweep(tmp_path, grid=grid))


def test_a_score_without_its_conditions_is_refused(write_sweep: WriteSweep, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ablation\.conditions leaves out shuffled"):
        points_of(write_sweep(tmp_path), ["ablation.conditions=[zero]"])


def test_a_config_without_a_sweep_is_refused(tiny_config: MakeConfig, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny_config(tmp_path).model_dump(mode="json", exclude_defaults=True)))

    with pytest.raises(UserError, match="no sweep: section"):
        points_of(file)


# ---------------------------------------------------------------------------------------------------------------
# The folder


def test_a_folder_with_a_run_of_other_settings_is_an_error_that_names_them(
    write_sweep: WriteSweep, tmp_path: Path
) -> None:
    points = points_of(write_sweep(tmp_path))
    folder = points.runs[0].folder
    folder.mkdir(parents=True)
    from beholder.config.file import dump_config

    other = load_config(tmp_path / "sweep.yaml", ["train.train_steps=7"]).model_copy(update={"sweep": None})
    (folder / "config.yaml").write_text(dump_config(other))
    (folder / "run.json").write_text(json.dumps({"status": "succeeded", "config_hash": config_hash(other)}))

    with pytest.raises(UserError, match=r"(?s)lr.*vision_ln0:.*train.train_steps: 7 there, 2 here.*another run_name"):
        check_folders(points)


def test_a_sweep_does_not_go_into_the_folder_of_a_run(write_sweep: WriteSweep, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "run.json").write_text("{}")

    with pytest.raises(UserError, match="folder of a single run"):
        run_sweep(write_sweep(tmp_path), console=quiet())


def test_two_sweeps_cannot_share_a_folder(write_sweep: WriteSweep, tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    (tmp_path / "sweep").mkdir()
    with held(tmp_path / "sweep", "sweep"):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
            run_sweep(file, console=quiet())
    assert not (tmp_path / "sweep" / "logs").exists()


# ---------------------------------------------------------------------------------------------------------------
# The runs: one sweep, killed, interrupted, finished, and asked again


STEPS = 300
"""Long enough that a signal meets runs in the middle of training, however busy the machine is."""


@dataclass
class Story:
    """What became of one 2 x 2 sweep."""

    folder: Path
    config: Path
    orphans_after_kill: list[int]
    interrupted: SweepRecord
    code_interrupted: int
    steps_interrupted: dict[str, list[int]]
    finished: SweepResult
    told: str
    again: SweepResult
    told_again: str
    changed_again: list[str]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return {}


def wait_for(what: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def steps(folder: Path) -> dict[str, list[int]]:
    """Run -> the steps in its log."""
    found = {}
    for file in folder.glob("*/metrics.jsonl"):
        lines = [line for line in file.read_bytes().split(b"\n")[:-1] if line]
        found[file.parent.name] = [r["step"] for r in map(json.loads, lines) if "loss" in r]
    return found


def children(pid: int) -> list[int]:
    return [p.pid for p in psutil.Process(pid).children()]


def alive(pids: list[int]) -> list[int]:
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def swept(story: dict[str, Story], write_sweep: WriteSweep, tmp_path_factory: pytest.TempPathFactory) -> Story:
    if "it" in story:
        return story["it"]
    root = tmp_path_factory.mktemp("swept")
    config = write_sweep(root, **{"train.train_steps": STEPS, "train.save_every": 4, "train.log_every": 1})
    folder = root / "sweep"

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", COMMAND, str(config)], stdout=subprocess.DEVNULL)

    killed = start()
    wait_for(lambda: any(len(s) > 4 for s in steps(folder).values()))
    orphans = children(killed.pid)
    killed.kill()
    killed.wait()
    wait_for(lambda: sys.platform != "linux" or not alive(orphans), 60)
    left = alive(orphans)

    before = {name: len(s) for name, s in steps(folder).items()}
    stopped = start()
    wait_for(lambda: any(len(s) > before.get(name, 0) + 1 for name, s in steps(folder).items()))
    runs = children(stopped.pid)
    stopped.send_signal(signal.SIGINT)
    code = stopped.wait(timeout=120)
    assert alive(runs) == []
    interrupted, reached = SweepRecord.load(folder), steps(folder)

    console = quiet()
    finished = run_sweep(config, console=console)
    finished.print(console)
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("*/*") if p.is_file() and p.parent.name != "configs"}
    asked = quiet()
    again = run_sweep(config, console=asked)
    again.print(asked)
    changed = [str(p) for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp]
    story["it"] = Story(
        folder, config, left, interrupted, code, reached, finished, said(console), again, said(asked), changed
    )
    return story["it"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children that their parent died")
@pytest.mark.slow
def test_a_killed_sweep_leaves_no_run_training_unwatched(swept: Story) -> None:
    assert swept.orphans_after_kill == []


@pytest.mark.slow
def test_ctrl_c_stops_the_runs_with_a_checkpoint_and_says_so(swept: Story) -> None:
    assert swept.code_interrupted == 130
    unfinished = [r for r in swept.interrupted.rows if r.status != "finished"]
    assert unfinished and any(r.status == "interrupted" for r in unfinished)
    assert all(r.score is None for r in unfinished)
    assert any("not finished" in w for w in swept.interrupted.warnings)


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_where_it_was(swept: Story) -> None:
    assert swept.finished.exit_code == 0
    assert [r.status for r in swept.finished.record.rows] == ["finished"] * 4
    for name, found in steps(swept.folder).items():
        assert found == list(range(1, STEPS + 1)), name
    begun = [name for name, found in swept.steps_interrupted.items() if 4 < len(found) < STEPS]
    assert begun, "nothing was interrupted in training"
    for name in begun:
        assert "[resume]" in (swept.folder / "logs" / f"{name}.log").read_text()


@pytest.mark.slow
def test_finished_runs_are_not_run_again(swept: Story) -> None:
    assert swept.again.exit_code == 0
    assert "4 of 4 runs are finished already" in swept.told_again and "started" not in swept.told_again
    assert swept.changed_again == []
    assert swept.again.record.rows == swept.finished.record.rows


@pytest.mark.slow
def test_a_line_per_finished_run_and_the_verdict_are_printed(swept: Story) -> None:
    assert "4/4 " in swept.told and "loss " in swept.told and "shuffled image" in swept.told
    assert " left" in swept.told, "an estimate of what is left"
    assert swept.finished.record.ranking.verdict in " ".join(swept.told.split())


@pytest.mark.slow
def test_the_winner_follows_by_hand_from_the_csv(swept: Story) -> None:
    rows = table(swept.folder)

    assert [r["name"] for r in rows] == [r.name for r in points_of(swept.config).runs]
    by_hand = {}
    median = statistics.median(float(r["d_shuffle"]) for r in rows)
    for r in rows:
        evidence = load_evidence(swept.folder / r["name"])
        loss, shuffle, zero = (
            m.value
            for name in ("eval.loss", "ablation.delta.shuffled", "ablation.delta.zero")
            if (m := evidence.get(name))
        )
        assert (float(r["eval_loss_end"]), float(r["d_shuffle"]), float(r["d_zero"])) == (loss, shuffle, zero)
        assert float(r["score"]) == pytest.approx(loss - 0.1 * (shuffle + zero), abs=1e-12)
        assert int(r["steps"]) == STEPS and r["status"] == "finished" and len(r["config_hash"]) == 64
        record = json.loads((swept.folder / r["name"] / "run.json").read_text())
        assert r["config_hash"] == record["config_hash"]
        collapsed = float(r["d_shuffle_low"]) <= 0 or shuffle < 0.1 * median
        assert ("collapsed" in r["flags"]) == collapsed
        assert [f for f in r["flags"].split("; ") if f.startswith("gate ")] == [
            f"gate {g.name}" for g in evidence.failed_gates
        ]
        if not r["flags"]:
            by_hand[r["name"]] = float(r["score"])
    expected = min(by_hand, key=lambda name: by_hand[name]) if by_hand else None
    assert swept.finished.record.ranking.winner == expected
    assert {(float(r["train.lr.connector"]), r["model.connector.vision_ln"]) for r in rows} == {
        (lr, str(ln)) for lr in GRID["train.lr.connector"] for ln in GRID["model.connector.vision_ln"]
    }


@pytest.mark.slow
def test_all_runs_share_one_split_and_one_golden_set(swept: Story) -> None:
    splits = [json.loads(p.read_bytes())["eval"] for p in swept.folder.glob("*/splits/split_*.json")]

    assert len(splits) == 4 and all(s == splits[0] for s in splits)
    assert (swept.folder / "golden.jsonl").stat().st_size > 0
    assert not list(swept.folder.glob("*/golden.jsonl"))
    assert not any("same held-out samples" in w for w in swept.finished.record.warnings)


@pytest.mark.slow
def test_pages_are_rendered_from_the_record_alone(swept: Story, tmp_path: Path) -> None:
    from beholder.studies.page import render_sweep

    record = SweepRecord.load(swept.folder)
    assert record == swept.again.record

    html, markdown = render_sweep(swept.folder / "sweep.json", tmp_path)

    assert html.read_text() == (swept.folder / "sweep.html").read_text()
    assert markdown.read_text() == (swept.folder / "sweep.md").read_text()


# ---------------------------------------------------------------------------------------------------------------
# What the runs are told


@pytest.mark.parametrize("promote_anyway", [False, True])
def test_promote_anyway_is_handed_to_every_run(
    write_sweep: WriteSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promote_anyway: bool
) -> None:
    commands: list[list[str]] = []
    popen: Any = subprocess.Popen

    def start(command: list[str], **more: Any) -> subprocess.Popen[bytes]:
        commands.append(command[1:])
        return popen([sys.executable, "-c", "raise SystemExit(2)"], **more)

    monkeypatch.setattr(runner.subprocess, "Popen", start)

    result = run_sweep(write_sweep(tmp_path), console=quiet(), promote_anyway=promote_anyway)

    assert result.exit_code == 1 and len(commands) == 4
    for command in commands:
        assert command[:3] == ["-m", "beholder", "run"]
        assert command[4:] == (["--promote-anyway"] if promote_anyway else [])


# ---------------------------------------------------------------------------------------------------------------
# A run that fails, and one that stands


@pytest.mark.slow
def test_a_failed_run_is_named_and_the_others_go_on(write_sweep: WriteSweep, tmp_path: Path) -> None:
    config = write_sweep(tmp_path, grid={"model.vision.feature_layer": [-99, -1]})
    console = quiet()

    result = run_sweep(config, console=console)

    assert result.exit_code == 1 and [r.name for r in result.record.rows if r.status == "failed"] == [
        "feature_layer-99"
    ]
    bad, good = result.record.rows
    assert bad.score is None and re.match(r"exit code [12]: .*\w", bad.reason)
    assert good.status == "finished" and good.score is not None
    assert "feature_layer-99 FAILED after" in said(console)
    assert any(w.startswith("feature_layer-99 failed: exit code") for w in result.record.warnings)
    rows = table(tmp_path / "sweep")
    assert [(r["name"], r["status"], bool(r["score"])) for r in rows] == [
        ("feature_layer-99", "failed", False), ("feature_layer-1", "finished", True),
    ]  # fmt: skip
    assert "feature\\_layer-99 failed" in (tmp_path / "sweep" / "sweep.md").read_text()

    asked = quiet()
    again = run_sweep(config, console=asked)

    assert again.exit_code == 1 and again.record.rows[1] == good
    assert "2 runs: feature_layer-99, feature_layer-1\n" in said(console).replace(", 2 at a time", "")
    assert "1 of 2 runs to go" in said(asked)
    assert "1 of 2 runs are finished already" in said(asked) and "started feature_layer-1 " not in said(asked)
