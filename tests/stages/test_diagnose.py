"""``beholder doctor teacher|distillation|batch|inference``: each check holds on sound tiny parts, and fails on a fault
that was planted for it."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.conftest import TinyParts
from typer.testing import CliRunner

from beholder.cli import app
from beholder.config import DistillConfig, RunConfig
from beholder.config.file import dump_config
from beholder.data import collate
from beholder.prepare import diagnose, diagnose_distill
from beholder.prepare.diagnose import Examined, examine_inference, examine_teacher
from beholder.prepare.diagnose_distill import examine_batch, examine_distillation
from beholder.prepare.tiny import tiny_llm, tiny_native
from beholder.stages import run_stage
from beholder.stages.teachers import Teacher, cache_teachers, open_teacher
from beholder.types import UserError

Written = Callable[..., str]


@pytest.fixture
def written(student, tmp_path: Path) -> Written:
    """``written("name", **settings)``: the student's config as a file."""

    def make(name: str = "student", **sets: object) -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_config(student(name, **sets)), encoding="utf-8")
        return str(path)

    return make


def levels(found: Examined) -> dict[str, str]:
    return {c.name: c.level for c in found.checks}


def failures(found: Examined) -> list[str]:
    return [c.name for c in found.checks if c.level == "fail"]


def of(found: Examined, name: str) -> Any:
    return next(c for c in found.checks if c.name == name)


def as_text(found: Examined) -> str:
    """At 80 columns; advice is left to the terminal to wrap."""
    console = Console(width=80, file=io.StringIO(), record=True)
    replace(found, checks=tuple(replace(c, advice="") for c in found.checks)).print(console)
    return console.export_text()


def opened_with(change: Callable[[Teacher], Any]) -> Callable[..., Teacher]:
    """`open_teacher` of a teacher that is then damaged."""

    def opened(*args: Any) -> Teacher:
        teacher = open_teacher(*args)
        with torch.no_grad():
            change(teacher)
        return teacher

    return opened


def damaged(teacher: Teacher) -> None:
    next(iter(teacher.language.model.parameters())).fill_(float("nan"))


def blinded(teacher: Teacher) -> None:
    for parameter in teacher.model.connector.parameters():  # pyright: ignore[reportAttributeAccessIssue]
        parameter.zero_()


def speechless(teacher: Teacher) -> None:
    teacher.encoder.eos_ids[:] = range(teacher.language.vocab)


# ---------------------------------------------------------------------------------------------------------------
# teacher


def test_a_sound_teacher_answers_and_looks(written: Written, teacher: Path) -> None:
    for subject in (written(), str(teacher)):
        found = examine_teacher(subject)
        assert not found.failed, found.checks
        (told,) = found.to_json()["teachers"]
        assert told["look"]["question"] and told["look"]["reference"] and len(told["look"]["others"]) == 4
        p = [row[1] for row in told["look"]["likeliest"]]
        assert p == sorted(p, reverse=True) and 0 < sum(p) <= 1
        text = as_text(found)
        assert "another's" in text and told["look"]["question"] in text
        assert max(map(len, text.splitlines())) <= 80


def test_a_native_model_is_asked_about_drawn_pictures(tmp_path: Path) -> None:
    found = examine_teacher(str(tiny_native(tmp_path / "native")), ["device=cpu"])
    assert levels(found)["log-probabilities"] == "ok" and found.facts["teachers"][0]["look"]["question"]


@pytest.mark.parametrize(
    ("fault", "check", "told"),
    [
        (damaged, "log-probabilities", "no finite log-probabilities"),
        (blinded, "picture", "moves by up to 0"),
        (speechless, "answer", "empty"),
    ],
)
def test_what_ails_a_teacher_is_told(
    written: Written, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Teacher], None], check: str, told: str
) -> None:
    monkeypatch.setattr(diagnose, "open_teacher", opened_with(fault))
    found = examine_teacher(written())
    assert failures(found) == [check] and told in of(found, check).found and of(found, check).advice


# ---------------------------------------------------------------------------------------------------------------
# distillation


@pytest.mark.parametrize("form", ["topk", *(pytest.param(f, marks=pytest.mark.slow) for f in ("sampled", "full"))])
def test_a_sound_distillation_holds(student, written: Written, form: str) -> None:
    sets = {"distill.form": form, "distill.alpha_end": 0.1}
    cache_teachers(student(**sets))
    found = examine_distillation(written(**sets))
    assert not found.failed, found.checks
    assert "8 of 8 samples from the cache" in of(found, "KL of the teacher with itself").found
    (numbers,) = found.facts["teachers"]
    k, v = 8 if form == "topk" else 64, numbers["bytes_per_token"]["full"] // 2
    assert numbers["bytes_per_token"]["topk"] == (4 * k + 8) and v > 100
    assert numbers["kl"]["full"] - numbers["kl"]["topk"] == pytest.approx(numbers["topk_bound"], abs=1e-5)
    assert found.shown[0].rows == (
        ("first (1)", "0.3", "2"), ("middle (2)", "0.2", "2"), ("last (3)", "0.1", "2")
    )  # fmt: skip
    assert max(map(len, as_text(found).splitlines())) <= 80


