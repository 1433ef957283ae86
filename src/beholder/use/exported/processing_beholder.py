"""Pictures and conversations as a model of Beholder's takes them: the decoding, resizing and layout that it was
trained with."""

import io
import json
import re
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessorMixin

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
RESAMPLE = {
    "nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS,
}  # fmt: skip
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class BeholderImageProcessor(ImageProcessingMixin):
    """Upright 8-bit RGB, alpha on white, resized with Pillow, normalised in fp32.

    An image is encoded bytes, a path, or an open Pillow image (as its file would be, if nothing was converted before).
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]
    valid_kwargs = ImagesKwargs

    def __init__(
        self,
        height: int = 224,
        width: int = 224,
        resize: str = "stretch",
        resize_to: int = 0,
        resample: str = "bicubic",
        image_mean: Any = (0.5, 0.5, 0.5),
        image_std: Any = (0.5, 0.5, 0.5),
        max_megapixels: float = 64.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.height, self.width, self.resize, self.resize_to = height, width, resize, resize_to
        self.resample, self.max_megapixels = resample, max_megapixels
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def __call__(self, images: Any, return_tensors: Any = "pt", **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, return_tensors=return_tensors)

    def preprocess(self, images: Any, return_tensors: Any = "pt", **kwargs: Any) -> BatchFeature:
        """``pixel_values``: float32 ``[m, 3, h, w]``."""
        pixels = torch.stack([self.pixels(image) for image in flat(images)])
        mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
        scale, shift = (1 / (255 * std)).view(1, 3, 1, 1), (-mean / std).view(1, 3, 1, 1)
        return BatchFeature({"pixel_values": torch.addcmul(shift, pixels.float(), scale)}, tensor_type=return_tensors)

    def pixels(self, image: Any) -> torch.Tensor:
        """uint8 ``[3, h, w]``."""
        upright = self.decode(image)
        resized = upright.resize(
            (self.width, self.height), RESAMPLE[self.resample], box=self._box(upright.width, upright.height)
        )
        return torch.from_numpy(np.array(resized, dtype=np.uint8)).permute(2, 0, 1).contiguous()

    def decode(self, image: Any) -> Image.Image:
        if isinstance(image, np.ndarray | torch.Tensor):
            raise ValueError("give encoded bytes, a path or a Pillow image: of an array it is not known what it shows")
        if not isinstance(image, Image.Image):
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS)
        if image.width * image.height > self.max_megapixels * 1e6:
            raise ValueError(
                f"the image has {image.width} x {image.height} pixels, the limit is {self.max_megapixels:g} megapixels"
            )
        image.load()
        try:
            turn = UPRIGHT.get(image.getexif().get(0x0112, 1))
        except Exception:  # damaged EXIF says nothing about the pixels
            turn = None
        image = to_rgb(image)
        return image if turn is None else image.transpose(turn)

    def _box(self, width: float, height: float) -> tuple[float, float, float, float]:
        """What of the picture fills the output: all, or what a centre crop after resizing the short side would
        leave."""
        if self.resize == "stretch":
            return 0.0, 0.0, width, height
        if width <= height:
            whole_w, whole_h = self.resize_to, int(self.resize_to * height / width)
        else:
            whole_w, whole_h = int(self.resize_to * width / height), self.resize_to
        x, y = (whole_w - self.width) // 2, (whole_h - self.height) // 2
        sx, sy = width / whole_w, height / whole_h
        return x * sx, y * sy, min((x + self.width) * sx, width), min((y + self.height) * sy, height)


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"the image has 32-bit pixels (mode {image.mode}) whose white point is unknown")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def flat(images: Any) -> list[Any]:
    if images is None:
        return []
    return [i for one in images for i in flat(one)] if isinstance(images, list | tuple) else [images]


def filled_up(pixels: torch.Tensor, counts: Any) -> torch.Tensor:
    """``[m, 3, h, w]`` → ``[texts, most images of one, 3, h, w]``. Idefics3 leaves out what is all zero, so a picture
    that is (all of it the grey that is taken off) gets the smallest number that 16 bits hold in one place."""
    tiny = 2.0**-24
    empty = pixels.abs().flatten(1).amax(1) < tiny
    pixels[empty, 0, 0, 0] = tiny
    rows = pixels.split(list(counts))
    made = pixels.new_zeros(len(rows), max(counts), *pixels.shape[1:])
    for row, own in zip(made, rows, strict=True):
        row[: len(own)] = own
    return made


def without_word_mark(tokenizer: Any) -> Any:
    """The tokenizer's inside without the mark (``▁`` or a space) that it puts before a text of its own accord, for
    text that goes on after an image; None where it puts none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    facts = json.loads(backend.to_str())

    def unmarked(part: Any) -> Any:
        match part:
            case {"type": "Prepend"}:
                return None
            case {"type": "Metaspace"}:
                return part | {"prepend_scheme": "never"}
            case {"type": "ByteLevel"}:
                return part | {"add_prefix_space": False}
            case {"type": "Sequence"}:
                return {k: [u for p in v if (u := unmarked(p))] if isinstance(v, list) else v for k, v in part.items()}
            case _:
                return part

    before = [facts["normalizer"], facts["pre_tokenizer"]]
    after = [unmarked(part) for part in before]
    if after == before:
        return None
    facts["normalizer"], facts["pre_tokenizer"] = after
    facts["truncation"] = facts["padding"] = None
    return Tokenizer.from_str(json.dumps(facts))


