"""The door to outside vision towers: Hugging Face models and timm backbones become one `VisionTower`.

A tower takes uint8 images of its own size and gives ``[M, P, Dv]`` patch features; class and register tokens are
dropped. Decoding and resizing are `data.images`' business, which follows the `ImageGeometry` made here. What of a tower
learns, if anything, is `placement`'s, `adapters`' and `plan`'s business.
"""

import difflib
import importlib
import inspect
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from beholder.config import VisionConfig
from beholder.model.families import check_no_adapter
from beholder.model.language import source_of
from beholder.model.patch_layout import Declared, PatchLayout, UnknownLayout, find_layout
from beholder.model.placement import Part, base_state, counted, given_to, input_of, inside, state_below, tower_part
from beholder.model.weights import (
    DTYPES,
    check_finite,
    check_loading_info,
    check_no_pointer,
    convert,
    first_line,
    freeze,
    from_pretrained,
    hash_state,
    listed,
    loading,
)
from beholder.types import ImageGeometry, UserError

RESAMPLE: dict[int, Literal["nearest", "lanczos", "bilinear", "bicubic"]] = {
    0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic",
}  # fmt: skip
"""Pillow's numbers, which preprocessor files carry."""

MAX_SIDE = 4096
"""Pixels. No tower sees more at once, and a file that asks for more would only fill the memory."""

HEADS = ("classifier.", "pooler.", "head.", "lm_head.", "logit_", "cls_classifier.", "distillation_classifier.")
"""Checkpoint keys of a single-tower file that are a head on top of the tower, not part of it."""


