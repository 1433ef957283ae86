"""A stage that starts from a run with adapters: they go on, are merged into the base, or are dropped."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import TinyParts, make_config
from tests.stages.dying import dying_at

from beholder.config import RunConfig
from beholder.config.file import load_config
from beholder.evidence import load_evidence
from beholder.model import adapters, placement
from beholder.model.language import load_language
from beholder.prepare.tiny import colour_source
from beholder.runs import sha256_file
from beholder.stages import run_stage
from beholder.stages.remeasure import evaluate_run
from beholder.train import checkpoint, restore
from beholder.types import Status, TrainedPart, UserError
from beholder.use.vlm import load

STILL = {
    "train.lr.connector": 0.0, "train.lr.lora": 0.0, "train.train_steps": 1, "eval.caption_samples": 2,
    "eval.audit_turns": 0, "ablation.num_samples": 2,
}  # fmt: skip
MakeStage = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def stage(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> MakeStage:
    """``stage(folder, **sets)``: a run of stage multi on records of 1 to 4 pictures."""
    source = colour_source(tmp_path_factory.mktemp("several"), "jsonl", 48, dialogues=True, most_images=4)
    return functools.partial(make_config, tiny_parts, **{
        "stage": "multi", "model.lora.enable": True, "model.lora.r": 4, "model.lora.dropout": 0.1,
        "data.json_path": source.json_path, "data.image_root": source.image_root, "data.eval_size": 8,
        "train.lr.lora": 1e-2, "eval.answer_tokens": 4, "eval.caption_samples": 4, "eval.golden_size": 0,
    })  # fmt: skip


@pytest.fixture(scope="module")
def origin(stage: MakeStage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of stage instruct, its adapters used at 0.5 of their strength."""
    folder = tmp_path_factory.mktemp("origin")
    cfg = stage(folder, **{
        "stage": "instruct", "prompting.max_images_per_sample": 1, "model.lora.strength": 0.5, "model.lora.r": 8,
    })  # fmt: skip
    run_stage(cfg)
    return folder / "run"


