"""Which held-out samples an export is asked, and as what both sides take them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from beholder.data.build import open_records
from beholder.data.chat import EncodeError
from beholder.data.images import as_input, read_bytes
from beholder.data.splits import load_split
from beholder.model.native import NativeModel
from beholder.train.trained import TrainedRun
from beholder.types import Encoded, Example, ImageInput, ImageSlot, Turn, UserError
from beholder.use.export.template import IMAGE_TOKEN


@dataclass(frozen=True)
class AskedSample:
    """A held-out sample, as both sides take it."""

    example: Example
    messages: list[dict[str, Any]]
    images: list[bytes]


def askable(run: TrainedRun, count: int, among: Iterable[Example]) -> list[AskedSample]:
    """The first samples of ``among`` with an image that can be asked. Raises `UserError` for none."""
    found: list[AskedSample] = []
    for example in among:
        if not example.images:
            continue
        example = run.encoder.apply_template(example)
        turns = asked_turns(example)
        if not turns or any(IMAGE_TOKEN in p for t in turns for p in t.parts if isinstance(p, str)):
            continue
        try:
            images = [read_bytes(ref) for ref in example.images]
            native = isinstance(run.model, NativeModel)
            inputs = [as_input(run.pipeline(ref)) for ref in example.images] if native else []
            run.encoder.encode_prompt(example, run.sizes(inputs))
        except EncodeError:
            continue
        found.append(AskedSample(example, [_message(t, native, len(images), run) for t in turns], images))
        if len(found) == count:
            return found
    if not found:
        raise UserError(
            f"{run.checkpoint}: no held-out sample with an image can be asked, so nothing could be compared"
        )
    return found


def asked_turns(example: Example) -> tuple[Turn, ...]:
    """What is said before the answer."""
    return example.turns[:-1] if example.answer_text else example.turns


def held_out(run: TrainedRun) -> Iterator[Example]:
    """The run's held-out samples in a fixed random order; of a run without a split file, its records."""
    data = run.cfg.data
    records = open_records(run.cfg, data.eval_sources or data.train_sources)
    splits = sorted((run.folder / "splits").glob("split_*.json"))
    if data.eval_sources or not splits:
        indices = np.arange(len(records))
    else:
        indices = load_split(splits[-1], records).eval
    order = np.random.default_rng(0).permutation(len(indices))
    return (records[int(indices[i])] for i in order)


def trained_on(run: TrainedRun) -> Iterator[Example]:
    """The samples that the run was trained on, in a fixed random order. Raises `UserError` without its split file,
    which says which they are."""
    splits = sorted((run.folder / "splits").glob("split_*.json"))
    if not splits:
        raise UserError(
            f"{run.folder}/splits has no split file, so which samples the run was trained on is not known; put the "
            "run's own back"
        )
    records = open_records(run.cfg, run.cfg.data.train_sources)
    indices = np.random.default_rng(0).permutation(load_split(splits[-1], records).train)
    return (records[int(i)] for i in indices)


def _message(turn: Turn, native: bool, num_images: int, run: TrainedRun) -> dict[str, Any]:
    """A turn as an exported processor takes it: text with a marker where each image goes; a native one wants parts."""
    if not native:
        label = run.encoder.image_label if num_images > 1 else ""
        text = ""
        for part in turn.parts:
            if isinstance(part, ImageSlot):
                own = label.format(k=part.index + 1)
                text += ("" if text.rstrip().endswith(own.rstrip()) else own) + IMAGE_TOKEN
            else:
                text += part
        return {"role": turn.role, "content": text}
    parts = [
        {"type": "image"} if isinstance(p, ImageSlot) else {"type": "text", "text": p} for p in turn.parts if p != ""
    ]
    return {"role": turn.role, "content": parts}


def prompt_of(run: TrainedRun, sample: AskedSample) -> tuple[Encoded, list[ImageInput]]:
    """A sample as the run's own model takes it, without its answer."""
    inputs = [as_input(run.pipeline(ref)) for ref in sample.example.images]
    return run.encoder.encode_prompt(sample.example, run.sizes(inputs)), inputs