class VisionTower(nn.Module):
    """A backbone with its own normalisation. Always in eval mode, and without a graph below the lowest weights that
    learn, in whatever mode its owner is.

    ``features`` maps normalised pixels ``[m, 3, h, w]`` to ``[m, P, Dv]``, or says how many images there are where they
    came in on the way; ``identity`` says, for the fingerprint, what
    the weights alone do not (architecture and its settings).
    """

    def __init__(
        self,
        backbone: nn.Module,
        features: Callable[[nn.Module, Tensor, int], Tensor],
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
        self.layout: PatchLayout | None = None
        """Where in the backbone's output the patches are."""
        self.interpolates = False
        """Whether it is asked to fit its positions to the size of its pictures."""
        self.part = tower_part(backbone, name)
        self.part.try_out = self.try_out
        freeze(self)

    def train(self, mode: bool = True) -> "VisionTower":
        """Stays in eval mode: batch statistics would move, of blocks that learn too, and dropout would change its
        features. Only its adapters follow ``mode``."""
        super().train(False)
        self.part.learn(mode)
        return self

    @property
    def learns(self) -> bool:
        """Whether anything in it learns now."""
        return any(p.requires_grad for p in self.backbone.parameters())

    def forward(self, pixels: UInt8[Tensor, "m 3 h w"]) -> Float[Tensor, "m p dv"]:
        """Patch features in the tower's precision. Raises `UserError` for images of another size."""
        return self._run(pixels, pixels.shape[0])

    def _run(self, pixels: Tensor, count: int) -> Tensor:
        g = self.geometry
        if pixels.shape[2:] != (g.height, g.width):
            raise UserError(
                f"the tower takes {g.height} x {g.width} images but got {pixels.shape[2]} x {pixels.shape[3]}; prepare "
                "them with the tower's own geometry"
            )
        if pixels.shape[0] == 0:
            return pixels.new_zeros(0, g.num_patches, g.d_vision, dtype=self.dtype)
        scale, shift = self.get_buffer("scale"), self.get_buffer("shift")
        graph = torch.is_grad_enabled() and self.learns
        with torch.autocast(pixels.device.type, enabled=False), torch.set_grad_enabled(graph):
            normalised = torch.addcmul(shift, pixels.float(), scale).to(self.dtype)
            return self._features(self.backbone, normalised, count)

    # -- what can be computed once an image

    @property
    def lowest(self) -> str | None:
        """The lowest of its blocks that learns: what goes into it can be kept of every image."""
        return self.part.lowest

    @torch.no_grad()
    def keep(self, pixels: UInt8[Tensor, "m 3 h w"]) -> Tensor:
        """What can be kept of images while the tower learns, ``[m, …]``: what goes into the lowest block that learns;
        of a frozen tower its features. `finish` goes on from it."""
        if self.lowest is None:
            return self(pixels)
        return input_of(self.part, self.lowest, lambda: self(pixels))

    def finish(self, kept: Tensor) -> Float[Tensor, "m p dv"]:
        """Features from what `keep` gave. What is below runs once over an empty image, for what else it hands up
        (positions)."""
        if self.lowest is None:
            return kept
        g = self.geometry
        with given_to(self.part, self.lowest, kept):
            return self._run(kept.new_zeros(1, 3, g.height, g.width, dtype=torch.uint8), kept.shape[0])

    @torch.no_grad()
    def check_kept(self) -> str | None:
        """Why nothing can be kept of an image while the tower learns, or None where `finish` after `keep` gives what
        the tower gives."""
        if self.learns and self.lowest is None:
            return "something outside of its blocks learns"
        g, draw = self.geometry, torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (2, 3, g.height, g.width), dtype=torch.uint8, generator=draw)
        pixels = pixels.to(self.get_buffer("scale").device)
        try:
            again, whole = self.finish(self.keep(pixels)).float(), self(pixels).float()
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as e:
            return f"it cannot go on from {self.lowest} ({first_line(e)})"
        close = torch.allclose(again, whole, rtol=1e-5 if self.dtype == torch.float32 else 1e-2, atol=1e-5)
        return None if close else f"going on from {self.lowest} gives something else"

    def try_out(self) -> Tensor:
        """One forward pass over an empty image."""
        g, device = self.geometry, self.get_buffer("scale").device
        return self(torch.zeros(1, 3, g.height, g.width, dtype=torch.uint8, device=device))

    def identity(self) -> str:
        """What decides its features besides its weights."""
        g = self.geometry
        return json.dumps(
            {**self._identity, "dtype": str(self.dtype), "geometry": [getattr(g, f) for f in g.__slots__]},
            sort_keys=True, default=str,
        )  # fmt: skip

    def fingerprint(self) -> str:
        """sha256 over weights, architecture, precision and preprocessing: what decides the features of an image."""
        if self._fingerprint is None:
            self._fingerprint = hash_state(base_state(self.part), self.identity())
        return self._fingerprint

    def kept_fingerprint(self) -> str:
        """sha256 over what decides what `keep` gives: of a tower that learns, what lies below."""
        lowest = self.lowest
        if lowest is None:
            return self.fingerprint()
        return hash_state(state_below(self.part, lowest), f"{self.identity()} below {lowest}")


def check_reached(part: Part) -> None:
    """Refuse weights of a tower that are to learn and that the features do not depend on: of blocks above
    ``model.vision.feature_layer``, of a head that is not used."""
    names = {n: p for n, p in part.module.named_parameters() if inside(n, part.unfrozen) or ".lora_" in n}
    if not names:
        return
    flags = [weight.requires_grad for weight in names.values()]
    with torch.enable_grad():
        for weight in names.values():
            weight.requires_grad_(True)
        assert part.try_out is not None
        features, weights = part.try_out(), list(names.values())
        assert isinstance(features, Tensor)
        total = features.float().sum()
        grads = torch.autograd.grad(total, weights, allow_unused=True) if total.requires_grad else [None] * len(weights)
        for weight, flag in zip(names.values(), flags, strict=True):
            weight.requires_grad_(flag)
    idle = [n for n, grad in zip(names, grads, strict=True) if grad is None]
    if idle:
        earlier = "the model" if part.prefix else "model.vision.feature_layer"
        raise UserError(
            f"model.vision.unfreeze, model.lora.vit_layers: the features of {part.source} do not depend on "
            f"{counted(idle)} ({earlier} takes an earlier layer's, or the module is not used), so nothing would be "
            "learned there; take it out"
        )


