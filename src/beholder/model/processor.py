"""A native model's own processor: an image → its inputs, and what stands for it in the text.

All that is asked of transformers' processors is public and the same for every class: one call with a text that is an
image's placeholder and with that image. Whether our encoder lays a conversation out as the processor does is proven in
`data.same_ids`, with `NativeProcessor.ids` as the processor's word.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from beholder.config import LlmConfig
from beholder.model.families import check_no_adapter, running
from beholder.model.weights import loading
from beholder.types import ImageInput, UserError

TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""What a processor makes of the text; the rest is the image's."""
PROBES = [(40, 56), (64, 32)]
"""Sizes (height, width) of the made-up images that a processor and a model are tried on."""
MAX_SIDE, MOST_PIXELS = 16_384, 2**26
"""Of an image as a processor may scale it. ``shortest_edge`` is a side for some, and a number of pixels for others."""
MAX_PLACES = 4096
"""Sizes of images whose layout is remembered."""


class NativeProcessor:
    """transformers' processor as `types.ImageProcessor`. Picklable.

    ``token_id``: what the model takes visual tokens in place of; it may not be what ``placeholder`` is read as (Gemma's
    template writes one token, which the processor replaces by others). ``dtype``: what the inputs are rounded to, as
    the model would.
    """

    def __init__(self, processor: Any, token_id: int, dtype: torch.dtype, most_images: int | None = None) -> None:
        self.processor, self.token_id, self.dtype, self.most_images = processor, token_id, dtype, most_images
        self.placeholder: str = processor.image_token
        self.chat_template: str = processor.chat_template or ""
        if not self.chat_template:
            raise UserError(
                f"the processor {type(processor).__name__} has no chat template (chat_template.jinja), so its "
                "conversations cannot be laid out; put the model's own beside its config.json"
            )
        images = processor.image_processor
        facts = {
            "processor": type(processor).__name__, "images": type(images).__name__, "settings": images.to_dict(),
            "dtype": str(dtype), "token": token_id, "placeholder": self.placeholder,
        }  # fmt: skip
        self.fingerprint: str = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        self._blank: dict[tuple[int, int], tuple[str, dict[str, tuple[int, ...]], dict[str, Tensor]]] = {}

    def process(self, image: Image.Image, /) -> ImageInput:
        """The inputs of an RGB image. Raises ValueError where the processor refuses it."""
        _, inputs = self._call(image)
        return ImageInput(inputs=inputs, size=(image.height, image.width))

    def place(self, size: tuple[int, int], /) -> str:
        """What stands in the text for an image of this (height, width), instead of the placeholder."""
        return self._like(size)[0]

    def takes(self, size: tuple[int, int], /) -> tuple[int, tuple[int, ...]]:
        """Of an image of this (height, width): the positions it takes, and the shape of its pixels."""
        text, shapes, _ = self._like(size)
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids).count(self.token_id), shapes["pixel_values"]

    def beside(self, size: tuple[int, int]) -> dict[str, Tensor]:
        """What is not pixels among the inputs of an image of this (height, width), such as its grid."""
        return dict(self._like(size)[2])

    def blank(self, size: tuple[int, int], fill: float | int) -> dict[str, Tensor]:
        """The inputs of an image of this size whose normalised pixels are all ``fill``, or, for a whole number, drawn
        from N(0, 1) with that seed."""
        _, shapes, others = self._like(size)
        made = dict(others)
        draw = None if isinstance(fill, float) else torch.Generator().manual_seed(fill)
        for name, shape in shapes.items():
            values = torch.full(shape, float(fill)) if draw is None else torch.randn(shape, generator=draw)
            frames = getattr(self.processor.image_processor, "temporal_patch_size", 1)
            if draw is not None and frames > 1 and len(shape) == 2:  # one picture, shown as so many equal frames
                side = self.processor.image_processor.patch_size
                patches = values.view(shape[0], -1, frames, side, side)
                values = patches[:, :, :1].expand_as(patches).reshape(shape)
            made[name] = values.to(self.dtype)
        return made

    def ids(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image], *, prompt: bool) -> list[int]:
        """The processor's own ids of a conversation: what our encoder has to give as well."""
        text = self.processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        leading = self.processor.tokenizer.bos_token
        own = {"add_special_tokens": False} if leading and text.startswith(leading) else {}
        given = {"images": list(images)} if images else {}
        return [int(i) for i in self.processor(text=[text], return_tensors="pt", **given, **own)["input_ids"][0]]

    def _call(self, image: Image.Image) -> tuple[list[int], dict[str, Tensor]]:
        out = self.processor(text=[self.placeholder], images=[image], return_tensors="pt", add_special_tokens=False)
        inputs = {
            k: v.to(self.dtype) if v.is_floating_point() else v
            for k, v in out.items()
            if k not in TEXT and isinstance(v, Tensor)
        }  # fmt: skip
        return [int(i) for i in out["input_ids"][0]], inputs

    def _like(self, size: tuple[int, int]) -> tuple[str, dict[str, tuple[int, ...]], dict[str, Tensor]]:
        """Of an image of this size, whatever it shows: its text, the shapes of its pixels, and its other inputs."""
        known = self._blank.get(size)
        if known is None:
            ids, inputs = self._call(Image.new("RGB", (size[1], size[0]), (128, 128, 128)))
            text = self.processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            shapes = {k: tuple(v.shape) for k, v in inputs.items() if v.is_floating_point()}
            known = str(text), shapes, {k: v for k, v in inputs.items() if not v.is_floating_point()}
            if len(self._blank) < MAX_PLACES:
                self._blank[size] = known
        return known


