"""The wrong images a model is shown: another sample's, an empty one, noise, or none; and the
losses under them (S11-4)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch

from beholder.evidence import CONDITIONS, Condition
from beholder.probes import measuring
from beholder.probes.loss import LossModel, SampleLoss, sample_losses
from beholder.types import Batch, Example, ImageGeometry, ImageInput, ImageProcessor, ImageRef, Part, UserError

NUM_NOISE = 8
"""Noise images of the condition ``noise``: one tower pass for all of them instead of one for every image."""


class SightedModel(LossModel, Protocol):
    """A model whose tower can be asked for what it says of an image."""

    @property
    def geometry(self) -> ImageGeometry | ImageProcessor: ...
    def keep(self, image: ImageInput, /) -> ImageInput: ...


def ablation_losses(
    model: SightedModel,
    examples: Sequence[Example],
    make_batches: Callable[[Sequence[Example]], Iterable[Batch]],
    conditions: Sequence[Condition] = CONDITIONS,
    *,
    content_key: Callable[[ImageRef], str],
    seed: int = 0,
) -> dict[Condition, list[SampleLoss]]:
    """The same loss on the same samples with their own image, another sample's, a grey one, and noise.

    ``make_batches`` may give this process's share; which image a sample is shown does not depend on it. Raises
    UserError when ``shuffled`` is asked for and the samples do not show two different images.
    """
    losses: dict[Condition, list[SampleLoss]] = {}
    for condition in conditions:
        shown = shuffle_images(examples, content_key, seed) if condition == "shuffled" else examples
        batches = make_batches(shown)
        if condition in ("zero", "noise"):
            batches = map(partial(show, images=blank_images(model, condition, seed)), batches)
        losses[condition] = sample_losses(model, batches)
    return losses


def blank_image(model: SightedModel, kind: Literal["zero", "noise"], seed: int = 0) -> ImageInput:
    """An image without anything in it, as tower features, so that the tower sees it once.

    ``zero``: its normalised pixels are 0. Pixels travel as uint8, so the nearest grey is taken: a normalised value is
    off 0 by at most ``0.5/255/std``. ``noise``: its normalised pixels are drawn from N(0, 1) and clipped to what uint8
    can say; ``seed`` decides which noise. A native model's processor gives normalised values, so there they are exact,
    and as many as the image in whose place it stands has: it takes the same positions.
    """
    g = model.geometry
    if not isinstance(g, ImageGeometry):
        return ImageInput(blank=(kind, seed))
    normalised = torch.zeros(3, g.height, g.width)
    if kind == "noise":
        normalised = torch.randn(normalised.shape, generator=torch.Generator().manual_seed(seed))
    mean, std = torch.tensor(g.mean)[:, None, None], torch.tensor(g.std)[:, None, None]
    pixels = (255 * (normalised * std + mean)).round().clamp(0, 255).to(torch.uint8)
    with measuring(model):
        return model.keep(ImageInput(pixels=pixels))


def blank_images(model: SightedModel, kind: Literal["zero", "noise"], seed: int = 0) -> list[ImageInput]:
    """What the condition shows: one empty image, or `NUM_NOISE` of noise."""
    return [blank_image(model, kind, seed + k) for k in range(1 if kind == "zero" else NUM_NOISE)]


def slots_of(batch: Batch) -> list[int]:
    """The place of each of the batch's images within its sample, from 0."""
    used = [0] * len(batch.ids)
    found: list[int] = []
    for owner in batch.image_sample.tolist():
        found.append(used[owner])
        used[owner] += 1
    return found


def show(batch: Batch, images: Sequence[ImageInput], only: int | None = None) -> Batch:
    """Every image place, or of every sample the one numbered ``only`` (from 0), filled from ``images``, chosen by
    sample id and place: neither the batch size nor the number of processes changes what a sample is shown."""
    shown = [
        images[zlib.crc32(f"{batch.ids[owner]}/{place}".encode()) % len(images)]
        if only in (None, place) else batch.images[m]
        for m, (owner, place) in enumerate(zip(batch.image_sample.tolist(), slots_of(batch), strict=True))
    ]  # fmt: skip
    return replace(batch, images=shown)


def shuffle_images(examples: Sequence[Example], content_key: Callable[[ImageRef], str], seed: int) -> list[Example]:
    """The examples with one another's images: no image slot gets an image that its own example shows.

    Slots are shuffled rather than examples, so examples with different numbers of images mix. ``content_key`` tells
    images apart by their bytes (`data.images.content_hash`). Text-only examples stay as they are.
    """
    slots = [(e, k) for e, example in enumerate(examples) for k in range(len(example.images))]
    keys = [content_key(examples[e].images[k]) for e, k in slots]
    own: list[set[str]] = [set() for _ in examples]
    for (e, _), key in zip(slots, keys, strict=True):
        own[e].add(key)
    pick = reassign(len(slots), lambda place, item: keys[item] not in own[slots[place][0]], seed)
    images: list[list[ImageRef]] = [[] for _ in examples]
    for (e, _), item in zip(slots, pick, strict=True):
        source, k = slots[item]
        images[e].append(examples[source].images[k])
    return [replace(example, images=tuple(images[e])) for e, example in enumerate(examples)]


def reassign(n: int, fits: Callable[[int, int], bool], seed: int) -> list[int]:
    """For each place an item that fits it: a random permutation, repaired by swaps.

    A place i whose item does not fit swaps with a place k such that both fit afterwards. With "fits" = "is not equal
    to mine" this finds a permutation wherever one exists: if there is no such k, every k holds an item equal to i's or
    is itself equal to i; both kinds number c (the size of i's class) and share i, so n <= 2c - 1, and c items that
    are equal cannot all go to the n - c < c places that differ. Only then an item is used more than once.
    """
    rng = np.random.default_rng(seed)
    pick = rng.permutation(n).tolist()
    for i in range(n):
        if fits(i, pick[i]):
            continue
        start = int(rng.integers(n))
        for k in ((start + step) % n for step in range(n)):
            if fits(i, pick[k]) and fits(k, pick[i]):
                pick[i], pick[k] = pick[k], pick[i]
                break
        else:
            others = [k for k in range(n) if fits(i, k)]
            if not others:
                raise UserError(
                    f"cannot shuffle {n} images: place {i} has no other image to take, they are all the same to it; "
                    "give the ablation samples with at least two different images"
                )
            pick[i] = others[int(rng.integers(len(others)))]
    if n == 0:
        raise UserError("cannot shuffle images: the samples have none; give the ablation samples with images")
    return pick


def without_images(example: Example) -> Example:
    """The example with its images and their places taken out, and the line break that set a place apart from the text.

    That is the one after a place, or before a place that ends its turn. Its own words are kept, so it is to be encoded
    as a conversation or a chat: the caption template wants an image.
    """

    def text(parts: tuple[Part, ...]) -> tuple[Part, ...]:
        out: list[Part] = []
        after_image = False
        for part in parts:
            if isinstance(part, str):
                out.append(part.removeprefix("\n") if after_image else part)
            after_image = not isinstance(part, str)
        if after_image and out and isinstance(out[-1], str):
            out[-1] = out[-1].removesuffix("\n")
        return tuple(p for p in out if p)

    return replace(example, images=(), turns=tuple(replace(t, parts=text(t.parts)) for t in example.turns))
