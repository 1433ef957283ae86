"""Which runs nobody beats: the Pareto frontier over any number of measurements. Pure; nothing is read or written.

A run is dominated when another is at least as good on every axis and better on one. Values have intervals, so beside
the frontier stand the near-winners: dominated by the values, and by none beyond both intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Axis:
    """One measurement that runs are compared by."""

    measure: str
    better: Literal["lower", "higher"]


@dataclass(frozen=True, slots=True)
class Value:
    """A measurement's value and, where it has one, its interval."""

    value: float
    ci95: tuple[float, float] | None = None

    def ends(self, better: Literal["lower", "higher"]) -> tuple[float, float, float]:
        """(unfavourable end, value, favourable end), turned so that more is better; without an interval all alike."""
        low, high = self.ci95 or (self.value, self.value)
        return (low, self.value, high) if better == "higher" else (-high, -self.value, -low)


@dataclass(frozen=True, slots=True)
class Point:
    """A run, by name, with its values by measurement."""

    name: str
    values: Mapping[str, Value]

    def lacks(self, axes: Sequence[Axis]) -> list[str]:
        """Axes it was not measured on."""
        return [axis.measure for axis in axes if axis.measure not in self.values]


@dataclass(frozen=True, slots=True)
class Frontier:
    """Every point is in exactly one of the first four."""

    best: list[Point]
    """Dominated by none, in the order of the first axis, best first."""
    near: list[Point]
    """Dominated, and by none beyond both intervals."""
    beaten: list[Point]
    unplaced: list[Point]
    """Not measured on every axis: neither better nor worse than anything."""
    by: Mapping[str, list[str]]
    """For each dominated point, by name, the points of the frontier that dominate it."""


def dominates(a: Point, b: Point, axes: Sequence[Axis], *, surely: bool = False) -> bool:
    """Whether ``a`` is at least as good as ``b`` on every axis and better on one.

    ``surely``: by the unfavourable end of a's intervals against the favourable end of b's. Both must have every axis.
    """
    pairs = [(a.values[x.measure].ends(x.better), b.values[x.measure].ends(x.better)) for x in axes]
    differences = [own[0] - other[2] if surely else own[1] - other[1] for own, other in pairs]
    return all(d >= 0 for d in differences) and any(d > 0 for d in differences)


def frontier(points: Sequence[Point], axes: Sequence[Axis]) -> Frontier:
    """The points that no other dominates, those that nearly are such, and the rest; equal points stand together.

    Raises ValueError without an axis, and for two points of one name.
    """
    if not axes:
        raise ValueError("a frontier needs at least one axis")
    if len({p.name for p in points}) < len(points):
        raise ValueError("two points have the same name")
    placed = [p for p in points if not p.lacks(axes)]
    best = [p for p in placed if not any(dominates(q, p, axes) for q in placed)]
    behind = [p for p in placed if p not in best]
    near = [p for p in behind if not any(dominates(q, p, axes, surely=True) for q in placed)]
    return Frontier(
        best=sorted(best, key=lambda p: [-p.values[x.measure].ends(x.better)[1] for x in axes]),
        near=near,
        beaten=[p for p in behind if p not in near],
        unplaced=[p for p in points if p.lacks(axes)],
        by={p.name: [q.name for q in best if dominates(q, p, axes)] for p in behind},
    )
