"""``beholder audit``: of a record file, a config and a run; a learner of words, and the run's language model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.conftest import MakeConfig, TinyParts

from beholder.config import RunConfig
from beholder.config.file import dump_config
from beholder.stages import learnable, run_stage
from beholder.stages.learnable import audit_subject
from beholder.stages.remeasure import Answer
from beholder.types import UserError


@pytest.fixture
def leaking(tiny_parts: TinyParts, tmp_path: Path) -> Path:
    """72 questions about the tiny pictures whose answers their words give away, and some whose do not."""
    path = tmp_path / "leaking.jsonl"
    lines: list[str] = []
    for k, line in enumerate(tiny_parts.records.read_text(encoding="utf-8").splitlines()):
        record = json.loads(line)
        word, answer = (("parrot", "green"), ("swan", "white"))[k % 2]
        turns = [{"role": "user", "content": f"<image>\nthe {word}?"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": record["id"], "images": record["images"], "messages": turns}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def config(tiny_config: MakeConfig, leaking: Path, tmp_path: Path) -> RunConfig:
    return tiny_config(tmp_path, **{
        "stage": "instruct", "model.lora.enable": True, "model.lora.r": 8, "data.json_path": str(leaking),
        "prompting.max_images_per_sample": 1, "train.lr.lora": 1e-2, "eval.answer_tokens": 6,
    })  # fmt: skip


def values(found: Answer) -> dict[str, float]:
    return {m.name: m.value for m in found.measurements if m.stratum is None}


def test_of_a_record_file_the_audit_says_which_words_give_it_away_and_loads_no_model(
    leaking: Path, tiny_parts: TinyParts
) -> None:
    with leaking.open("a", encoding="utf-8") as file:
        file.write('{"id": "bad"}\n')

    found = audit_subject(str(leaking), image_root=str(tiny_parts.images))

    assert values(found) == {"learner.accuracy": 1.0, "learner.majority": 1.0}
    told = "\n".join(found.findings)
    assert "Learnable without an image" in told and "“parrot” → green" in told and "“swan” → white" in told
    assert "1 bad records were left out" in told


def test_a_run_on_answers_that_the_words_give_away_fails_the_gate_on_it_and_tells_the_words(config: RunConfig) -> None:
    """However right its answers are: a learner of the words alone is as right."""
    outcome = run_stage(config)

    evidence = outcome.evidence
    assert evidence is not None and not evidence.promotable
    gate = next(g for g in evidence.gates if g.name == "better_than_words")
    assert not gate.passed and gate.value is not None and gate.value <= 0
    assert any("Learnable without an image" in f and "“parrot” → green" in f for f in evidence.findings)


def test_a_config_has_both_the_language_model_as_it_is_and_the_learner(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")

    found = audit_subject(str(path), num_turns=8)

    assert values(found)["learner.accuracy"] == 1 and "audit.answerable.alone" in values(found)


def test_the_runs_own_language_model_learns_the_words_without_images_and_is_left_as_it_was(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    monkeypatch.setattr(learnable, "LM_EPOCHS", 20)

    found = audit_subject(str(run), num_turns=8, learner="lm")

    # guessing one of the two is right half the time
    assert values(found)["learner.lm"] > 0.9
    assert any("60 questions, 2 folds, 20 epochs" in text for text in found.findings), found.findings
    assert [p.name for p in run.iterdir()] == ["config.yaml"], "nothing is written into the run"


def test_samples_that_the_language_model_does_not_learn_from_are_counted(
    config: RunConfig, leaking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    for k, line in enumerate(leaking.read_text(encoding="utf-8").splitlines()):
        record = json.loads(line)
        if k % 6 == 0:
            more = [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes"}]
            record["messages"] += more
        lines.append(json.dumps(record))
    leaking.write_text("\n".join(lines) + "\n", encoding="utf-8")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    monkeypatch.setattr(learnable, "LM_EPOCHS", 1)

    found = audit_subject(str(run), num_turns=8, learner="lm")

    learned = next(m for m in found.measurements if m.name == "learner.lm")
    told = f"{60 - learned.n} of 60 samples left out: several answers, or one too long"
    assert 40 < learned.n < 60 and told in (learned.caveat or "")
    assert any(told in text for text in found.findings)


def test_what_cannot_be_audited_is_said(
    config: RunConfig, leaking: Path, tiny_parts: TinyParts, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--learner lm trains the language model of a run"):
        audit_subject(str(leaking), learner="lm")
    for flag, given in (
        ("--set", {"overrides": ["seed=1"]}),
        ("--num-turns", {"num_turns": 3}),
        ("--part", {"part": "eval"}),
    ):
        with pytest.raises(UserError, match=f"{flag} is about a config or a run, but SUBJECT is a record file"):
            audit_subject(str(leaking), **given)
    with pytest.raises(UserError, match="--image-root describes a record file"):
        (tmp_path / "c.yaml").write_text(dump_config(config), encoding="utf-8")
        audit_subject(str(tmp_path / "c.yaml"), image_root="x")
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="is not a run folder"):
        audit_subject(str(unfinished))
    few = tmp_path / "few.jsonl"
    few.write_text("".join(leaking.read_text().splitlines(keepends=True)[:5]), encoding="utf-8")
    with pytest.raises(UserError, match="only 5 samples have a question with a short answer"):
        audit_subject(str(few), image_root=str(tiny_parts.images))