@pytest.mark.slow
def test_the_schedule_that_is_shown_is_the_one_that_is_trained() -> None:
    cfg = DistillConfig.model_validate({
        "teachers": [{"run": "t"}], "preset": "progressive", "temperature": 3.0, "temperature_end": 1.0,
    })  # fmt: skip
    shown = diagnose_distill._schedule(cfg, 5)
    assert shown.rows == (("first (1)", "0.5", "3"), ("middle (3)", "0.35", "2"), ("last (5)", "0.2", "1"))


def test_teachers_that_are_asked_online_need_no_cache(written: Written) -> None:
    found = examine_distillation(written(**{"distill.online": True}))
    assert not found.failed and "online" in of(found, "cache").found


def test_missing_rows_are_named(student, written: Written, tmp_path: Path) -> None:
    cache_teachers(student(**{"train.train_steps": 1}))
    path = written(**{"train.train_steps": 3})
    check = of(found := examine_distillation(path), "cache")
    assert failures(found) == ["cache"] and "missing: 'colour-" in check.found and "teacher-cache" in check.advice
    shutil.rmtree(tmp_path / "cache")
    check = of(examine_distillation(path), "cache")
    assert check.found.startswith("0 of ") and "Nothing is kept there yet" in check.advice


def test_another_template_is_shown_in_words(student, written: Written, tmp_path: Path) -> None:
    template = tmp_path / "other.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|endoftext|>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}",
        encoding="utf-8",
    )
    path = written(**{"prompting.chat_template": str(template), "distill.online": True})
    found = examine_distillation(path)
    check = of(found, "mask")
    assert failures(found) == ["mask"] and "0 of 8" in check.found
    assert "'<|endoftext|>'" in check.advice and "'<|im_end|>'" in check.advice and "chat_template" in check.advice


def test_a_teacher_that_gives_nothing_finite_is_told(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnose_distill, "open_teacher", opened_with(damaged))
    found = examine_distillation(written(**{"distill.online": True}))
    assert failures(found) == ["log-probabilities"]


