"""Contrast pairs (E-3): two held-out samples with the same question and different right answers, both to be right.

What the question alone can give is the same answer to both, so whoever does not look is never right about both
(NaturalBench, Li et al. 2024). The pairs are found among the answers that are written anyway.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from beholder.evidence import Condition, Measurement
from beholder.probes import bootstrap, drawn, joined, measurement, wilson
from beholder.probes.answers import mean_share, references_of, usual_answer
from beholder.probes.strata import MIN_SAMPLES, parts
from beholder.probes.vqa import normalize_answer, vqa_accuracy
from beholder.types import Example, ImageRef

if TYPE_CHECKING:
    from beholder.probes.written import Written

MAX_ASKED = 100
"""Samples of one question that are paired with each other: at most 4,950 pairs. Of more, as many are drawn."""
RIGHT = 0.5
"""VQA accuracy from which an answer counts as right, where people gave several; with one reference it is 0 or 1."""
_BLOCK = 2_000_000
"""Resampled pairs held in memory at once."""


@dataclass(frozen=True)
class Pairs:
    """Which samples stand against each other, by their index."""

    left: np.ndarray
    right: np.ndarray
    prior: np.ndarray
    """For each pair p(a)·p(b): what a guesser would reach that draws from the right answers to that question."""
    questions: int
    cut: int
    """Questions of which only `MAX_ASKED` samples were paired."""

    def __len__(self) -> int:
        return len(self.left)

    @property
    def members(self) -> np.ndarray:
        return np.unique(np.concatenate([self.left, self.right]))

    def only(self, keep: np.ndarray) -> Pairs:
        """Those of these indices."""
        return Pairs(self.left[keep], self.right[keep], self.prior[keep], self.questions, self.cut)


def asked(example: Example) -> tuple[int, str]:
    """What two samples of a pair have in common: how many images, and all text before the last answer, earlier turns
    included, apart from case and spacing."""
    before = example.turns[:-1] if example.turns and example.turns[-1].role == "assistant" else example.turns
    said = "\n".join(f"{t.role}: {' '.join(p for p in t.parts if isinstance(p, str))}" for t in before)
    return len(example.images), " ".join(said.casefold().split())


def find(examples: Sequence[Example], content_key: Callable[[ImageRef], str], seed: int = 0) -> Pairs:
    """All pairs of samples that are `asked` the same, about other images, and have no right answer in common.

    Of a question that more than `MAX_ASKED` samples ask, as many are drawn with ``seed``.
    """
    by: dict[tuple[int, str], list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        if example.images:
            by[asked(example)].append(i)
    right = [frozenset(map(normalize_answer, references_of(e))) for e in examples]
    rng = np.random.default_rng(seed)
    found: list[tuple[int, int, float]] = []
    questions = cut = 0
    for _, same in sorted(by.items()):
        if len({right[i] for i in same}) < 2:
            continue
        usual = [usual_answer(references_of(examples[i])) for i in same]
        share = {answer: n / len(same) for answer, n in Counter(usual).items()}
        members = list(zip(same, usual, strict=True))
        cut += len(members) > MAX_ASKED
        members = drawn(members, MAX_ASKED, rng)
        shows = {i: sorted(content_key(ref) for ref in examples[i].images) for i, _ in members}
        own = [
            (i, j, share[a] * share[b])
            for (i, a), (j, b) in combinations(members, 2)
            if right[i].isdisjoint(right[j]) and shows[i] != shows[j]
        ]
        found += own
        questions += bool(own)
    left, other, prior = (np.array(column) for column in zip(*found, strict=True)) if found else [np.zeros(0, int)] * 3
    return Pairs(left, other, prior, questions, cut)


def why_not(pairs: Pairs) -> str | None:
    """Why these pairs are too few to say anything; None when they are not."""
    n = len(pairs.members)
    if n >= MIN_SAMPLES:
        return None
    return (
        f"{n or 'none'} of the held-out samples whose answers were written can be paired with one that asks the same, "
        f"about another image, and has another right answer; {MIN_SAMPLES} are needed"
    )


def score(
    examples: Sequence[Example],
    pairs: Pairs,
    by: Mapping[Condition, Sequence[Written]],
    kinds: Sequence[str | None],
    *,
    content_key: Callable[[ImageRef], str],
    seed: int = 0,
) -> list[Measurement]:
    """``pairs.right.<condition>``, ``pairs.single.<condition>`` and ``pairs.prior``, overall and by kind of question.

    ``right``: share of the pairs with both answers right; ``single``: share of the paired samples with their own answer
    right. One sample stands in many pairs, so the interval resamples samples and not pairs: those that show the same
    images are drawn together, and a pair counts as often as its two samples were drawn, times each other. Where all
    pairs are alike no resample differs; then it is Wilson's, of half as many trials as there are such sets of images:
    so many pairs have no image in common.

    ``prior``: the share that answering from the question's own right answers would reach, drawn at random for each
    sample: p(a)·p(b) for a pair with answers a and b. No prior reaches more than 1/4: p(a) + p(b) <= 1, so the product
    is at most (1/2)². One that always says the same is never right about both.

    ``by[condition][k]`` was written for ``examples[k]``, ``kinds[k]`` is its kind of question.
    """
    accuracy: dict[Condition, np.ndarray] = {}
    for condition, records in by.items():
        assert [r.id for r in records] == [e.id for e in examples], f"{condition}: answers to other questions"
        scores = (vqa_accuracy(r.prediction, references_of(e)) for r, e in zip(records, examples, strict=True))
        accuracy[condition] = np.array([s >= RIGHT for s in scores], dtype=np.float64)
    number: dict[tuple[str, ...], int] = {}
    cluster = np.array([
        number.setdefault(tuple(sorted(content_key(r) for r in e.images)), len(number)) if e.images else -1
        for e in examples
    ])  # fmt: skip
    kind_of = [kinds[i] if kinds[i] == kinds[j] else None for i, j in zip(pairs.left, pairs.right, strict=True)]
    groups: list[tuple[str | None, str | None, Pairs]] = [(None, None, pairs)]
    groups += [(by, name, pairs.only(k)) for by, name, k in parts(kind_of, "question")]
    out: list[Measurement] = []
    for grouping, name, own in groups:
        members = own.members
        if len(members) < MIN_SAMPLES:
            continue
        of = f"{len(members)} samples"
        of += "" if name else f", {own.questions} question{'s' * (own.questions != 1)}"
        cut = f"of {own.cut} questions only {MAX_ASKED} samples are paired" if own.cut and name is None else None
        add = partial(measurement, by=grouping, stratum=name)
        for condition, hits in accuracy.items():
            both = hits[own.left] * hits[own.right]
            ci = _interval(both, own, cluster, seed)
            out.append(
                add(
                    f"pairs.right.{condition}", float(both.mean()), ci, n=len(own), caveat=joined(f"pairs of {of}", cut)
                )
            )
        for condition, hits in accuracy.items():
            out.append(add(f"pairs.single.{condition}", *mean_share(hits[members], seed), n=len(members)))
        told = "drawing from the right answers to the question; no prior reaches more than 25 %"
        out.append(add("pairs.prior", float(own.prior.mean()), n=len(own), caveat=told))
    return out


def _interval(both: np.ndarray, pairs: Pairs, cluster: np.ndarray, seed: int) -> tuple[float, float] | None:
    _, place = np.unique(cluster[np.concatenate([pairs.left, pairs.right])], return_inverse=True)
    left, right = place[: len(pairs)], place[len(pairs) :]
    n = int(place.max()) + 1
    if both.min() == both.max():
        trials = max(n // 2, 1)
        return wilson(round(both[0]) * trials, trials)

    def statistic(drawn: np.ndarray) -> np.ndarray:
        out = np.empty(len(drawn))
        step = max(1, _BLOCK // len(both))
        for start in range(0, len(drawn), step):
            rows = drawn[start : start + step]
            flat = rows + n * np.arange(len(rows))[:, None]
            times = np.bincount(flat.reshape(-1), minlength=n * len(rows)).reshape(len(rows), n)
            weight = times[:, left] * times[:, right]
            out[start : start + step] = weight @ both / weight.sum(1)
        return out

    return bootstrap(statistic, n, seed)