class BeholderProcessor(ProcessorMixin):
    """Text with ``image_token`` where each image goes, as the chat template writes it. ``before`` and ``after``: ids
    around the ``num_visual_tokens`` places of an image. The text between images is tokenised on its own; ``goes_on``:
    without a mark for a text's first word. ``by_text``: pixels are ``[texts, most images of one, 3, h, w]``, filled up
    with zeros, as Idefics3 takes them; else ``[images, 3, h, w]``."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: Any = None,
        image_token: str = "<image>",
        num_visual_tokens: int = 0,
        before: Any = (),
        after: Any = (),
        goes_on: bool = False,
        by_text: bool = False,
        **kwargs: Any,
    ) -> None:
        self.by_text = by_text
        self.image_token, self.num_visual_tokens = image_token, num_visual_tokens
        self.before, self.after = list(before), list(after)
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.goes_on = goes_on
        self._unmarked = without_word_mark(tokenizer) if goes_on else None
        spelled = sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, spelled)))

    def to_dict(self) -> dict[str, Any]:
        told = super().to_dict()
        return {k: v for k, v in told.items() if not k.startswith("_")}

    def __call__(
        self, images: Any = None, text: Any = None, return_tensors: Any = None, padding: Any = True, **kwargs: Any
    ) -> BatchFeature:
        if text is None:
            raise ValueError("give the text as well")
        texts, given = [text] if isinstance(text, str) else list(text), flat(images)
        places = [t.count(self.image_token) for t in texts]
        if sum(places) != len(given):
            raise ValueError(f"the text has {sum(places)} places ({self.image_token}) for {len(given)} images")
        rows = [self.encode(t) for t in texts]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        data: dict[str, Any] = {
            "input_ids": [[pad] * (longest - len(row)) + row for row in rows],
            "attention_mask": [[0] * (longest - len(row)) + [1] * len(row) for row in rows],
        }
        if given:
            data |= self.image_processor(given)
        if given and self.by_text:
            data["pixel_values"] = filled_up(data["pixel_values"], places)
        return BatchFeature(data, tensor_type=return_tensors)

    def encode(self, text: str) -> list[int]:
        """The ids of a text as the chat template writes it."""
        first, *others = text.split(self.image_token)
        ids = self._ids(first)
        for piece in others:
            ids += [*self.before, *[self.image_token_id] * self.num_visual_tokens, *self.after]
            if self._unmarked is None:
                ids += self._ids(piece)
                continue
            control = self._control.search(piece)
            cut = len(piece) if control is None else control.start()
            ids += self._unmarked.encode(piece[:cut], add_special_tokens=False).ids if cut else []
            ids += self._ids(piece[cut:])
        return ids

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    # What vLLM's transformers back end asks.

    def replace_image_token(self, image_inputs: Any = None, image_idx: int = 0, **kwargs: Any) -> str:
        before, after = (self.tokenizer.decode(ids) for ids in (self.before, self.after))
        return before + self.image_token * self.num_visual_tokens + after

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_visual_tokens] * count, num_image_patches=[1] * count)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]
