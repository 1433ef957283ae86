"""CLIPScore and RefCLIPScore (Hessel et al. 2021): how well captions fit their pictures, as a CLIP model sees it.

A CLIP that was trained elsewhere judges; it is loaded from safetensors only, and its own preprocessing is followed.
Which captions are judged is the caller's business.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beholder.evidence import Measurement
from beholder.model.weights import check_finite, check_loading_info, freeze, from_pretrained, loading
from beholder.probes import mean, measurement
from beholder.types import UserError

PREFIX = "A photo depicts "
"""Put before every caption and every reference, as the paper does."""

MAX_SIDE = 4096
"""Pixels; more would only fill the memory."""

SCALE = 2.5
"""The paper's w, which spreads the scores over 0 to 1."""


class ClipJudge:
    """A frozen CLIP model with its tokenizer and preprocessing, in fp32."""

    def __init__(self, name: str | Path, device: torch.device | str = "cpu") -> None:
        """``name``: a folder or hub name. Raises UserError for what is no CLIP model, lacks a file, has NaN weights,
        or has its weights as a pickle only."""
        from transformers import AutoTokenizer, CLIPModel

        name = str(name)
        self.device = torch.device(device)
        with loading(f"eval.clip_model {name!r}", _WANTED, name):
            _check_folder(name)
            self.pixels: Any = _preprocessing(name)
            model, info = from_pretrained(CLIPModel, name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        check_loading_info(info, model, name)
        check_finite(model, name)
        freeze(model)
        self.model: Any = model.to(self.device)
        self.tokenizer: Any = tokenizer
        self.max_tokens: int = model.config.text_config.max_position_embeddings
        with loading(f"eval.clip_model {name!r}: a picture and a text that are tried", _TRIED):
            self.see([Image.new("RGB", (50, 40))])
            self.read(["a"])

    @torch.no_grad()
    def see(self, pictures: Sequence[Image.Image]) -> Tensor:
        """fp32 [M, D]: unit vectors of the pictures."""
        pixels = self.pixels([p.convert("RGB") for p in pictures], return_tensors="pt")["pixel_values"].to(self.device)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return _unit(self.model.visual_projection(pooled))

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> tuple[Tensor, int]:
        """fp32 [M, D], unit vectors of the texts, prefix included; and how many were cut to the model's length."""
        full = [PREFIX + text for text in texts]
        lengths = [len(ids) for ids in self.tokenizer(full, verbose=False)["input_ids"]]
        batch = self.tokenizer(
            full, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)  # fmt: skip
        pooled = self.model.text_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).pooler_output  # fmt: skip
        return _unit(self.model.text_projection(pooled)), sum(length > self.max_tokens for length in lengths)


def clip_score(
    folder: str | Path,
    pictures: Iterable[Image.Image],
    texts: Sequence[str],
    references: Sequence[str | Sequence[str]] | None = None,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    seed: int = 0,
) -> list[Measurement]:
    """``clipscore.correct`` and, given references (one text or several a caption), ``refclipscore.correct``.

    Means over captions with bootstrap intervals. CLIPScore is 2.5 · max(cos(picture, caption), 0); RefCLIPScore the
    harmonic mean of that and of the best max(cos(caption, reference), 0) over the sample's references. Pictures are
    taken one batch at a time, so a generator keeps few in memory. Raises FloatingPointError naming the captions whose
    score is not finite.
    """
    judge = ClipJudge(folder, device)
    scores, with_references, cut = clip_scores(judge, pictures, texts, references, batch_size=batch_size)
    caveat = f"judged by {Path(folder).name}, fp32"
    if cut:
        caveat += f"; {cut} of {len(texts)} captions were cut to its {judge.max_tokens} tokens"
    out = []
    for name, values in (("clipscore", scores), ("refclipscore", with_references)):
        if values is None:
            continue
        bad = np.flatnonzero(~np.isfinite(values)).tolist()
        if bad:
            raise FloatingPointError(
                f"{name}.correct is not finite for caption {', '.join(map(str, bad[:8]))} (from 0)"
            )
        out.append(measurement(f"{name}.correct", *mean(values, seed), n=len(values), caveat=caveat))
    return out


