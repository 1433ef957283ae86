"""What goes into the lowest layer of the language model that learns, kept: equal losses and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from beholder.config import LoraConfig
from beholder.model import adapters
from beholder.model.plan import TrainPlan, apply_train_plan
from beholder.store.layers import POSITIONS, LayerStore

from .conftest import Build, Built

LAST = LoraConfig(enable=True, r=4, alpha=8, dropout=0.0, llm_layers="last-1")


def open_store(folder: Path, built: Built, *, max_bytes: int = 10**8) -> LayerStore:
    language = built.model.language
    return LayerStore(
        folder, {"below": built.model.below_fingerprint()}, width=language.d_text, dtype=language.dtype,
        max_bytes=max_bytes,
    )  # fmt: skip


def learn(built: Built, packing: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and gradients of a step."""
    built.model.train()
    built.model.zero_grad()
    nll = built.model(built.batch(packing=packing)).nll
    nll.sum().backward()
    return nll.detach(), {n: p.grad.clone() for n, p in built.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("llm", ["qwen3", "smollm2", "llama"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_pass_that_begins_at_what_was_kept_equals_the_plain_one_bit_for_bit(
    build: Build, tmp_path: Path, llm: str, packing: bool, precision: str
) -> None:
    built = build(llm, precision=precision, lora=LAST)
    with torch.no_grad():
        for name, weight in adapters.adapter_parameters(built.model.language.part).items():
            if "lora_B" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)))
    apply_train_plan(built.model, TrainPlan(connector="frozen", language="lora"))
    assert built.model.check_layers_kept() is None
    plain = learn(built, packing)

    with open_store(tmp_path, built) as store:
        built.model.layer_keeper = store
        first, second = learn(built, packing), learn(built, packing)

        assert (store.computed, store.reused) == (5, 5)
    for losses, gradients in (first, second):
        assert torch.equal(losses, plain[0])
        assert gradients.keys() == plain[1].keys() and all(torch.equal(g, plain[1][k]) for k, g in gradients.items())


def test_layers_below_are_not_run_once_everything_is_kept(build: Build, tmp_path: Path) -> None:
    built = build(lora=LAST)
    apply_train_plan(built.model, TrainPlan(connector="frozen", language="lora"))
    calls: list[int] = []
    built.model.language.model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(0))
    with open_store(tmp_path, built) as store:
        built.model.layer_keeper = store
        learn(built, False)
        assert calls == [0]
        learn(built, False)
        assert calls == [0]
        built.model.eval()
        built.model(built.batch())
        assert calls == [0, 0], "what is measured goes the whole way"


def test_another_picture_or_another_text_is_another_row_and_a_full_store_goes_on(build: Build, tmp_path: Path) -> None:
    built = build(lora=LAST)
    apply_train_plan(built.model, TrainPlan(connector="frozen", language="lora"))
    plain = learn(built, False)
    room = 3 * POSITIONS * built.model.language.d_text * 4
    with open_store(tmp_path, built, max_bytes=room) as store:
        built.model.layer_keeper = store
        for _ in range(2):
            losses, gradients = learn(built, False)
            assert torch.equal(losses, plain[0]) and all(torch.equal(g, plain[1][k]) for k, g in gradients.items())
        assert store.over_cap > 0
    samples = built.samples(["a red square"]), built.samples(["a red squire"])
    assert samples[0][0][1].ids.tolist() != samples[1][0][1].ids.tolist()


def test_it_is_refused_where_something_before_the_layers_learns_or_the_first_layer_does(build: Build) -> None:
    built = build(lora=LAST)
    apply_train_plan(built.model, TrainPlan(language="lora"))
    assert built.model.check_layers_kept() == "connector or tower learn, so what its layers are given changes"

    built = build(lora=LAST.model_copy(update={"llm_layers": "all"}))
    apply_train_plan(built.model, TrainPlan(connector="frozen", language="lora"))
    assert built.model.check_layers_kept() == "it learns from its first layer on"

    built = build(lora=LAST, gradient_checkpointing=True)
    apply_train_plan(built.model, TrainPlan(connector="frozen", language="lora"))
    why = built.model.check_layers_kept()
    assert why is not None and "without what was kept (model.llm.gradient_checkpointing)" in why