def load_vision(cfg: VisionConfig, device: torch.device) -> VisionTower:
    """The tower named by the settings, strictly loaded, frozen, on ``device``.

    ``timm/<name>`` goes to timm, everything else to Hugging Face. Raises `UserError` for unknown names, files that do
    not fit the architecture, NaN weights, and preprocessing it cannot follow.
    """
    load = _load_timm if cfg.name_or_path.startswith("timm/") else _load_hf
    return load(cfg, device)


def empty_tower(cfg: VisionConfig, config: Any = None) -> Any:
    """The backbone on the meta device, from its configuration alone: ``config``, or that of its name. Raises
    `UserError` where there is none."""
    if cfg.name_or_path.startswith("timm/"):
        import timm

        name = timm_name(cfg)
        try:
            with torch.device("meta"):
                return timm.create_model(name, pretrained=False, num_classes=0).eval()
        except (NotImplementedError, RuntimeError):  # an older timm reads weights while it builds some towers
            return timm.create_model(name, pretrained=False, num_classes=0).to("meta").eval()
    from transformers import AutoConfig

    what, wanted = f"sizes of model.vision {cfg.name_or_path!r}", "Its config.json must be that of a vision tower."
    with loading(what, wanted, cfg.name_or_path if config is None else None):
        if config is None:
            name, where = source_of(cfg)
            config = AutoConfig.from_pretrained(name, **where)
            config = _vision_part(config, name) or config
        with torch.device("meta"):
            kind = hf_class(config, cfg.name_or_path)
            auto = hasattr(kind, "from_config")
            model: Any = kind.from_config(config, trust_remote_code=cfg.trust_remote_code) if auto else kind(config)
        _drop_pooling(model)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------
# Hugging Face


def _load_hf(cfg: VisionConfig, device: torch.device) -> VisionTower:
    from transformers import AutoConfig

    name, dtype = cfg.name_or_path, DTYPES[cfg.precision]
    if cfg.weights is not None:
        raise UserError("model.vision.weights belongs to timm/<name> towers; put the weights into the folder instead")
    check_no_adapter(name, "model.vision.name_or_path")
    where: dict[str, Any] = {"revision": cfg.revision, "trust_remote_code": cfg.trust_remote_code}
    wanted = (
        "Its config.json, or a file of weights, is damaged or of something else: get its files again. Give a Hugging "
        "Face vision model (hub name or folder with config.json and safetensors), or timm/<name>."
    )
    with loading(f"model.vision.name_or_path {name!r}", wanted, name):
        config = AutoConfig.from_pretrained(name, **where)
        part = _vision_part(config, name)
        if part is not None and (file := getattr(config, "transformers_weights", None)) is not None:
            part.transformers_weights = file  # the part's weights are among the whole model's
        model, info = from_pretrained(hf_class(part or config, name), name, config=part or config, dtype=dtype, **where)
    _drop_pooling(model)
    check_loading_info(info, model, name, other_parts=HEADS if part is None else None)
    check_finite(model, name)
    processor = _preprocessor(name, where)
    part = part or config
    try:
        height, width, resize, resize_to = _hf_size(processor, name)
        mean, std = _hf_normalisation(processor)
        resample = RESAMPLE.get(processor.get("resample", 3), "bicubic")
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
        raise UserError(
            f"{name}: its preprocessing file cannot be followed ({type(e).__name__}: {first_line(e)}); expected size "
            "and crop_size in pixels, image_mean and image_std as three numbers, rescale_factor as one. Get it again."
        ) from e

    def outputs(backbone: nn.Module, pixels: Tensor) -> Any:
        extra = {"interpolate_pos_encoding": True} if interpolate else {}
        if cfg.feature_layer == -1:
            return backbone(pixel_values=pixels, **extra).last_hidden_state
        states = backbone(pixel_values=pixels, output_hidden_states=True, **extra).hidden_states
        if not -len(states) <= cfg.feature_layer < len(states):
            raise UserError(
                f"model.vision.feature_layer is {cfg.feature_layer}, but {cfg.name_or_path} has {len(states)} "
                f"hidden states: give -{len(states)} to {len(states) - 1} (-1 is the final output)"
            )
        return states[cfg.feature_layer]

    trained_at = getattr(part, "image_size", None)
    trained_at = trained_at[0] if isinstance(trained_at, list | tuple) else trained_at
    interpolate = (
        trained_at not in (None, height) and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    )
    model = model.to(device)
    freeze(model)

    def advice() -> str:
        twin = _timm_twins(str(getattr(part, "model_type", "")))  # timm takes seconds to load
        return f"Give a tower that takes pixel_values and returns patch tokens, at a size it accepts{twin}."

    declared = hf_declared(part, height, width)
    layout, d_vision = _probe(model, outputs, height, width, device, dtype, name, declared, advice)
    geometry = ImageGeometry(
        height, width, layout.num_patches, d_vision,
        mean=mean, std=std, resize=resize, resize_to=resize_to, resample=resample,
    )  # fmt: skip
    skip = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"}
    settings = {k: v for k, v in part.to_dict().items() if k not in skip}
    identity = {"class": type(model).__name__, "config": settings, "feature_layer": cfg.feature_layer}
    tower = VisionTower(model, patches_of(outputs, layout), geometry, identity, dtype, cfg.name_or_path).to(device)
    tower.layout, tower.interpolates = layout, interpolate
    return tower


