"""A footprint study planned, refused by name, and, slowly, run for real: killed, continued, not run again."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from tests.conftest import TinyParts, make_config

from beholder.config import FootprintConfig
from beholder.config.file import dump_config, load_config, parse_config
from beholder.config.studies import PointConfig
from beholder.evidence import load_evidence
from beholder.prepare.tiny import colour_source, tiny_native
from beholder.report.compare import compare_runs
from beholder.runs import is_held
from beholder.stages import run_stage
from beholder.studies.footprint import _check_runs, collect, measure_similarity, plan_footprint, run_footprint
from beholder.studies.footprint_record import FootprintRecord, explanation
from beholder.studies.frontier import KEPT
from beholder.studies.matrix import ALPHA, LLM, RANK, START, TARGETS, VISION, every_point, groups, plan
from beholder.studies.points import needs, read_json
from beholder.studies.runner import Runner
from beholder.train.checkpoint import resolve_checkpoint
from beholder.types import Status, UserError

COMMAND = "import sys; from beholder.studies.footprint import run_footprint as run; "
COMMAND += "sys.exit(run(sys.argv[1], promote_anyway=True).exit_code)"

WriteStudy = Callable[..., Path]


# ---------------------------------------------------------------------------------------------------------------
# The points, from the settings alone


def names(study: FootprintConfig, *, connector_learns: bool = False) -> list[str]:
    return [p.name for p in plan(study, connector_learns=connector_learns)]


def test_the_plans_matrix_and_its_priorities() -> None:
    study = FootprintConfig()

    assert list(study.matrix()) == ["A0", "A1", "A2", "B1", "B2", "B3", "C1", "C2", "C3", "D1", "D2", "D3"]
    assert groups(study)["priority"] == ("A0", "A1", "A2", "B2", "B3", "C2", "C3")
    assert names(study) == ["A0", "A1", "A2", "B2", "B3", "C2", "C3", "first", "similar", "attention", "gate_up"]
    assert names(FootprintConfig(select=("matrix",)))[-5:] == ["B1", "C1", "D1", "D2", "D3"]


def test_each_point_of_the_matrix_places_the_last_layers_of_either_tower() -> None:
    points = every_point(FootprintConfig(), connector_learns=False)

    assert points["A2"].settings == {LLM: "last-4", VISION: "none"}
    assert points["B3"].settings == {LLM: "none", VISION: "last-6"}
    assert points["D1"].settings == {LLM: "last-4", VISION: "last-2"} and (points["D1"].llm, points["D1"].vision) == (
        4,
        2,
    )


def test_at_the_baseline_nothing_learns_and_one_step_is_enough_unless_the_connector_learns() -> None:
    frozen = every_point(FootprintConfig(), connector_learns=False)["A0"].settings
    learning = every_point(FootprintConfig(), connector_learns=True)["A0"].settings

    assert frozen["train.lr.lora"] == 0.0 and frozen[VISION] == "none" and frozen["train.train_steps"] == 1
    assert learning["train.lr.lora"] == 0.0 and "train.train_steps" not in learning


def test_points_can_be_selected_left_out_and_added_and_a_run_that_another_needs_comes_along() -> None:
    study = FootprintConfig(
        select=("A1", "ranks", "grow_2"), leave_out=("rank_32",), groups={"ranks": ("rank_8", "rank_32")},
        points={
            "rank_8": PointConfig(like="A1", set={"model.lora.r": 8}), "rank_32": PointConfig(like="A1"),
            "grow_1": PointConfig(like="C1"), "grow_2": PointConfig(like="C2", after="grow_1"),
        },
    )  # fmt: skip
    points = {p.name: p for p in plan(study, connector_learns=False)}

    assert list(points) == ["A0", "A1", "rank_8", "grow_1", "grow_2"]  # A0: what the others are measured against
    assert points["rank_8"].settings == {LLM: "last-2", VISION: "none", "model.lora.r": 8}
    assert points["grow_2"].after == "grow_1" and points["grow_2"].settings[VISION] == "last-4"


def test_the_restart_is_like_a_point_of_the_matrix_from_another_run() -> None:
    study = FootprintConfig(restart="outputs/stage2")
    points = {p.name: p for p in plan(study, connector_learns=False)}

    assert points["restart"].settings == {LLM: "last-2", VISION: "last-4", START: "outputs/stage2"}


def test_controls_are_other_layers_or_other_modules_of_the_same_ones() -> None:
    points = every_point(FootprintConfig(controls_of="C2"), connector_learns=False)

    assert points["first"].settings == {LLM: "first-2", VISION: "first-4"}
    assert points["similar"].similar == 2 and points["similar"].settings == {VISION: "last-4"}
    assert points["gate_up"].settings[TARGETS] == ("gate_proj", "up_proj")
    assert {points[n].equal_to for n in ("first", "similar", "attention", "gate_up")} == {"C2"}
    assert groups(FootprintConfig(controls_of="B2"))["controls"] == ("first",)  # no layer of the language model learns
    assert names(FootprintConfig(llm_layers=(0,))) == ["A0", "B2", "B3"]  # there is no A1 to compare controls with
    assert names(FootprintConfig(leave_out=("A0",), select=("A1",))) == ["A1"]


def test_what_a_point_sets_itself_is_not_found_out_for_it() -> None:
    study = FootprintConfig(
        points={
            "rank": PointConfig(like="attention", set={RANK: 8}), "as_many": PointConfig(like="attention"),
            "layers": PointConfig(like="similar", set={LLM: "last-2"}), "alike": PointConfig(like="similar"),
            "grown": PointConfig(like="A1", after="A2"), "moved": PointConfig(like="grown", set={START: "elsewhere"}),
            "moved_again": PointConfig(like="moved", after="A1"),
        }
    )  # fmt: skip
    points = every_point(study, connector_learns=False)

    assert points["rank"].equal_to is None and points["as_many"].equal_to == "A1"
    assert points["layers"].similar == 0 and points["alike"].similar == 2
    assert points["grown"].after == "A2" and points["moved"].after is None and points["moved_again"].after == "A1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select": ("A1", "C9")}, "select names 'C9', which is no point here; nearest: C"),
        ({"leave_out": ("prioritie",)}, "leave_out names 'prioritie'.*nearest: priority"),
        ({"select": ("A1", "A1")}, "select has a name twice"),
        ({"points": {"A1": {}}}, "points has 'A1', which is a point or a group already"),
        ({"points": {"x": {}}, "groups": {"x": ()}}, "'x', which is a point or a group already"),
        ({"points": {"a/b": {}}}, "a name is part of a path"),
        ({"points": {"x": {"like": "y"}, "y": {"like": "x"}}}, "go round in a circle"),
        ({"points": {"x": {"after": "C7"}}}, "points x after names 'C7'"),
        ({"select": ("restart",)}, "say in restart which stage-2 run"),
        ({"llm_layers": (2, 4)}, "llm_layers is .*give 0 first"),
        ({"controls_of": "E1"}, "controls_of names 'E1'"),
        ({"seeds": (1, 1)}, "seeds has a number twice"),
        ({"controls_of": "B1", "points": {"x": {"like": "attention"}}},
         "points x like names attention, a control that this study has not: B1.* has no layer of the language model"),
        ({"controls_of": "B1", "select": ("A0", "B1", "similar")}, "select names similar, a control"),
        ({"controls_of": "B1", "groups": {"g": ("gate_up",)}}, "groups g names gate_up, a control"),
        ({"llm_layers": (0,), "select": ("A0", "first")}, "select names first, .*no layer learns at A1"),
        ({"controls_of": "A0", "leave_out": ("first",)}, "leave_out names first, .*no layer learns at A0"),
    ],
)  # fmt: skip
def test_a_study_that_cannot_be_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        FootprintConfig(**settings)


# ---------------------------------------------------------------------------------------------------------------
# The runs, on tiny parts


def questions(parts: TinyParts, folder: Path) -> Path:
    asked, answers = ("what shape is it?", "what color is it?"), ("square", "disc", "triangle")
    rows = []
    for i, r in enumerate(map(json.loads, parts.records.read_text(encoding="utf-8").splitlines())):
        turns = [
            {"role": "user", "content": f"<image>\n{asked[i % 2]}"},
            {"role": "assistant", "content": answers[i % 3]},
        ]
        rows.append(json.dumps({"id": r["id"], "images": r["images"], "messages": turns}))
    file = folder / "questions.jsonl"
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


FEW = {
    "stage": "instruct", "model.lora.enable": True, "model.lora.r": 4, "model.lora.alpha": 8, "train.lr.lora": 1e-2,
    "prompting.max_images_per_sample": 1, "eval.golden_size": 0, "eval.caption_samples": 2, "eval.answer_tokens": 4,
    "eval.audit_turns": 0, "ablation.num_samples": 4,
}  # fmt: skip


@pytest.fixture
def write_study(tiny_parts: TinyParts, monkeypatch: pytest.MonkeyPatch) -> WriteStudy:
    """``write_study(folder, footprint, **settings)``: the path of a config whose study folder is ``folder/study``,
    going on from ``folder/start/run``, which is made with ``started=True``."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))

    def write(folder: Path, footprint: dict[str, Any], *, started: bool = False, **sets: Any) -> Path:
        data = {"data.json_path": str(questions(tiny_parts, folder))}
        if started:
            run_stage(make_config(tiny_parts, folder / "start", **FEW, **data))
        on_top = {
            **FEW, **data, "model.connector.load_checkpoint": str(folder / "start" / "run"),
            "model.lora.adapters": "merge", "eval.strengths": [0.5],
        }  # fmt: skip
        raw = yaml.safe_load(dump_config(make_config(tiny_parts, folder, **{**on_top, **sets})))
        raw["model"]["connector"]["trainable"] = False
        raw["train"]["lr"].pop("connector")
        raw["train"]["weight_decay"].pop("connector", None)
        raw |= {"run_name": "study", "output_dir": str(folder / "study"), "footprint": footprint}
        file = folder / "study.yaml"
        file.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
        return file

    return write


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def own(sets: dict[str, Any]) -> dict[str, Any]:
    return {"select": ["x"], "points": {"x": {"set": sets}}}


