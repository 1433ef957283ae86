"""Towers of every family give the patch tokens of their own model, stay frozen, and refuse files that do not fit."""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from beholder.config import VisionConfig
from beholder.model.vision import VisionTower, _hf_size, load_vision
from beholder.prepare.estimate import vision_shape
from beholder.types import UserError

from .conftest import CPU, Parts
from .tower_zoo import HF, build, shake

GRID = {"siglip": 16, "clip": None, "dinov2": 4, "repvit": 49}


def load(parts: Parts, family: str, **settings: Any) -> VisionTower:
    name, weights = parts.vision(family)
    return load_vision(
        VisionConfig.model_validate({"name_or_path": name, "weights": weights, "precision": "fp32"} | settings), CPU
    )


def noise(tower: VisionTower, m: int = 2, seed: int = 0) -> torch.Tensor:
    g, draw = tower.geometry, torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (m, 3, g.height, g.width), dtype=torch.uint8, generator=draw)


def copied(parts: Parts, tmp_path: Path, family: str = "siglip") -> Path:
    folder = tmp_path / "tower"
    shutil.copytree(parts.vision(family)[0], folder)
    return folder


def rewrite(folder: Path, change: Any) -> str:
    """The folder's weights after ``change(dict)``."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("family", ["siglip", "clip", "dinov2"])
def test_patches_are_the_models_own_last_tokens_without_class_token(parts: Parts, family: str) -> None:
    tower = load(parts, family)
    pixels = noise(tower)
    g = tower.geometry
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (g.mean, g.std))
    normal = (pixels / 255 - mean) / std
    extra = {"interpolate_pos_encoding": True} if family == "dinov2" else {}
    if family == "dinov2":
        extra = {}  # it always interpolates
    own = tower.backbone(pixel_values=normal, **extra).last_hidden_state

    got = tower(pixels)

    prefix = own.shape[1] - g.num_patches
    assert prefix == (0 if family == "siglip" else 1)
    assert got.shape == (2, g.num_patches, g.d_vision)
    # The same sums with the normalisation folded into one multiply-add.
    torch.testing.assert_close(got, own[:, prefix:], rtol=1e-4, atol=1e-5)


def test_timm_feature_maps_are_flattened_row_by_row(parts: Parts) -> None:
    tower = load(parts, "repvit")
    pixels = noise(tower, 1)
    g = tower.geometry
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (g.mean, g.std))
    own = tower.backbone.forward_features((pixels / 255 - mean) / std)  # type: ignore[operator]

    got = tower(pixels)[0]

    assert own.shape[2:] == (7, 7)
    for row, column in ((0, 0), (2, 5), (6, 6)):
        torch.testing.assert_close(got[7 * row + column], own[0, :, row, column], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("model", "shape"), [("swin_tiny_patch4_window7_224", (49, 768)), ("vit_tiny_patch16_224", (196, 192))])  # fmt: skip  # noqa: E501
def test_timm_towers_of_other_layouts_give_patches_too(tmp_path: Path, model: str, shape: tuple[int, int]) -> None:
    import timm

    path = tmp_path / "w.safetensors"
    whole = timm.create_model(model, pretrained=False)  # with its classifier, as files from the hub have it
    save_file({k: v.contiguous() for k, v in whole.state_dict().items()}, path)

    tower = load_vision(VisionConfig(name_or_path=f"timm/{model}", weights=str(path), precision="fp32"), CPU)

    assert (tower.geometry.num_patches, tower.geometry.d_vision) == shape
    maps = whole.eval().forward_features(torch.zeros(1, 3, 224, 224))
    own = maps[:, 1:] if maps.ndim == 3 else maps.flatten(1, 2)  # class token dropped; swin is channels-last
    got = tower._features(tower.backbone, torch.zeros(1, 3, 224, 224), 1)
    torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["siglip", "clip", "dinov2"])
def test_an_earlier_layer_can_be_chosen(parts: Parts, family: str) -> None:
    last, earlier = load(parts, family), load(parts, family, feature_layer=-2)
    pixels = noise(last)

    assert earlier.geometry.num_patches == last.geometry.num_patches
    assert not torch.allclose(earlier(pixels), last(pixels), atol=1e-3)
    states = last.backbone(
        pixel_values=torch.addcmul(last.get_buffer("shift"), pixels.float(), last.get_buffer("scale")),
        output_hidden_states=True,
    ).hidden_states
    torch.testing.assert_close(earlier(pixels), states[-2][:, -earlier.geometry.num_patches :], rtol=1e-4, atol=1e-5)


def test_a_tower_can_be_used_at_another_size_than_it_was_trained_at(parts: Parts, tmp_path: Path) -> None:
    folder = copied(parts, tmp_path)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"size": {"height": 48, "width": 48}}))

    tower = load_vision(VisionConfig(name_or_path=str(folder), precision="fp32"), CPU)

    assert (tower.geometry.height, tower.geometry.num_patches) == (48, 36)
    assert tower(noise(tower)).shape == (2, 36, 48)


def test_a_model_that_does_not_take_images_is_refused(parts: Parts, tmp_path: Path) -> None:
    folder = tmp_path / "not_a_tower"
    shutil.copytree(parts.llm(), folder)
    shutil.copy(Path(parts.vision()[0]) / "preprocessor_config.json", folder)
    with pytest.raises(UserError, match=r"cannot be run on plain|does not fit"):
        load_vision(VisionConfig(name_or_path=str(folder)), CPU)


def test_a_tower_never_leaves_eval_mode_and_never_makes_a_graph(parts: Parts) -> None:
    tower = load(parts, "repvit")
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    pixels = noise(tower)
    tower.train()

    first, again = tower(pixels), tower(pixels)

    assert not any(m.training for m in tower.modules()) and not first.requires_grad
    assert torch.equal(first, again)
    assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items()), "batch statistics moved"


def test_features_do_not_depend_on_the_company_of_an_image(parts: Parts) -> None:
    tower = load(parts, "siglip")
    pixels = noise(tower, 3)

    # Another batch size may be another blocking; worst seen 0.
    torch.testing.assert_close(tower(pixels[1:2])[0], tower(pixels)[1], rtol=1e-4, atol=1e-5)
    assert tower(pixels[:0]).shape == (0, 16, 48)


def test_images_of_another_size_are_refused(parts: Parts) -> None:
    tower = load(parts, "siglip")
    with pytest.raises(UserError, match=r"takes 32 x 32 images but got 32 x 16"):
        tower(torch.zeros(1, 3, 32, 16, dtype=torch.uint8))


def test_the_fingerprint_follows_weights_precision_layer_and_preprocessing_and_not_the_place(
    parts: Parts, tmp_path: Path
) -> None:
    folder = copied(parts, tmp_path)
    base = load(parts, "siglip").fingerprint()

    def of(path: Path, **settings: Any) -> str:
        return load_vision(
            VisionConfig.model_validate({"name_or_path": str(path), "precision": "fp32"} | settings), CPU
        ).fingerprint()

    assert of(folder) == base
    assert of(folder, precision="bf16") != base
    assert of(folder, feature_layer=-2) != base
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"image_mean": [0.4, 0.5, 0.5]}))
    assert of(folder) != base
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))

    def one_bit(weights: dict[str, torch.Tensor]) -> None:
        key = next(k for k in sorted(weights) if k.startswith("vision_model.encoder") and k.endswith("weight"))
        flat = weights[key].view(-1).view(torch.int32)
        flat[0] ^= 1 << 20

    rewrite(folder, one_bit)
    assert of(folder) != base


def test_a_missing_weight_is_named(parts: Parts, tmp_path: Path) -> None:
    lost = "vision_model.encoder.layers.1.mlp.fc1.weight"
    name = rewrite(copied(parts, tmp_path), lambda w: w.pop(lost))
    with pytest.raises(UserError, match=r"lack.*layers\.1\.mlp\.fc1\.weight"):
        load_vision(VisionConfig(name_or_path=name), CPU)


def test_a_weight_without_a_place_is_named(parts: Parts, tmp_path: Path) -> None:
    extra = "vision_model.encoder.layers.7.mlp.fc1.weight"
    name = rewrite(copied(parts, tmp_path), lambda w: w.update({extra: torch.zeros(2, 2)}))
    with pytest.raises(UserError, match=r"no place for.*layers\.7\.mlp"):
        load_vision(VisionConfig(name_or_path=name), CPU)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(parts: Parts, tmp_path: Path, value: float) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["vision_model.post_layernorm.bias"][3] = value

    name = rewrite(copied(parts, tmp_path), spoil)
    with pytest.raises(UserError, match=r"NaN or infinite weights in post_layernorm\.bias"):
        load_vision(VisionConfig(name_or_path=name), CPU)


def test_a_tower_without_preprocessing_is_refused(parts: Parts, tmp_path: Path) -> None:
    folder = copied(parts, tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"no preprocessor_config\.json"):
        load_vision(VisionConfig(name_or_path=str(folder)), CPU)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "nan"])
def test_timm_weights_are_loaded_strictly(parts: Parts, tmp_path: Path, change: str) -> None:
    name, path = parts.vision("repvit")
    assert path is not None
    weights = load_file(path)
    key = sorted(k for k in weights if k.endswith("weight") and weights[k].ndim == 4)[0]
    match change:
        case "missing":
            del weights[key]
        case "extra":
            weights["stages.9.conv.weight"] = torch.zeros(1)
        case "shape":
            weights[key] = weights[key][:1]
        case _:
            weights[key] = weights[key] * float("nan")
    save_file(weights, tmp_path / "w.safetensors")

    expected = {"missing": "lack", "extra": r"stages\.9\.conv", "shape": "another shape", "nan": "NaN or infinite"}
    with pytest.raises(UserError, match=expected[change]):
        load_vision(VisionConfig(name_or_path=name, weights=str(tmp_path / "w.safetensors")), CPU)


@pytest.mark.parametrize("name", ["dinov3 convnext", "pvt", "deit distilled", "swin", "hiera", "blip", "pixtral"])
def test_only_patches_are_patches(tmp_path: Path, name: str) -> None:
    """Pooled, class and distillation tokens are dropped, whether or not the config speaks of them; a pyramid's grid is
    the one at its end; a batch in one row is taken apart. `plan` counts the same."""
    build(HF[name], tmp_path)
    cfg = VisionConfig(name_or_path=str(tmp_path), precision="fp32")

    tower = load_vision(cfg, CPU)

    assert tower.geometry.num_patches == HF[name].patches == vision_shape(cfg).num_patches
    pixels = noise(tower, 3)
    together = tower(pixels)
    assert together.shape == (3, tower.geometry.num_patches, tower.geometry.d_vision)
    torch.testing.assert_close(together[1], tower(pixels[1:2])[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("model", "patches"), [("coat_lite_tiny", 49), ("lambda_resnet26t", 64), ("levit_128s", 16)])
def test_timm_towers_that_declare_nothing(tmp_path: Path, model: str, patches: int) -> None:
    """CoaT-Lite has a class token it does not tell of, the lambda layers a weight of rank 5."""
    cfg = timm_tower(tmp_path, model)

    tower = load_vision(cfg, CPU)

    assert tower.geometry.num_patches == patches == vision_shape(cfg).num_patches
    pixels = noise(tower)
    torch.testing.assert_close(tower(pixels)[1], tower(pixels[1:])[0], rtol=1e-3, atol=1e-3)


def test_a_pooled_output_is_refused_and_the_way_round_it_works(tmp_path: Path) -> None:
    cfg = timm_tower(tmp_path, "pit_ti_224")
    with pytest.raises(UserError, match=r"one token for the whole picture.*feature_layer: 2 takes its last"):
        load_vision(cfg, CPU)
    assert load_vision(cfg.model_copy(update={"feature_layer": 2}), CPU).geometry.num_patches == 49


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit-mae", r"random masking.*timm/vit_base_patch16_224\.mae"),
        ("qwen2-vl", "no tower that takes pictures alone.*SigLIP"),
        ("hgnet v2", "timm/hgnetv2"),
    ],
)
def test_what_is_no_tower_is_refused_with_what_to_take_instead(tmp_path: Path, name: str, words: str) -> None:
    build(HF[name], tmp_path)
    with pytest.raises(UserError, match=words):
        load_vision(VisionConfig(name_or_path=str(tmp_path)), CPU)


def timm_tower(folder: Path, model: str) -> VisionConfig:
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = timm.create_model(model, pretrained=False, num_classes=0)
        shake(built, built.pretrained_cfg["input_size"][1], matrices=False)
    path = folder / "w.safetensors"
    save_file({k: v.clone().contiguous() for k, v in built.state_dict().items()}, path)
    return VisionConfig(name_or_path=f"timm/{model}", weights=str(path), precision="fp32")


@pytest.mark.parametrize("kept", [0, 4, 200, 0.5, 0.999])
def test_damaged_weights_are_named(parts: Parts, tmp_path: Path, kept: float) -> None:
    """A download that stopped: nothing, half of the header's length, half of the header, half of the weights."""
    folder = copied(parts, tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    part = whole[: int(kept if kept > 1 else kept * len(whole))]
    (folder / "model.safetensors").write_bytes(part)
    with pytest.raises(UserError, match=rf"{folder}.*cannot be loaded"):
        load_vision(VisionConfig(name_or_path=str(folder)), CPU)
    (tmp_path / "w.safetensors").write_bytes(part)
    with pytest.raises(UserError, match=r"w\.safetensors' cannot be loaded.*get it again"):
        load_vision(VisionConfig(name_or_path="timm/test_vit", weights=str(tmp_path / "w.safetensors")), CPU)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("how", ["bin", "config", "index", "outside"])
def test_no_pickle_is_read_whatever_names_it(parts: Parts, tmp_path: Path, how: str) -> None:
    folder = copied(parts, tmp_path)
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    index = folder / "model.safetensors.index.json"
    if how == "config":
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "pytorch_model.bin"}))
    elif how in ("index", "outside"):
        (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
        where = "pytorch_model.bin" if how == "index" else "../model.safetensors"
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, where)}))
    else:
        (folder / "model.safetensors").unlink()
    expected = {
        "bin": r"has no model\.safetensors, only pytorch_model\.bin\. Weights are read from safetensors only",
        "config": r"config\.json names 'pytorch_model\.bin'", "index": r"index\.json names 'pytorch_model\.bin'",
        "outside": r"names '\.\./model\.safetensors'",
    }  # fmt: skip
    with pytest.raises(UserError, match=expected[how]) as e:
        load_vision(VisionConfig(name_or_path=str(folder), precision="fp32"), CPU)

    if how == "bin":  # the advice works, in a shell
        command = str(e.value).partition("in its folder: ")[2]
        subprocess.run(command.replace("python", shlex.quote(sys.executable), 1), shell=True, check=True, cwd=folder)
        converted = load_vision(VisionConfig(name_or_path=str(folder), precision="fp32"), CPU)
        assert converted.fingerprint() == load(parts, "siglip").fingerprint()


