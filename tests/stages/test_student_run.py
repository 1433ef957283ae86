"""A run whose language model was made for it and learns whole: killed, resumed, loaded, measured, built upon."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import TinyParts, make_config
from tests.stages.dying import dying_at

from beholder.config import RunConfig
from beholder.evidence import load_evidence
from beholder.prepare.tiny import colour_source, tiny_tokenizer, tiny_vision
from beholder.runs import sha256_file
from beholder.stages import run_stage
from beholder.stages.remeasure import evaluate_run
from beholder.types import Status, UserError
from beholder.use.vlm import load

MakeStage = Callable[..., RunConfig]
SMALL = {"like": "llama", "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 64}


@pytest.fixture(scope="module")
def stage(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> MakeStage:
    """A RepViT whose last block learns, and a language model made for the run; of another there is a tokenizer."""
    folder = tmp_path_factory.mktemp("student")
    source = colour_source(folder / "questions", "jsonl", 32, dialogues=True)
    vision, weights = tiny_vision(folder / "vision", "repvit")
    tiny_tokenizer(folder / "words", "smollm2")
    return functools.partial(make_config, tiny_parts, **{
        "model.llm.name_or_path": str(folder / "words"), "model.llm.precision": "bf16", "model.student": SMALL,
        "model.vision.name_or_path": vision, "model.vision.weights": weights, "model.vision.unfreeze": ["last-1"],
        "data.json_path": source.json_path, "data.image_root": source.image_root, "data.eval_size": 8,
        "train.lr.language": 3e-3, "train.lr.vision": 1e-3,
        "train.precision": "bf16", "eval.answer_tokens": 4, "eval.caption_samples": 4,
        "eval.golden_size": 0, "ablation.num_samples": 4, "eval.audit_turns": 0, "features.layers": False,
    })  # fmt: skip


@pytest.fixture(scope="module")
def straight(stage: MakeStage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    assert run_stage(stage(folder)).status == Status.SUCCEEDED
    return folder / "run"


def language_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step}" / "language.safetensors")


def test_all_of_it_learns_and_what_of_the_tower_does_not_is_bit_identical(straight: Path) -> None:
    evidence = load_evidence(straight)
    rows = {r.part: r for r in evidence.trainable}

    assert evidence.stage == "instruct", "a student that learns is no alignment"
    assert rows["language"].trainable == rows["language"].params and rows["language"].intact is None
    assert 0 < rows["vision"].trainable < rows["vision"].params and rows["vision"].intact is True
    first, last = language_of(straight, 2), language_of(straight, 4)
    assert [k for k, t in first.items() if torch.equal(t, last[k])] == [], "these did not learn"
    assert "lm_head.weight" not in last, "a tied head is kept once"


def test_gates_on_a_base_that_stays_are_not_judged_and_say_why(straight: Path) -> None:
    evidence = load_evidence(straight)

    judged, told = {g.name for g in evidence.gates}, "\n".join(evidence.gaps)
    for gate in ("text_unchanged", "retained", "merges", "better_than_text"):
        assert gate not in judged and f"Gate {gate}: not judged, the language model learns itself" in told
    assert next(g for g in evidence.gates if g.name == "frozen").passed, "of the tower, what does not learn"
    assert evidence.text_only is None and evidence.get("text.changed") is None


def test_interrupted_and_resumed_it_equals_the_straight_run(stage: MakeStage, straight: Path, tmp_path: Path) -> None:
    with dying_at(3):
        run_stage(stage(tmp_path))

    assert run_stage(stage(tmp_path)).status == Status.SUCCEEDED

    for name in ("language", "vision", "connector", "optimizer"):
        ours, theirs = (
            sha256_file(r / "checkpoints" / "step_4" / f"{name}.safetensors") for r in (tmp_path / "run", straight)
        )
        assert ours == theirs, name


def test_its_run_folder_is_enough_to_answer_and_to_be_measured_again(straight: Path, tmp_path: Path) -> None:
    vlm = load(straight, overrides=["seed=7"])  # another seed would make another; the checkpoint's is put in place

    here = vlm.model.language.model.state_dict()
    assert all(torch.equal(t, here[k]) for k, t in language_of(straight, vlm.step).items())
    picture = next(Path(vlm.cfg.data.image_root or "").rglob("*.png"))
    assert isinstance(vlm.generate(picture, "What colour is it?", max_new_tokens=3), str)

    copy = tmp_path / "run"
    shutil.copytree(straight, copy)
    known, again = load_evidence(straight), evaluate_run(str(copy)).evidence
    assert again is not None and again.get("eval.loss") == known.get("eval.loss")

    vlm.save_merged(tmp_path / "plain")
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    assert all(torch.equal(t, here[k]) for k, t in plain.items())


@pytest.mark.slow
def test_a_run_with_another_seed_goes_on_from_it(stage: MakeStage, straight: Path, tmp_path: Path) -> None:
    still = {
        "train.train_steps": 1, "train.save_every": 1, "train.lr.language": 0.0, "seed": 5,
        "model.connector.load_checkpoint": str(straight),
    }  # fmt: skip
    run_stage(stage(tmp_path, **still), promote_anyway=True)

    step = load(straight).step
    was, now = language_of(straight, step), language_of(tmp_path / "run", 1)
    assert was.keys() == now.keys() and all(torch.equal(t, now[k]) for k, t in was.items())
    assert isinstance(load(tmp_path / "run").step, int)


def test_what_it_cannot_go_on_from_is_refused(stage: MakeStage, straight: Path, tmp_path: Path) -> None:
    start = {"model.connector.load_checkpoint": str(straight), "train.train_steps": 1}
    other = {"model.student": SMALL | {"intermediate": 96}}
    with pytest.raises(UserError, match=r"trained weights of the language model do not fit .*model.student"):
        run_stage(stage(tmp_path / "other", **start, **other), promote_anyway=True)


def test_one_that_is_cut_learns_and_is_loaded_without_the_whole_ones_weights(
    tiny_parts: TinyParts, stage: MakeStage, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(tiny_parts.llm, whole)
    cut = {"model.llm.name_or_path": str(whole), "model.student": {"cut": [1], "learns": "layers"}}
    run_stage(stage(tmp_path, **cut))

    rows = {r.part: r for r in load_evidence(tmp_path / "run").trainable}
    assert 0 < rows["language"].trainable < rows["language"].params and rows["language"].intact is True
    (whole / "model.safetensors").unlink()
    there = load(tmp_path / "run").model.language.model.state_dict()
    assert all(torch.equal(t, there[k]) for k, t in language_of(tmp_path / "run", 4).items())


@pytest.mark.slow
def test_aligned_first_it_learns_from_that_run_with_another_seed(
    tiny_parts: TinyParts, stage: MakeStage, tmp_path: Path
) -> None:
    """Stage align takes one that does not learn, and keeps it for the stage that lets it."""
    with pytest.raises(UserError, match=r"stage align trains the connector alone, but model.student.learns is all"):
        stage(tmp_path, stage="align")
    captions = {"data.json_path": str(tiny_parts.records), "data.image_root": str(tiny_parts.images)}
    first = {"model.student": SMALL | {"learns": "none"}, "train.lr.language": 2e-4, "model.vision.unfreeze": []}
    run_stage(stage(tmp_path / "align", **captions, **first, **{"train.lr.vision": 5e-5}))
    align = tmp_path / "align" / "run"
    evidence = load_evidence(align)
    assert evidence.stage == "align" and evidence.text_only is not None and evidence.text_only.equal
    still = {"train.train_steps": 1, "train.save_every": 1, "train.lr.language": 0.0, "seed": 5}

    run_stage(stage(tmp_path, **still, **{"model.connector.load_checkpoint": str(align)}), promote_anyway=True)

    was, now = language_of(align, load(align).step), language_of(tmp_path / "run", 1)
    assert was.keys() == now.keys() and all(torch.equal(t, now[k]) for k, t in was.items())
    rows = {r.part: r for r in load_evidence(tmp_path / "run").trainable}
    assert rows["language"].trainable == rows["language"].params