@pytest.fixture(scope="module")
def merged(stage: MakeStage, origin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of stage multi that merged them into its base."""
    folder = tmp_path_factory.mktemp("merged")
    run_stage(stage(folder, **start(origin, "merge")), promote_anyway=True)
    return folder / "run"


def start(run: Path, how: str) -> dict[str, object]:
    return {"model.connector.load_checkpoint": str(run), "model.lora.adapters": how}


def adapters_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step}" / "adapter_model.safetensors")


def test_adapters_that_continue_go_on_from_the_very_weights_and_it_is_said(
    stage: MakeStage, origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    like = {"model.lora.r": 8, "model.lora.strength": 0.25}  # of no account to what they learn
    run_stage(stage(tmp_path, **start(origin, "continue"), **like, **STILL), promote_anyway=True)

    where = checkpoint.resolve_checkpoint(origin)
    before, after = load_file(where / "adapter_model.safetensors"), adapters_at(tmp_path / "run", 1)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    told = json.loads((tmp_path / "run" / "run.json").read_text())["adapters"]
    assert told == f"continue: those of {where} go on learning"
    assert f"[adapters] {told}" in capsys.readouterr().out


@pytest.mark.parametrize(("sets", "says"), [
    ({"model.lora.r": 4, "model.lora.strength": 0.5}, "model.lora.r: checkpoint 8, config 4"),
    ({"model.lora.r": 8, "model.lora.alpha": 16}, "model.lora.alpha: checkpoint 32, config 16"),  # 32 at 0.5
    ({"model.lora.r": 8, "model.lora.strength": 0.5, "model.lora.target_modules": ["q_proj"]}, "the file has adapters"),
])  # fmt: skip
def test_adapters_of_another_shape_do_not_continue_and_the_other_ways_are_named(
    stage: MakeStage, origin: Path, tmp_path: Path, sets: dict[str, object], says: str
) -> None:
    with pytest.raises(UserError, match=rf"(?s)model.lora.adapters: continue: .*{says}.*merge makes them part .*fresh"):
        run_stage(stage(tmp_path, **start(origin, "continue"), **sets), promote_anyway=True)


def test_merged_adapters_are_the_frozen_base_of_the_new_run_at_the_strength_they_are_used_with(
    origin: Path, merged: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    load(origin).save_merged(tmp_path / "plain")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).state_dict()
    base = placement.base_state(load(merged).model.language.part)
    evidence = load_evidence(merged)
    rows = {r.part: r for r in evidence.trainable}

    assert theirs.keys() == base.keys() and all(torch.equal(theirs[k], base[k]) for k in base)
    assert rows["language"].intact is True
    assert evidence.text_only is not None and evidence.text_only.equal
    assert any(gap.startswith("Base: the adapters of 1 earlier run(s)") for gap in evidence.gaps)
    written = json.loads((merged / "checkpoints" / "step_4" / "adapter_config.json").read_text())
    assert written["r"] == 4 and "1 earlier runs merged" in written["base_model_name_or_path"]


def test_new_adapters_on_a_merged_base_start_without_effect(stage: MakeStage, origin: Path, tmp_path: Path) -> None:
    run_stage(stage(tmp_path, **start(origin, "merge"), **STILL), promote_anyway=True)

    ids = torch.arange(20)[None] + 30
    before, after = load(origin).model, load(tmp_path / "run").model
    with adapters.merged(before.language.part):
        assert torch.equal(after.text_logits(ids), before.text_logits(ids))
    with before.adapters_off():
        assert not torch.equal(after.text_logits(ids), before.text_logits(ids)), "the merged adapters do nothing"


def test_a_merged_run_is_measured_again_and_loaded_as_it_was_without_the_run_it_came_from(
    stage: MakeStage, origin: Path, merged: Path, tmp_path: Path
) -> None:
    """What was merged lies in the run's own checkpoints."""
    run, gone = tmp_path / "run", tmp_path / "gone"
    shutil.copytree(origin, gone)
    run_stage(stage(tmp_path, **start(gone, "merge")), promote_anyway=True)
    known = load_evidence(run)
    shutil.rmtree(gone)

    again = evaluate_run(str(run)).evidence

    assert again is not None and known.get("eval.loss") == again.get("eval.loss")
    assert known.get("eval.loss") == load_evidence(merged).get("eval.loss")
    assert load(run).model.language.part.merged[0].facts["lora_alpha"] == 16


def test_a_killed_run_on_a_merged_base_resumes_bit_for_bit(
    stage: MakeStage, origin: Path, merged: Path, tmp_path: Path
) -> None:
    cfg = stage(tmp_path, **start(origin, "merge"))
    with dying_at(3):
        run_stage(cfg, promote_anyway=True)

    assert run_stage(cfg, promote_anyway=True).status == Status.SUCCEEDED

    for name in ("adapter_model.safetensors", "connector.safetensors", "optimizer.safetensors", "merged_1.safetensors"):
        ours, theirs = (sha256_file(r / "checkpoints" / "step_4" / name) for r in (tmp_path / "run", merged))
        assert ours == theirs, name
    assert json.loads((tmp_path / "run" / "run.json").read_text())["adapters"].startswith("merge: those of ")


def test_a_base_goes_on_through_later_runs(stage: MakeStage, merged: Path, tmp_path: Path) -> None:
    """What a run merged is under whatever starts from it: its adapters continue on it, or are merged on top."""
    run_stage(stage(tmp_path / "a", **start(merged, "continue"), **STILL), promote_anyway=True)
    run_stage(stage(tmp_path / "b", **start(merged, "merge"), **STILL), promote_anyway=True)
    run_stage(stage(tmp_path / "c", **start(merged, "fresh"), **STILL), promote_anyway=True)

    ids = torch.arange(20)[None] + 30
    was, continued, twice, fresh = (load(r).model for r in (merged, *(tmp_path / n / "run" for n in "abc")))
    assert [len(m.language.part.merged) for m in (continued, twice, fresh)] == [1, 2, 1]
    assert torch.equal(continued.text_logits(ids), was.text_logits(ids))
    with adapters.merged(was.language.part):
        assert torch.equal(twice.text_logits(ids), was.text_logits(ids))
    with was.adapters_off():
        assert torch.equal(fresh.text_logits(ids), was.text_logits(ids))


def test_fresh_drops_them_and_starts_new_ones_of_another_shape(
    stage: MakeStage, origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_stage(stage(tmp_path, **start(origin, "fresh"), **STILL), promote_anyway=True)

    after = adapters_at(tmp_path / "run", 1)
    assert all(not t.any() for k, t in after.items() if ".lora_B." in k)
    assert "[adapters] fresh: those of " in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints" / "step_1" / "merged_1.safetensors").exists()


def test_a_run_without_adapters_has_none_to_merge(stage: MakeStage, tmp_path: Path, tiny_parts: TinyParts) -> None:
    run_stage(make_config(tiny_parts, tmp_path / "aligned", **{"train.train_steps": 1}))

    with pytest.raises(UserError, match=r"model.lora.adapters is merge, but .* has no adapters to merge; leave"):
        run_stage(stage(tmp_path, **start(tmp_path / "aligned" / "run", "merge")), promote_anyway=True)


def test_a_checkpoint_on_a_merged_base_does_not_load_on_another(stage: MakeStage, origin: Path, merged: Path) -> None:
    where = checkpoint.resolve_checkpoint(merged)

    with pytest.raises(UserError, match=r"trained on another base: .* is merged_1, of this model nothing"):
        restore.load_trained(where, load(origin).model)


def test_adapters_that_are_no_plain_lora_or_of_another_model_are_not_merged(origin: Path) -> None:
    part = restore.read_part(checkpoint.resolve_checkpoint(origin), "adapter")
    language, _ = load_language(load_config(origin / "config.yaml").model.llm, torch.device("cpu"))
    before = {k: t.clone() for k, t in placement.base_state(language.part).items()}
    some = next(iter(part.tensors))

    for facts, tensors, says in (
        ({"use_dora": True}, {}, "use_dora is True; only plain LoRA can"),
        ({"lora_alpha": "16"}, {}, "r is 8 and lora_alpha '16'"),
        ({"r": 4}, {}, "do not fit it; they are of another language model"),
        ({}, {some.replace("layers.0", "layers.9"): part.tensors[some]}, "do not fit it"),
        ({}, {some: part.tensors[some] * float("nan")}, "NaN or infinite"),
    ):
        odd = TrainedPart({**part.tensors, **tensors}, {**part.facts, **facts})
        with pytest.raises(UserError, match=says):
            adapters.merge_in(language.part, odd)
    after = placement.base_state(language.part)
    assert all(torch.equal(before[k], after[k]) for k in before) and not language.part.merged


def test_stage_multi_does_not_start_from_an_instruct_run_whose_gates_failed(
    stage: MakeStage, origin: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"model\.connector\.load_checkpoint: .*gates.* or say --promote-anyway"):
        run_stage(stage(tmp_path, **start(origin, "merge")))
