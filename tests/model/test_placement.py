"""One explicit list of layers, from whatever names them: where they stand, their names, an expression of all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from beholder.config import Layers, LoraConfig, VisionConfig
from beholder.model.placement import (
    Part,
    Selector,
    choose,
    choose_modules,
    language_part,
    render_sites,
    resolve_targets,
    selectors,
    tower_blocks,
    tower_part,
)
from beholder.model.vision import empty_tower
from beholder.types import UserError

from .conftest import Build

SHAPES = Path(__file__).parents[2] / "configs" / "shapes"
SEED_LANGUAGE = (
    r"language_model.layers.({}).(self_attn.(q_proj|k_proj|v_proj|o_proj)|mlp.(gate_proj|up_proj|down_proj))"
)
SEED_VISION = r"visual.blocks.({}).(attn.(qkv|proj)|mlp.(linear_fc1|linear_fc2))"


@pytest.fixture(scope="module")
def qwen3_vl_4b() -> dict[str, Part]:
    """The parts of a model of Qwen3-VL-4B's shape, without memory."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    shape = json.loads((SHAPES / "qwen3_vl_4b.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        whole: Any = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**shape))
    lm, tower = whole.model.language_model, whole.model.visual
    layers = tuple(f"layers.{k}" for k in range(len(lm.layers)))
    return {
        "vision": Part("vision", "qwen3-vl", tower, tower_blocks(tower), prefix="model.visual."),
        "language": Part("language", "qwen3-vl", lm, layers, prefix="model.language_model."),
    }


@pytest.mark.parametrize(
    ("language", "vision", "counts", "params"),
    [
        (2, 0, (14, 0), 1_835_008), (4, 0, (28, 0), 3_670_016), (0, 2, (0, 8), 524_288), (0, 4, (0, 16), 1_048_576),
        (0, 6, (0, 24), 1_572_864), (2, 2, (14, 8), 2_359_296), (2, 4, (14, 16), 2_883_584),
        (2, 6, (14, 24), 3_407_872), (4, 6, (28, 24), 5_242_880),
    ],
)  # fmt: skip
def test_the_seeds_expressions_and_last_k_give_the_same_printed_list_on_a_model_of_4b(
    qwen3_vl_4b: dict[str, Part], language: int, vision: int, counts: tuple[int, int], params: int
) -> None:
    seeds = [
        pattern.format("|".join(str(depth - k) for k in range(count, 0, -1)))
        for pattern, count, depth in ((SEED_LANGUAGE, language, 36), (SEED_VISION, vision, 24))
        if count
    ]
    by_name = LoraConfig(enable=True, target_modules=tuple(seeds))
    by_place = LoraConfig(
        enable=True, target_modules=("all-linear",), llm_layers=f"last-{language}", vit_layers=f"last-{vision}"
    )

    found = [
        {name: resolve_targets(qwen3_vl_4b[name], s, 16) for name, s in selectors(cfg, qwen3_vl_4b).items()}
        for cfg in (by_name, by_place)
    ]

    assert found[0] == found[1]
    assert [render_sites(s) for s in found[0].values()] == [render_sites(s) for s in found[1].values()]
    assert (len(found[0].get("language", [])), len(found[0].get("vision", []))) == counts
    assert sum(s.params for sites in found[0].values() for s in sites) == params