STEPS = 300
"""Of a run that learns."""
TINY = {"llm_layers": [0, 1, 2], "vision_blocks": [0, 1], "similarity_samples": 4}


def test_every_point_is_a_run_on_one_split_that_goes_on_from_the_start(write_study: WriteStudy, tmp_path: Path) -> None:
    footprint = {**TINY, "seeds": [1, 2], "select": ["A0", "A1", "B1"]}
    study = plan_footprint(write_study(tmp_path, footprint), ["seed=5"])
    runs = {r.name: r for r in study.points.runs}

    # nothing learns at A0, so it is not repeated; a study that is cut short has every point once
    assert list(runs) == ["A0_s1", "A1_s1", "B1_s1", "A1_s2", "B1_s2"]
    assert {r.cfg.measure_seed for r in runs.values()} == {5}
    assert {r.cfg.model.connector.load_checkpoint for r in runs.values()} == {str(tmp_path / "start" / "run")}
    assert runs["A1_s2"].cfg.model.lora.llm_layers == "last-1" and runs["B1_s1"].cfg.model.lora.vit_layers == "last-1"
    assert study.adapters["A1"] > 0 and study.adapters["B1"] > 0
    assert not (tmp_path / "study").exists(), "planning writes nothing"
    assert any("hallucination" in n and "eval.ood.path is not given" in n for n in study.notes)
    assert any("no guardrail is on" in n for n in study.notes)