def load_processor(cfg: LlmConfig, config: Any, dtype: torch.dtype, most_images: int | None = None) -> NativeProcessor:
    """The processor beside a native model whose configuration is ``config``. Raises `UserError` without one."""
    from transformers import AutoProcessor

    check_no_adapter(cfg.name_or_path, "model.native.name_or_path")
    wanted = "The folder must hold its processor (preprocessor_config.json, tokenizer files, chat_template.jinja)."
    with loading(f"model.native.name_or_path {cfg.name_or_path!r}: its processor", wanted, cfg.name_or_path):
        processor = AutoProcessor.from_pretrained(cfg.name_or_path, revision=cfg.revision, trust_remote_code=False)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise UserError(
            f"model.native.name_or_path {cfg.name_or_path!r} has a {type(processor).__name__} and no processor of "
            f"images and text. {wanted}"
        )
    token = getattr(config, "image_token_id", None)
    token = getattr(config, "image_token_index", None) if token is None else token
    if not isinstance(token, int):
        raise UserError(
            f"model.native.name_or_path {cfg.name_or_path!r}: its config.json names no image token (image_token_id is "
            f"{token!r}, expected a whole number), so where images stand in the text is not known; get it again"
        )
    _check_settings(cfg.name_or_path, processor.image_processor, getattr(config, "vision_config", None))
    with running(cfg.name_or_path, processor, "its processor"):
        native = NativeProcessor(processor, token, dtype, most_images)
        for size in PROBES:
            native.place(size)
        ids, _ = native._call(Image.new("RGB", PROBES[0]))
    if token not in ids:
        raise UserError(
            f"model.native.name_or_path {cfg.name_or_path!r}: config.json says that images stand at token {token} "
            f"(image_token_id), but its processor writes {sorted(set(ids))[:8]} for one; the two files do not belong "
            "together, get them again"
        )
    return native


def _check_settings(name: str, images: Any, vision: Any) -> None:
    """Refuse settings of preprocessor_config.json that give pixels which are no numbers, and patches of another size
    than the tower takes."""
    wrong: list[str] = []
    for key in ("image_mean", "image_std", "rescale_factor"):
        value = getattr(images, key, None)
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if not all(isinstance(v, int | float) and math.isfinite(v) and (v or key == "image_mean") for v in values):
            wrong.append(f"{key} is {value!r:.60}, expected finite numbers{'' if key == 'image_mean' else ', not 0'}")
    size = getattr(images, "size", None)
    size = size if isinstance(size, Mapping) else vars(size) if hasattr(size, "__dict__") else {}  # SizeDict is no dict
    for key, value in size.items():
        most = MAX_SIDE if key in ("height", "width") else MOST_PIXELS
        if isinstance(value, int) and value > most:
            wrong.append(f"{key} of size is {value}, expected {most} at most")
    for key in ("patch_size", "temporal_patch_size", "merge_size"):
        tower = "spatial_merge_size" if key == "merge_size" else key
        value, theirs = getattr(images, key, None), getattr(vision, tower, None)
        if isinstance(value, int) and (value < 1 or (isinstance(theirs, int) and value != theirs)):
            more = f"{theirs} ({tower} in config.json)" if isinstance(theirs, int) else "1 or more"
            wrong.append(f"{key} is {value}, expected {more}")
    if wrong:
        raise UserError(
            f"model.native.name_or_path {name!r}: its processor (preprocessor_config.json, processor_config.json) "
            f"cannot be used: {'; '.join(wrong)}. Get its files again"
        )
