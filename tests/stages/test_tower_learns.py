"""A run whose tower learns, by adapters and by a block of its own: killed, resumed, evaluated, built upon."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import TinyParts, make_config
from tests.stages.dying import dying_at

from beholder.config import RunConfig
from beholder.evidence import load_evidence
from beholder.model.placement import base_state
from beholder.prepare.tiny import colour_source
from beholder.runs import sha256_file
from beholder.stages import run_stage
from beholder.stages.remeasure import evaluate_run
from beholder.train import checkpoint
from beholder.types import Status, UserError
from beholder.use.vlm import load

MakeStage = Callable[..., RunConfig]
ADAPTED, OWN = "encoder.layers.1", "encoder.layers.0"
"""Of the tower's two blocks one learns through adapters, the other itself."""


@pytest.fixture(scope="module")
def stage(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> MakeStage:
    source = colour_source(tmp_path_factory.mktemp("questions"), "jsonl", 32, dialogues=True)
    return functools.partial(make_config, tiny_parts, **{
        "stage": "instruct", "model.lora.enable": True, "model.lora.r": 4, "model.lora.dropout": 0.1,
        "model.lora.llm_layers": "last-1", "model.lora.vit_layers": "last-1", "model.vision.unfreeze": [OWN],
        "data.json_path": source.json_path, "data.image_root": source.image_root, "data.eval_size": 8,
        "train.lr.lora": 1e-2, "train.lr.vision": 3e-3, "eval.answer_tokens": 4, "eval.caption_samples": 4,
        "eval.golden_size": 0, "ablation.num_samples": 4, "eval.audit_turns": 0,
    })  # fmt: skip


@pytest.fixture(scope="module")
def straight(stage: MakeStage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    assert run_stage(stage(folder)).status == Status.SUCCEEDED
    return folder / "run"


def test_what_was_named_learns_and_the_rest_is_bit_identical(straight: Path) -> None:
    evidence = load_evidence(straight)
    rows = {r.part: r for r in evidence.trainable}

    assert rows["vision"].trainable > 0 and rows["vision"].intact is True, "what of the tower does not learn"
    assert rows["language"].trainable == 0 and rows["language"].intact is True
    assert rows["vision_lora"].trainable == rows["vision_lora"].params > 0
    assert {(a.part, a.name.rpartition(".")[0].rpartition(".")[0]) for a in evidence.adapters} == {
        ("language", "model.layers.1"), ("vision", ADAPTED),
    }  # fmt: skip
    step = straight / "checkpoints" / "step_4"
    first = straight / "checkpoints" / "step_2"
    for name in ("vision", "vision_adapter", "adapter_model", "connector"):
        one, other = (load_file(f / f"{name}.safetensors") for f in (first, step))
        assert any(not torch.equal(t, other[k]) for k, t in one.items()), f"{name} did not learn"
    assert all(k.startswith(OWN) for k in load_file(step / "vision.safetensors"))
    assert json.loads((step / "vision.json").read_text())["modules"] == [OWN]


def test_interrupted_and_resumed_with_dropout_it_equals_the_straight_run(
    stage: MakeStage, straight: Path, tmp_path: Path
) -> None:
    with dying_at(3):
        run_stage(stage(tmp_path))

    assert run_stage(stage(tmp_path)).status == Status.SUCCEEDED

    names = sorted(p.name for p in (straight / "checkpoints" / "step_4").glob("*.safetensors"))
    assert {"vision.safetensors", "vision_adapter.safetensors", "adapter_model.safetensors"} < set(names)
    for name in names:
        ours, theirs = (sha256_file(r / "checkpoints" / "step_4" / name) for r in (tmp_path / "run", straight))
        assert ours == theirs, name


def test_it_is_measured_again_as_it_was(straight: Path) -> None:
    known = load_evidence(straight)

    again = evaluate_run(str(straight)).evidence

    assert again is not None and again.get("eval.loss") == known.get("eval.loss")
    assert again.get("frozen.changed") == known.get("frozen.changed")


def test_a_run_that_starts_from_it_has_its_tower_and_merges_its_adapters(
    stage: MakeStage, straight: Path, tmp_path: Path
) -> None:
    """And carries them along: its own folder is enough to load it."""
    still = {
        "train.train_steps": 1, "train.lr.connector": 0.0, "train.lr.lora": 0.0, "model.vision.unfreeze": [],
        "train.lr.vision": 0.0, "model.connector.load_checkpoint": str(straight), "model.lora.adapters": "merge",
    }  # fmt: skip
    run_stage(stage(tmp_path, **still), promote_anyway=True)

    was, now = load(straight).model, load(tmp_path / "run").model
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert was.vision is not None and now.vision is not None
    with torch.no_grad():
        assert torch.allclose(now.vision(pixels), was.vision(pixels), atol=1e-5)
        with was.adapters_off():
            assert not torch.allclose(now.vision(pixels), was.vision(pixels), atol=1e-5), "the adapters do nothing"
    own, theirs = base_state(now.vision.part), base_state(was.vision.part)
    assert all(torch.equal(own[k], theirs[k]) for k in own if k.startswith(OWN))
    files = {p.name for p in checkpoint.resolve_checkpoint(tmp_path / "run").glob("*.safetensors")}
    assert {"merged_1.safetensors", "vision_merged_1.safetensors", "vision.safetensors"} < files


def test_a_checkpoint_with_a_trained_tower_is_refused_by_a_config_that_freezes_it(
    stage: MakeStage, straight: Path, tmp_path: Path
) -> None:
    frozen = {"model.lora.vit_layers": "none", "model.lora.adapters": "continue", "train.train_steps": 1}
    with pytest.raises(UserError, match="has adapters on the vision tower, but this config has none"):
        run_stage(stage(tmp_path, **frozen, **{"model.connector.load_checkpoint": str(straight)}), promote_anyway=True)


def test_what_lies_below_the_lowest_block_that_learns_is_read_from_the_store_and_changes_nothing(
    stage: MakeStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit in fp32 on a CPU, dropout and all."""
    top = {"model.vision.unfreeze": [], "model.lora.vit_layers": "last-1", "train.train_steps": 6}
    run_stage(stage(tmp_path / "kept", **top))
    assert f"[features] kept: what goes into {ADAPTED}" in capsys.readouterr().out
    run_stage(stage(tmp_path / "plain", **top, **{"features.enabled": False, "features.dir": None}))

    for name in ("vision_adapter", "adapter_model", "connector"):
        kept, plain = (
            load_file(tmp_path / f / "run" / "checkpoints" / "step_6" / f"{name}.safetensors")
            for f in ("kept", "plain")
        )
        assert all(torch.equal(t, plain[k]) for k, t in kept.items()), name
