"""A run that is watched: an over-trained one is stopped by the right guardrail, early; a healthy one is not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.conftest import TinyParts, make_config
from tests.stages.dying import dying_at

from beholder.cli import app
from beholder.config import MONITORS, WATCHED, RunConfig, settings
from beholder.config.file import dump_config
from beholder.config.stages import GUARDRAILS
from beholder.evidence import load_evidence
from beholder.evidence.catalogue import quantity
from beholder.report import render
from beholder.runs import sha256_file
from beholder.stages import run_stage
from beholder.stages.guard import differences, first_reading
from beholder.stages.remeasure import evaluate_run
from beholder.types import Status, UserError

QUESTIONS = ("what shape is it?", "what color is it?")
PHRASE = "off"


class World:
    """Tiny parts, questions with one and the same answer, unlike images, and a run that has learned to say "off"."""

    def __init__(self, parts: TinyParts, folder: Path) -> None:
        self.parts, self.folder = parts, folder
        records = [json.loads(line) for line in parts.records.read_text(encoding="utf-8").splitlines()]
        for name, answers in {"off": [PHRASE], "over": ["box"]}.items():
            rows = [
                {"id": r["id"], "images": r["images"], "messages": [
                    {"role": "user", "content": f"<image>\n{QUESTIONS[i % 2]}"},
                    {"role": "assistant", "content": answers[i % len(answers)]},
                ]}
                for i, r in enumerate(records)
            ]  # fmt: skip
            text = "".join(json.dumps(r) + "\n" for r in rows)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        (folder / "objects.txt").write_text("square: box\ndisc: dot\ntriangle: tri\n", encoding="utf-8")
        (folder / "texts.txt").write_text("Water boils at a hundred degrees.\nOnce upon a time.\n", encoding="utf-8")
        (folder / "images").mkdir()
        unlike = []
        for k in range(6):
            image = Image.new("RGB", (40, 40), (40 * k, 255 - 40 * k, 90))
            image.putpixel((k, 3), (0, 0, 0))
            image.save(folder / "images" / f"{k}.png")
            unlike.append({"image": f"{k}.png", "shows": [f"shade {k}"], "kind": "shades" if k % 2 else "plain"})
        (folder / "ood.jsonl").write_text("".join(json.dumps(r) + "\n" for r in unlike), encoding="utf-8")
        run_stage(self.config(folder / "first", "off", load=None, **{
            "train.train_steps": 30, "train.save_every": 30, "train.lr.lora": 1e-2, "train.lr.connector": 1e-3,
            "eval.ood.path": None, "eval.irrelevant.path": None, "eval.gap_samples": 0,
            "guardrails": {},
        }), promote_anyway=True)  # fmt: skip

    def config(self, folder: Path, data: str, *, load: str | None = "first", **sets: Any) -> RunConfig:
        settings = {
            "stage": "instruct", "model.lora.enable": True, "model.lora.r": 4,
            "train.lr.lora": 2e-3, "train.lr.connector": 2e-4,
            "data.json_path": str(self.folder / f"{data}.jsonl"), "prompting.max_images_per_sample": 1,
            "model.connector.load_checkpoint": None if load is None else str(self.folder / load / "run"),
            "train.train_steps": 60, "train.save_every": 5, "train.lr_scheduler": "constant",
            "train.warmup_ratio": 0.0, "ablation.conditions": ["zero"],
            "eval.golden_size": 0, "eval.caption_samples": 0, "eval.audit_turns": 0,
            "eval.answer_tokens": 12, "ablation.num_samples": 4, "eval.object_list": str(self.folder / "objects.txt"),
            "eval.ood.path": str(self.folder / "ood.jsonl"), "eval.irrelevant.path": str(self.folder / "ood.jsonl"),
            "eval.irrelevant.phrase": PHRASE, "eval.gap_samples": 12,
            "eval.retention_path": str(self.folder / "texts.txt"),
            "guardrails.generalisation_gap.enable": False,
            "guardrails.caption_sanity.enable": False,
        }  # fmt: skip
        settings |= sets
        if settings["eval.ood.path"] is None:
            for name in (
                "guardrails.caption_sanity.enable",
                "guardrails.generalisation_gap.enable",
                "eval.irrelevant.phrase",
                "eval.answer_tokens",
            ):
                settings.pop(name)
        return make_config(self.parts, folder, **settings)


@pytest.fixture(scope="module")
def world(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tiny_parts, tmp_path_factory.mktemp("world"))


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def history(run: Path) -> list[tuple[int, dict[str, float]]]:
    return [(r["step"], r["monitors"]) for r in rows(run) if "monitors" in r]


def weights(run: Path) -> dict[str, str]:
    return {p.name: sha256_file(p / "adapter_model.safetensors") for p in (run / "checkpoints").glob("step_*")}


@pytest.fixture(scope="module")
def stopped(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted run: it learns to say "box" whatever it is shown."""
    folder = tmp_path_factory.mktemp("stopped")
    outcome = run_stage(world.config(folder, "over"), promote_anyway=True)
    assert outcome.status == Status.STOPPED_BY_GUARDRAIL, history(folder / "run")
    return folder / "run"


