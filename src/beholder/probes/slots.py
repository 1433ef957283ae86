"""Whether every image of a sample counts, wherever it stands: the evidence of samples with several images (S3-3).

Three questions, each about the same samples twice. Is a sample worse when one image alone is replaced (`replaced`)? Is
it as good when the image that decides stands elsewhere (`rotations`)? Do answers follow images that change places
(`find_swap`)? Which places the words name is `data.places`' reading; how a model is asked is the caller's business.

An answer is right here when every token of it, the end included, is the arg-max: what greedy decoding would write
exactly. So one forward pass gives loss and accuracy. Intervals resample sets of pictures: samples that show the same
ones are drawn together.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch

from beholder.data import places
from beholder.evidence import Measurement
from beholder.probes import NUM_RESAMPLES, joined, measurement, ratio_of_sums, wilson
from beholder.probes.answers import is_short, mean_share
from beholder.probes.loss import SampleLoss
from beholder.probes.strata import MIN_SAMPLES, images_shown
from beholder.probes.vqa import normalize_answer
from beholder.probes.wrong_images import show, shuffle_images, slots_of
from beholder.types import Batch, Example, ImageInput, ImageRef, Turn

Replacement = Literal["shuffled", "zero", "noise", "neighbour", "text"]
"""What stands in one place instead of its image: another sample's, an empty one, noise, a copy of the image beside it,
or as many tokens of plain text."""

REPLACEMENTS: tuple[Replacement, ...] = get_args(Replacement)

CLEAR = 2.0
"""The image that decides must cost at least so many times what any other costs when it is replaced, ..."""
LEAST = 0.1
"""... and nats per token."""

NUM_CONSISTENT = 64
"""Swaps without a known answer that are answered twice, to see whether the answers agree."""
CONSIDERED = 8
"""Times as many samples as are moved: those among which swaps with a known answer are looked for."""

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


Pictures = tuple[str, ...]
"""The contents of a sample's images, whatever their order."""


@dataclass
class Found:
    """What was measured, what could not be, and what says nothing of these samples."""

    measurements: list[Measurement] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    inapplicable: dict[str, str] = field(default_factory=dict)
    """Beginnings of measurement names, and why gates on them are not judged."""


def slot_name(place: int, num_images: int) -> str:
    """``image 2 of 3``; places count from 1."""
    return f"image {place} of {num_images}"


def pictures(example: Example, content_key: Callable[[ImageRef], str]) -> Pictures:
    """What the sample shows."""
    return tuple(sorted(map(content_key, example.images)))


def _together(values: np.ndarray, shown: Sequence[Pictures]) -> np.ndarray:
    """Sums over the samples that show the same pictures, in the order of the first of each."""
    number: dict[Pictures, int] = {}
    where = [number.setdefault(key, len(number)) for key in shown]
    total = np.zeros((len(number), *values.shape[1:]))
    np.add.at(total, where, values)
    return total


def _mean(values: np.ndarray, shown: Sequence[Pictures], seed: int) -> tuple[float, tuple[float, float] | None]:
    return ratio_of_sums(_together(values, shown), _together(np.ones(len(values)), shown), seed)