def test_another_vocabulary_is_told(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(teacher: Teacher) -> None:
        vocab = dict(teacher.tokenizer.get_vocab())
        a, b = sorted(vocab)[:2]
        vocab[a], vocab[b] = vocab[b], vocab[a]
        teacher.tokenizer.get_vocab = lambda: vocab

    monkeypatch.setattr(diagnose_distill, "open_teacher", opened_with(renamed))
    found = examine_distillation(written(**{"distill.online": True}))
    assert failures(found) == ["vocabulary"] and "2 ids differ" in of(found, "vocabulary").advice


def test_rows_that_are_not_the_teachers_are_noticed(student, written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_teachers(student())

    def moved(teacher: Teacher) -> None:
        for parameter in teacher.language.model.parameters():
            parameter.add_(torch.full_like(parameter, 0.05).cumsum(0).sin() * 0.1)

    monkeypatch.setattr(diagnose_distill, "open_teacher", opened_with(moved))
    found = examine_distillation(written())
    assert failures(found) == ["KL of the teacher with itself"]


@pytest.mark.slow
def test_a_teacher_with_another_tokenizer_is_told_by_what_it_can_say(written: Written, tmp_path: Path) -> None:
    """The student's tokenizer has one control token more, so ids differ and every byte is shared."""
    other = tiny_llm(tmp_path / "other", "smollm2")
    sets = {"model.llm.name_or_path": str(other), "model.connector.load_checkpoint": None}
    path = written(**sets, **{"distill.vocabulary": "shared"})
    check = of(examine_distillation(path), "vocabulary")
    told = re.search(r"speaks of (\d+) of (\d+)", check.found)
    assert check.level == "ok" and told is not None and 0 < int(told[1]) <= int(told[2])
    found = examine_batch(path)
    assert not found.failed and found.facts["samples"][0]["teachers"]
    equal = examine_distillation(written("equal", **sets))
    assert "vocabulary" in failures(equal) and "ids differ" in of(equal, "vocabulary").advice


# ---------------------------------------------------------------------------------------------------------------
# batch


def test_a_batch_is_shown_with_what_its_teachers_say(student, written: Written) -> None:
    path = written()
    asked = examine_batch(path)
    cache_teachers(student())
    cached = examine_batch(path)
    assert not asked.failed and not cached.failed
    assert asked.checks[-1].found.startswith("asked now;")
    assert cached.checks[-1].found.startswith("2 of 2 samples from the cache;")
    for one, two in zip(asked.facts["samples"], cached.facts["samples"], strict=True):
        assert one["supervised"] == two["supervised"] and 0 < sum(one["supervised"]) < one["tokens"]
        for name, rows in one["teachers"].items():
            assert len(rows) == sum(one["supervised"])
            for a, b in zip(rows, two["teachers"][name], strict=True):
                assert [t for t, _ in a["top"]] == [t for t, _ in b["top"]]
                assert [p for _, p in a["top"]] == pytest.approx([p for _, p in b["top"]], rel=2e-3)
    text = as_text(cached)
    assert "masked" in text and "learned" in text and "the teacher's likeliest" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_batch_with_another_mask_is_told(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = collate._batch  # pyright: ignore[reportPrivateUsage]

    def shifted(*args: Any) -> Any:
        batch = sound(*args)
        return replace(batch, supervise=batch.supervise.roll(-1, -1))

    monkeypatch.setattr(collate, "_batch", shifted)
    assert failures(examine_batch(written(**{"distill.online": True}))) == ["mask"]


def test_a_batch_of_a_damaged_teacher_is_told(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnose_distill, "open_teacher", opened_with(damaged))
    found = examine_batch(written(**{"distill.online": True}))
    assert found.failed and "no finite log-probabilities" in found.checks[-1].found


# ---------------------------------------------------------------------------------------------------------------
# inference


def test_a_checkpoint_answers_with_and_without_its_picture(teacher: Path, tiny_parts: TinyParts) -> None:
    found = examine_inference(str(teacher), device="cpu")
    assert not found.failed, found.checks
    assert found.facts["look"]["blind"] is not None and found.facts["look"]["tokens"] > 0
    assert found.facts["step"] == 4 and "tokens a second" in as_text(found)
    picture = next(p for p in sorted(tiny_parts.images.rglob("*.png")))
    given = examine_inference(str(teacher), picture, "what shape is it?", device="cpu", max_new_tokens=3)
    assert given.facts["look"]["question"] == "what shape is it?" and given.facts["look"]["tokens"] <= 3


def test_a_captioning_run_is_asked_without_words(aligned: Path, tiny_parts: TinyParts) -> None:
    picture = next(p for p in sorted(tiny_parts.images.rglob("*.png")))
    for image in (None, picture):
        found = examine_inference(str(aligned), image, device="cpu", max_new_tokens=3)
        assert found.facts["look"]["blind"] is None and "log-probabilities" in levels(found)


def test_a_blind_checkpoint_is_told(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = diagnose.open_trained

    def opened(*args: Any) -> Any:
        run = sound(*args)
        with torch.no_grad():
            for parameter in run.model.connector.parameters():  # pyright: ignore[reportAttributeAccessIssue]
                parameter.zero_()
        return run

    monkeypatch.setattr(diagnose, "open_trained", opened)
    assert failures(examine_inference(str(teacher), device="cpu")) == ["picture"]


# ---------------------------------------------------------------------------------------------------------------
# commands and wrong input


def test_the_exit_code_is_3_where_a_check_fails(student, written: Written) -> None:
    path = written()
    runner = CliRunner()
    missing = runner.invoke(app, ["doctor", "distillation", path, "--json"])
    assert missing.exit_code == 3 and json.loads(missing.stdout)["ok"] is False
    cache_teachers(student())
    assert runner.invoke(app, ["doctor", "distillation", path]).exit_code == 0
    whole = runner.invoke(app, ["doctor", "batch", path, "--num", "1", "--json"])
    assert whole.exit_code == 0 and len(json.loads(whole.stdout)["samples"]) == 1


def test_wrong_input_is_refused(tmp_path: Path, aligned: Path, teacher: Path, written: Written) -> None:
    calls: tuple[tuple[Callable[[], Any], str], ...] = (
        (lambda: examine_distillation(str(aligned)), "names no teachers"),
        (lambda: examine_batch(str(tmp_path)), "neither a config file nor a run folder"),
        (lambda: examine_teacher(written(**{"distill.teachers": [{"run": "nowhere"}]})), "nowhere"),
        (lambda: examine_inference(str(teacher), None, "what?", device="cpu"), "--image"),
        (lambda: examine_inference(str(teacher), tmp_path / "no.png", "what?", device="cpu"), "no.png"),
        (lambda: examine_inference(str(tmp_path)), "checkpoint"),
    )
    for call, told in calls:
        with pytest.raises(UserError, match=told):
            call()


@pytest.mark.slow
def test_a_finished_student_is_examined_as_it_is_now(student, written: Written) -> None:
    cfg: RunConfig = student()
    cache_teachers(cfg)
    start = examine_distillation(written())
    done = examine_distillation(str(run_stage(cfg, promote_anyway=True).folder))
    assert not done.failed
    assert done.facts["teachers"][0]["kl"]["full"] != start.facts["teachers"][0]["kl"]["full"]
