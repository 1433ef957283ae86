"""Teacher-forced loss: per sample, summarised over samples, and compared between the right and the wrong image.

A loss is summed per sample in fp64 and divided once, so it does not depend on the batch size or on packing. How a
batch is laid out is the caller's business (`data.collate`); what the model computes is `model.vlm`'s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from beholder.evidence import Condition, Measurement
from beholder.probes import Measurable, bootstrap, measuring
from beholder.types import Batch, Example, ImageGeometry, ImageInput, ImageRef, TokenLosses, UserError


class LossModel(Measurable, Protocol):
    def __call__(self, batch: Batch, /) -> TokenLosses: ...


class SightedModel(LossModel, Protocol):
    """A model whose tower can be asked for the patches of an image."""

    geometry: ImageGeometry

    def patches(self, images: list[ImageInput], /) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class SampleLoss:
    """Sums over the supervised tokens of one sample; plain numbers, so processes can exchange them as JSON."""

    id: str
    nll: float
    """Nats, summed."""
    tokens: int
    correct: int
    """Tokens that were the arg-max."""


def sample_losses(model: LossModel, batches: Iterable[Batch]) -> list[SampleLoss]:
    """Loss sums of every sample, in the order the samples come.

    Equal for every batch size and layout up to the rounding of the model's own forward pass (fp32: about 1e-6
    relative), because nothing is averaged here. Raises FloatingPointError naming the samples whose loss is not finite.
    """
    losses: list[SampleLoss] = []
    with measuring(model):
        for batch in batches:
            n = len(batch.ids)
            if n == 0:  # every sample of it was rejected
                continue
            out = model(batch)
            sample = out.sample.cpu()
            nll = torch.zeros(n, dtype=torch.float64).index_add_(0, sample, out.nll.detach().cpu().double())
            tokens = torch.bincount(sample, minlength=n)
            correct = torch.bincount(sample[out.correct.cpu()], minlength=n)
            bad = [batch.ids[k] for k in range(n) if not math.isfinite(float(nll[k]))]
            if bad:
                raise FloatingPointError(f"the evaluation loss is not finite for samples {', '.join(map(repr, bad))}")
            losses += [SampleLoss(id, float(nll[k]), int(tokens[k]), int(correct[k])) for k, id in enumerate(batch.ids)]
    return losses


def summarize(losses: Sequence[SampleLoss], name: str, stratum: str | None = None, seed: int = 0) -> list[Measurement]:
    """``<name>.loss`` (Σnll/Σtokens), ``.perplexity``, ``.token_accuracy`` and ``.tokens`` of the samples.

    Long targets count as much as they are long. Intervals are 95 % bootstrap intervals over samples (1,000 resamples,
    seeded). Raises UserError when there is nothing to average.
    """
    nll, tokens, correct = _columns(losses, name)
    n = len(losses)
    mean = float(nll.sum() / tokens.sum())
    ci = bootstrap(lambda k: nll[k].sum(1) / tokens[k].sum(1), n, seed)
    out = [
        Measurement(name=f"{name}.loss", value=mean, unit="nats/token", better="lower", n=n, ci95=ci, stratum=stratum)
    ]
    if mean < 700:  # exp overflows a double past 709; such a perplexity says nothing
        out.append(
            Measurement(
                name=f"{name}.perplexity", value=math.exp(mean), unit="perplexity", better="lower", n=n,
                ci95=None if ci is None or ci[1] > 700 else (math.exp(ci[0]), math.exp(ci[1])), stratum=stratum,
                caveat="per token of this tokenizer; not comparable across tokenizers",
            )
        )  # fmt: skip
    out.append(
        Measurement(
            name=f"{name}.token_accuracy", value=float(correct.sum() / tokens.sum()), unit="share", better="higher",
            n=n, ci95=bootstrap(lambda k: correct[k].sum(1) / tokens[k].sum(1), n, seed), stratum=stratum,
            caveat="teacher-forced: each token is predicted after the right ones",
        )
    )  # fmt: skip
    out.append(
        Measurement(
            name=f"{name}.tokens", value=float(tokens.sum()), unit="tokens", better="none", n=n, stratum=stratum
        )
    )
    return out


def summarize_strata(
    losses: Sequence[SampleLoss], name: str, stratum_of: Mapping[str, str], seed: int = 0
) -> list[Measurement]:
    """`summarize` over all samples, then over the samples of each stratum (``stratum_of`` by sample id)."""
    out = summarize(losses, name, seed=seed)
    groups: dict[str, list[SampleLoss]] = {}
    for loss in losses:
        if loss.id in stratum_of:
            groups.setdefault(stratum_of[loss.id], []).append(loss)
    for stratum in sorted(groups):
        out += summarize(groups[stratum], name, stratum=stratum, seed=seed)
    return out


# ---------------------------------------------------------------------------------------------------------------
# Ablation


def derange(items: Sequence[object], same: Callable[[int, int], bool], seed: int) -> list[int]:
    """For every item another item, never itself and never an equal one: ``same(i, j)`` is False for the result.

    ``same`` must be an equivalence. The result is a permutation wherever one exists (`_reassign` says why), so that
    every image is used once. Raises UserError when all items are equal, or when there are fewer than two.
    """
    return _reassign(len(items), lambda place, item: not same(place, item), seed)


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
    pick = _reassign(len(slots), lambda place, item: keys[item] not in own[slots[place][0]], seed)
    images: list[list[ImageRef]] = [[] for _ in examples]
    for (e, _), item in zip(slots, pick, strict=True):
        source, k = slots[item]
        images[e].append(examples[source].images[k])
    return [replace(example, images=tuple(images[e])) for e, example in enumerate(examples)]


def _reassign(n: int, fits: Callable[[int, int], bool], seed: int) -> list[int]:
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


def zero_image(model: SightedModel) -> ImageInput:
    """The image whose normalised pixels are 0, as tower features, so that the tower sees it once.

    Pixels travel as uint8, so the nearest grey is taken: a normalised value is off 0 by at most ``0.5/255/std``.
    """
    g = model.geometry
    grey = torch.tensor([round(255 * m) for m in g.mean]).clamp(0, 255).to(torch.uint8)
    pixels = grey[:, None, None].expand(3, g.height, g.width).contiguous()
    with measuring(model):
        features = model.patches([ImageInput(pixels=pixels)])[0]
    return ImageInput(features=features.detach().to("cpu", torch.bfloat16))


def ablation_losses(
    model: SightedModel,
    examples: Sequence[Example],
    make_batches: Callable[[Sequence[Example]], Iterable[Batch]],
    conditions: Sequence[Condition] = ("correct", "shuffled", "zero"),
    *,
    content_key: Callable[[ImageRef], str],
    blank: ImageInput | None = None,
    seed: int = 0,
) -> dict[Condition, list[SampleLoss]]:
    """The same loss on the same samples, with their own image, with another sample's, and with no image.

    ``blank`` is `zero_image` of the model, for one whose tower has been released by now. Raises UserError when
    ``shuffled`` is asked for and the samples do not show two different images.
    """
    losses: dict[Condition, list[SampleLoss]] = {}
    for condition in conditions:
        match condition:
            case "correct":
                losses[condition] = sample_losses(model, make_batches(examples))
            case "shuffled":
                losses[condition] = sample_losses(model, make_batches(shuffle_images(examples, content_key, seed)))
            case "zero":
                losses[condition] = sample_losses(
                    model, _with_image(make_batches(examples), blank or zero_image(model))
                )
    return losses


def compare_conditions(
    losses: Mapping[Condition, Sequence[SampleLoss]], name: str = "ablation", seed: int = 0
) -> list[Measurement]:
    """``<name>.loss.<condition>`` of each, and ``<name>.delta.…`` and ``<name>.ratio.…`` of the others to ``correct``.

    Paired: only samples that every condition measured count, and a resample picks the same samples for both.
    """
    paired = _pair(losses)
    columns = {condition: _columns(paired[condition], name) for condition in paired}
    n = len(next(iter(paired.values())))
    out: list[Measurement] = []
    for condition, (nll, tokens, _) in columns.items():
        out.append(
            Measurement(
                name=f"{name}.loss.{condition}", value=float(nll.sum() / tokens.sum()), unit="nats/token",
                better="lower" if condition == "correct" else "none", n=n,
                ci95=bootstrap(lambda k, a=nll, t=tokens: a[k].sum(1) / t[k].sum(1), n, seed),
            )
        )  # fmt: skip
    if "correct" not in columns:
        return out
    right, tokens, _ = columns["correct"]
    for condition, (wrong, _, _) in columns.items():
        if condition == "correct":
            continue
        out.append(
            Measurement(
                name=f"{name}.delta.{condition}", value=float((wrong.sum() - right.sum()) / tokens.sum()),
                unit="nats/token", better="higher", n=n,
                ci95=bootstrap(lambda k, w=wrong: (w[k].sum(1) - right[k].sum(1)) / tokens[k].sum(1), n, seed),
                caveat="paired: the same samples with the wrong and the right image",
            )
        )  # fmt: skip
        if right.sum() > 0:  # a loss of exactly 0 has no ratio: the delta above says what there is to say
            out.append(
                Measurement(
                    name=f"{name}.ratio.{condition}", value=float(wrong.sum() / right.sum()), unit="ratio",
                    better="higher", n=n, ci95=bootstrap(lambda k, w=wrong: w[k].sum(1) / right[k].sum(1), n, seed),
                    caveat="loss with the wrong image over loss with the right one; 1 means the image is not used",
                )
            )  # fmt: skip
    return out


def ablate(
    model: SightedModel,
    examples: Sequence[Example],
    make_batches: Callable[[Sequence[Example]], Iterable[Batch]],
    conditions: Sequence[Condition] = ("correct", "shuffled", "zero"),
    *,
    content_key: Callable[[ImageRef], str],
    blank: ImageInput | None = None,
    name: str = "ablation",
    seed: int = 0,
) -> list[Measurement]:
    """Does the model look? `ablation_losses`, compared by `compare_conditions`."""
    losses = ablation_losses(model, examples, make_batches, conditions, content_key=content_key, blank=blank, seed=seed)
    return compare_conditions(losses, name, seed)


def _with_image(batches: Iterable[Batch], image: ImageInput) -> Iterator[Batch]:
    for batch in batches:
        yield replace(batch, images=[image] * len(batch.images))


def _columns(losses: Sequence[SampleLoss], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """nll, tokens and correct as fp64 [n]."""
    nll = np.array([loss.nll for loss in losses], dtype=np.float64)
    tokens = np.array([loss.tokens for loss in losses], dtype=np.float64)
    if tokens.sum() == 0:
        raise UserError(f"{name}: no sample was left to measure; look at the reject log for what was skipped")
    return nll, tokens, np.array([loss.correct for loss in losses], dtype=np.float64)


def _pair(losses: Mapping[Condition, Sequence[SampleLoss]]) -> dict[Condition, list[SampleLoss]]:
    """The samples that every condition has, in one order. Ids may repeat: the k-th of an id pairs with the k-th."""

    def keyed(items: Sequence[SampleLoss]) -> dict[tuple[str, int], SampleLoss]:
        seen: Counter[str] = Counter()
        out: dict[tuple[str, int], SampleLoss] = {}
        for item in items:
            out[item.id, seen[item.id]] = item
            seen[item.id] += 1
        return out

    by_condition: dict[Condition, dict[tuple[str, int], SampleLoss]] = {
        condition: keyed(items) for condition, items in losses.items()
    }
    first, *rest = by_condition.values()
    common = [key for key in first if all(key in other for other in rest)]
    for key in common:
        counts = {c: by_condition[c][key].tokens for c in by_condition}
        assert len(set(counts.values())) == 1, f"{key[0]}: the conditions supervise different tokens: {counts}"
    return {condition: [items[key] for key in common] for condition, items in by_condition.items()}