def _share(hits: np.ndarray, shown: Sequence[Pictures], seed: int) -> tuple[float, tuple[float, float] | None]:
    """Share of hits and its interval. Where all are alike no resample differs; then it is Wilson's, of as many trials
    as there are sets of pictures."""
    trials = len(set(shown))
    if trials == len(hits):
        return mean_share(hits, seed)
    if hits.min() == hits.max():
        return float(hits[0]), wilson(trials * int(hits[0]), trials)
    return _mean(hits, shown, seed)


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
        gone = [m for m, slot in enumerate(slots_of(batch)) if slot == k]
        left = [m for m in range(len(batch.images)) if m not in set(gone)]
        tokens = batch.input_ids.clone()
        spans = batch.image_positions.split(batch.image_lengths.tolist())
        for m in gone:
            width = len(spans[m])
            filler = (list(ids) * (width // len(ids) + 1))[:width]
            tokens.view(-1)[spans[m]] = torch.tensor(filler, dtype=tokens.dtype)
        return replace(
            batch, input_ids=tokens, images=[batch.images[m] for m in left], image_sample=batch.image_sample[left],
            image_positions=torch.cat([spans[m] for m in left] or [batch.image_positions[:0]]),
            image_lengths=batch.image_lengths[left],
            image_sizes=[batch.image_sizes[m] for m in left if batch.image_sizes],
        )  # fmt: skip

    return change


def compare_slots(
    examples: Sequence[Example],
    own: Sequence[SampleLoss],
    found: Mapping[Replacement, Sequence[Sequence[SampleLoss]]],
    *,
    content_key: Callable[[ImageRef], str],
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
    shown = [pictures(e, content_key) for e in examples]
    out: list[Measurement] = []
    for stratum, cells in rows:
        out += _compare(stratum, cells, examples, shown, own, found, seed)
    return out


def _compare(
    stratum: str | None,
    cells: Sequence[tuple[int, int]],
    examples: Sequence[Example],
    shown: Sequence[Pictures],
    own: Sequence[SampleLoss],
    found: Mapping[Replacement, Sequence[Sequence[SampleLoss]]],
    seed: int,
) -> list[Measurement]:
    by = None if stratum is None else "slot"
    short = [(i, k) for i, k in cells if is_short(examples[i])]

    def summed(of: Callable[[int, int], float], among: Sequence[tuple[int, int]] = cells) -> np.ndarray:
        return _together(np.array([of(i, k) for i, k in among], dtype=np.float64), [shown[i] for i, _ in among])

    tokens = summed(lambda i, _: own[i].tokens)
    right = summed(lambda i, _: own[i].nll)
    count = summed(lambda *_: 1.0, short)
    exact = summed(lambda i, _: own[i].exact, short)
    out: list[Measurement] = []

    def add(
        name: str, top: np.ndarray, bottom: np.ndarray, caveat: str | None = None,
        among: Sequence[tuple[int, int]] = cells,
    ) -> None:  # fmt: skip
        value, ci = ratio_of_sums(top, bottom, seed)
        n = len({i for i, _ in among})
        out.append(measurement(f"slots.{name}", value, ci, n=n, by=by, stratum=stratum, caveat=caveat))

    add("loss.correct", right, tokens)
    if short:
        add("right.correct", exact, count, among=short)
    for kind, losses in found.items():
        wrong = summed(lambda i, k, own=losses: own[i][k].nll)
        add(f"loss.{kind}", wrong, tokens)
        add(f"delta.{kind}", wrong - right, tokens, "paired: the same samples with this one image replaced")
        if short:
            other = summed(lambda i, k, own=losses: own[i][k].exact, short)
            add(f"right.{kind}", other, count, among=short)
            told = "paired: the same questions with this one image replaced"
            add(f"gain.{kind}", exact - other, count, told, among=short)
    return out


# ---------------------------------------------------------------------------------------------------------------
# Images that stand elsewhere


def is_movable(example: Example) -> bool:
    """Whether its images may change places with the right answer known: several of them without words between them, one
    answer, short, and words that speak of places in no other way than `places.renamed` can rename."""
    n = len(example.images)
    if n < 2 or example.num_answers != 1 or not example.answer_text or not places.stand_together(example):
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
    rows: Sequence[tuple[Pictures, int, Sequence[SampleLoss]]], *, seed: int = 0
) -> tuple[list[Measurement], list[str]]:
    """``slots.accuracy``, ``slots.rotated_loss``, ``slots.spread`` and ``slots.last_bias``; and what cannot be judged.

    ``rows``: (what the sample shows, place of the deciding image as it is, losses with everything moved on by 0, 1, …
    places). ``spread``: by number of images, the best place's accuracy minus the worst's; over all, the largest of
    these. It and ``last_bias`` are told of numbers of images with at least `MIN_SAMPLES` samples.
    """
    out: list[Measurement] = []
    gaps: list[str] = []
    shown: dict[int, list[Pictures]] = {}
    right: dict[int, np.ndarray] = {}
    nll: dict[int, np.ndarray] = {}
    tokens: dict[int, np.ndarray] = {}
    for n in sorted({len(losses) for *_, losses in rows}):
        own = [(place, losses) for _, place, losses in rows if len(losses) == n]
        shown[n] = [key for key, _, losses in rows if len(losses) == n]
        at = [[losses[(k - place + 1) % n] for k in range(n)] for place, losses in own]  # by place of what decides
        right[n] = np.array([[x.exact for x in row] for row in at], dtype=np.float64)
        nll[n] = np.array([[x.nll for x in row] for row in at])
        tokens[n] = np.array([[x.tokens for x in row] for row in at], dtype=np.float64)
    told = "the same samples in every place"
    for n, own in right.items():
        for k in range(n):
            more = {"n": len(own), "by": "slot", "stratum": slot_name(k + 1, n), "caveat": told}
            out.append(measurement("slots.accuracy", *_share(own[:, k], shown[n], seed), **more))
            loss, ci = ratio_of_sums(_together(nll[n][:, k], shown[n]), _together(tokens[n][:, k], shown[n]), seed)
            out.append(measurement("slots.rotated_loss", loss, ci, **more))
    if not right:
        return out, gaps
    overall = np.concatenate([own.mean(1) for own in right.values()])
    every = [key for own in shown.values() for key in own]
    out.append(measurement("slots.accuracy", *_mean(overall, every, seed), n=len(overall), caveat=told))

    enough = {n: own for n, own in right.items() if len(own) >= MIN_SAMPLES}
    if few := [f"{images_shown(n)} ({len(own)})" for n, own in right.items() if n not in enough]:
        gaps.append(
            f"Spread over places: fewer than {MIN_SAMPLES} samples whose deciding image is known, not judged: "
            f"{', '.join(few)}."
        )
    if not enough:
        return out, gaps
    last = {n: own[:, -1] - own[:, :-1].mean(1) for n, own in enough.items()}
    every = [key for n in enough for key in shown[n]]
    about = "accuracy with the deciding image last minus the mean over its other places"
    bias, ci = _mean(np.concatenate(list(last.values())), every, seed)
    out.append(measurement("slots.last_bias", bias, ci, n=len(every), caveat=about))
    for n, own in last.items():
        bias, ci = _mean(own, shown[n], seed)
        out.append(
            measurement("slots.last_bias", bias, ci, n=len(own), by="images", stratum=images_shown(n), caveat=about)
        )
    rng = np.random.default_rng(seed)
    drawn = {n: _range(_resampled_means(own, shown[n], rng)) for n, own in enough.items()}
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


def _resampled_means(right: np.ndarray, shown: Sequence[Pictures], rng: np.random.Generator) -> np.ndarray:
    """[R, n]: means by place over resampled sets of pictures."""
    total, count = _together(right, shown), _together(np.ones(len(right)), shown)
    draws = (rng.integers(len(count), size=len(count)) for _ in range(NUM_RESAMPLES))
    return np.stack([total[k].sum(0) / count[k].sum() for k in draws])


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
    moves_the_named: bool
    """Question or answer names one place, and another picture stands there now: whoever minds the order finds the
    sample's own answer less likely."""


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
    said = {*found.answered, *found.asked}
    first = next(iter((*found.answered, *found.asked)), start % n + 1)
    others = [p for p in range(1, n + 1) if p != first]
    swaps = [
        _swap(example, first, others[(start + k) % len(others)], siblings, content_key, only=said == {first})
        for k in range(len(others))
    ]
    return max(swaps, key=lambda s: (s.follows, s.kept is not None, s.moves_the_named))


def _swap(
    example: Example, a: int, b: int, siblings: Siblings, content_key: Callable[[ImageRef], str], *, only: bool
) -> Swap:
    """``only``: a is the one place that the sample names."""
    to = {p: {a: b, b: a}.get(p, p) for p in range(1, len(example.images) + 1)}
    words = places.renamed(example, to)
    assert words is not None, f"{example.id}: its places cannot be renamed"
    swapped = replace(example, images=_moved_images(example, to))
    told = [places.renamed(e, to) for e in siblings.get(_asked(words, content_key), ())]
    answers = {normalize_answer(e.answer_text): e.answer_text for e in told if e is not None}
    right = next(iter(answers.values())) if len(answers) == 1 and None not in told else None
    kept = None if right is None else _answered(swapped, right)
    follows = right is not None and normalize_answer(right) != normalize_answer(example.answer_text)
    differ = content_key(example.images[a - 1]) != content_key(example.images[b - 1])
    return Swap(replace(words, images=swapped.images), kept, follows, swapped, words, to, only and differ)


def _answered(example: Example, answer: str) -> Example:
    return replace(example, turns=(*example.turns[:-1], Turn("assistant", (answer,))), answers=())


def alike(swap: Swap, kept: str, renamed: str) -> bool:
    """Whether an answer to the words that stay says what an answer to the renamed words says."""
    there = places.renamed(_answered(swap.words_renamed, renamed), swap.to) if renamed else None
    return normalize_answer(kept) == normalize_answer(renamed if there is None else there.answer_text)


Hit = tuple[Pictures, bool]
"""What the sample shows, and whether it was answered rightly."""


def score_swaps(
    renamed: Sequence[Hit], follows: Sequence[Hit], consistent: Sequence[Hit] = (), *, seed: int = 0
) -> list[Measurement]:
    """``slots.swap_renamed``, ``slots.follows`` and ``slots.consistent``: shares of swaps that were answered rightly.

    ``follows``: swaps whose right answer changed; told of all together from `MIN_SAMPLES` on.
    """
    out: list[Measurement] = []

    def add(name: str, hits: Sequence[Hit], caveat: str, **more: Any) -> None:
        if hits:
            few = f"only {len(hits)} swaps" if len(hits) < MIN_SAMPLES else None
            value, ci = _share(np.array([right for _, right in hits], dtype=np.float64), [key for key, _ in hits], seed)
            out.append(measurement(name, value, ci, n=len(hits), caveat=joined(caveat, few), **more))

    add("slots.swap_renamed", renamed, "two images swapped and renamed in the words: the right answer is known")
    about = "two images swapped, words as they were, where that changes the right answer"
    if len(follows) >= MIN_SAMPLES:
        add("slots.follows", follows, about)
    numbers = sorted({len(key) for key, _ in follows})
    for n in numbers if len(numbers) > 1 else ():
        own = [hit for hit in follows if len(hit[0]) == n]
        add("slots.follows", own, about, by="images", stratum=images_shown(n))
    add(
        "slots.consistent", consistent,
        "swaps whose right answer no sample tells: images swapped, against the renamed words; not judged",
    )  # fmt: skip
    return out


def score_order(
    own: Sequence[SampleLoss], swapped: Sequence[SampleLoss], shown: Sequence[Pictures], seed: int = 0
) -> list[Measurement]:
    """``slots.order``, nats per token: what it costs the right answer that another image stands at the place that the
    words name. 0 for whoever ignores the order, whatever else it sees; needs no sample that tells what is right then.
    """
    more = np.array([wrong.nll - right.nll for right, wrong in zip(own, swapped, strict=True)])
    tokens = np.array([right.tokens for right in own], dtype=np.float64)
    value, ci = ratio_of_sums(_together(more, shown), _together(tokens, shown), seed)
    about = "the same samples with two images swapped under words that name one place"
    return [measurement("slots.order", value, ci, n=len(own), caveat=about)]


def too_few(measurements: Sequence[Measurement]) -> list[str]:
    """Places with too few samples to judge, by name."""
    rows = (m for m in measurements if m.name == "slots.delta.shuffled" and m.by == "slot" and m.n < MIN_SAMPLES)
    return [f"{m.stratum} ({m.n})" for m in rows]


# ---------------------------------------------------------------------------------------------------------------
# All of it


def move(
    examples: Mapping[int, Example],
    own: Sequence[SampleLoss],
    costs: Mapping[int, Sequence[float]],
    measure: Measure,
    write: Callable[[Sequence[Example], str], Sequence[str]],
    *,
    size: int,
    choose: Callable[[Sequence[int], int], list[int]],
    fits: Callable[[Example], bool],
    content_key: Callable[[ImageRef], str],
    seed: int = 0,
) -> Found:
    """The deciding image of ``size`` samples through every place, and two images of as many swapped with the words
    renamed or kept.

    ``examples`` by their index in the held-out set, whose losses ``own`` are; ``costs`` as of `deciding_place`, of the
    samples that were measured so. ``write`` gives the model's answers, under a name for its progress; ``choose`` at
    most so many of these, balanced over the number of images; ``fits`` whether nothing of a sample would be cut off.
    """
    found = Found()
    movable = [i for i, e in examples.items() if is_movable(e)]
    if left := len(examples) - len(movable):
        found.gaps.append(
            f"Images moved and swapped: {left} of {len(examples)} held-out samples of several images are left out; "
            "their answer is long, words stand between their images, or their words speak of an order that cannot be "
            "renamed."
        )
    decides = {i: p for i in movable if (p := deciding_place(examples[i], costs.get(i))) is not None}
    rows: list[tuple[int, list[Example]]] = []
    long = 0
    for i in choose(list(decides), size):
        others = rotations(examples[i])
        if all(map(fits, others)):
            rows.append((i, others))
        else:
            long += 1
    measured = iter(measure([e for _, others in rows for e in others]))
    turned = [
        (pictures(examples[i], content_key), decides[i], [own[i], *(next(measured) for _ in others)])
        for i, others in rows
    ]
    judged, gaps = score_rotations(turned, seed=seed)
    found.measurements += judged
    found.gaps += gaps
    if not any(m.name == "slots.spread" for m in judged):
        unmeasured = [i for i in movable if i not in decides and i not in costs]  # replacing their images would tell
        if _enough(examples[i] for i in decides):  # the data have enough: a setting waives no gate
            found.gaps.append(
                f"Images moved: only {len(rows)} samples were, too few to judge for any number of images; raise "
                f"eval.moved_samples ({size})."
            )
        elif _enough(examples[i] for i in (*decides, *unmeasured)):
            found.gaps.append(
                f"Images moved: of only {len(decides)} held-out samples it is known which image decides, too few to "
                f"judge for any number of images, and of {len(unmeasured)} it was not measured; raise "
                "eval.slot_samples, with shuffled among ablation.conditions."
            )
        else:
            why = (
                f"of {len(decides)} held-out samples it is known which image decides, too few for any number of images"
            )
            found.inapplicable |= {"slots.spread": why, "slots.last_bias": why}

    siblings = siblings_of(examples.values(), content_key)
    swaps = {i: find_swap(examples[i], siblings, content_key) for i in choose(movable, CONSIDERED * size)}
    telling = choose([i for i, s in swaps.items() if s.follows], (size + 1) // 2)
    rest = choose([i for i in swaps if i not in set(telling)], size - len(telling))
    wanted = sorted((*telling, *rest))
    taken = [i for i in wanted if fits((s := swaps[i]).renamed) and fits(s.kept or s.words_kept)]
    chosen = [swaps[i] for i in taken]
    if long := long + len(wanted) - len(chosen):
        found.gaps.append(
            f"Images moved and swapped: {long} chosen samples are left out; with their images or words exchanged they "
            "are longer than prompting.max_seq_len."
        )
    known = [s for s in chosen if s.kept is not None and s.follows]
    renamed = measure([s.renamed for s in chosen])
    kept = measure([s.kept for s in known if s.kept is not None])
    unknown = [s for s in chosen if s.kept is None][:NUM_CONSISTENT]
    agree: list[bool] = []
    if unknown:
        said = write([s.words_kept for s in unknown], "swapped images")
        again = write([s.words_renamed for s in unknown], "renamed words")
        agree = [alike(s, a, b) for s, a, b in zip(unknown, said, again, strict=True)]

    def hits(of: Sequence[Swap], right: Iterable[bool]) -> list[Hit]:
        return [(pictures(s.renamed, content_key), x) for s, x in zip(of, right, strict=True)]

    found.measurements += score_swaps(
        hits(chosen, (x.exact for x in renamed)), hits(known, (x.exact for x in kept)), hits(unknown, agree),
        seed=seed,
    )  # fmt: skip

    def wanting(name: str, have: int, tells: Callable[[Swap], bool], gap: str, why: str) -> bool:
        """Said where the data have enough, a reason where they have not: a setting waives no gate."""
        if have < MIN_SAMPLES and (len(swaps) < len(movable) or sum(map(tells, swaps.values())) >= MIN_SAMPLES):
            found.gaps.append(f"{gap} too few to judge; raise eval.moved_samples ({size}).")
        elif have < MIN_SAMPLES:
            found.inapplicable[name] = why
        return have < MIN_SAMPLES

    moving = [(i, s) for i, s in zip(taken, chosen, strict=True) if s.moves_the_named]
    if not wanting(
        "slots.order", len(moving), lambda s: s.moves_the_named,
        f"Order of the images: only {len(moving)} swaps moved the one image that the words name, which are",
        f"the words of {len(moving)} held-out samples name one place whose image can be moved, and {MIN_SAMPLES} are "
        "needed",
    ):  # fmt: skip
        found.measurements += score_order(
            [own[i] for i, _ in moving], measure([s.words_kept for _, s in moving]),
            [pictures(s.renamed, content_key) for _, s in moving], seed,
        )  # fmt: skip
    wanting(
        "slots.follows", len(known), lambda s: s.follows,
        f"Swapped images: only {len(known)} swaps with a known answer were made, which are",
        f"of {len(known)} held-out samples it is known how swapping two images changes the right answer, and "
        f"{MIN_SAMPLES} are needed: questions about one place of images whose other places are asked about too, or "
        "whose answer is a place",
    )  # fmt: skip
    return found


def _enough(examples: Iterable[Example]) -> bool:
    """Whether they are enough to judge for some number of images."""
    return max(Counter(len(e.images) for e in examples).values(), default=0) >= MIN_SAMPLES
