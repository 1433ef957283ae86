"""From the numbers of a sweep's runs to a ranking: score, flags, spread, ties. Pure functions, no I/O.

The score is the seed's (S11-5): ``held-out loss - weight x (shuffle delta + zero delta)``, in nats per token, lower is
better. A delta is the loss with a wrong image minus the loss with the right one.

A tie is decided by repeats. Let a grid point i have n_i runs that differ in their seed alone, with scores x_ij and mean
m_i. Then

    pooled spread  s  = sqrt( sum_ij (x_ij - m_i)^2 / sum_i (n_i - 1) )     over the points that are not flagged
    standard error SE = s * sqrt( 1/n_a + 1/n_b )                           of the difference of two means

and point b ties with the best point a when m_b - m_a <= 2 SE. Without a repeat there is no spread, and the result says
so instead of calling the smallest number a winner that was proven.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

COLLAPSED = "collapsed"
TIE_WITHIN = 2.0
"""Standard errors of the difference of two means; about 95 % when there are many repeats, less with few."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A run as the ranking sees it."""

    name: str
    point: str
    """Its combination of settings, without the seed: runs of one point are repeats of each other."""
    score: float
    flags: tuple[str, ...] = ()
    """Why it must not be used; empty when nothing speaks against it."""


@dataclass(frozen=True, slots=True)
class Place:
    """A grid point in the ranking."""

    point: str
    runs: tuple[str, ...]
    mean: float
    """Mean score of its runs."""
    sd: float | None
    """Standard deviation over its runs; None with a single one."""
    flags: tuple[str, ...]
    """The flags of any of its runs."""
    tied: bool = False
    """Whether its distance to the best point is within the spread."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Points that may be used, best first, then flagged ones, best first."""

    places: tuple[Place, ...]
    winner: str | None
    """The point with the lowest mean score among those without a flag."""
    tested: bool
    """Whether there were repeats to test the difference to the next point with."""
    ties: tuple[str, ...]
    """Points that cannot be told from the winner; always empty when nothing was tested."""
    spread: float | None
    """Pooled standard deviation over repeats; None without repeats."""
    repeats: int
    """Degrees of freedom of the spread: runs beyond the first of each point."""
    verdict: str
    """All of this in a sentence or two."""


def score(loss: float, d_shuffle: float, d_zero: float, weight: float) -> float:
    """The seed's score in nats per token, lower is better."""
    return loss - weight * (d_shuffle + d_zero)


def flags(
    *,
    d_shuffle: float,
    d_shuffle_low: float | None,
    grid_median: float,
    collapsed_below: float,
    failed_gates: Sequence[str] = (),
) -> tuple[str, ...]:
    """Why a run must not be used: ``collapsed``, and ``gate <name>`` for each gate it failed.

    Collapsed means that another sample's image costs it nothing that is certain (the lower end of the interval, or the
    value where there is none, is not above 0), or less than ``collapsed_below`` of the grid's median ``grid_median``.
    """
    certain = d_shuffle if d_shuffle_low is None else d_shuffle_low
    collapsed = certain <= 0 or d_shuffle < collapsed_below * max(grid_median, 0.0)
    return ((COLLAPSED,) if collapsed else ()) + tuple(f"gate {name}" for name in failed_gates)


def pooled_spread(groups: Sequence[Sequence[float]]) -> tuple[float | None, int]:
    """(Pooled standard deviation within groups, its degrees of freedom); None when no group has two values."""
    freedom = sum(len(g) - 1 for g in groups if g)
    if freedom < 1:
        return None, 0
    squares = math.fsum((x - statistics.fmean(g)) ** 2 for g in groups if g for x in g)
    return math.sqrt(squares / freedom), freedom


def rank(rows: Sequence[Entry]) -> Ranking:
    """Rank the grid points by mean score; the order of ``rows`` does not matter."""
    members: dict[str, list[Entry]] = {}
    for row in sorted(rows, key=lambda r: (r.score, r.name)):
        members.setdefault(row.point, []).append(row)
    places = [_place(point, runs) for point, runs in members.items()]
    places.sort(key=lambda p: (bool(p.flags), p.mean, p.point))
    usable = [p for p in places if not p.flags]
    spread, repeats = pooled_spread([[r.score for r in members[p.point]] for p in usable])
    if usable and spread is not None:
        best = usable[0]
        tied = {p.point for p in usable[1:] if p.mean - best.mean <= TIE_WITHIN * _standard_error(spread, best, p)}
        places = [replace(p, tied=p.point in tied or (bool(tied) and p is best)) for p in places]
    ties = tuple(p.point for p in places[1:] if p.tied)
    return Ranking(
        places=tuple(places),
        winner=usable[0].point if usable else None,
        tested=spread is not None and len(usable) > 1,
        ties=ties,
        spread=spread,
        repeats=repeats,
        verdict=_verdict(places, usable, ties, spread, repeats),
    )


def _place(point: str, runs: Sequence[Entry]) -> Place:
    scores = [r.score for r in runs]
    return Place(
        point=point,
        runs=tuple(r.name for r in runs),
        mean=statistics.fmean(scores),
        sd=statistics.stdev(scores) if len(scores) > 1 else None,
        flags=tuple(dict.fromkeys(f for r in sorted(runs, key=lambda r: r.name) for f in r.flags)),
    )


def _standard_error(spread: float, a: Place, b: Place) -> float:
    return spread * math.sqrt(1 / len(a.runs) + 1 / len(b.runs))


def _verdict(
    places: Sequence[Place], usable: Sequence[Place], ties: Sequence[str], spread: float | None, repeats: int
) -> str:
    if not places:
        return "No run has a score, so there is no winner."
    if not usable:
        best = places[0]
        return (
            f'No winner: every run is marked "do not use". The lowest score among them is {best.mean:.4g} '
            f"({best.point}: {', '.join(best.flags)})."
        )
    best = usable[0]
    if len(usable) == 1:
        others = f'; the other {len(places) - 1} are marked "do not use"' if len(places) > 1 else ""
        return f"{best.point} is the only one that may be used, score {best.mean:.4g}{others}."
    next_ = usable[1]
    difference = next_.mean - best.mean
    if spread is None:
        return (
            f"{best.point} has the lowest score, {best.mean:.4g}, before {next_.point} with {next_.mean:.4g}; "
            f"no repeats: the spread is unknown, a difference of {difference:.2g} is not tested."
        )
    error = _standard_error(spread, best, next_)
    told = f"pooled spread over {repeats} repeat{'s' * (repeats > 1)} {spread:.2g}"
    if ties:
        return (
            f"A tie: {best.point} has the lowest mean score, {best.mean:.4g}, but {', '.join(ties)} cannot be told "
            f"from it: to {next_.point} the difference is {difference:.2g}, twice its standard error is "
            f"{2 * error:.2g} ({told})."
        )
    return (
        f"{best.point} wins with a mean score of {best.mean:.4g}, before {next_.point} with {next_.mean:.4g}: the "
        f"difference of {difference:.2g} is larger than twice its standard error, {2 * error:.2g} ({told})."
    )
