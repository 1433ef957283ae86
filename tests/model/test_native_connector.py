"""The connector of a whole vision-language model, where it is let learn: it and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.model.test_native import Native, per_sample

from beholder.config import LlmConfig, ModelConfig
from beholder.model.build import build_vlm
from beholder.model.learned import narrowed
from beholder.model.native import CONNECTOR_LEARNS, FAMILIES, NativeModel, load_native
from beholder.model.plan import TrainPlan, apply_train_plan, frozen_fingerprint, param_groups
from beholder.prepare.tiny import tiny_native

CPU = torch.device("cpu")
BETWEEN = {
    "qwen3_vl": {"visual.merger", "visual.deepstack_merger_list.0", "visual.deepstack_merger_list.1"},
    "qwen2_5_vl": {"visual.merger"},
    "idefics3": {"connector"},
    "smolvlm": {"connector"},
}


FIRST = ("qwen3_vl", "llava", "gemma3")


@pytest.fixture(
    scope="module",
    params=[*FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(FAMILIES.keys() - set(FIRST)))],
)
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Native:
    return Native(tiny_native(tmp_path_factory.mktemp(request.param), request.param))


def test_it_learns_and_all_else_is_bit_identical(native: Native) -> None:
    model, family = native.model, native.model.family
    batch = native.batch([0, 1], packing=False)
    with torch.no_grad():
        plain = model(batch).nll
    language = frozen_fingerprint(model)["language"]
    kept = model.kept_fingerprint()

    model.free_connector()

    kind = native.model.whole.config.model_type
    assert set(model.connector.within) == BETWEEN.get(kind, {"multi_modal_projector"})
    table = apply_train_plan(model, TrainPlan(connector="full", language="frozen"))
    rows = {row.part: row for row in table.rows}
    assert rows["connector"].trainable == rows["connector"].params > 0
    assert rows["vision"].trainable == rows["language"].trainable == 0
    assert table.params == sum({id(p): p.numel() for p in model.parameters()}.values())
    (decay, *others) = param_groups(model, {"connector": 3e-4}, {"connector": 0.1})
    assert (decay["name"], decay["lr"], decay["weight_decay"]) == ("connector.decay", 3e-4, 0.1)
    assert all(g["name"] == "connector.no_decay" and g["weight_decay"] == 0 for g in others)
    assert model.check_kept() == CONNECTOR_LEARNS
    with torch.no_grad():
        assert torch.equal(model(batch).nll, plain)  # in fp32 nothing is computed otherwise
    frozen = frozen_fingerprint(model)
    assert set(frozen) == {"vision", "language"} and frozen["language"] == language
    before = {name: p.detach().clone() for name, p in model.whole.named_parameters()}

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(batch).nll.sum().backward()
    optimizer.step()

    moved = {n for n, p in model.whole.named_parameters() if not torch.equal(p, before[n])}
    inside = {n for n in before if any(n.startswith(f"model.{name}.") for name in model.connector.within)}
    assert moved == inside and frozen_fingerprint(model) == frozen
    with torch.no_grad():
        learned = model(batch).nll
        with model.adapters_off():  # it stays what it is
            assert torch.equal(model(batch).nll, learned)
    assert not torch.equal(learned, plain) and len(per_sample(model(batch))) == 2
    state = model.trained_state()
    assert state.keys() == {"connector"} and state["connector"].facts["native"]["class"] == type(model.whole).__name__
    again, _ = load_native(LlmConfig(name_or_path=str(native.folder), precision="fp32"), CPU)
    again.free_connector()
    again.connector.load_state_dict(dict(state["connector"].tensors), strict=True)
    with torch.no_grad():
        assert torch.equal(again(batch).nll, learned)
    assert family.between(model.whole.model) == model.connector.within
    apply_train_plan(model, TrainPlan(connector="frozen", language="frozen"))  # of a later run that leaves it alone
    assert model.check_kept() is None and model.kept_fingerprint() != kept


def test_in_a_model_of_16_bits_its_weights_are_fp32(tmp_path: Path) -> None:
    tiny_native(tmp_path, "gemma3")
    cfg = ModelConfig.model_validate(
        {"native": {"name_or_path": str(tmp_path), "precision": "bf16"}, "connector": {"trainable": True}}
    )
    model, _ = build_vlm(cfg, compute_precision="bf16", device=CPU, seed=0)
    assert isinstance(model, NativeModel)
    apply_train_plan(model, TrainPlan(connector="full", language="frozen"))
    batch = Native(tmp_path).batch([0, 1], packing=False)

    model(batch).nll.sum().backward()

    assert {p.dtype for p in model.connector.parameters()} == {torch.float32}
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.connector.parameters())
    assert {p.dtype for p in model.language.parameters()} == {torch.bfloat16}
    assert model.connector.part is not None
    written = narrowed(model.whole.state_dict(), [model.connector.part])  # as others load it
    assert {t.dtype for t in written.values()} == {torch.bfloat16}
    name = "model.multi_modal_projector.mm_input_projection_weight"
    assert torch.equal(written[name], model.whole.state_dict()[name].bfloat16())