def test_an_expression_of_the_tower_is_refused_because_the_study_varies_its_blocks(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    expression = {"model.lora.target_modules": [r"encoder\.layers\.\d+\.self_attn\.out_proj", "q_proj"]}

    with pytest.raises(UserError, match=r"out_proj' names modules of the vision tower alone, and a footprint study"):
        plan_footprint(write_study(tmp_path, {**TINY, "select": ["A1"]}, **expression))


def test_controls_get_the_rank_that_gives_them_as_many_parameters(write_study: WriteStudy, tmp_path: Path) -> None:
    select = ["A1", "first", "attention", "gate_up"]
    study = plan_footprint(
        write_study(tmp_path, {**TINY, "select": select}, **{"model.lora.r": 64, "model.lora.alpha": 128})
    )
    runs = {r.point: r.cfg.model.lora for r in study.points.runs}

    assert runs["first"].r == 64 and runs["first"].llm_layers == "first-1"
    for name in ("attention", "gate_up"):
        assert runs[name].r > 64 and runs[name].alpha == pytest.approx(2 * runs[name].r, abs=1)
        assert study.adapters[name] == pytest.approx(study.adapters["A1"], rel=0.02)


@pytest.mark.parametrize(
    ("footprint", "sets", "message"),
    [
        ({"llm_layers": [0, 1, 9], "select": ["A0", "A2"]}, [], r"A2: model\.lora\.llm_layers is last-9, but .* has 2"),
        ({"select": ["A1"]}, ["model.connector.load_checkpoint=null"], "goes on from a stage-3"),
        (own({"model.lora.rank": 8}), [], "no setting 'model.lora.rank'; nearest"),
        (own({"eval.caption_samples": 8}), [], "sets eval.caption_samples; points must be measured on the same"),
        (own({"train.lr.lora": "fast"}), [], "(?s)cannot be run:.*x: .*fast"),
        ({"points": {"x": {"after": "A1", "set": {START: "elsewhere"}}}}, [], "it starts from one run"),
        ({"select": ["y"], "points": {"x": {"after": "y"}, "y": {"like": "x"}}}, [], "y → y wait for each other"),
        (
            {"select": ["x"], "points": {"x": {"after": "A1"}}}, ["eval.baseline_run={study}/x"],
            "(A1 → x → A1|x → A1 → x) wait for each other",
        ),
        ({"select": ["A0"], "leave_out": ["A0"]}, [], "no point is left to run"),
        (own({START: None}), [], "points.x sets model.connector.load_checkpoint: null; every point goes on from a run"),
        (own({"model.lora.enable": False}), [], "points.x sets model.lora.enable: false; where adapters go is what"),
        ({"select": ["attention"], "attention": []}, [], "attention is empty; name its modules"),
        (own({RANK: [1]}), [], r"x: model\.lora\.r: got .*; expected a whole number"),
        (own({LLM: []}), [], r"x: model\.lora: enable is true, but llm_layers and vit_layers choose no layer"),
        ({"select": ["attention"]}, ["model.lora.r=65536"], "as many .* as A1 .* need the rank [0-9]+,"),
        ({"select": ["attention"], "attention": ["nope"]}, [], r"attention: footprint\.attention .*nope"),
        ({"select": ["A1"]}, ["model.connector.load_checkpoint={study}/A1/checkpoints/step_2"], "A1 → A1 wait for"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_before_anything_runs(
    write_study: WriteStudy, tmp_path: Path, footprint: dict[str, Any], sets: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan_footprint(write_study(tmp_path, {**TINY, **footprint}), [s.format(study=tmp_path / "study") for s in sets])
    assert not (tmp_path / "study").exists() and "pydantic" not in str(caught.value)


def test_a_point_that_is_none_by_its_other_settings_is_refused(write_study: WriteStudy, tmp_path: Path) -> None:
    runs = plan_footprint(write_study(tmp_path, {**TINY, "select": ["A1"]})).points.runs
    connector = runs[1].cfg.model.connector.model_copy(update={"load_checkpoint": None})
    cfg = runs[1].cfg.model_copy(update={"model": runs[1].cfg.model.model_copy(update={"connector": connector})})

    _check_runs(runs)
    with pytest.raises(UserError, match="A1 starts from no run"):
        _check_runs([replace(runs[1], cfg=cfg)])
    with pytest.raises(UserError, match=r"A1 has no adapters \(stage: align"):
        _check_runs([replace(runs[1], cfg=runs[1].cfg.model_copy(update={"stage": "align"}))])


def test_leaving_out_the_baseline_is_told_before_anything_runs(write_study: WriteStudy, tmp_path: Path) -> None:
    file = write_study(tmp_path, {**TINY, "select": ["A1"]})

    assert not [n for n in plan_footprint(file).notes if "A0" in n]
    assert [n for n in plan_footprint(file, ["footprint.leave_out=[A0]"]).notes if n.startswith("A0 is left out")]


def test_where_the_connector_learns_the_record_says_so(write_study: WriteStudy, tmp_path: Path) -> None:
    file = write_study(tmp_path, {**TINY, "select": ["A1"]})

    def told(*sets: str) -> list[str]:
        return [p.where for p in collect(plan_footprint(file, sets)).points]

    assert told() == ["nothing", "the language model's last 1"]
    learns = ["model.connector.trainable=true", "train.lr.connector=1e-3"]
    assert told(*learns) == ["the connector", "the language model's last 1 and the connector"]


def test_a_run_is_not_its_own_baseline_and_the_others_wait_for_it(write_study: WriteStudy, tmp_path: Path) -> None:
    file = write_study(tmp_path, {**TINY, "select": ["A1"]})
    baseline = tmp_path / "study" / "A0"

    runs = plan_footprint(file, [f"eval.baseline_run={baseline}/"]).points.runs

    assert [r.cfg.eval.baseline_run for r in runs] == [None, f"{baseline}/"]
    assert [[r.name for r in needs(run, runs)] for run in runs] == [[], ["A0"]]


def test_whatever_goes_on_from_the_baseline_takes_the_one_run_that_it_has(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    footprint = {**TINY, "seeds": [1, 2], "select": ["x"], "points": {"x": {"like": "A1", "after": "A0"}}}
    runs = {r.name: r for r in plan_footprint(write_study(tmp_path, footprint)).points.runs}

    assert list(runs) == ["A0_s1", "x_s1", "x_s2"]
    for name in ("x_s1", "x_s2"):
        assert runs[name].cfg.model.connector.load_checkpoint == str(tmp_path / "study" / "A0_s1")


def test_the_time_that_is_left_is_not_taken_from_the_one_step_of_the_baseline(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    points = plan_footprint(write_study(tmp_path, {**TINY, "select": ["A1", "B1"]}, **{"train.train_steps": 9})).points
    runner = Runner(points, quiet(), False)
    done = runner.left.pop(0)

    runner.seconds = [(done, 60.0)]
    assert runner._eta() == " · more than 2 min 00 s left"
    runner.seconds.append((runner.left.pop(0), 600.0))
    assert runner._eta() == " · about 10 min 00 s left"


def test_a_rank_or_alpha_of_ones_own_stays(write_study: WriteStudy, tmp_path: Path) -> None:
    own_points = {
        "rank": {"like": "attention", "set": {RANK: 8}}, "alpha": {"like": "attention", "set": {ALPHA: 8}},
    }  # fmt: skip
    footprint = {**TINY, "select": list(own_points), "points": own_points}
    study = plan_footprint(write_study(tmp_path, footprint, **{RANK: 64, ALPHA: 128}))
    runs = {r.point: r.cfg.model.lora for r in study.points.runs}

    assert (runs["rank"].r, runs["rank"].alpha) == (8, 128)
    assert runs["alpha"].r > 64 and runs["alpha"].alpha == 8


def test_a_config_without_a_footprint_is_refused(write_study: WriteStudy, tmp_path: Path) -> None:
    file = write_study(tmp_path, {})
    raw = yaml.safe_load(file.read_text())
    del raw["footprint"]
    file.write_text(yaml.safe_dump(raw))

    with pytest.raises(UserError, match="no footprint: section"):
        plan_footprint(file)


def test_a_start_whose_run_is_not_there_or_failed_its_gates_is_told_before_anything_runs(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    file = write_study(tmp_path, {**TINY, "select": ["A0"]}, started=True)

    with pytest.raises(UserError, match=r"load_checkpoint: .*start.run: .*say --promote-anyway"):
        run_footprint(file, console=quiet())
    with pytest.raises(UserError, match="nowhere"):
        run_footprint(file, ["model.connector.load_checkpoint=nowhere"], console=quiet())
    assert not (tmp_path / "study").exists()


# ---------------------------------------------------------------------------------------------------------------
# For real


def wait_for(what: Callable[[], bool], study: subprocess.Popen[bytes] | None = None) -> None:
    """However long it takes; an error once the study has ended without it."""
    while True:
        ended = study is not None and study.poll() is not None
        if what():
            return
        assert not ended, "the study ended before"
        time.sleep(0.02)


def has_ended(run: Path) -> bool:
    """By its own record, the last thing that a run writes: pages are still drawn after evidence.json."""
    record = read_json(run / "run.json")
    return record is not None and record.get("status") == Status.SUCCEEDED


def finished(folder: Path) -> dict[str, int]:
    """Run that has ended -> when its evidence was written."""
    return {p.parent.name: p.stat().st_mtime_ns for p in folder.glob("*/evidence.json") if has_ended(p.parent)}


def steps(folder: Path) -> list[int]:
    file = folder / "metrics.jsonl"
    lines = [] if not file.is_file() else [x for x in file.read_bytes().split(b"\n")[:-1] if x]
    return [r["step"] for r in map(json.loads, lines) if "loss" in r]


@pytest.mark.timeout(7200)  # a dozen processes, each of which loads torch: minutes, and far more on a busy machine
@pytest.mark.slow
def test_a_study_killed_between_two_runs_and_in_the_middle_of_one_goes_on_and_repeats_nothing(
    write_study: WriteStudy, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    footprint = {**TINY, "select": ["A0", "A1", "B1", "similar", "grown"], "parallel": 1,
                 "points": {"grown": {"like": "B1", "after": "A1"}}}  # fmt: skip
    file = write_study(
        tmp_path, footprint, started=True, **{"train.train_steps": STEPS, "train.save_every": 2, "train.log_every": 1}
    )
    folder = tmp_path / "study"

    def start() -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", COMMAND, str(file)]
        study = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        request.addfinalizer(lambda: (study.kill(), study.wait()))  # a test that fails leaves nothing running
        return study

    def caught(number: signal.Signals, names: list[str]) -> tuple[str, int]:
        """The first of the runs that the signal to the study met in the middle of training, and how the study ended.

        A run may have trained to its end before the signal is there; then the next one is tried.
        """
        for name in names:
            study = start()
            wait_for(lambda name=name: len(steps(folder / name)) > 4 or has_ended(folder / name), study)
            study.send_signal(number)
            code = study.wait()
            wait_for(lambda name=name: not is_held(folder / name))  # a run whose study was killed saves and ends
            if 4 < len(steps(folder / name)) < STEPS and not has_ended(folder / name):
                return name, code
        raise AssertionError(f"{names}: all had trained to their end before the signal met them")

    first = start()  # killed between two runs: one has ended, no other one has
    wait_for(lambda: "A0" in finished(folder), first)
    first.kill()
    first.wait()
    between = finished(folder)
    assert list(between) == ["A0"]
    killed, _ = caught(signal.SIGKILL, ["A1", "B1"])
    told, code = caught(signal.SIGINT, {"A1": ["B1", "similar", "grown"], "B1": ["similar", "grown"]}[killed])
    stopped = FootprintRecord.load(folder)
    before = finished(folder)

    result = run_footprint(file, console=(console := quiet()), promote_anyway=True)

    assert code == 130 and {r.name: r.status for r in stopped.rows}[told] == "interrupted"
    assert "not finished" in stopped.warnings[0]
    assert between["A0"] == before["A0"] and {k: finished(folder)[k] for k in before} == before
    assert result.exit_code == 0 and [r.status for r in result.record.rows] == ["finished"] * 5
    for name in ("A1", "B1", "similar", "grown"):
        assert steps(folder / name) == list(range(1, STEPS + 1)), name
    assert steps(folder / "A0") == [1]
    for name in (killed, told):
        assert "[resume]" in (folder / "logs" / f"{name}.log").read_text(encoding="utf-8")
    assert isinstance(console.file, io.StringIO)
    assert f"{5 - len(before)} of 5 runs to go: " in console.file.getvalue()

    record = result.record
    base, adapted = (load_evidence(folder / name) for name in ("A0", "A1"))
    lost = [e.get("retention.loss").value for e in (adapted, base)]  # type: ignore[union-attr]
    assert record.point("A1").at[KEPT.measure].value == pytest.approx(lost[0] / lost[1])
    assert record.point("A0").at[KEPT.measure].value == 1.0
    assert record.point("A0").learns == 0 and record.point("A1").learns == record.point("A1").planned
    assert base.get("retention.loss_ratio") is not None and base.get("retention.loss_ratio").value == 1.0  # type: ignore[union-attr]
    chosen = load_config(folder / "similar" / "config.yaml").model.lora.llm_layers
    known = json.loads((folder / "similarity.json").read_text())["similarity"]
    assert chosen == (min(range(len(known)), key=lambda k: known[k]),)
    assert load_config(folder / "grown" / "config.yaml").model.connector.load_checkpoint == str(folder / "A1")
    line = {m.name: m for m in adapted.measurements if m.stratum == "0.5" and m.by == "strength"}
    ends = sorted([base.get("eval.loss").value, adapted.get("eval.loss").value])  # type: ignore[union-attr]
    assert ends[0] - 0.1 < line["strength.loss"].value < ends[1] + 0.1 and "strength.text_ratio" in line
    assert (folder / "footprint.html").is_file() and (folder / "footprint.md").is_file()
    assert "model.lora.vit_layers" in str(compare_runs([folder / "A1", folder / "B1"]).settings)

    again = run_footprint(file, console=(console := quiet()), promote_anyway=True)
    assert isinstance(console.file, io.StringIO) and "5 of 5 runs are finished already" in console.file.getvalue()
    assert again.record.rows == record.rows and again.record.choice == record.choice


@pytest.mark.slow
def test_a_run_that_fails_is_named_those_that_need_it_are_not_run_and_the_others_go_on(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    footprint = {**TINY, "select": ["A1", "bad", "next"], "leave_out": ["A0"], "points": {
        "bad": {"like": "A1", "set": {"model.vision.feature_layer": -99}}, "next": {"like": "A1", "after": "bad"},
    }}  # fmt: skip
    file = write_study(tmp_path, footprint, started=True, **{"train.train_steps": 2})

    result = run_footprint(file, console=quiet(), promote_anyway=True)

    assert result.exit_code == 1
    assert {r.name: r.status for r in result.record.rows} == {"A1": "finished", "bad": "failed", "next": "failed"}
    assert next(r for r in result.record.rows if r.name == "next").reason == "it needs bad, which failed"
    assert RANK not in result.record.rows[0].settings
    assert not result.record.limits and "A0's loss on plain text was not measured" in explanation(result.record)


@pytest.mark.slow
def test_layers_are_chosen_on_the_very_checkpoint_that_is_started_from(write_study: WriteStudy, tmp_path: Path) -> None:
    file = write_study(tmp_path, {**TINY, "select": ["similar"]}, started=True)
    run = tmp_path / "start" / "run"
    latest = resolve_checkpoint(run)

    study = plan_footprint(file, [f"model.connector.load_checkpoint={latest}"])
    assert study.pending == 1
    measure_similarity(study)

    found = json.loads((tmp_path / "study" / "similarity.json").read_text())
    assert (found["folder"], f"step_{found['step']}") == (str(run), latest.name)
    after = plan_footprint(file, [f"model.connector.load_checkpoint={latest}"])
    assert after.pending == 0 and [r.name for r in after.points.runs] == ["A0", "similar"]
    assert plan_footprint(file).pending == 0  # the run folder means the same checkpoint


@pytest.mark.slow
def test_a_native_model_is_studied_as_a_joined_one_is(tmp_path: Path) -> None:
    source = colour_source(tmp_path / "data", "jsonl", 48, dialogues=True)
    start: dict[str, Any] = {
        "run_name": "start", "stage": "instruct", "output_dir": str(tmp_path / "start"), "device": "cpu",
        "model": {
            "native": {"name_or_path": str(tiny_native(tmp_path / "native")), "precision": "fp32"},
            "lora": {"enable": True, "r": 4},
        },
        "data": {"json_path": source.json_path, "image_root": source.image_root, "eval_size": 10},
        "train": {
            "train_steps": 4, "micro_batch_size": 4, "precision": "fp32", "num_threads": 1,
            "lr": {"lora": 1e-2}, "full_eval_every": 2,
        },
        "eval": {"golden_size": 0, "caption_samples": 4, "answer_tokens": 4, "audit_turns": 0},
        "ablation": {"num_samples": 6},
    }  # fmt: skip
    run_stage(parse_config(yaml.safe_dump(start), "start"))
    study = {
        **start, "run_name": "study", "output_dir": str(tmp_path / "study"),
        "footprint": {"select": ["A0", "A1", "C1"], "vision_blocks": [0, 2]},
        "model": {
            "native": start["model"]["native"], "connector": {"load_checkpoint": str(tmp_path / "start")},
            "lora": {
                "enable": True, "adapters": "merge", "r": 4,
                "vit_target_modules": ["all-linear"], "vit_layers": "last-2",
            },
        },
        "train": {**start["train"], "lr": {"lora": 1e-2, "vision": 1e-2}},
    }  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")

    record = run_footprint(path, promote_anyway=True, console=quiet()).record

    assert {r.name: r.status for r in record.rows} == dict.fromkeys(("A0", "A1", "C1"), "finished")
    learned = {r.name: load_evidence(tmp_path / "study" / r.name) for r in record.rows}
    assert not any(a.params for a in learned["A0"].adapters if a.name.startswith("model.visual."))
    layers = {a.name.split(".")[3] for a in learned["A1"].adapters}
    assert layers == {"2", "3"}  # of four
    blocks = {a.name.split(".")[3] for a in learned["C1"].adapters if a.name.startswith("model.visual.")}
    assert blocks == {"1", "2"}  # of three
    for evidence in learned.values():
        assert all(r.intact for r in evidence.trainable if r.part in ("vision", "language"))