def test_an_over_trained_run_is_stopped_early_by_the_right_guardrail(stopped: Path) -> None:
    e = load_evidence(stopped)

    assert e.stopped is not None and e.stopped.name == "irrelevant_pass" and e.stopped.step <= 20
    course = history(stopped)
    assert course[0][0] == 0 and course[0][1]["irrelevant.pass"] == 1
    assert [s for s, _ in course] == list(range(0, e.stopped.step + 1, 5)), "every evaluation, and none after the stop"
    assert course[-1][1]["irrelevant.pass"] == e.stopped.value < 0.8
    assert max(r["step"] for r in rows(stopped) if "loss" in r) == e.stopped.step == e.cost.steps
    assert json.loads((stopped / "run.json").read_text())["stopped"] == e.stopped.sentence


def test_a_stopped_run_measures_its_constrained_best_and_says_so_on_top(stopped: Path) -> None:
    e = load_evidence(stopped)
    assert e.stopped is not None and e.status == Status.STOPPED_BY_GUARDRAIL and not e.promotable

    last = e.candidates[-1]
    assert last.step == e.stopped.step and last.monitors["irrelevant.pass"] == e.stopped.value
    assert last.refused.startswith(f"irrelevant.pass is {e.stopped.value:g}, below 0.9 ") and not last.best
    kept = [c for c in e.candidates if c.monitors["irrelevant.pass"] >= 0.9]
    assert kept and not any(c.refused for c in kept), "it said so at an evaluation before"
    best = min(kept, key=lambda c: c.eval_loss)
    assert last.eval_loss < best.eval_loss, "what was forgotten for it made the loss lower"
    assert best.best and e.step == best.step < e.stopped.step == e.cost.steps
    measured = e.get("irrelevant.pass")
    assert measured is not None and measured.value == best.monitors["irrelevant.pass"], "the best's, not the last's"
    assert (stopped / "checkpoints" / f"step_{best.step}").is_dir()
    for name in ("irrelevant.pass", "ood.hallucination", "ood.blind", "sane.captions", "gap.generalisation"):
        assert e.get(name) is not None and e.get_baseline(name) is not None, name
    assert {c.name for c in e.curves} >= {"irrelevant.pass", "ood.hallucination", "gap.generalisation"}
    for page in render(stopped, stopped):
        text = page.read_text(encoding="utf-8").replace("\\", "")  # Markdown's escapes
        assert "Stopped by its guardrail irrelevant_pass" in text
        assert text.index("Stopped by its guardrail") < text.index("Did it learn?")
    said = [json.loads(x) for x in (stopped / "qual" / f"step_{e.stopped.step}_ood.jsonl").read_text().splitlines()]
    assert len(said) == 6 and {"said", "shows", "hallucinated", "blind", "insane"} <= said[0].keys()