def test_a_pickle_that_timm_would_fetch_is_refused() -> None:
    with pytest.raises(UserError, match=r"only\. Weights are read from safetensors only.*model\.vision\.weights"):
        load_vision(VisionConfig(name_or_path="timm/legacy_xception.tf_in1k"), CPU)


def test_a_pickle_with_code_in_it_is_not_run(parts: Parts, tmp_path: Path) -> None:
    folder = copied(parts, tmp_path)
    (folder / "model.safetensors").unlink()
    mark = tmp_path / "ran"
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump({"w": Bomb(mark)}, file)
    with pytest.raises(UserError, match="safetensors only"):
        load_vision(VisionConfig(name_or_path=str(folder)), CPU)
    with pytest.raises(UserError, match="safetensors only"):
        weights = str(folder / "pytorch_model.bin")
        load_vision(VisionConfig(name_or_path="timm/test_vit", weights=weights), CPU)
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        "{", "[1]", "[" * 100_000,
        '{"size": {"height": "32", "width": 32}}', '{"size": {"height": 1e9, "width": 1e9}}',
        '{"size": {"height": 100000, "width": 100000}}', '{"size": {"height": 0, "width": 0}}',
        '{"size": {"shortest_edge": 32}, "do_center_crop": true, "crop_size": {"height": 1}}',
        '{"size": 32, "rescale_factor": "x"}', '{"size": 32, "rescale_factor": 0}', '{"size": 32, "resample": []}',
        '{"size": 32, "image_std": [1, 0, 1]}', '{"size": 32, "image_mean": [0.5]}', '{"size": 32, "image_mean": NaN}',
    ],
)  # fmt: skip
def test_damaged_preprocessing_files_are_named(parts: Parts, tmp_path: Path, text: str) -> None:
    folder = copied(parts, tmp_path)
    (folder / "preprocessor_config.json").write_text(text)
    with pytest.raises(UserError, match=r"preprocess"):
        load_vision(VisionConfig(name_or_path=str(folder)), CPU)


