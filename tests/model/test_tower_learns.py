"""A vision tower that learns: only what was named changes, statistics stay, and what lies below keeps no graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from beholder.config import LoraConfig, VisionConfig
from beholder.model import adapters
from beholder.model.learned import learned_state, load_changed, unfreeze
from beholder.model.placement import Part, base_state
from beholder.model.vision import VisionTower, check_reached, load_vision
from beholder.types import UserError

from .conftest import CPU, Parts

FAMILIES = ("siglip", "test_vit", "test_efficientnet", "repvit")
Load = Callable[..., VisionTower]


@pytest.fixture(scope="module")
def tower(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """``tower(family, precision="fp32", …)``: a Hugging Face tower, or timm's smallest of a kind."""

    def load(family: str, **settings: Any) -> VisionTower:
        vision = loaded(family, **{"precision": "fp32"} | settings)
        for (
            module
        ) in vision.modules():  # timm starts what ends a residual branch at 0, and nothing before it would learn
            if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
                nn.init.ones_(module.weight)
        return vision

    def loaded(family: str, **settings: Any) -> VisionTower:
        if not family.startswith("test_"):
            name, weights = parts.vision(family)
            return load_vision(VisionConfig(name_or_path=name, weights=weights, **settings), CPU)
        import timm
        from safetensors.torch import save_file

        path = tmp_path_factory.getbasetemp() / f"{family}.safetensors"
        if not path.exists():
            torch.manual_seed(1)
            model = timm.create_model(family, pretrained=False, num_classes=0)
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
        return load_vision(VisionConfig(name_or_path=f"timm/{family}", weights=str(path), **settings), CPU)

    return load


def pictures(vision: VisionTower, count: int = 3) -> Tensor:
    g, draw = vision.geometry, torch.Generator().manual_seed(4)
    return torch.randint(0, 256, (count, 3, g.height, g.width), dtype=torch.uint8, generator=draw)


def on_tower(**settings: Any) -> LoraConfig:
    return LoraConfig(enable=True, r=4, alpha=8, dropout=0.0, **{"vit_layers": "last-2"} | settings)


def adapt(vision: VisionTower, stir: float = 0.1, **settings: Any) -> Part:
    part = vision.part
    adapters.attach(part, on_tower(**settings), seed=3)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in adapters.adapter_parameters(part).items():
            if "lora_B" in name:
                weight.copy_(stir * torch.randn(weight.shape, generator=draw))
    return part


