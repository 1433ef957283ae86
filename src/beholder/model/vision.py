"""The door to outside vision towers: Hugging Face models and timm backbones become one `VisionTower`.

A tower takes uint8 images of its own size and gives ``[M, P, Dv]`` patch features; class and register tokens are
dropped. Decoding and resizing are `data.images`' business, which follows the `ImageGeometry` made here. Nothing here is
ever trained.
"""

import difflib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from beholder.config import VisionConfig
from beholder.model.weights import DTYPES, check_finite, check_loading_info, freeze, hash_module, listed, loading
from beholder.types import ImageGeometry, UserError

RESAMPLE: dict[int, Literal["nearest", "lanczos", "bilinear", "bicubic"]] = {
    0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic",
}  # fmt: skip
"""Pillow's numbers, which preprocessor files carry."""

HEADS = ("classifier.", "pooler.", "head.", "lm_head.", "logit_", "cls_classifier.", "distillation_classifier.")
"""Checkpoint keys of a single-tower file that are a head on top of the tower, not part of it."""


class VisionTower(nn.Module):
    """A frozen backbone with its own normalisation. Always in eval mode, never a graph, in whatever mode its owner is.

    ``features`` maps normalised pixels ``[m, 3, h, w]`` to ``[m, P, Dv]``; ``identity`` says, for the fingerprint, what
    the weights alone do not (architecture and its settings).
    """

    def __init__(
        self,
        backbone: nn.Module,
        features: Callable[[nn.Module, Tensor], Tensor],
        geometry: ImageGeometry,
        identity: Mapping[str, Any],
        dtype: torch.dtype,
        name: str,
    ) -> None:
        super().__init__()
        self.name = name
        self.backbone = backbone
        self.geometry = geometry
        self._features, self._identity, self.dtype = features, dict(identity), dtype
        std, mean = torch.tensor(geometry.std), torch.tensor(geometry.mean)
        self.register_buffer("scale", (1 / (255 * std)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(1, 3, 1, 1), persistent=False)
        self._fingerprint: str | None = None
        freeze(self)

    def train(self, mode: bool = True) -> "VisionTower":
        """Stays in eval mode: batch statistics and dropout of a frozen tower would change its features."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: UInt8[Tensor, "m 3 h w"]) -> Float[Tensor, "m p dv"]:
        """Patch features in the tower's precision. Raises `UserError` for images of another size."""
        g = self.geometry
        if pixels.shape[2:] != (g.height, g.width):
            raise UserError(
                f"the tower takes {g.height} x {g.width} images but got {pixels.shape[2]} x {pixels.shape[3]}; prepare "
                "them with the tower's own geometry"
            )
        if pixels.shape[0] == 0:
            return pixels.new_zeros(0, g.num_patches, g.d_vision, dtype=self.dtype)
        scale, shift = self.get_buffer("scale"), self.get_buffer("shift")
        with torch.autocast(pixels.device.type, enabled=False):
            normalised = torch.addcmul(shift, pixels.float(), scale).to(self.dtype)
            return self._features(self.backbone, normalised)

    def fingerprint(self) -> str:
        """sha256 over weights, architecture, precision and preprocessing: what decides the features of an image."""
        if self._fingerprint is None:
            g = self.geometry
            header = json.dumps(
                {**self._identity, "dtype": str(self.dtype), "geometry": [getattr(g, f) for f in g.__slots__]},
                sort_keys=True, default=str,
            )  # fmt: skip
            self._fingerprint = hash_module(self.backbone, header)
        return self._fingerprint


def load_vision(cfg: VisionConfig, device: torch.device) -> VisionTower:
    """The tower named by the settings, strictly loaded, frozen, on ``device``.

    ``timm/<name>`` goes to timm, everything else to Hugging Face. Raises `UserError` for unknown names, files that do
    not fit the architecture, NaN weights, and preprocessing it cannot follow.
    """
    load = _load_timm if cfg.name_or_path.startswith("timm/") else _load_hf
    return load(cfg, device)


# ---------------------------------------------------------------------------------------------------------------
# Hugging Face


def _load_hf(cfg: VisionConfig, device: torch.device) -> VisionTower:
    from transformers import AutoConfig, AutoModel

    name, dtype = cfg.name_or_path, DTYPES[cfg.precision]
    if cfg.weights is not None:
        raise UserError("model.vision.weights belongs to timm/<name> towers; put the weights into the folder instead")
    where: dict[str, Any] = {"revision": cfg.revision, "trust_remote_code": cfg.trust_remote_code}
    wanted = "Give a Hugging Face vision model (hub name or folder with config.json and safetensors), or timm/<name>."
    with loading(f"model.vision.name_or_path {name!r}", wanted):
        config = AutoConfig.from_pretrained(name, **where)
        part = getattr(config, "vision_config", None)
        model, info = AutoModel.from_pretrained(
            name, config=part or config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **where
        )
    _drop_pooling(model)
    check_loading_info(info, model, name, other_parts=HEADS if part is None else None)
    check_finite(model, name)
    processor = _preprocessor(name, where)
    part = part or config
    height, width, resize, resize_to = _hf_size(processor, name)
    rescale = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    mean, std = processor.get("image_mean") or 0.0, processor.get("image_std") or 1.0
    if not processor.get("do_normalize", True):
        mean, std = 0.0, 1.0
    prefix, grid = 0, None
    patch = None if hasattr(part, "hidden_sizes") else getattr(part, "patch_size", None)  # hidden_sizes: a pyramid
    if patch is not None:
        ph, pw = patch if isinstance(patch, list | tuple) else (patch, patch)
        grid = (height // ph) * (width // pw)

    def features(backbone: nn.Module, pixels: Tensor) -> Tensor:
        extra = {"interpolate_pos_encoding": True} if interpolate else {}
        if cfg.feature_layer == -1:
            out = backbone(pixel_values=pixels, **extra).last_hidden_state
        else:
            states = backbone(pixel_values=pixels, output_hidden_states=True, **extra).hidden_states
            if not -len(states) <= cfg.feature_layer < len(states):
                raise UserError(
                    f"model.vision.feature_layer is {cfg.feature_layer}, but {cfg.name_or_path} has {len(states)} "
                    f"hidden states: give -{len(states)} to {len(states) - 1} (-1 is the final output)"
                )
            out = states[cfg.feature_layer]
        return (out.flatten(2).transpose(1, 2) if out.ndim == 4 else out)[:, prefix:]

    trained_at = getattr(part, "image_size", None)
    trained_at = trained_at[0] if isinstance(trained_at, list | tuple) else trained_at
    interpolate = (
        trained_at not in (None, height) and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    )
    model = model.to(device)
    freeze(model)
    shape = _probe(model, features, height, width, device, dtype, name)
    if grid is not None:
        registers = int(getattr(part, "num_register_tokens", 0) or 0)
        prefix = shape[0] - grid
        if prefix not in (0, 1, 1 + registers):
            raise UserError(
                f"{name}: {shape[0]} output tokens for a grid of {grid} patches ({height} x {width} pixels, patch "
                f"{patch}); this tower's token layout is not supported"
            )
    geometry = ImageGeometry(
        height, width, shape[0] - prefix, shape[1],
        mean=_triple(mean, 255 * rescale), std=_triple(std, 255 * rescale),
        resize=resize, resize_to=resize_to, resample=RESAMPLE.get(processor.get("resample", 3), "bicubic"),
    )  # fmt: skip
    skip = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"}
    settings = {k: v for k, v in part.to_dict().items() if k not in skip}
    identity = {"class": type(model).__name__, "config": settings, "feature_layer": cfg.feature_layer}
    return VisionTower(model, features, geometry, identity, dtype, cfg.name_or_path).to(device)


def _drop_pooling(model: Any) -> None:
    """Remove the pooling head: its output is never used, and some checkpoints do not even have its weights."""
    if getattr(model, "use_head", False):
        model.use_head = False
        del model.head
    if isinstance(getattr(model, "pooler", None), nn.Module) and type(model).__name__.startswith(("ViT", "DeiT")):
        model.pooler = None


def _preprocessor(name: str, where: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's preprocessing file as a plain dict; no image processor class (and no torchvision) is
    involved."""
    from transformers.utils.hub import cached_file

    for file in ("preprocessor_config.json", "processor_config.json"):
        path = cached_file(
            name, file, revision=where["revision"],
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        if path is not None:
            found = json.loads(Path(path).read_text())
            return found.get("image_processor", found)
    raise UserError(
        f"{name}: no preprocessor_config.json, so the image size and normalisation the tower was trained with are "
        "unknown. Save the tower's image processor beside its weights."
    )


def _hf_size(processor: Mapping[str, Any], name: str) -> tuple[int, int, Literal["stretch", "shortest_edge"], int]:
    """(height, width, how to get there, short side before the crop) from ``size``, ``crop_size`` and ``crop_pct``."""
    size, crop = processor.get("size"), processor.get("crop_size")
    size = {"height": size, "width": size} if isinstance(size, int) else dict(size or {})
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else dict(crop or {})
    if processor.get("max_num_patches") or "longest_edge" in size:
        raise UserError(
            f"{name}: its preprocessing keeps the aspect ratio (variable number of patches), which is not supported; "
            "use a fixed-resolution checkpoint of the family, such as siglip2-…-patch16-256"
        )
    short = size.get("shortest_edge")
    if short and processor.get("do_center_crop", False) and crop:
        return crop["height"], crop["width"], "shortest_edge", short
    if short and (crop_pct := processor.get("crop_pct")) and short < 384:
        return short, short, "shortest_edge", int(short / crop_pct)
    if short:
        return short, short, "stretch", 0
    if "height" in size and "width" in size:
        return size["height"], size["width"], "stretch", 0
    raise UserError(
        f"{name}: cannot tell the image size from preprocessor_config.json (size = {processor.get('size')!r})"
    )


def _triple(value: float | list[float], divisor: float) -> tuple[float, float, float]:
    """Three channel values for pixels scaled to 0..1, from a file written for pixels scaled by ``divisor / 255``."""
    r, g, b = value if isinstance(value, list | tuple) else (value, value, value)
    return (r / divisor, g / divisor, b / divisor)


@torch.no_grad()
def _probe(
    model: nn.Module,
    features: Callable[[nn.Module, Tensor], Tensor],
    height: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    name: str,
) -> tuple[int, int]:
    """(tokens, width) the backbone gives for one grey image, which must be finite."""
    try:
        out = features(model, torch.zeros(1, 3, height, width, device=device, dtype=dtype))
    except (TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise UserError(
            f"{name} ({type(model).__name__}) cannot be run on plain {height} x {width} images: {e}. Give a tower that "
            "takes pixel_values and returns patch tokens, at a size it accepts."
        ) from e
    if out.ndim != 3:
        raise UserError(
            f"{name}: the tower gives a tensor of shape {list(out.shape)}; expected [images, patches, width]"
        )
    if not bool(torch.isfinite(out).all()):
        raise UserError(
            f"{name}: the tower gives NaN or infinite features in {dtype}; set model.vision.precision: fp32"
        )
    return out.shape[1], out.shape[2]


# ---------------------------------------------------------------------------------------------------------------
# timm


def _load_timm(cfg: VisionConfig, device: torch.device) -> VisionTower:
    import timm
    from safetensors.torch import load_file
    from timm.data.config import resolve_model_data_config

    name, dtype = timm_name(cfg), DTYPES[cfg.precision]
    wanted = "Without a network, give a local safetensors file as model.vision.weights."
    with loading(f"model.vision.name_or_path: timm's {name!r}", wanted):
        model = timm.create_model(name, pretrained=cfg.weights is None, num_classes=0)
    if cfg.weights is not None:
        if not Path(cfg.weights).is_file():
            raise UserError(
                f"model.vision.weights: no file {cfg.weights!r}; expected a .safetensors file of timm's {name}"
            )
        if not cfg.weights.endswith(".safetensors"):
            raise UserError(
                f"model.vision.weights: {cfg.weights!r} is not .safetensors; other formats can run code when read"
            )
        _load_timm_weights(model, load_file(cfg.weights), cfg.weights)
    check_finite(model, cfg.weights or name)
    data = resolve_model_data_config(model)
    _, height, width = data["input_size"]
    features = timm_features(model, cfg.feature_layer)
    # Depthwise convolutions want the channels innermost: EfficientNet-lite0 is 1.6 to 1.8 times as fast on a CPU
    # (`benchmarks/tower_layout.py`).
    model = model.to(device=device, dtype=dtype).to(memory_format=torch.channels_last)
    freeze(model)
    patches, width_out = _probe(model, features, height, width, device, dtype, name)
    geometry = ImageGeometry(
        height, width, patches, width_out, mean=tuple(data["mean"]), std=tuple(data["std"]),
        # Not timm's centre crop: a caption may speak of what the crop would cut off.
        resize="stretch", resample=data["interpolation"] if data["interpolation"] in RESAMPLE.values() else "bicubic",
    )  # fmt: skip
    identity = {"timm": name.split(".")[0], "class": type(model).__name__, "feature_layer": cfg.feature_layer}
    return VisionTower(model, features, geometry, identity, dtype, cfg.name_or_path).to(device)


def timm_name(cfg: VisionConfig) -> str:
    """timm's own name of the model. Raises `UserError` when timm has none of it."""
    import timm

    name = cfg.name_or_path.removeprefix("timm/")
    if name.split(".")[0] not in timm.list_models():
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        raise UserError(
            f"model.vision.name_or_path: timm has no model {name!r}; nearest: {', '.join(near) or 'none'} "
            "(timm.list_models() lists all)"
        )
    return name


def timm_features(model: Any, layer: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """What gives ``[m, P, Dv]`` of a timm model: its last output (-1) or another layer's, without prefix tokens."""
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"

    def features(backbone: Any, pixels: Tensor) -> Tensor:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        if layer == -1:
            out = backbone.forward_features(pixels)
            if out.ndim == 3:
                return out[:, prefix:]
            return out.flatten(1, 2) if channels_last else out.flatten(2).transpose(1, 2)
        maps = backbone.forward_intermediates(pixels, indices=[layer], intermediates_only=True, output_fmt="NCHW")
        return maps[0].flatten(2).transpose(1, 2)

    return features


def _load_timm_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """`load_state_dict` that forgives only the classifier timm itself names, which is not part of the tower."""
    named = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    # RepViT names head.head.l and keeps a batch norm beside it, so the classifier's parent module is the head.
    heads = tuple(f"{h.rpartition('.')[0] or h}." for h in ((named,) if isinstance(named, str) else named))
    own = model.state_dict()
    weights = {k: v for k, v in weights.items() if k in own or not k.startswith(heads)} if heads else weights
    info = {
        "missing_keys": [k for k in own if k not in weights and not k.endswith("num_batches_tracked")],
        "unexpected_keys": [k for k in weights if k not in own],
        "mismatched_keys": [
            (k, v.shape, own[k].shape) for k, v in weights.items() if k in own and own[k].shape != v.shape
        ],
    }
    check_loading_info(info, model, source)
    left = model.load_state_dict(weights, strict=False)
    assert all(k.endswith("num_batches_tracked") for k in left.missing_keys), listed(left.missing_keys)