def test_mistaken_names_say_what_was_meant(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="repvit_m0_9"):
        load_vision(VisionConfig(name_or_path="timm/repvit_m09"), CPU)
    with pytest.raises(UserError, match="no file"):
        load_vision(VisionConfig(name_or_path="timm/repvit_m0_9", weights="nowhere.safetensors"), CPU)
    (tmp_path / "w.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"not \.safetensors"):
        load_vision(VisionConfig(name_or_path="timm/repvit_m0_9", weights=str(tmp_path / "w.bin")), CPU)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_vision(VisionConfig(name_or_path=str(tmp_path)), CPU)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"size": {"height": 384, "width": 384}}, (384, 384, "stretch", 0)),
        ({"size": 224}, (224, 224, "stretch", 0)),
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
            (224, 224, "shortest_edge", 256),
        ),
        ({"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224}, (224, 224, "shortest_edge", 224)),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, (224, 224, "shortest_edge", 256)),
        ({"size": {"shortest_edge": 224}}, (224, 224, "stretch", 0)),
    ],
)
def test_sizes_of_preprocessor_files(processor: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert _hf_size(processor, "x") == expected


@pytest.mark.parametrize("processor", [{"size": {"longest_edge": 384}}, {"size": {}}, {"max_num_patches": 256}])
def test_sizes_that_cannot_be_followed_are_refused(processor: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"aspect ratio|cannot tell the image size"):
        _hf_size(processor, "x")