def train_a_step(vision: VisionTower, learns: dict[str, nn.Parameter]) -> None:
    for weight in learns.values():
        weight.requires_grad_(True)
    vision.train()
    loss = vision(pictures(vision)).float().square().mean()
    loss.backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in learns.values())
    with torch.no_grad():
        for weight in learns.values():
            assert weight.grad is not None
            weight -= 0.1 * weight.grad / weight.grad.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_on_a_tower_change_no_feature_and_a_step_changes_them_alone(tower: Load, family: str) -> None:
    vision = tower(family)
    images = pictures(vision)
    with torch.no_grad():
        plain = vision(images)
    before = {k: t.clone() for k, t in base_state(vision.part).items()}
    part = adapt(vision, stir=0.0)
    with torch.no_grad():
        fresh = vision(images)
    assert torch.equal(fresh, plain)

    # of a B of 0, A learns nothing
    ups = {n: w for n, w in adapters.adapter_parameters(part).items() if "lora_B" in n}
    train_a_step(vision, ups)

    after = base_state(part)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before), "batch statistics"
    with torch.no_grad():
        assert not torch.equal(vision(images), plain)
        with adapters.adapters_off(part):
            assert torch.equal(vision(images), plain)


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("siglip", ("all-linear",)), ("test_vit", ("qkv", "fc1")), ("repvit", ("all-linear",)),
        ("test_efficientnet", ("all-linear",)), ("test_efficientnet", (r"blocks\..*\.conv_dw",)),
        ("test_efficientnet", ("conv_exp",)),
    ],
)  # fmt: skip
def test_merged_into_linear_one_by_one_depthwise_and_wide_convolutions_they_compute_the_same(
    tower: Load, family: str, modules: tuple[str, ...]
) -> None:
    vision = tower(family)
    part, images = adapt(vision, vit_target_modules=modules, vit_layers="all"), pictures(vision)
    with torch.no_grad():
        apart = vision(images)
        with adapters.adapters_off(part):
            plain = vision(images)
        before = {k: t.clone() for k, t in base_state(part).items()}
        with adapters.merged(part):
            together = vision(images)
        again = vision(images)

    assert (apart - plain).abs().max() > 100 * (apart - together).abs().max(), "the adapters do nothing"
    assert torch.allclose(apart, together, rtol=1e-3, atol=1e-4 * float(apart.abs().max()))
    assert torch.equal(again, apart)
    assert all(torch.equal(t, base_state(part)[k]) for k, t in before.items())

    # merged for good into a fresh tower, from the files
    state = learned_state(part)["vision_adapter"]
    fresh = tower(family)
    adapters.merge_in(fresh.part, state)
    with torch.no_grad():
        assert torch.allclose(fresh(images), together, rtol=1e-4, atol=1e-5 * float(apart.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_unfrozen_block_learns_in_fp32_alone_and_its_weights_come_back_bit_for_bit(
    tower: Load, family: str, precision: str
) -> None:
    vision = tower(family, precision=precision)
    part = vision.part
    before = {k: t.clone() for k, t in base_state(part).items()}
    unfreeze(part, ("last-1",))
    check_reached(vision.part)
    own = dict(part.module.get_submodule(part.unfrozen[0]).named_parameters(prefix=part.unfrozen[0]))
    assert all(p.dtype == torch.float32 for p in own.values())
    assert vision(pictures(vision)).dtype == vision.dtype

    train_a_step(vision, {n: p for n, p in own.items() if p.ndim > 1})

    changed = {k for k, t in base_state(part).items() if not torch.equal(t.to(before[k].dtype), before[k])}
    assert changed and all(k.startswith(part.unfrozen[0] + ".") for k in changed)
    assert not any("running" in k for k in changed), "batch statistics moved"
    state = learned_state(part)["vision"]
    other = tower(family, precision=precision)
    unfreeze(other.part, ("last-1",))
    load_changed(other.part, state)
    with torch.no_grad():
        assert torch.equal(other(pictures(other)), vision(pictures(vision)))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_lies_below_the_lowest_block_that_learns_keeps_no_graph(tower: Load, family: str) -> None:
    vision = tower(family)
    part = vision.part
    unfreeze(part, ("last-1",))
    part.module.get_submodule(part.blocks[-1]).requires_grad_(True)
    graph: dict[str, bool] = {}
    for name in part.blocks:
        part.module.get_submodule(name).register_forward_hook(
            lambda _m, _x, out, n=name: graph.update({n: (out[0] if isinstance(out, tuple) else out).requires_grad})
        )

    vision(pictures(vision))

    assert [n for n, kept in graph.items() if kept] == [part.blocks[-1]] and len(graph) == len(part.blocks)


def test_blocks_whose_output_is_not_used_are_refused(tower: Load) -> None:
    vision = tower("siglip", feature_layer=-2)
    unfreeze(vision.part, ("last-1",))

    with pytest.raises(UserError, match=r"do not depend on .*layers\.\*.*feature_layer takes an earlier layer's"):
        check_reached(vision.part)


def test_a_layer_learns_itself_or_through_an_adapter_not_both(tower: Load) -> None:
    vision = tower("siglip")
    unfreeze(vision.part, ("last-1",))

    with pytest.raises(UserError, match=r"would get adapters, and model\.vision\.unfreeze lets their weights learn"):
        adapters.attach(vision.part, on_tower(vit_layers="last-1"), seed=0)


def test_weights_of_another_tower_or_not_finite_are_refused_and_nothing_is_loaded(tower: Load) -> None:
    one, other = tower("siglip").part, tower("siglip").part
    unfreeze(one, ("last-1",))
    unfreeze(other, ("last-1",))
    state = learned_state(one)["vision"]
    before = {k: t.clone() for k, t in base_state(other).items()}
    key = next(iter(state.tensors))

    for spoil, says in (
        ({k: t for k, t in state.tensors.items() if k != key}, "is missing"),
        (state.tensors | {"more": torch.ones(1)}, "more has no place here"),
        (state.tensors | {key: torch.ones(1)}, r"is \[1\]"),
        (state.tensors | {key: torch.full_like(state.tensors[key], torch.nan)}, "NaN or infinite"),
    ):
        with pytest.raises(UserError, match=says):
            load_changed(other, type(state)(spoil, state.facts))
    assert all(torch.equal(t, base_state(other)[k]) for k, t in before.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_from_what_is_kept_below_the_lowest_block_that_learns_the_features_are_the_same(
    tower: Load, family: str, precision: str
) -> None:
    plain, vision = tower(family, precision=precision), tower(family, precision=precision)
    images = pictures(vision)
    before = vision.kept_fingerprint()
    assert before == plain.fingerprint(), "of a frozen tower its features are kept"
    part = adapt(vision, vit_layers="last-1")
    assert vision.lowest == part.blocks[-1] and vision.check_kept() is None

    kept = vision.keep(images)

    with torch.no_grad():
        assert torch.equal(vision.finish(kept), vision(images))
    below = vision.kept_fingerprint()
    with torch.no_grad():
        part.module.get_submodule(part.blocks[-1]).get_parameter(
            next(
                n for n, _ in part.module.get_submodule(part.blocks[-1]).named_parameters() if "base_layer.weight" in n
            )
        ).add_(1)
    assert vision.kept_fingerprint() == below != before, "what learns does not decide what is kept"


def test_of_a_tower_that_learns_below_its_blocks_nothing_is_kept(tower: Load) -> None:
    vision = tower("siglip")
    unfreeze(vision.part, ("embeddings",))
    vision.part.module.get_submodule("embeddings").requires_grad_(True)

    assert vision.lowest is None and vision.check_kept() == "something outside of its blocks learns"


@pytest.mark.parametrize("family", ["siglip", "test_vit"])
@pytest.mark.parametrize("before", ["one", "all"])
def test_a_block_may_learn_of_which_modules_learned_before(tower: Load, family: str, before: str) -> None:
    """In a tower of 16 bits: what learns computes in fp32, what is around it does not."""
    plain, vision = tower(family, precision="bf16"), tower(family, precision="bf16")
    last = plain.part.blocks[-1]
    inner = [n for n, m in plain.part.module.get_submodule(last).named_modules() if n and list(m.parameters(False))]
    unfreeze(vision.part, [f"{last}.{n}" for n in (inner if before == "all" else inner[-1:])])
    with torch.no_grad():
        assert vision(pictures(vision)).dtype == torch.bfloat16

    unfreeze(vision.part, ("last-1",))
    unfreeze(plain.part, ("last-1",))

    with torch.no_grad():
        assert torch.equal(vision(pictures(vision)), plain(pictures(plain)))
    assert vision.part.changed == (last,) and set(vision.part.widened) == {last}
