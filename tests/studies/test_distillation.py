"""A distillation study judged, told, planned, refused by name, and, slowly, run for real: killed and continued."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from tests.conftest import TinyParts, make_config
from tests.studies.test_footprint import steps

from beholder.config import DistillationConfig, TeacherConfig
from beholder.config.file import dump_config, load_config
from beholder.evidence import Evidence, Measurement
from beholder.evidence.record import Cost, DataFacts, TrainableRow
from beholder.prepare.tiny import COLOURS, SHAPES
from beholder.stages import run_stage
from beholder.store.teachers import seconds_a_token
from beholder.studies.distillation import (
    arm_settings,
    cache_cost,
    facts_of_run,
    plan_distillation,
    run_distillation,
    teacher_facts,
)
from beholder.studies.distillation_page import print_distillation, render_distillation, render_html, render_markdown
from beholder.studies.distillation_record import (
    ACCURACY,
    LOSS,
    DistillationRecord,
    DistillationRow,
    Longer,
    TeacherFacts,
    answer,
    compact,
    conclude,
    distillation_csv,
    mean_of,
    sizes,
    t975,
)
from beholder.studies.points import needs
from beholder.types import Status, UserError

# ---------------------------------------------------------------------------------------------------------------
# What the rows say


def measured(name: str, value: float, **also: Any) -> Measurement:
    return Measurement(
        name=name, value=value, unit="x", better="none", n=500, ci95=(value - 0.03, value + 0.03), **also
    )


def row(arm: str, seed: int, right: float, loss: float, **also: Any) -> DistillationRow:
    kinds = [
        ("question", "shape", right - 0.1),
        ("question", "yes/no", right + 0.05),
        ("answer", "other", right - 0.08),
    ]
    known: dict[str, Any] = {
        "teaching": "none" if arm in ("alone", "longer") else "online" if arm == "online" else "kept", "steps": 300,
        "step_s": 0.5, "epochs": 3.0, "settings": {},
    }  # fmt: skip
    known |= {"cache_s": 60.0} if known["teaching"] == "kept" else {}
    return DistillationRow(
        name=f"{arm}_s{seed}", arm=arm, seed=seed, folder=f"{arm}_s{seed}", config_hash="0" * 64, status="finished",
        measured={
            ACCURACY: measured(ACCURACY, right), LOSS: measured(LOSS, loss),
            "answer.gain.none": measured("answer.gain.none", right - 0.5),
            "teacher.kl": measured("teacher.kl", 0.4 if arm == "kd" else 0.9),
        },
        by_kind=tuple(measured(ACCURACY, value, stratum=s, by=by) for by, s, value in kinds),
        params=37_200_000, learns=23_000_000, device="cpu", **(known | also),
    )  # fmt: skip


KD = [(0.90, 0.40), (0.92, 0.39), (0.91, 0.41)]
ALONE = [(0.85, 0.45), (0.88, 0.40), (0.86, 0.43)]
LONGER = [(0.905, 0.38), (0.915, 0.36), (0.912, 0.37)]


def record(seeds: int = 3, **changes: Any) -> DistillationRecord:
    rows = [
        row(arm, seed, *found[seed], **({"steps": 420} if arm == "longer" else {}))
        for seed in range(seeds) for arm, found in (("kd", KD), ("alone", ALONE), ("longer", LONGER))
    ]  # fmt: skip
    teacher = TeacherFacts(
        name="runs/teacher", params=162_000_000, measured={ACCURACY: measured(ACCURACY, 0.99)},
        by_kind=(measured(ACCURACY, 0.98, stratum="shape", by="question"),),
    )  # fmt: skip
    known: dict[str, Any] = {
        "name": "study", "created": "2026-01-01T00:00:00Z", "seeds": list(range(seeds)), "rows": rows,
        "teachers": (teacher,),
        "longer": Longer(steps=420, alike="0" * 64, cache_s=60.0, kd_s=150.0, step_s=0.5),
    }  # fmt: skip
    return conclude(DistillationRecord(**(known | changes)))


def test_intervals_over_seeds_are_students() -> None:
    assert [round(t975(n), 3) for n in (1, 2, 9, 30, 40, 120)] == [12.706, 4.303, 2.262, 2.042, 2.021, 1.980]
    mean = mean_of([1.0, 2.0, 3.0])
    assert (mean.value, mean.n) == (2.0, 3)
    assert mean.high == pytest.approx(2 + 4.3027 / 3**0.5) and mean.low == pytest.approx(2 - 4.3027 / 3**0.5)
    assert mean_of([1.0]).low is None


def test_intervals_of_shares_stay_within_0_and_1_and_hold_the_mean() -> None:
    wide = mean_of([0.99, 0.999, 0.96], within=True)
    plain = mean_of([0.99, 0.999, 0.96])
    assert plain.high is not None and plain.high > 1
    assert wide.low is not None and wide.high is not None and 0 < wide.low < wide.value == plain.value < wide.high < 1
    other = mean_of([0.01, 0.001, 0.04], within=True)
    assert (other.low, other.high) == pytest.approx((1 - wide.high, 1 - wide.low))
    narrow, same = mean_of([0.50, 0.51, 0.49], within=True), mean_of([0.50, 0.51, 0.49])
    assert (narrow.low, narrow.high) == pytest.approx((same.low, same.high), abs=1e-3)  # far from the ends: as before
    assert mean_of([1.0, 1.0], within=True).high == 1.0 and mean_of([0.0, 0.0], within=True).low == 0.0
    hard = mean_of([0.0, 1.0], within=True)
    assert hard.low is not None and hard.high is not None and 0 <= hard.low < 0.5 < hard.high <= 1


def test_no_share_of_a_page_leaves_0_to_100_percent() -> None:
    rows = [row("kd", seed, right, 0.4) for seed, right in enumerate((0.94, 0.949, 0.91))]
    for arm in record(rows=rows).arms:  # yes/no questions: 99, 99.9 and 96 %
        for mean in [arm.at[ACCURACY], *arm.by_kind.values()]:
            assert mean.low is not None and mean.high is not None and 0 <= mean.low <= mean.high <= 1


def test_arms_are_compared_seed_by_seed_at_equal_steps_and_at_equal_time() -> None:
    found = {(d.basis, d.measure): d for d in record().differences if d.arm == "kd" and not d.kind}
    steps = found["equal steps", ACCURACY]

    assert steps.against == "alone" and steps.by_seed == pytest.approx({0: 0.05, 1: 0.04, 2: 0.05})
    assert steps.mean.value == pytest.approx(0.14 / 3) and steps.said == "helps"
    assert found["equal time", ACCURACY].against == "longer"
    assert found["equal time", ACCURACY].by_seed == pytest.approx({0: -0.005, 1: 0.005, 2: -0.002})


def test_a_verdict_is_helps_does_not_help_or_cannot_be_told_by_the_interval() -> None:
    told = record()

    assert {(v.measure, v.basis): v.said for v in told.verdicts} == {
        (ACCURACY, "equal steps"): "helps", (LOSS, "equal steps"): "cannot be told",
        (ACCURACY, "equal time"): "cannot be told", (LOSS, "equal time"): "does not help",
    }  # fmt: skip
    assert "+4.7 points" in told.verdict(ACCURACY, "equal steps").why
    assert "none of the interval is on the better side" in told.verdict(LOSS, "equal time").why
    assert answer(told) == "At equal steps the teacher helps, at equal time it cannot be told (by answers right)"
    assert {d.said for d in told.differences if d.measure == "teacher.kl"} == {None}


def test_one_seed_tells_nothing_and_an_arm_that_is_missing_is_named() -> None:
    one = record(seeds=1)
    assert {v.said for v in one.verdicts} == {"cannot be told"}
    assert "needs two for an interval" in one.verdict(ACCURACY, "equal steps").why
    without = record(rows=[r for r in record().rows if r.arm != "longer"])
    assert without.verdict(LOSS, "equal time").why == "the arm longer was not run"
    unfinished = [r.model_copy(update={"status": "waiting"}) if r.arm == "alone" else r for r in record().rows]
    assert "no seed has a finished run of both" in record(rows=unfinished).verdict(LOSS, "equal steps").why
    same = [row(arm, seed, 0.9, 0.4) for seed in range(3) for arm in ("kd", "alone")]
    assert record(rows=same).verdict(ACCURACY, "equal steps").said == "does not help"


def test_only_runs_of_as_many_steps_are_compared_at_equal_steps() -> None:
    rows = [*record().rows, *(row("short", seed, 0.8, 0.5, steps=100) for seed in range(3))]
    stopped = [r.model_copy(update={"steps": 10}) if r.name == "kd_s1" else r for r in rows]
    found = record(rows=stopped).differences

    assert not [d for d in found if d.arm == "short"]
    assert [sorted(d.by_seed) for d in found if (d.arm, d.basis, d.measure) == ("kd", "equal steps", LOSS)] == [[0, 2]]


def test_the_cost_of_what_is_kept_counts() -> None:
    rows = {r.name: r for r in record().rows}

    assert rows["kd_s0"].total_s == 300 * 0.5 + 60 and rows["longer_s0"].total_s == 420 * 0.5
    assert rows["alone_s0"].total_s == 150
    assert rows["kd_s0"].model_copy(update={"cache_s": None}).total_s is None


def test_distances_from_the_teacher_that_are_told_otherwise_do_not_compare() -> None:
    asked = [row("online", seed, *KD[seed], kl_of="all ids") for seed in range(3)]
    told = record(rows=[*record().rows, *asked])

    assert {d.arm for d in told.differences if d.measure == "teacher.kl"} == {"kd"}
    assert "KL to its teacher does not compare" in render_markdown(told)


def test_when_keeping_has_paid_for_itself() -> None:
    online = [row("online", seed, *KD[seed], step_s=0.9, settings={"distill.online": True}) for seed in range(3)]
    (found,) = record(rows=[*record().rows, *online]).break_even

    assert (found.kept, found.online, found.faster) == ("kd", "online", pytest.approx(1.8))
    assert found.epochs == pytest.approx(60 / (0.4 * 100))
    assert found.faster_in_all == pytest.approx(0.9 * 300 / (150 + 60))
    slow = [r.model_copy(update={"step_s": 0.4}) for r in online]
    assert record(rows=[*record().rows, *slow]).break_even[0].epochs is None
    other = [r.model_copy(update={"settings": {"distill.online": True, "distill.alpha": 0.9}}) for r in online]
    assert not record(rows=[*record().rows, *other]).break_even


def test_sizes_are_told() -> None:
    assert sizes(record()) == "a 37M student of a 162M teacher"
    assert [compact(n) for n in (999, 1_240, 85_000, 1_500_000, 7_600_000_000)] == [
        "999",
        "1.2K",
        "85K",
        "1.5M",
        "7.6B",
    ]
    assert "of a teacher of unknown size" in sizes(record(teachers=(TeacherFacts(name="x/y", note="no run"),)))


def test_the_pages_say_the_same_and_survive_hostile_names(tmp_path: Path) -> None:
    hostile = TeacherFacts(name="<script>alert(1)</script>", note="not a run of Beholder")
    told = record(teachers=(record().teachers[0], hostile), warnings=("kd_s9 failed: <b>",))
    page, twin = render_html(told), render_markdown(told)

    assert "<script>" not in page and "<script>" not in twin and "<b>failed" not in page
    for text in (page, twin):
        assert "+4.7 points" in text and "does not help" in text and "a 37M student of a 162M teacher" in text
        assert "420 steps without a teacher" in text and "question: shape" in text and "98.0 %" in text
    assert page.count('class="strip') == len([d for d in told.differences if not d.kind])
    console = Console(file=io.StringIO(), width=160)
    print_distillation(told, console)
    assert isinstance(console.file, io.StringIO)
    assert "at equal time, held-out loss: does not help" in console.file.getvalue()
    (tmp_path / "distillation.json").write_text(json.dumps(told.model_dump(mode="json")), encoding="utf-8")
    html, _ = render_distillation(tmp_path, tmp_path)
    assert html.read_text(encoding="utf-8") == page
    assert render_html(record(rows=[], teachers=()))  # nothing has been run yet


def test_the_table_has_every_run_in_full_precision() -> None:
    rows = list(csv.DictReader(io.StringIO(distillation_csv(record()))))

    assert len(rows) == 9 and float(rows[0][ACCURACY]) == 0.90 and float(rows[0]["total_s"]) == 210.0
    assert float(rows[0][f"{ACCURACY} question: shape"]) == pytest.approx(0.80)


# ---------------------------------------------------------------------------------------------------------------
# The plan


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arms": {"kd": {"seed": 1}}}, "arms has 'kd', which every study has"),
        ({"arms": {"a/b": {"distill.alpha": 0.5}}}, "a name is part of a path"),
        ({"arms": {"caches": {"distill.alpha": 0.5}}}, "arms has 'caches', which is a folder that every study has"),
        ({"arms": {"x": {}}}, "arms x sets nothing"),
        ({"seeds": (1, 1)}, "seeds has a number twice"),
    ],
)
def test_a_study_that_cannot_be_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**given)


def test_an_arm_of_ones_own_counts_more_than_what_the_base_says_beside_it() -> None:
    soft = arm_settings({"distill.preset": "soft"})
    assert soft["distill.alpha"] == 0.2 and soft["distill.temperature"] == 3.0 and soft["distill.alpha_end"] is None
    assert arm_settings({"distill.preset": "progressive", "distill.alpha": 0.6})["distill.alpha"] == 0.6
    assert arm_settings({"distill.online": True})["distill.k"] == 64
    assert arm_settings({"distill.online": True})["distill.dir"] is None
    assert arm_settings({"distill.form": "sampled"}) == {
        "distill.k": 64, "distill.draws": 12, "distill.form": "sampled"
    }  # fmt: skip


def questions(parts: TinyParts, folder: Path) -> Path:
    rows = []
    for i, r in enumerate(map(json.loads, parts.records.read_text(encoding="utf-8").splitlines())):
        words = r["caption"].split()
        asked, known, kind = [
            ("what shape is it?", {*SHAPES, *SHAPES.values()}, "shape"), ("what color is it?", COLOURS, "color"),
        ][i % 2]  # fmt: skip
        said = next(w for w in words if w in known)
        turns = [{"role": "user", "content": f"<image>\n{asked}"}, {"role": "assistant", "content": said}]
        rows.append(json.dumps({"id": r["id"], "images": r["images"], "messages": turns, "question_type": kind}))
    file = folder / "questions.jsonl"
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


FEW = {
    "stage": "instruct", "model.lora.enable": True, "model.lora.r": 4, "model.lora.dropout": 0.0, "train.lr.lora": 1e-2,
    "prompting.max_images_per_sample": 1, "eval.golden_size": 0, "eval.caption_samples": 40, "eval.answer_tokens": 4,
    "data.eval_size": 40,
    "eval.audit_turns": 0, "ablation.num_samples": 4,
}  # fmt: skip

WriteStudy = Callable[..., Path]


@pytest.fixture
def write_study(tiny_parts: TinyParts, monkeypatch: pytest.MonkeyPatch) -> WriteStudy:
    """``write_study(folder, distillation, **settings)``: the path of a config whose study folder is ``folder/study``,
    of the teacher ``folder/teacher/run``, which is made with ``taught=True``."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def write(folder: Path, distillation: dict[str, Any] | None, *, taught: bool = False, **sets: Any) -> Path:
        data = {"data.json_path": str(questions(tiny_parts, folder))}
        if taught:
            run_stage(make_config(tiny_parts, folder / "teacher", **FEW, **data))
        own = {
            "stage": "distill", "distill.teachers": [{"run": str(folder / "teacher" / "run")}], "distill.k": 8,
            "distill.dir": str(folder / "kept"),
        }  # fmt: skip
        dumped = dump_config(make_config(tiny_parts, folder, **(FEW | data | own | sets)))
        raw = yaml.safe_load(re.sub(r"\b(\d)e-", r"\1.0e-", dumped))  # PyYAML alone takes 5e-05 for text
        raw |= {"run_name": "study", "output_dir": str(folder / "study")}
        raw |= {} if distillation is None else {"distillation": distillation}
        file = folder / "study.yaml"
        file.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
        return file

    return write