def clip_scores(
    judge: ClipJudge,
    pictures: Iterable[Image.Image],
    texts: Sequence[str],
    references: Sequence[str | Sequence[str]] | None = None,
    *,
    batch_size: int = 32,
) -> tuple[np.ndarray, np.ndarray | None, int]:
    """(CLIPScore fp64 [S], RefCLIPScore fp64 [S] or None, captions that were cut) of every caption."""
    if not texts:
        raise UserError("clipscore: there are no captions to score")
    assert references is None or len(references) == len(texts), f"{len(references)} references for {len(texts)} texts"
    stream = iter(pictures)
    image_text: list[float] = []
    text_text: list[float] = []
    cut = 0
    for start in range(0, len(texts), batch_size):
        chunk = texts[start : start + batch_size]
        seen = list(islice(stream, len(chunk)))
        assert len(seen) == len(chunk), f"{start + len(seen)} pictures for {len(texts)} captions"
        said, over = judge.read(chunk)
        cut += over
        image_text += (judge.see(seen).double() * said.double()).sum(-1).tolist()
        if references is not None:
            own = [[r] if isinstance(r, str) else r for r in references[start : start + batch_size]]
            known = iter(_read_all(judge, [r for refs in own for r in refs], batch_size))
            for vector, refs in zip(said, own, strict=True):
                best = max(float((vector.double() @ next(known).double()).item()) for _ in refs)
                text_text.append(best)
    scores = SCALE * np.maximum(np.array(image_text, dtype=np.float64), 0.0)
    if references is None:
        return scores, None, cut
    closest = np.maximum(np.array(text_text, dtype=np.float64), 0.0)
    total = scores + closest
    return scores, np.where(total > 0, 2 * scores * closest / np.where(total > 0, total, 1.0), 0.0), cut


def _read_all(judge: ClipJudge, texts: Sequence[str], batch_size: int) -> Iterator[Tensor]:
    for start in range(0, len(texts), batch_size):
        yield from judge.read(texts[start : start + batch_size])[0]


def _unit(vectors: Tensor) -> Tensor:
    vectors = vectors.float()
    return vectors / vectors.norm(dim=-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------
# The folder


def _preprocessing(name: str) -> Any:
    """transformers' own, on PIL: what the folder's ``preprocessor_config.json`` says."""
    from transformers.models.clip import CLIPImageProcessorPil

    settings = _read_json(name, "preprocessor_config.json", "processor_config.json")
    size = settings.get("size")
    if not isinstance(size, int | dict) or (isinstance(size, dict) and not {"shortest_edge", "height"} & set(size)):
        raise UserError(
            f"eval.clip_model {name!r}: cannot tell the image size from preprocessor_config.json (size {size!r}, "
            f"crop_size {settings.get('crop_size')!r})"
        )
    for key, value in (("size", size), ("crop_size", settings.get("crop_size") or {})):
        sides = value.values() if isinstance(value, dict) else [value]
        if not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in sides):
            raise UserError(
                f"eval.clip_model {name!r}: preprocessor_config.json has {key} {value!r:.80}, expected sides of 1 to "
                f"{MAX_SIDE} pixels; get the file again"
            )
    return CLIPImageProcessorPil(**settings)


_TRIED = (
    "Its preprocessor_config.json, tokenizer_config.json and config.json must be those of one CLIP model; get its "
    "files again."
)
_WANTED = (
    "Give a folder (or hub name) with a CLIP model: config.json, model.safetensors, a tokenizer and "
    "preprocessor_config.json."
)


def _check_folder(name: str) -> None:
    """What a loader would answer with a riddle, said plainly. A name that is no folder is left to the hub."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.count("/") != 1 or name.startswith("."):
            raise UserError(f"eval.clip_model {name!r}: there is no such folder. {_WANTED}")
        return
    kind = _read_json(name, "config.json").get("model_type")
    if kind != "clip":
        raise UserError(f"eval.clip_model {name!r}: config.json is of a {kind!r} model, and CLIPScore needs 'clip'")


def _read_json(name: str, *files: str) -> dict[str, Any]:
    """The first of the files that the folder or hub repository has."""
    from transformers.utils.hub import cached_file

    for file in files:
        path = cached_file(
            name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if path is None:
            continue
        try:
            found = json.loads(Path(path).read_text("utf-8"))
        except ValueError as e:
            raise UserError(f"eval.clip_model {name!r}: {file} is not valid JSON ({e})") from e
        return dict(found.get("image_processor", found))
    raise UserError(f"eval.clip_model {name!r} has no {files[0]}. {_WANTED}")