def test_an_expression_of_whole_names_as_ms_swift_writes_it_means_the_part_it_names(
    qwen3_vl_4b: dict[str, Part],
) -> None:
    full = r"^model\.visual\.blocks\.2[0-3]\.(attn\.(qkv|proj)|mlp\.linear_fc[12])$"

    wanted = selectors(LoraConfig(enable=True, target_modules=(full,)), qwen3_vl_4b)

    assert list(wanted) == ["vision"]
    assert len(resolve_targets(qwen3_vl_4b["vision"], wanted["vision"], 16)) == 16


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"vit_layers": "none"}, r"alone, but model\.lora\.vit_layers is none, so it would go nowhere"),
        ({"vit_layers": "last-0"}, r"vit_layers is last-0, so it would go nowhere"),
        ({"vit_layers": ()}, r"vit_layers is \[\], so it would go nowhere"),
        (
            {"vit_layers": "last-2", "vit_target_modules": ("qkv",)},
            r"and model\.lora\.vit_target_modules \(qkv\) names",
        ),
    ],
)
def test_an_expression_of_the_tower_beside_settings_of_the_tower_that_say_something_else_is_refused(
    qwen3_vl_4b: dict[str, Part], settings: dict[str, Any], says: str
) -> None:
    lora = LoraConfig(enable=True, target_modules=(r"visual\.blocks\.\d+\.attn\.qkv", "q_proj"), **settings)

    with pytest.raises(UserError, match=says):
        selectors(lora, qwen3_vl_4b)


def test_an_expression_of_the_tower_is_narrowed_by_its_layers(qwen3_vl_4b: dict[str, Part]) -> None:
    qkv = r"visual\.blocks\.\d+\.attn\.qkv"

    def sites(**settings: Any) -> int:
        wanted = selectors(LoraConfig(enable=True, target_modules=(qkv,), **settings), qwen3_vl_4b)
        return len(resolve_targets(qwen3_vl_4b["vision"], wanted["vision"], 2))

    assert sites() == 24 and sites(vit_layers="last-2") == 2
    assert "vision" not in selectors(LoraConfig(enable=True, target_modules=("q_proj",)), qwen3_vl_4b)


def test_an_expression_that_crosses_towers_is_refused(qwen3_vl_4b: dict[str, Part]) -> None:
    crossing = r".*\.(layers|blocks)\.\d+\.mlp\..*"

    with pytest.raises(UserError, match=r"crosses towers: it matches .*layers\.\*\.mlp.* and .*blocks\.\*\.mlp"):
        selectors(LoraConfig(enable=True, target_modules=(crossing,)), qwen3_vl_4b)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [0, 1, 2, 3]), ("none", []), ("last-0", []), ("last-2", [2, 3]), ("first-1", [0]), ((3, 1, 1), [1, 3]),
        ("last-4", [0, 1, 2, 3]),
    ],
)  # fmt: skip
def test_layers_are_chosen_by_where_they_stand_or_by_number(layers: Layers, expected: list[int]) -> None:
    part = Part("language", "lm", nn.Module(), tuple(f"layers.{k}" for k in range(4)))

    assert choose(part, layers, "model.lora.llm_layers") == tuple(f"layers.{k}" for k in expected)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ("last-5", r"model\.lora\.llm_layers is last-5, but lm has 4 decoder layers: layers\.0, layers\.1"),
        ("first-9", "is first-9, but lm has 4"),
        ((0, 4, 17), "names 4, 17, but lm has 4 decoder layers, 0 to 3"),
    ],
)
def test_more_layers_than_there_are_is_an_error_with_both_numbers(layers: Layers, says: str) -> None:
    part = Part("language", "lm", nn.Module(), tuple(f"layers.{k}" for k in range(4)))

    with pytest.raises(UserError, match=says):
        choose(part, layers, "model.lora.llm_layers")


def test_layers_and_modules_are_multiplied_and_an_empty_product_is_said(build: Build) -> None:
    part = build().model.language.part

    def names(*modules: str, layers: Layers) -> list[str]:
        return [s.name for s in resolve_targets(part, Selector(modules, layers), 2)]

    assert names("q_proj", layers="last-1") == ["model.layers.1.self_attn.q_proj"]
    assert names("all-linear", layers=(0,)) == [f"model.layers.0.{n}" for n in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj",
    )]  # fmt: skip
    with pytest.raises(UserError, match=r"matches nothing in the layers that .*\(last-1\) chooses: model\.layers\.1"):
        names(r"layers\.0\..*q_proj", layers="last-1")