@pytest.mark.slow
def test_a_stopped_run_does_not_go_on_unless_its_guardrail_is_changed(
    world: World, stopped: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    before = rows(run)

    again = run_stage(world.config(tmp_path, "over"), promote_anyway=True)

    assert again.again and again.stopped == load_evidence(stopped).stopped.sentence  # type: ignore[union-attr]
    assert again.status == Status.STOPPED_BY_GUARDRAIL and rows(run) == before
    sets = {
        "guardrails.irrelevant_pass.enable": False, "guardrails.hallucination.enable": False,
        "guardrails.mine": {"measure": "irrelevant.pass", "below": 0.5, "times": 4},
    }  # fmt: skip
    on = run_stage(world.config(tmp_path, "over", **sets), promote_anyway=True)
    e = load_evidence(run)
    assert on.status == Status.STOPPED_BY_GUARDRAIL and e.stopped is not None and e.stopped.name == "mine"
    assert before[-1]["step"] < on.step < 60 and all(v["irrelevant.pass"] < 0.5 for _, v in history(run)[-4:])
    trained = [r for r in before if "loss" in r]
    assert [r for r in rows(run) if "loss" in r][: len(trained)] == trained, "it went on from where it had stopped"


KILLED = """
import os, signal, sys
from beholder.config.file import load_config
from beholder.stages import run_stage
from beholder.stages.watch import Watch

real, last = Watch.on_step, int(sys.argv[2])

def on_step(self, step, record):
    found = real(self, step, record)
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return found

Watch.on_step = on_step
run_stage(load_config(sys.argv[1]), promote_anyway=True)
"""
"""A process that is killed when the reading of a step is logged and nothing has followed from it yet."""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["before its reading", "after its reading", "SIGKILL"])
def test_dead_in_the_middle_it_is_stopped_at_the_same_step_bit_for_bit(
    world: World, stopped: Path, tmp_path: Path, how: str
) -> None:
    at = load_evidence(stopped).cost.steps
    cfg = world.config(tmp_path, "over")
    if how == "SIGKILL":
        config = tmp_path / "config.yaml"
        config.write_text(dump_config(cfg), encoding="utf-8")
        died = subprocess.run([sys.executable, "-c", KILLED, str(config), str(at)], capture_output=True, text=True)
        assert died.returncode == -signal.SIGKILL, died.stderr
    else:
        with dying_at(at, measured=how == "after its reading"):
            run_stage(cfg, promote_anyway=True)
    assert (history(tmp_path / "run")[-1][0] == at) is (how != "before its reading")

    outcome = run_stage(world.config(tmp_path, "over"), promote_anyway=True)

    assert outcome.status == Status.STOPPED_BY_GUARDRAIL and outcome.step == at
    assert history(tmp_path / "run") == history(stopped) and weights(tmp_path / "run") == weights(stopped)
    assert load_evidence(tmp_path / "run").stopped == load_evidence(stopped).stopped


@pytest.mark.slow
def test_a_run_whose_descriptions_become_all_alike_is_stopped_by_caption_sanity(world: World, tmp_path: Path) -> None:
    sets = {
        "eval.ood.prompt": QUESTIONS[0],  # at the start all are told to be irrelevant, which excuses likeness
        "guardrails.irrelevant_pass.enable": False, "guardrails.hallucination.enable": False,
        "guardrails.caption_sanity.enable": True,
    }  # fmt: skip

    outcome = run_stage(world.config(tmp_path, "over", **sets), promote_anyway=True)

    e, course = load_evidence(tmp_path / "run"), history(tmp_path / "run")
    assert outcome.status == Status.STOPPED_BY_GUARDRAIL and e.stopped is not None
    assert e.stopped.name == "caption_sanity" and e.stopped.told == "below 0.8 2 evaluations in a row"
    low = [v["sane.captions"] < 0.8 for _, v in course]
    assert not low[0] and low[-2:] == [True, True] and (True, True) not in pairwise(low[:-1])
    assert e.stopped.step == course[-1][0] < 60