def _vision_part(config: Any, name: str) -> Any:
    """The vision part of a configuration, or None where it has none."""
    from transformers import PreTrainedConfig

    part = getattr(config, "vision_config", None)
    if part is not None and not isinstance(part, PreTrainedConfig):
        raise UserError(
            f"{name}: config.json has a vision_config, but says model_type {config.model_type!r}, which has none; get "
            "the file again"
        )
    return part


def patches_of(
    outputs: Callable[[nn.Module, Tensor], Any], layout: PatchLayout
) -> Callable[[nn.Module, Tensor, int], Tensor]:
    """What gives ``[m, P, Dv]``, the patches alone, of so many images."""
    return lambda backbone, pixels, count: layout.take(outputs(backbone, pixels), count)


def hf_class(config: Any, name: str) -> Any:
    """The class that a vision configuration belongs to. Some (BLIP, CLIPSeg, Llama 4) are known to no `AutoModel`; they
    are found beside it."""
    from transformers import MODEL_MAPPING, AutoModel, PreTrainedModel

    kind = type(config)
    if kind in MODEL_MAPPING or not kind.__module__.startswith("transformers.models."):
        return AutoModel
    module = importlib.import_module(kind.__module__.replace(".configuration_", ".modeling_"))
    beside = [
        c for n, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, PreTrainedModel) and c.config_class is kind and n.endswith("VisionModel")
    ]  # fmt: skip
    if len(beside) != 1:
        raise UserError(
            f"{name}: a {kind.model_type!r} part is no tower that takes pictures alone{_timm_twins(kind.model_type)}. "
            "Give a tower such as SigLIP, CLIP or DINOv2"
        )
    return beside[0]


