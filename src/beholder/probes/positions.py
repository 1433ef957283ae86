"""Whether every image of a sample counts, wherever it stands: the evidence of samples with several images (S3-3).

Three questions, each about the same samples twice. Is a sample worse when one image alone is replaced (`replaced`)? Is
it as good when the image that decides stands elsewhere (`rotations`)? Do answers follow images that change places
(`find_swap`)? Which places the words name is `data.places`' reading; how a model is asked is the caller's business.

An answer is right here when every token of it, the end included, is the arg-max: what greedy decoding would write
exactly. So one forward pass gives loss and accuracy.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch

from beholder.data import places
from beholder.evidence import Measurement
from beholder.probes import NUM_RESAMPLES, joined, mean, measurement, ratio_of_sums
from beholder.probes.answers import is_short, mean_share
from beholder.probes.loss import SampleLoss
from beholder.probes.strata import MIN_SAMPLES, images_shown
from beholder.probes.vqa import normalize_answer
from beholder.probes.wrong_images import places as places_of
from beholder.probes.wrong_images import show, shuffle_images
from beholder.types import Batch, Example, ImageInput, ImageRef, Turn

Replacement = Literal["shuffled", "zero", "noise", "neighbour", "text"]
"""What stands in one place instead of its image: another sample's, an empty one, noise, a copy of the image beside it,
or as many tokens of plain text."""

REPLACEMENTS: tuple[Replacement, ...] = get_args(Replacement)

CLEAR = 2.0
"""The image that decides must cost at least so many times what any other costs when it is replaced, ..."""
LEAST = 0.1
"""... and nats per token."""

FILLER = (
    "It was written down one evening, and nobody has asked for it since. The window stood open, the road was quiet, "
    "and there was time enough to go on with the letter. Some of it was about the weather, some of it about the way "
    "home, and most of it about nothing at all. "
)
"""What stands in the place of an image under ``text``: nothing that questions about pictures ask for."""

Change = Callable[[Batch], Batch]


class Measure(Protocol):
    """The loss of examples, each batch of them changed before the model sees it."""

    def __call__(self, examples: Sequence[Example], change: Change | None = None, /) -> list[SampleLoss]: ...


def slot_name(place: int, num_images: int) -> str:
    """``image 2 of 3``; places count from 1."""
    return f"image {place} of {num_images}"


# ---------------------------------------------------------------------------------------------------------------
# One image replaced


def replaced(
    measure: Measure,
    examples: Sequence[Example],
    kinds: Sequence[Replacement],
    fill: Mapping[Replacement, Callable[[int], Change]],
    *,
    content_key: Callable[[ImageRef], str],
    seed: int = 0,
) -> dict[Replacement, list[list[SampleLoss]]]:
    """Replacement → per example → per place: its loss with that one image replaced.

    ``fill``: the change of a batch that replaces what stands in place k (from 0), for the kinds that no other image of
    the data can stand for (`image_in_slot`, `text_in_slot`). Raises UserError when ``shuffled`` is asked for and the
    samples do not show two different images.
    """
    others = shuffle_images(examples, content_key, seed) if "shuffled" in kinds else examples
    out: dict[Replacement, list[list[SampleLoss]]] = {}
    for kind in kinds:
        rows: list[list[SampleLoss]] = [[] for _ in examples]
        for k in range(max((len(e.images) for e in examples), default=0)):
            members = [i for i, e in enumerate(examples) if len(e.images) > k]
            shown = [examples[i] for i in members]
            if kind == "shuffled":
                shown = [_with(examples[i], k, others[i].images[k]) for i in members]
            elif kind == "neighbour":
                shown = [_with(e, k, e.images[k + 1 if k + 1 < len(e.images) else k - 1]) for e in shown]
            change = fill[kind](k) if kind in fill else None
            for i, found in zip(members, measure(shown, change), strict=True):
                rows[i].append(found)
        out[kind] = rows
    return out


def _with(example: Example, k: int, image: ImageRef) -> Example:
    return replace(example, images=(*example.images[:k], image, *example.images[k + 1 :]))


def image_in_slot(k: int, images: Sequence[ImageInput]) -> Change:
    """Shows one of ``images``, chosen by sample id, in place k (from 0) of every sample that has one."""

    return lambda batch: show(batch, images, only=k)


def text_in_slot(k: int, ids: Sequence[int]) -> Change:
    """Plain text in place k (from 0): its positions hold ``ids``, again and again, and no image. Labels stay, and so
    does every length: what an image's absence costs is told from what a longer sequence costs."""

    def change(batch: Batch) -> Batch:
        gone = [m for m, place in enumerate(places_of(batch)) if place == k]
        left = [m for m in range(len(batch.images)) if m not in set(gone)]
        tokens = batch.input_ids.clone()
        places = batch.image_positions.split(batch.image_lengths.tolist())
        for m in gone:
            width = len(places[m])
            filler = (list(ids) * (width // len(ids) + 1))[:width]
            tokens.view(-1)[places[m]] = torch.tensor(filler, dtype=tokens.dtype)
        return replace(
            batch, input_ids=tokens, images=[batch.images[m] for m in left], image_sample=batch.image_sample[left],
            image_positions=torch.cat([places[m] for m in left] or [batch.image_positions[:0]]),
            image_lengths=batch.image_lengths[left],
            image_sizes=[batch.image_sizes[m] for m in left if batch.image_sizes],
        )  # fmt: skip

    return change


def compare_slots(
    examples: Sequence[Example],
    own: Sequence[SampleLoss],
    found: Mapping[Replacement, Sequence[Sequence[SampleLoss]]],
    *,
    seed: int = 0,
) -> list[Measurement]:
    """``slots.loss.…`` and ``slots.delta.…`` (nats per token), ``slots.right.…`` and ``slots.gain.…`` (short answers).

    For every number of images and place, and over all of them together; ``delta`` and ``gain`` are paired by sample,
    and places of one sample stay together in a resample.
    """
    rows = [(None, [(i, k) for i, e in enumerate(examples) for k in range(len(e.images))])]
    for n in sorted({len(e.images) for e in examples}):
        members = [i for i, e in enumerate(examples) if len(e.images) == n]
        rows += [(slot_name(k + 1, n), [(i, k) for i in members]) for k in range(n)]
    out: list[Measurement] = []
    for stratum, cells in rows:
        out += _compare(stratum, cells, examples, own, found, seed)
    return out


def _compare(
    stratum: str | None,
    cells: Sequence[tuple[int, int]],
    examples: Sequence[Example],
    own: Sequence[SampleLoss],
    found: Mapping[Replacement, Sequence[Sequence[SampleLoss]]],
    seed: int,
) -> list[Measurement]:
    by = None if stratum is None else "slot"
    samples = sorted({i for i, _ in cells})
    where = {i: j for j, i in enumerate(samples)}

    def summed(of: Callable[[int, int], float], among: Sequence[tuple[int, int]] = cells) -> np.ndarray:
        total = np.zeros(len(samples))
        for i, k in among:
            total[where[i]] += of(i, k)
        return total

    tokens = summed(lambda i, _: own[i].tokens)
    right = summed(lambda i, _: own[i].nll)
    short = [(i, k) for i, k in cells if is_short(examples[i])]
    asked = sorted({where[i] for i, _ in short})
    count = summed(lambda *_: 1.0, short)[asked]
    exact = summed(lambda i, _: own[i].exact, short)[asked]
    out: list[Measurement] = []

    def add(name: str, top: np.ndarray, bottom: np.ndarray, caveat: str | None = None) -> None:
        value, ci = ratio_of_sums(top, bottom, seed)
        out.append(measurement(f"slots.{name}", value, ci, n=len(top), by=by, stratum=stratum, caveat=caveat))

    add("loss.correct", right, tokens)
    if asked:
        add("right.correct", exact, count)
    for kind, losses in found.items():
        wrong = summed(lambda i, k, own=losses: own[i][k].nll)
        add(f"loss.{kind}", wrong, tokens)
        add(f"delta.{kind}", wrong - right, tokens, "paired: the same samples with this one image replaced")
        if asked:
            other = summed(lambda i, k, own=losses: own[i][k].exact, short)[asked]
            add(f"right.{kind}", other, count)
            add(f"gain.{kind}", exact - other, count, "paired: the same questions with this one image replaced")
    return out


# ---------------------------------------------------------------------------------------------------------------
# Images that stand elsewhere


def is_movable(example: Example) -> bool:
    """Whether its images may change places with the right answer known: several of them, one answer, short, and words
    that speak of places in no other way than `places.renamed` can rename."""
    n = len(example.images)
    if n < 2 or example.num_answers != 1 or not example.answer_text:
        return False
    return is_short(example) and places.renamed(example, {p: p for p in range(1, n + 1)}) is not None


def moved(example: Example, to: Mapping[int, int]) -> Example:
    """The image at place p at place ``to[p]``, and every place in the words renamed so that nothing else changes.

    Only for what `is_movable`.
    """
    other = places.renamed(example, to)
    assert other is not None, f"{example.id}: its places cannot be renamed"
    return replace(other, images=_moved_images(example, to))


def _moved_images(example: Example, to: Mapping[int, int]) -> tuple[ImageRef, ...]:
    came_from = {to[p]: p for p in to}
    return tuple(example.images[came_from[p] - 1] for p in range(1, len(example.images) + 1))


def deciding_place(example: Example, costs: Sequence[float] | None) -> int | None:
    """The place of the image that decides, from 1: the only one that the words name, else the one that clearly costs
    most when it is replaced (nats per token by place); None when neither says. Only for what `is_movable`."""
    found = places.named(example)
    told = {*found.asked, *found.answered}
    if len(told) == 1:
        return told.pop()
    if costs is None or len(costs) < 2:
        return None
    *_, second, first = sorted(costs)
    return 1 + list(costs).index(first) if first >= LEAST and first >= CLEAR * max(second, 0.0) else None


def rotations(example: Example) -> list[Example]:
    """The sample with all its images moved on by one place, by two, …: n - 1 of them."""
    n = len(example.images)
    return [moved(example, _turn(n, by)) for by in range(1, n)]


def _turn(n: int, by: int) -> dict[int, int]:
    return {p: (p - 1 + by) % n + 1 for p in range(1, n + 1)}


def score_rotations(
    rows: Sequence[tuple[int, Sequence[SampleLoss]]], *, seed: int = 0
) -> tuple[list[Measurement], list[str]]:
    """``slots.accuracy``, ``slots.rotated_loss``, ``slots.spread`` and ``slots.last_bias``; and what cannot be judged.

    ``rows``: (place of the deciding image as the sample is, losses with everything moved on by 0, 1, … places).
    ``spread``: by number of images, the best place's accuracy minus the worst's; over all, the largest of these, of
    numbers of images with at least `MIN_SAMPLES` samples.
    """
    out: list[Measurement] = []
    gaps: list[str] = []
    right: dict[int, np.ndarray] = {}
    nll: dict[int, np.ndarray] = {}
    tokens: dict[int, np.ndarray] = {}
    for n in sorted({len(losses) for _, losses in rows}):
        own = [(place, losses) for place, losses in rows if len(losses) == n]
        at = [[losses[(k - place + 1) % n] for k in range(n)] for place, losses in own]  # by place of what decides
        right[n] = np.array([[x.exact for x in row] for row in at], dtype=np.float64)
        nll[n] = np.array([[x.nll for x in row] for row in at])
        tokens[n] = np.array([[x.tokens for x in row] for row in at], dtype=np.float64)
    told = "the same samples in every place"
    for n, own in right.items():
        for k in range(n):
            more = {"n": len(own), "by": "slot", "stratum": slot_name(k + 1, n), "caveat": told}
            out.append(measurement("slots.accuracy", *mean_share(own[:, k], seed), **more))
            loss, ci = ratio_of_sums(nll[n][:, k], tokens[n][:, k], seed)
            out.append(measurement("slots.rotated_loss", loss, ci, **more))
    if not right:
        return out, gaps
    overall = np.concatenate([own.mean(1) for own in right.values()])
    out.append(measurement("slots.accuracy", *mean(overall, seed), n=len(overall), caveat=told))
    last = {n: own[:, -1] - own[:, :-1].mean(1) for n, own in right.items()}
    every = np.concatenate(list(last.values()))
    about = "accuracy with the deciding image last minus the mean over its other places"
    out.append(measurement("slots.last_bias", *mean(every, seed), n=len(every), caveat=about))
    out += [
        measurement("slots.last_bias", *mean(own, seed), n=len(own), by="images", stratum=images_shown(n), caveat=about)
        for n, own in last.items()
    ]

    enough = {n: own for n, own in right.items() if len(own) >= MIN_SAMPLES}
    if few := [f"{images_shown(n)} ({len(own)})" for n, own in right.items() if n not in enough]:
        gaps.append(
            f"Spread over places: fewer than {MIN_SAMPLES} samples whose deciding image is known, not judged: "
            f"{', '.join(few)}."
        )
    if not enough:
        return out, gaps
    rng = np.random.default_rng(seed)
    drawn = {n: _range(_resampled_means(own, rng)) for n, own in enough.items()}
    chance = {n: _range(_permuted_means(own, rng)) for n, own in enough.items()}

    def spread(value: float, draws: np.ndarray, alone: np.ndarray, n: int, **more: Any) -> Measurement:
        low, high = np.quantile(draws, [0.025, 0.975])
        caveat = f"best place minus worst; places that are all alike would differ by {100 * alone.mean():.1f} points"
        return measurement("slots.spread", value, (float(low), float(high)), n=n, caveat=caveat, **more)

    values = {n: float(_range(own.mean(0)[None])[0]) for n, own in enough.items()}
    most = max(values.values())
    joint = np.maximum.reduce(list(drawn.values()))
    out.append(spread(most, joint, np.maximum.reduce(list(chance.values())), sum(len(own) for own in enough.values())))
    out += [
        spread(values[n], drawn[n], chance[n], len(own), by="images", stratum=images_shown(n))
        for n, own in enough.items()
    ]
    return out, gaps


def _range(means: np.ndarray) -> np.ndarray:
    """Largest minus smallest, of each row."""
    return means.max(1) - means.min(1)


def _resampled_means(right: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[R, n]: means by place over resampled samples."""
    return np.stack([right[rng.integers(len(right), size=len(right))].mean(0) for _ in range(NUM_RESAMPLES)])


def _permuted_means(right: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[R, n]: means by place when the places of every sample are shuffled, as if none differed from another."""
    return np.stack([rng.permuted(right, axis=1).mean(0) for _ in range(NUM_RESAMPLES)])


# ---------------------------------------------------------------------------------------------------------------
# Two images that change places


Siblings = Mapping[tuple[tuple[str, ...], tuple[str, ...]], Sequence[Example]]
"""(images, words before the answer) → the samples that ask this of these images in this order."""


def siblings_of(examples: Iterable[Example], content_key: Callable[[ImageRef], str]) -> Siblings:
    """The samples that have an answer, by what is asked of which images."""
    found: defaultdict[tuple[tuple[str, ...], tuple[str, ...]], list[Example]] = defaultdict(list)
    for e in examples:
        if len(e.images) > 1 and e.answer_text:
            found[_asked(e, content_key)].append(e)
    return dict(found)


def _asked(example: Example, content_key: Callable[[ImageRef], str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    images = tuple(content_key(ref) for ref in example.images)
    return images, tuple(f"{t.role}: {t.text}" for t in example.turns[:-1])


@dataclass(frozen=True, slots=True)
class Swap:
    """A sample two of whose images change places."""

    renamed: Example
    """The words follow: the answer is the sample's own, with its places renamed."""
    kept: Example | None
    """The words stay, with what is then right as the answer; None where no sample tells it."""
    follows: bool
    """What is right with the words that stay is not what was right before: whoever ignores the order gets it wrong."""
    words_kept: Example
    """The images swapped and the words as they are: to be answered as ..."""
    words_renamed: Example
    """... the images as they are and the words renamed."""
    to: dict[int, int]


def find_swap(example: Example, siblings: Siblings, content_key: Callable[[ImageRef], str]) -> Swap:
    """The swap that says most: of the place that the words name with another, so that the right answer changes and is
    known. Only for what `is_movable`.

    Swapping images under words that stay asks what the renamed words ask of the images as they are. So what is right is
    the answer of the sample that asks just that, its places renamed; for words that name no place that is the sample
    itself.
    """
    n = len(example.images)
    found = places.named(example)
    start = zlib.crc32(example.id.encode())
    first = next(iter((*found.answered, *found.asked)), start % n + 1)
    others = [p for p in range(1, n + 1) if p != first]
    swaps = [
        _swap(example, first, others[(start + k) % len(others)], siblings, content_key) for k in range(len(others))
    ]
    return max(swaps, key=lambda s: (s.follows, s.kept is not None))


def _swap(example: Example, a: int, b: int, siblings: Siblings, content_key: Callable[[ImageRef], str]) -> Swap:
    to = {p: {a: b, b: a}.get(p, p) for p in range(1, len(example.images) + 1)}
    words = places.renamed(example, to)
    assert words is not None, f"{example.id}: its places cannot be renamed"
    swapped = replace(example, images=_moved_images(example, to))
    told = [places.renamed(e, to) for e in siblings.get(_asked(words, content_key), ())]
    answers = {normalize_answer(e.answer_text): e.answer_text for e in told if e is not None}
    right = next(iter(answers.values())) if len(answers) == 1 and None not in told else None
    kept = None if right is None else _answered(swapped, right)
    follows = right is not None and normalize_answer(right) != normalize_answer(example.answer_text)
    return Swap(replace(words, images=swapped.images), kept, follows, swapped, words, to)


def _answered(example: Example, answer: str) -> Example:
    return replace(example, turns=(*example.turns[:-1], Turn("assistant", (answer,))), answers=())


def alike(swap: Swap, kept: str, renamed: str) -> bool:
    """Whether an answer to the words that stay says what an answer to the renamed words says."""
    there = places.renamed(_answered(swap.words_renamed, renamed), swap.to) if renamed else None
    return normalize_answer(kept) == normalize_answer(renamed if there is None else there.answer_text)


def score_swaps(
    renamed: Sequence[bool],
    follows: Sequence[tuple[int, bool]],
    consistent: Sequence[bool] = (),
    *,
    seed: int = 0,
) -> list[Measurement]:
    """``slots.swap_renamed``, ``slots.follows`` and ``slots.consistent``: shares of swaps that were answered rightly.

    ``follows``: (number of images, right) of swaps whose right answer changed.
    """
    out: list[Measurement] = []

    def add(name: str, hits: Sequence[bool], caveat: str, **more: Any) -> None:
        if hits:
            few = f"only {len(hits)} swaps" if len(hits) < MIN_SAMPLES else None
            value, ci = mean_share(np.array(hits, dtype=np.float64), seed)
            out.append(measurement(name, value, ci, n=len(hits), caveat=joined(caveat, few), **more))

    add("slots.swap_renamed", renamed, "two images swapped and renamed in the words: the right answer is known")
    about = "two images swapped, words as they were, where that changes the right answer"
    add("slots.follows", [right for _, right in follows], about)
    strata = sorted({n for n, _ in follows})
    for n in strata if len(strata) > 1 else ():
        add(
            "slots.follows", [right for m, right in follows if m == n], about, by="images", stratum=images_shown(n)
        )  # fmt: skip
    add(
        "slots.consistent", consistent,
        "swaps whose right answer no sample tells: images swapped, against the renamed words; not judged",
    )  # fmt: skip
    return out


def too_few(measurements: Sequence[Measurement]) -> list[str]:
    """Places with too few samples to judge, by name."""
    rows = (m for m in measurements if m.name == "slots.delta.shuffled" and m.by == "slot" and m.n < MIN_SAMPLES)
    return [f"{m.stratum} ({m.n})" for m in rows]