@pytest.mark.slow
def test_a_run_that_learns_what_holds_for_its_training_samples_alone_is_stopped_by_the_gap(
    world: World, tmp_path: Path
) -> None:
    """Everything it is trained on is a box, and nothing that is held out."""
    for name, data, part in (("train", "over", slice(48)), ("test", "off", slice(48, None))):
        lines = (world.folder / f"{data}.jsonl").read_text(encoding="utf-8").splitlines()[part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    images = str(world.parts.images)
    sets = {
        "data.json_path": str(tmp_path / "train.jsonl"), "data.eval_size": None,
        "data.eval_sources": [{"json_path": str(tmp_path / "test.jsonl"), "image_root": images}],
        "eval.ood.path": None, "eval.irrelevant.path": None,
    }  # fmt: skip

    outcome = run_stage(world.config(tmp_path, "over", **sets), promote_anyway=True)

    e, course = load_evidence(tmp_path / "run"), [v["gap.generalisation"] for _, v in history(tmp_path / "run")]
    assert outcome.status == Status.STOPPED_BY_GUARDRAIL and e.stopped is not None
    assert e.stopped.name == "generalisation_gap" and e.stopped.step == history(tmp_path / "run")[-1][0] < 60
    assert course[-3] < course[-2] < course[-1] and course[-1] > min(course) + 0.06
    measured = e.get("gap.generalisation")
    assert measured is not None and measured.n == 12


@pytest.mark.slow
def test_dead_before_its_evidence_it_does_not_train_on(world: World, stopped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / "evidence.json").unlink()
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "status": "running", "stopped": None}))

    outcome = run_stage(world.config(tmp_path, "over"), promote_anyway=True)

    assert outcome.status == Status.STOPPED_BY_GUARDRAIL and history(run) == history(stopped)
    assert weights(run) == weights(stopped)


@pytest.mark.slow
def test_a_healthy_run_is_not_stopped_nor_after_it_died(world: World, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    sets = {"train.train_steps": 15, "train.lr.lora": 1e-3, "train.lr.connector": 1e-4}
    sets |= {f"guardrails.{name}.enable": True for name in GUARDRAILS}  # under all of them
    outcome = run_stage(world.config(straight, "off", **sets), promote_anyway=True)
    with dying_at(10):
        run_stage(world.config(killed, "off", **sets), promote_anyway=True)

    resumed = run_stage(world.config(killed, "off", **sets), promote_anyway=True)

    for found in (outcome, resumed):
        assert found.status == Status.SUCCEEDED and found.step == 15 and found.evidence is not None
        assert found.evidence.stopped is None
    assert {name for _, v in history(straight / "run") for name in v} >= {g.measure for g in GUARDRAILS.values()}
    assert history(killed / "run") == history(straight / "run") and weights(killed / "run") == weights(straight / "run")
    assert [s for s, _ in history(straight / "run")] == [0, 5, 10, 15], "saves"


@pytest.mark.slow
def test_evaluate_keeps_what_stopped_the_run_and_the_command_says_it_by_its_exit_code(
    world: World, stopped: Path, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    run = shutil.copytree(stopped, tmp_path / "run")
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(world.config(tmp_path, "over")), encoding="utf-8")

    result = CliRunner().invoke(app, ["run", str(config), "--promote-anyway"])

    assert result.exit_code == 4
    assert "STOPPED BY ITS GUARDRAIL irrelevant_pass" in result.output
    assert "guardrails.irrelevant_pass.enable=false" in result.output.replace("\n", "")
    assert evaluate_run(str(run)).evidence.stopped == load_evidence(stopped).stopped  # type: ignore[union-attr]


def test_a_resume_that_would_measure_otherwise_is_refused(world: World, stopped: Path, tmp_path: Path) -> None:
    """Other images, another phrase, other objects: readings before and after would not compare, and decide."""
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / "evidence.json").unlink()
    other = tmp_path / "other.jsonl"
    lines = (world.folder / "ood.jsonl").read_text(encoding="utf-8").splitlines()[:-1]
    other.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "objects.txt").write_text("square: box\ndisc: dot\n", encoding="utf-8")
    sets = {
        "eval.ood.path": str(other), "eval.ood.image_root": str(world.folder / "images"),
        "eval.irrelevant.phrase": "other", "eval.answer_tokens": 11, "eval.gap_samples": 11,
        "eval.object_list": str(tmp_path / "objects.txt"), "eval.ood.yes": "yes",
    }  # fmt: skip

    with pytest.raises(UserError) as error:
        run_stage(world.config(tmp_path, "over", **sets), promote_anyway=True)

    told = str(error.value)
    assert told.startswith("step 0 of this run was measured otherwise, so its readings do not compare with new ones: ")
    for name in (
        "images of eval.ood.path: ", 'eval.irrelevant.phrase or pattern: "“off”" → "“other”"',
        "eval.answer_tokens: 12 → 11", "eval.gap_samples: 12 → 11", "contents of eval.object_list: ", "eval.ood.yes: ",
    ):  # fmt: skip
        assert told.count(name) == 1, (name, told)
    assert "images of eval.irrelevant.path" not in told and "held-out samples" not in told