def test_every_arm_waits_for_what_is_kept_and_no_run_without_a_teacher_learns_from_one(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    arms = {"soft": {"distill.preset": "soft"}, "asked": {"distill.online": True}}
    study = plan_distillation(write_study(tmp_path, {"seeds": [1, 2], "arms": arms}), ["seed=5"])
    runs = {r.name: r for r in study.points.runs}

    assert list(runs) == [
        f"{before}{arm}_s{seed}" for seed in (1, 2)
        for before, arm in (
            ("caches/", "kd"), ("", "kd"), ("", "alone"), ("caches/", "soft"), ("", "soft"), ("", "asked"),
        )
    ]  # fmt: skip
    assert {r.cfg.measure_seed for r in runs.values()} == {5}
    assert not runs["alone_s1"].cfg.learnt_from.taught and runs["kd_s1"].cfg.learnt_from.alpha == 0.3
    assert runs["soft_s1"].cfg.learnt_from.temperature == 3.0 and runs["asked_s2"].cfg.learnt_from.online
    waits = {
        name: [r.name for r in needs(run, study.points.runs)] for name, run in runs.items() if run.command == "run"
    }
    assert waits["kd_s1"] == waits["alone_s1"] == ["caches/kd_s1"] and waits["soft_s2"] == ["caches/soft_s2"]
    assert waits["asked_s1"] == [] and study.longer is None
    assert not (tmp_path / "study").exists(), "planning writes nothing"


@pytest.mark.parametrize(
    ("distillation", "sets", "message"),
    [
        (None, [], "has no distillation: section"),
        ({}, ["distill.alpha=0"], "no teacher has a say"),
        ({"arms": {"x": {"distill.alhpa": 0.5}}}, [], "arms.x: no setting 'distill.alhpa'; nearest: distill.alpha"),
        ({"arms": {"x": {"seed": 3}}}, [], "arms.x sets seed; arms must be measured on the same"),
        ({"arms": {"x": {"eval.caption_samples": 3}}}, [], "arms.x sets eval.caption_samples; arms must be"),
        ({"arms": {"x": {"distill.alpha": 1.5}}}, [], "(?s)cannot be run:.*x_s0: .*alpha"),
    ],
)
def test_what_cannot_be_is_told_before_anything_runs(
    write_study: WriteStudy, tmp_path: Path, distillation: dict[str, Any] | None, sets: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan_distillation(write_study(tmp_path, distillation), sets)
    assert not (tmp_path / "study").exists()


def test_a_teacher_that_is_not_there_is_told_before_anything_runs(write_study: WriteStudy, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distill.teachers: the run .*teacher/run: there is no checkpoint at"):
        run_distillation(write_study(tmp_path, {}), promote_anyway=True)
    assert not (tmp_path / "study").exists()


def test_a_run_of_a_config_that_holds_the_study_says_which_command_it_needs(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="holds a distillation; run it with: beholder distill CONFIG"):
        run_stage(load_config(write_study(tmp_path, {})))


def evidence(steps: int, step_s: float, held_out: str = "a" * 64) -> Evidence:
    return Evidence(
        run_name="x", stage="distill", status=Status.SUCCEEDED, created="2026-01-01T00:00:00Z", config_yaml="",
        trainable=[TrainableRow(part="language", params=1000, trainable=10, dtype="fp32")],
        data=DataFacts(records=1, train=1, eval=1, held_out_sha256=held_out),
        measurements=[measured(ACCURACY, 0.7), measured(ACCURACY, 0.6, stratum="shape", by="question")],
        cost=Cost(steps=steps, step_s=step_s),
    )  # fmt: skip


def test_the_longer_arm_takes_the_time_of_the_steps_and_of_what_is_kept_and_a_resume_decides_the_same(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    epochs = {"train.train_steps": None, "train.num_epochs": 5}
    file = write_study(tmp_path, {"seeds": [1, 2]}, **epochs)
    runs = {r.name: r for r in plan_distillation(file).points.runs}
    assert cache_cost(tmp_path / "study", runs["kd_s1"]) is None
    for name, step_s in (("kd_s1", 0.5), ("alone_s1", 0.25)):
        folder = runs[name].folder
        folder.mkdir(parents=True)
        (folder / "evidence.json").write_text(evidence(4, step_s).to_json(), encoding="utf-8")
        (folder / "run.json").write_text(json.dumps({"status": "succeeded", "config_hash": runs[name].hash}))
    assert plan_distillation(file).longer is None  # what is kept has cost nobody knows what

    (kept := tmp_path / "kept" / "some").mkdir(parents=True)
    (kept / "costs.jsonl").write_text('{"tokens": 10, "seconds": 1.0}\n{"tokens": 30, "seconds": 3.0}\n{"tok')
    (caches := tmp_path / "study" / "caches" / "kd_s1").mkdir(parents=True)
    (caches / "teachers.json").write_text(json.dumps([{"train_tokens": 50, "folder": str(kept)}]))
    assert seconds_a_token(kept) == pytest.approx(0.1)
    study = plan_distillation(file)
    assert study.longer is not None and study.longer.steps == round((4 * 0.5 + 5.0) / 0.25) == 28
    runs = {r.name: r for r in study.points.runs}
    assert {runs[f"longer_s{seed}"].cfg.train.train_steps for seed in (1, 2)} == {28}
    assert not runs["longer_s2"].cfg.learnt_from.taught
    assert "longer_s1" not in {r.name for r in plan_distillation(file, ["distillation.longer=false"]).points.runs}

    (tmp_path / "study" / "longer.json").write_text(json.dumps(study.longer.model_dump(mode="json")))
    (kept / "costs.jsonl").write_text('{"tokens": 1, "seconds": 100.0}\n')  # asked again, of other samples
    assert plan_distillation(file).longer == study.longer
    (tmp_path / "study" / "longer.json").unlink()
    (kept / "costs.jsonl").write_text('{"tokens": 1000, "seconds": 0.001}\n')
    for name, step_s in (("kd_s1", 0.2), ("alone_s1", 0.3)):  # on a machine that was busy
        (plan_distillation(file).points.folder / name / "evidence.json").write_text(evidence(4, step_s).to_json())
    quick = plan_distillation(file).longer
    assert quick is not None and quick.steps == 4
    (tmp_path / "study" / "longer.json").write_text(json.dumps(study.longer.model_dump(mode="json")))
    more = plan_distillation(file, ["distillation.seeds=[0, 1, 2]"])  # and so do more seeds
    assert more.longer == study.longer and "longer_s0" in {r.name for r in more.points.runs}


def test_a_teachers_figures_stand_beside_and_other_samples_are_told(tmp_path: Path) -> None:
    student = tmp_path, evidence(4, 0.5)
    same = facts_of_run("t", tmp_path, evidence(9, 0.5), student)
    assert same.params == 1000 and not same.note and same.measured[ACCURACY].value == 0.7
    assert [m.stratum for m in same.by_kind] == ["shape"]
    assert "other held-out samples" in facts_of_run("t", tmp_path, evidence(9, 0.5, "b" * 64), student).note
    assert "is not known whether" in facts_of_run("t", tmp_path, evidence(9, 0.5, ""), student).note
    assert "cannot be read" in teacher_facts(TeacherConfig(run=str(tmp_path / "none")), None).note
    assert "not a run of Beholder" in teacher_facts(TeacherConfig(native="a/b"), None).note


# ---------------------------------------------------------------------------------------------------------------
# For real


COMMAND = "import sys; from beholder.studies.distillation import run_distillation as run; "
COMMAND += "sys.exit(run(sys.argv[1], promote_anyway=True).exit_code)"
STEPS = 40


@pytest.mark.timeout(7200)  # a dozen processes, each of which loads torch: minutes, and far more on a busy machine
@pytest.mark.slow
def test_a_study_killed_in_the_middle_goes_on_asks_no_teacher_twice_and_answers(
    write_study: WriteStudy, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    file = write_study(
        tmp_path, {"seeds": [1, 2], "arms": {"asked": {"distill.online": True}}}, taught=True,
        **{"train.train_steps": STEPS, "train.save_every": 2, "train.log_every": 1},
    )  # fmt: skip
    folder = tmp_path / "study"
    study = subprocess.Popen([sys.executable, "-c", COMMAND, str(file)], stdout=subprocess.DEVNULL, env=os.environ)
    request.addfinalizer(lambda: (study.kill(), study.wait()))  # a test that fails leaves nothing running
    while len(steps(folder / "kd_s1")) <= 4:
        assert study.poll() is None, "the study ended before"
        time.sleep(0.02)
    study.send_signal(signal.SIGKILL)
    study.wait()
    (cost,) = (tmp_path / "kept").glob("*/costs.jsonl")
    made = cost.read_bytes()

    result = run_distillation(file, console=(console := Console(file=io.StringIO(), width=200)), promote_anyway=True)

    assert isinstance(console.file, io.StringIO)
    assert result.exit_code == 0, console.file.getvalue()
    assert "[resume]" in (folder / "logs" / "kd_s1.log").read_text(encoding="utf-8")
    for name in ("kd_s1", "alone_s1", "asked_s1", "kd_s2", "alone_s2", "asked_s2"):
        assert steps(folder / name) == list(range(1, STEPS + 1)), name
    assert cost.read_bytes() == made, "a teacher was asked twice"  # both seeds see every sample
    record = result.record
    assert record.longer is not None and steps(folder / "longer_s2")[-1] == record.longer.steps
    assert "planned now: longer_s1, longer_s2" in console.file.getvalue()
    assert [a.name for a in record.arms] == ["kd", "alone", "longer", "asked"]
    assert all(len(a.runs) == 2 and LOSS in a.at and "teacher.kl" in a.at for a in record.arms)
    assert record.arms[0].by_kind and record.arms[0].cache_s and record.arms[1].cache_s is None
    assert record.teachers[0].params and not record.teachers[0].note and ACCURACY in record.teachers[0].measured
    assert record.break_even[0].kept == "kd" and not record.warnings
    assert (folder / "distillation.html").is_file() and (folder / "distillation.csv").is_file()

    again = run_distillation(file, console=(console := Console(file=io.StringIO(), width=200)), promote_anyway=True)
    assert isinstance(console.file, io.StringIO) and "8 of 8 runs are finished already" in console.file.getvalue()
    assert again.record.rows == record.rows and again.record.verdicts == record.verdicts