def hf_declared(part: Any, height: int, width: int) -> Declared:
    """What a configuration says of its output: a grid by ``patch_size``, and a class token with the registers, if any.
    A pyramid (``hidden_sizes``) has another grid at its end."""
    patch = None if hasattr(part, "hidden_sizes") else getattr(part, "patch_size", None)
    ph, pw = patch if isinstance(patch, list | tuple) and len(patch) == 2 else (patch, patch)
    if not isinstance(ph, int) or not isinstance(pw, int) or min(ph, pw) < 1:
        return Declared()
    registers = int(getattr(part, "num_register_tokens", 0) or 0)
    return Declared((height // ph, width // pw), frozenset({0, 1, 1 + registers}))


def _timm_twins(model_type: str) -> str:
    """``, or one of timm's: …`` where timm has models of that family."""
    import timm

    parts = [p for p in re.split("[_-]", model_type) if p not in ("vision", "model")]
    twins = [n for n in timm.list_pretrained() if parts and all(p in n for p in parts)]
    # A training method (MAE) is part of the tag, an architecture of the name before it.
    bare = [n.partition(".")[0] for n in twins]
    names = sorted({b if all(p in b for p in parts) else n for n, b in zip(twins, bare, strict=True)}, key=len)
    return f", or one of timm's: {', '.join(f'timm/{n}' for n in names[:3])}" if names else ""


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
            try:
                found = json.loads(Path(path).read_text("utf-8"))
                return dict(found.get("image_processor", found))
            except (ValueError, TypeError, AttributeError, RecursionError) as e:
                raise UserError(f"{name}: {file} is no JSON object ({first_line(e)}); get the file again") from e
    raise UserError(
        f"{name}: no preprocessor_config.json, so the image size and normalisation the tower was trained with are "
        "unknown. Save the tower's image processor beside its weights."
    )


def _hf_size(processor: Mapping[str, Any], name: str) -> tuple[int, int, Literal["stretch", "shortest_edge"], int]:
    """(height, width, how to get there, short side before the crop) from ``size``, ``crop_size`` and ``crop_pct``."""
    found = _read_hf_size(processor, name)
    if not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in found[:2]):
        raise UserError(
            f"{name}: its preprocessing file asks for {found[0]} x {found[1]} pixels; expected 1 to {MAX_SIDE}"
        )
    return found


def _read_hf_size(processor: Mapping[str, Any], name: str) -> tuple[int, int, Literal["stretch", "shortest_edge"], int]:
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


def _hf_normalisation(processor: Mapping[str, Any]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of pixels scaled to 0..1. Raises ValueError where they aren't usable numbers."""
    rescale = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    mean, std = processor.get("image_mean") or 0.0, processor.get("image_std") or 1.0
    if not processor.get("do_normalize", True):
        mean, std = 0.0, 1.0
    mean, std = _triple(mean, 255 * rescale), _triple(std, 255 * rescale)
    if not all(map(math.isfinite, mean)) or not all(math.isfinite(s) and s > 0 for s in std):
        raise ValueError(f"image_mean {mean} and image_std {std}, for pixels of 0 to 1")
    return mean, std


def _triple(value: float | list[float], divisor: float) -> tuple[float, float, float]:
    """Three channel values for pixels scaled to 0..1, from a file written for pixels scaled by ``divisor / 255``."""
    r, g, b = value if isinstance(value, list | tuple) else (value, value, value)
    return (r / divisor, g / divisor, b / divisor)


@torch.no_grad()
def _probe(
    model: nn.Module,
    outputs: Callable[[nn.Module, Tensor], Any],
    height: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    name: str,
    declared: Declared,
    advice: Callable[[], str],
) -> tuple[PatchLayout, int]:
    """(where the patches are, their width) in what the backbone gives, which must be finite."""

    def run(pixels: Tensor) -> Any:
        return outputs(model, pixels.to(device=device, dtype=dtype))

    who = f"{name} ({type(model).__name__})"
    try:
        layout, out = find_layout(run, height, width, declared)
    except UserError:
        raise
    except UnknownLayout as e:
        raise UserError(f"{who}: {e}. {advice()}") from e
    except FloatingPointError as e:
        raise UserError(
            f"{name}: the tower gives NaN or infinite features in {dtype}; set model.vision.precision: fp32"
        ) from e
    except (TypeError, ValueError, AttributeError, RuntimeError, LookupError, AssertionError) as e:
        raise UserError(
            f"{who} cannot be run on plain {height} x {width} images: {first_line(e).rstrip('.')}. {advice()}"
        ) from e
    return layout, layout.take(out, 2).shape[2]


# ---------------------------------------------------------------------------------------------------------------
# timm


def _load_timm(cfg: VisionConfig, device: torch.device) -> VisionTower:
    import timm
    from safetensors.torch import load_file
    from timm.data.config import resolve_model_data_config
    from timm.models import get_pretrained_cfg

    name, dtype = timm_name(cfg), DTYPES[cfg.precision]
    source = get_pretrained_cfg(name)
    if cfg.weights is None and source and source.url and not source.hf_hub_id:  # an old release, never on the hub
        url = source.url if isinstance(source.url, str) else source.url[0]
        raise UserError(
            f"model.vision.name_or_path: timm has {name} at {url} only. {convert(Path(url).name)}, and give the file "
            "as model.vision.weights"
        )
    wanted = "Without a network, give a local safetensors file as model.vision.weights."
    with loading(f"model.vision.name_or_path: timm's {name!r}", wanted):
        model = timm.create_model(name, pretrained=cfg.weights is None, num_classes=0)
    if cfg.weights is not None:
        if not Path(cfg.weights).is_file():
            problem = f"{cfg.weights!r} is a folder" if Path(cfg.weights).is_dir() else f"no file {cfg.weights!r}"
            raise UserError(f"model.vision.weights: {problem}; expected a .safetensors file of timm's {name}")
        if not cfg.weights.endswith(".safetensors"):
            raise UserError(f"model.vision.weights: {cfg.weights!r} is not .safetensors. {convert(cfg.weights)}")
        check_no_pointer(Path(cfg.weights))
        with loading(
            f"model.vision.weights {cfg.weights!r}", "The file is damaged or no safetensors file; get it again."
        ):
            weights = load_file(cfg.weights)
        _load_timm_weights(model, weights, cfg.weights)
    check_finite(model, cfg.weights or name)
    data = resolve_model_data_config(model)
    _, height, width = data["input_size"]
    outputs = timm_outputs(cfg.feature_layer)
    # Depthwise convolutions want the channels innermost: EfficientNet-lite0 is 1.6 to 1.8 times as fast on a CPU
    # (`benchmarks/tower_layout.py`). Tensors of other ranks have no such format (lambda layers convolve in 3-D).
    model = model.to(device=device, dtype=dtype)
    for weight in itertools.chain(model.parameters(), model.buffers()):
        if weight.ndim == 4:
            weight.data = weight.data.to(memory_format=torch.channels_last)
    freeze(model)
    declared = timm_declared(model, cfg.feature_layer)
    layout, d_vision = _probe(model, outputs, height, width, device, dtype, name, declared, lambda: _timm_advice(model))
    geometry = ImageGeometry(
        height, width, layout.num_patches, d_vision, mean=tuple(data["mean"]), std=tuple(data["std"]),
        # Not timm's centre crop: a caption may speak of what the crop would cut off.
        resize="stretch", resample=data["interpolation"] if data["interpolation"] in RESAMPLE.values() else "bicubic",
    )  # fmt: skip
    identity = {"timm": name.split(".")[0], "class": type(model).__name__, "feature_layer": cfg.feature_layer}
    tower = VisionTower(model, patches_of(outputs, layout), geometry, identity, dtype, cfg.name_or_path).to(device)
    tower.layout = layout
    return tower


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


def timm_outputs(layer: int) -> Callable[[nn.Module, Tensor], Any]:
    """What gives the raw output of a timm model: its last (-1), or another layer's as a feature map."""

    def outputs(backbone: Any, pixels: Tensor) -> Any:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        if layer == -1:
            return backbone.forward_features(pixels)
        return backbone.forward_intermediates(pixels, indices=[layer], intermediates_only=True, output_fmt="NCHW")[0]

    return outputs


def timm_declared(model: Any, layer: int) -> Declared:
    """What a timm model says of its output. Some with a class token (VOLO, CoaT) say nothing."""
    axes = "nhwc" if layer == -1 and getattr(model, "output_fmt", "NCHW") == "NHWC" else "nchw"
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    prefix = getattr(model, "num_prefix_tokens", None)
    return Declared(
        (int(grid[0]), int(grid[1])) if grid is not None else None,
        frozenset({int(prefix)}) if prefix is not None else None, axes,
    )  # fmt: skip


def _timm_advice(model: Any) -> str:
    last = len(getattr(model, "feature_info", ())) - 1
    if hasattr(model, "forward_intermediates") and last > 0:
        return f"model.vision.feature_layer: {last} takes its last feature map instead."
    return "Give another timm model, whose forward_features gives patch tokens or a feature map."


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