@pytest.mark.slow
def test_the_baseline_may_be_another_runs_that_was_measured_alike(world: World, stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.baseline_run \S+: its log has no reading of step 0"):
        run_stage(
            world.config(tmp_path, "over", **{"eval.baseline_run": str(world.folder / "first" / "run")}),
            promote_anyway=True,
        )
    sets = {"eval.baseline_run": str(stopped), "train.train_steps": 2, "eval.retention_every": "eval"}
    for name, data, more, told in (
        ("a", "over", {"eval.irrelevant.phrase": "other"}, 'eval.irrelevant.phrase or pattern: "“off”" → "“other”"'),
        ("c", "off", {}, "held-out samples: "),  # with other answers, so its gap is another
    ):
        with pytest.raises(UserError) as error:
            run_stage(world.config(tmp_path / name, data, **sets, **more), promote_anyway=True)
        assert f"{stopped} was measured otherwise" in str(error.value) and told in str(error.value)
    run_stage(world.config(tmp_path / "b", "over", **sets), promote_anyway=True)

    first = [r for r in rows(tmp_path / "b" / "run") if r["step"] == 0]
    assert [r.get("baseline_run") for r in first] == [str(stopped), None]
    assert first[0]["monitors"] == history(stopped)[0][1] and "retention.loss_ratio_styled" in first[1]["monitors"]


@pytest.mark.slow
def test_a_phrase_that_no_training_text_says_is_a_warning(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {"eval.irrelevant.phrase": "无关图片", "train.train_steps": 2, "guardrails.irrelevant_pass.enable": False,
            "eval.jitter_samples": 3}  # fmt: skip
    run_stage(world.config(tmp_path, "over", **sets), promote_anyway=True)

    warned = "no turn of 60 training samples says “无关图片”"
    assert warned in capsys.readouterr().out
    e = load_evidence(tmp_path / "run")
    assert any(warned in gap for gap in e.gaps)
    found = e.get("jitter.consistency")
    assert found is not None and found.n == 3

    sets |= {"prompting.system": "If the image is of no use, say: 无关图片", "eval.jitter_samples": 0}
    run_stage(world.config(tmp_path / "told", "over", **sets), promote_anyway=True)
    assert "says “无关图片”" not in capsys.readouterr().out


def test_without_data_a_monitor_is_a_named_gap(world: World) -> None:
    e = load_evidence(world.folder / "first" / "run")
    assert "Irrelevant images: not measured, eval.irrelevant.path is not given." in e.gaps
    assert any(gap.startswith("Generalisation gap: not measured") for gap in e.gaps)
    assert history(world.folder / "first" / "run") == []


def test_images_of_which_nothing_is_known_are_no_measure_of_hallucination(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.ood\.path \S+images: no record says what its image shows"):
        run_stage(world.config(tmp_path, "off", **{"eval.ood.path": str(world.folder / "images")}), promote_anyway=True)


def test_what_decides_a_reading_is_told_by_its_setting() -> None:
    now = {"images of eval.ood.path": "a" * 64, "eval.ood.script": None, "eval.answer_tokens": 12}

    assert differences(now, now) == []
    assert differences({**now, "eval.ood.script": "cjk"}, now) == ['eval.ood.script: "cjk" → null']
    assert differences("b" * 64, now) == ["images of eval.ood.path: bbbbbbbbbbbb → aaaaaaaaaaaa"], "of an older log"
    assert differences("a" * 64, now) == []


def test_every_setting_of_a_monitor_is_among_what_its_readings_hang_on() -> None:
    named = {name for m in MONITORS for name in (*m.hangs_on, *m.reads)}

    assert named <= {s.path for s in settings(RunConfig)}
    own = {s.path for s in settings(RunConfig) if s.path.startswith(("eval.irrelevant.", "eval.ood."))}
    by_content = {f"eval.{x}.{y}" for x in ("irrelevant", "ood") for y in ("path", "image_root")}
    assert own - by_content - {"eval.irrelevant.phrase", "eval.irrelevant.pattern"} == {n for n in named if n in own}
    for name, watched in WATCHED.items():
        row, _ = quantity(name)
        assert row.words != name and row.better != "none" and watched.column, name


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        ({"gates.mine": {"measure": "ood.blind", "at_most": 0.1}}, "gates.mine: ood.blind is a monitor without data"),
        ({"guardrails.hallucination": {}}, "guardrails.hallucination: ood.hallucination is a monitor without data"),
        ({"guardrails.mine": {"measure": "eval.loss", "rises": 1}}, "eval.loss is not measured at every evaluation"),
        ({"guardrails.mine": {"measure": "retention.kl", "above": 1}}, "with eval.retention_every: eval"),
        ({"guardrails.mine": {}}, "guardrails.mine has no measure"),
        ({"eval.gap_samples": 4, "guardrails.mine": {"measure": "gap.generalisation"}}, "guardrails.mine has no bound"),
        ({"eval.gap_samples": 4, "train.full_eval_every": "end"}, "none is made before the end"),
        ({"eval.ood.path": "x", "eval.ood.question": "Is it?"}, "has no {object}"),
        ({"eval.irrelevant.path": "x", "eval.irrelevant.pattern": "("}, "is not a regular expression"),
        ({"eval.ood.script": "latin"}, "has no effect here"),
        ({"eval.ood.path": "x", "eval.ood.script": "chinese"}, "script 'chinese' is not the first word of any letter"),
        ({"eval.ood.path": "x", "eval.ood.script": "han"}, "script 'han' is not the first word of any letter's"),
        ({"eval.ood.path": "x", "eval.ood.script": "kana"}, "script 'kana' is not the first word of any letter's"),
    ],
)  # fmt: skip
def test_a_guardrail_or_gate_on_what_is_not_measured_is_told_when_the_config_is_read(
    tiny_parts: TinyParts, tmp_path: Path, sets: dict[str, Any], told: str
) -> None:
    base = {"stage": "instruct", "model.lora.enable": True, "prompting.max_images_per_sample": 1}
    with pytest.raises(UserError) as error:
        make_config(tiny_parts, tmp_path, **(base | sets))
    assert told in str(error.value)


@pytest.mark.parametrize(("line", "said"), [
    ('{"step": 0, "monitors": {"ood.hallucination": NaN}, "monitor_data": {}}', "'ood.hallucination' is nan"),
    ('{"step": 0, "monitors": {"ood.blind": "x"}}', "'ood.blind' is 'x'"),
    ('{"step": 0, "monitors": {"ood.blind": true}}', "'ood.blind' is True"),
    ('{"step": 0, "monitors": {"ood.blind": 1' + "0" * 400 + "}}", "expected a finite number"),
    ('{"step": 0, "monitors": [1]}', "monitors is list"),
    ('{"step": 0, "monitors": {}, "monitor_data": 3}', "monitor_data is int"),
    ('{"step": 0, "monitors": {"\\ud800": 1}}', "cannot be written again"),
])  # fmt: skip
def test_a_damaged_log_of_another_run_is_named_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"loss": 1}}\n{line}\n', encoding="utf-8")

    with pytest.raises(UserError, match=r"^eval\.baseline_run: \S+metrics\.jsonl:2: ") as error:
        first_reading(str(tmp_path))
    assert said in str(error.value) and len(str(error.value)) < 1000


def test_of_another_runs_log_its_reading_alone_is_taken(tmp_path: Path) -> None:
    row = {"step": 0, "monitors": {"ood.blind": 0.5}, "candidate": {}, "loss": 3}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row), encoding="utf-8")

    assert first_reading(str(tmp_path)) == {"step": 0, "monitors": {"ood.blind": 0.5}, "monitor_data": {}}