TOWERS = {
    "vit_tiny_patch16_224": (12, "blocks.0", "blocks.11"),
    "repvit_m0_9": (20, "stages.0.blocks.0", "stages.3.blocks.1"),
    "tf_efficientnet_lite0": (16, "blocks.0.0", "blocks.6.0"),
    "convnext_atto": (12, "stages.0.blocks.0", "stages.3.blocks.1"),
    "resnet18": (8, "layer1.0", "layer4.1"),
    "swin_tiny_patch4_window7_224": (12, "layers.0.blocks.0", "layers.3.blocks.1"),
}


@pytest.mark.parametrize("name", TOWERS)
def test_the_blocks_of_timm_towers_are_found_through_their_stages(name: str) -> None:
    blocks = tower_blocks(empty_tower(VisionConfig(name_or_path=f"timm/{name}")))

    assert (len(blocks), blocks[0], blocks[-1]) == TOWERS[name]


def test_all_linear_on_a_convolutional_tower_are_its_one_by_one_convolutions_and_others_are_named() -> None:
    import timm

    with torch.device("meta"):
        part = tower_part(timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0))

    linear = resolve_targets(part, Selector(("all-linear",), "last-2"), 16)
    depthwise = resolve_targets(part, Selector(("conv_dw",), "last-2"), 16)

    assert [(s.name, s.d_in, s.d_out) for s in linear] == [
        ("blocks.5.3.conv_pw", 192, 1152), ("blocks.5.3.conv_pwl", 1152, 192),
        ("blocks.6.0.conv_pw", 192, 1152), ("blocks.6.0.conv_pwl", 1152, 320),
    ]  # fmt: skip
    assert [(s.name, s.d_in, s.d_out) for s in depthwise] == [
        ("blocks.5.3.conv_dw", 25, 1152), ("blocks.6.0.conv_dw", 9, 1152)
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"'bn1' matches blocks\.\*\.\*\.bn1 .*which are no linear layers"):
        resolve_targets(part, Selector(("bn1",), "last-2"), 16)


def test_a_tower_without_a_list_of_blocks_is_refused_with_the_way_out() -> None:
    part = Part("vision", "odd", nn.Sequential(nn.Linear(2, 2)), ())

    with pytest.raises(UserError, match=r"no list of blocks was found, .* set model\.lora\.vit_layers: none"):
        resolve_targets(part, Selector(("all-linear",), "last-1"), 2)


def test_modules_to_unfreeze_are_stages_blocks_or_the_last_blocks() -> None:
    import timm

    with torch.device("meta"):
        part = tower_part(timm.create_model("repvit_m0_9", pretrained=False, num_classes=0), "repvit")

    assert choose_modules(part, ("stages.3.blocks.1", "stages.3"), "unfreeze") == ("stages.3",)
    assert choose_modules(part, ("last-2",), "unfreeze") == ("stages.3.blocks.0", "stages.3.blocks.1")
    with pytest.raises(UserError, match=r"unfreeze 'stage\.3' is no module of repvit .*Nearest: stages\.3"):
        choose_modules(part, ("stage.3",), "unfreeze")


def test_a_language_model_and_its_tower_have_names_of_their_own_in_a_joined_model(build: Build) -> None:
    """``q_proj`` is both SigLIP's and the language model's; which layers of which is said by where it stands."""
    lora = LoraConfig(
        enable=True, r=2, llm_layers="last-1", vit_layers="first-1", target_modules=("q_proj",),
        vit_target_modules=("q_proj", "fc1"),
    )  # fmt: skip
    built = build(lora=lora)

    parts = built.model.parts()

    assert [s.name for s in parts["language"].adapters] == ["model.layers.1.self_attn.q_proj"]
    assert [s.name.rpartition("layers.")[2] for s in parts["vision"].adapters] == ["0.self_attn.q_proj", "0.mlp.fc1"]
    assert language_part(built.model.language.model).blocks == ("model.layers.0", "model.layers.1")
