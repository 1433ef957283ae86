"""The frontier of task fit against what is kept, and the point to take. Pure functions, no I/O.

A point stands for its runs, which differ in their seed alone. What is measured at it has a value, the mean over its
runs; an interval over samples, the mean of the runs' half-widths around it; and, where the study has repeats, a
standard error over seeds, from the spread pooled over all points (`studies.score.pooled_spread`).

Two points are told apart when their values differ by more than twice the standard error of the difference over seeds.
All runs are measured on the same held-out samples, so which samples these are moves the points together, and the
interval over samples would say too little. Without repeats nothing else is known, and then it decides: two points are
told apart when their intervals do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from beholder.evidence import Measurement
from beholder.evidence.guardrails import Limit
from beholder.studies.score import TIE_WITHIN, pooled_spread

Better = Literal["lower", "higher"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What was measured at a point."""

    value: float
    low: float
    high: float
    """95 % interval over samples; the value itself where there is none."""
    error: float | None = None
    """Standard error over seeds; None without repeats."""


def estimates(by_point: Mapping[str, Sequence[Measurement]]) -> dict[str, Estimate]:
    """A measurement's `Estimate` at every point, from those of its runs; points without any are left out."""
    values = {name: [m.value for m in runs] for name, runs in by_point.items() if runs}
    spread, _ = pooled_spread(list(values.values()))
    found = {}
    for name, numbers in values.items():
        mean = statistics.fmean(numbers)
        ends = [m.ci95 or (m.value, m.value) for m in by_point[name]]
        below = statistics.fmean([v - low for v, (low, _) in zip(numbers, ends, strict=True)])
        above = statistics.fmean([high - v for v, (_, high) in zip(numbers, ends, strict=True)])
        error = None if spread is None else spread / math.sqrt(len(numbers))
        found[name] = Estimate(mean, mean - below, mean + above, error)
    return found


def told_apart(a: Estimate, b: Estimate) -> bool:
    """Whether two points differ by more than chance would make them."""
    if a.error is not None and b.error is not None:
        return abs(a.value - b.value) > TIE_WITHIN * math.hypot(a.error, b.error)
    return a.low > b.high or b.low > a.high


def worse_by(a: Estimate, b: Estimate, better: Better) -> float:
    """By how much ``b`` is worse than ``a``, in the measurement's unit; below 0: it is better."""
    return b.value - a.value if better == "lower" else a.value - b.value


# ---------------------------------------------------------------------------------------------------------------
# The frontier


@dataclass(frozen=True, slots=True)
class Axis:
    """A measurement that points are compared by."""

    measure: str
    better: Better
    words: str


TASK = Axis("eval.loss", "lower", "held-out loss")
KEPT = Axis("retention.over_start", "lower", "loss on plain text, times A0's")
"""``retention.loss`` over A0's: `footprint_record` makes it of what runs measured."""
SEEN = Axis("ood.hallucination", "lower", "hallucination on unlike images")
AXES = (TASK, KEPT, SEEN)


def frontier(points: Mapping[str, Sequence[float]]) -> frozenset[str]:
    """Names of the points that no other one dominates; every number: lower is better.

    A point dominates another when it is nowhere worse and somewhere better, so of equal points all stay.
    """
    return frozenset(name for name, at in points.items() if not any(dominates(p, at) for p in points.values()))


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def measured_axes(known: Mapping[str, Mapping[str, Estimate]]) -> tuple[Axis, ...]:
    """The axes that were measured at two points or more."""
    return tuple(axis for axis in AXES if sum(axis.measure in at for at in known.values()) > 1)


def coordinates(known: Mapping[str, Mapping[str, Estimate]], axes: Sequence[Axis]) -> dict[str, tuple[float, ...]]:
    """Where each point stands on every axis, lower is better; points that lack one are left out."""
    return {
        name: tuple(at[a.measure].value if a.better == "lower" else -at[a.measure].value for a in axes)
        for name, at in known.items()
        if all(a.measure in at for a in axes)
    }


# ---------------------------------------------------------------------------------------------------------------
# The point to take


def limits(
    baseline: Mapping[str, Estimate], *, max_text_ratio: float, max_hallucination_rise: float,
    max_irrelevant_fall: float,
) -> list[Limit]:  # fmt: skip
    """What a point must keep to be taken (S4-3): by the baseline, where it was measured."""
    found: list[Limit] = []
    if KEPT.measure in baseline:
        found.append(Limit(KEPT.measure, most=max_text_ratio, words=f"at most {max_text_ratio:g} times A0's"))
    if (seen := baseline.get(SEEN.measure)) is not None:
        most = seen.value + max_hallucination_rise
        words = f"at most the baseline's {seen.value:.3g} + {max_hallucination_rise:g}"
        found.append(Limit(SEEN.measure, most=most, words=words))
    if (said := baseline.get("irrelevant.pass")) is not None:
        least = said.value * (1 - max_irrelevant_fall)
        words = f"at least the baseline's {said.value:.3g} − {max_irrelevant_fall:.0%}"
        found.append(Limit("irrelevant.pass", least=least, words=words))
    return found


@dataclass(frozen=True, slots=True)
class Contender:
    """A point that could be taken."""

    name: str
    params: int
    """That learn: of two that cannot be told apart the one with fewer is recommended."""
    at: Mapping[str, Estimate]
    stopped: str = ""
    """Why a guardrail stopped a run of it; it is then not taken."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The point to take."""

    winner: str | None = None
    """The lowest held-out loss among those that keep the limits."""
    near: tuple[str, ...] = ()
    """Those that keep them, too, and cannot be told from it, best first."""
    smallest: str | None = None
    """Of the winner and these the one that learns least."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why each of the others cannot be taken."""


def choose(contenders: Sequence[Contender], kept: Sequence[Limit]) -> Choice:
    """The winner, those that cannot be told from it, and who is out and why; the order does not matter."""
    refused = {c.name: why for c in contenders if (why := refusal(c, kept))}
    usable = [c for c in contenders if c.name not in refused]
    if not usable:
        return Choice(refused=refused)
    usable.sort(key=lambda c: (c.at[TASK.measure].value, c.params, c.name))
    best, *others = usable
    near = [c for c in others if not told_apart(best.at[TASK.measure], c.at[TASK.measure])]
    smallest = min([best, *near], key=lambda c: (c.params, c.at[TASK.measure].value, c.name))
    return Choice(best.name, tuple(c.name for c in near), smallest.name, refused)


def refusal(c: Contender, kept: Sequence[Limit]) -> str:
    """Why a point cannot be taken; empty when it can."""
    if TASK.measure not in c.at:
        return "its held-out loss was not measured"
    if c.stopped:
        return c.stopped
    for limit in kept:
        if (e := c.at.get(limit.measure)) is not None and limit.broken_by(e.value):
            return f"{limit.measure} is {e.value:.3g}, {limit.words}"
    return ""
