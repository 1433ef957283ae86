"""What a footprint study says about the plan's hypotheses H1-H4, each by a rule that is written down. Pure functions.

A rule says *supported*, *contradicted* or *cannot be told*, and why, with the points that decided. *Told apart* is
`frontier.told_apart`. That nothing got worse is only said where a difference that matters (`TOLERANCE`) is excluded;
else too little was measured, and it cannot be told.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from beholder.config import WATCHED
from beholder.evidence.catalogue import quantity
from beholder.evidence.guardrails import Limit, Reading
from beholder.studies.frontier import (
    KEPT,
    SEEN,
    TASK,
    TIE_WITHIN,
    Better,
    Choice,
    Estimate,
    told_apart,
    worse_by,
)

Said = Literal["supported", "contradicted", "cannot be told"]

BLIND = "ood.blind"
_JUDGED = {name: w for name, w in WATCHED.items() if w.matters is not None}
HARMS: dict[str, Better] = {
    name: "higher" if quantity(name)[0].better == "higher" else "lower" for name in (KEPT.measure, *_JUDGED)
}
TOLERANCE = {KEPT.measure: 0.01, **{name: w.matters for name, w in WATCHED.items() if w.matters is not None}}
"""A change that matters: one per cent of the loss on plain text, five points of a share."""
ENOUGH = 2 / 3
"""Share of the runs that must agree, of two at least (H4)."""
WORDS = {KEPT.measure: "loss on plain text", **{name: w.harm for name, w in _JUDGED.items()}}

CLAIMS = {
    "H1": "More adapters than a small top subset cost language and make it hallucinate or go blind",
    "H2": "Each tower has a narrow, best number of layers",
    "H3": "How many layers learn, and which, matters more than the learning rate",
    "H4": "Going on helps only while what the model could do stays; after that it harms",
}


@dataclass(frozen=True, slots=True)
class Seen:
    """A point of the study as the rules see it."""

    name: str
    llm: int | None = None
    vision: int | None = None
    """Last layers that learn, of points of the matrix; None: no such point."""
    at: Mapping[str, Estimate] = field(default_factory=dict)
    stopped_by: frozenset[str] = frozenset()
    """Measurements over which a guardrail stopped one of its runs."""
    rate_of: str | None = None
    """The point that it differs from in learning rates alone."""
    runs: Sequence[Sequence[Reading]] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    name: str
    claim: str
    said: Said
    why: str


def judge(points: Sequence[Seen], choice: Choice, kept: Sequence[Limit]) -> tuple[Verdict, ...]:
    """H1 to H4."""
    rules = {"H1": more_harms(points), "H2": narrow(points, choice), "H3": placement_over_rate(points)}
    rules["H4"] = drift_harms(points, kept)
    return tuple(Verdict(name, CLAIMS[name], said, why) for name, (said, why) in rules.items())


# ---------------------------------------------------------------------------------------------------------------
# H1


def more_harms(points: Sequence[Seen]) -> tuple[Said, str]:
    """Points with more layers than the least number that learns, against that one, the other tower the same.

    Supported: of language and of seeing something got worse, told apart in one pair at least, and nothing got better.
    Contradicted: of either, every pair excludes a change for the worse that matters. Language is measured by the loss
    on plain text over layers of the language model, seeing by hallucination and blindness over both towers' layers. A
    guardrail that stopped the larger one alone counts as worse: what is measured is then its state before.
    """
    language = _change(points, (KEPT.measure,), ("llm",))
    seeing = _change(points, (SEEN.measure, BLIND), ("llm", "vision"))
    why = f"Language: {language[1]}. Seeing: {seeing[1]}."
    found = (language[0], seeing[0])
    if found == ("worse", "worse"):
        return "supported", why
    return ("contradicted" if "not worse" in found else "cannot be told"), why


Change = Literal["worse", "not worse", "unclear"]


def _change(points: Sequence[Seen], measures: Sequence[str], towers: Sequence[str]) -> tuple[Change, str]:
    worse: list[str] = []
    better: list[str] = []
    unclear: list[str] = []
    same: list[str] = []
    for tower in towers:
        for few, more in _pairs(points, tower):
            for measure in measures:
                pair = f"{few.name} → {more.name}"
                if measure in more.stopped_by - few.stopped_by:
                    worse.append(f"{WORDS[measure]} {pair} (stopped by its guardrail)")
                    continue
                a, b = few.at.get(measure), more.at.get(measure)
                if a is None or b is None:
                    continue
                by = worse_by(a, b, HARMS[measure])
                told = f"{WORDS[measure]} {pair} {by:+.3g}"
                if told_apart(a, b):
                    (worse if by > 0 else better).append(told)
                elif by + _uncertainty(a, b) <= TOLERANCE[measure]:
                    same.append(told)
                else:
                    unclear.append(told)
    if worse and not better:
        return "worse", f"worse in {len(worse)} of {len(worse + unclear + same)} comparisons: {_few(worse)}"
    if not worse and not unclear and (better or same):
        return "not worse", f"not worse in any of {len(better + same)} comparisons: {_few([*better, *same])}"
    if worse:
        return "unclear", f"worse and better: {_few([*worse, *better])}"
    if unclear:
        return "unclear", f"no change told apart, and one that matters is not excluded: {_few(unclear)}"
    return "unclear", "not compared (no two points that differ in one tower's layers alone were measured so)"


def _pairs(points: Sequence[Seen], tower: str) -> Iterator[tuple[Seen, Seen]]:
    """Points with the least number of layers of a tower that learns, and those with more, the other tower the same."""
    placed = [p for p in points if p.llm is not None and p.vision is not None]
    other = {"llm": "vision", "vision": "llm"}[tower]
    for count in dict.fromkeys(getattr(p, other) for p in placed):
        row = sorted(
            (p for p in placed if getattr(p, other) == count and getattr(p, tower)), key=lambda p: getattr(p, tower)
        )
        yield from ((row[0], more) for more in row[1:])


def _uncertainty(a: Estimate, b: Estimate) -> float:
    if a.error is not None and b.error is not None:
        return TIE_WITHIN * math.hypot(a.error, b.error)
    return (a.high - a.low) / 2 + (b.high - b.low) / 2


# ---------------------------------------------------------------------------------------------------------------
# H2


def narrow(points: Sequence[Seen], choice: Choice) -> tuple[Said, str]:
    """Numbers of layers, by tower, of the matrix's winner and of those that cannot be told from it.

    Supported: for each tower they lie strictly between 0 and the largest number that was tried. Contradicted: for one
    tower they are only 0, or only the largest. Else, and with fewer than three numbers for a tower, it cannot be told.
    """
    placed = {p.name: p for p in points if p.llm is not None and p.vision is not None and TASK.measure in p.at}
    best = [placed[name] for name in (choice.winner, *choice.near) if name in placed]
    if not best:
        return "cannot be told", "No point of the matrix keeps the limits."
    said: list[Said] = []
    why: list[str] = []
    for tower, words in (("llm", "language model"), ("vision", "vision tower")):
        tried = sorted({getattr(p, tower) for p in placed.values()})
        taken = sorted({getattr(p, tower) for p in best})
        told = f"{words}: {_numbers(taken)} of {_numbers(tried)}"
        if len(tried) < 3:
            said.append("cannot be told")
            told += " (three are needed)"
        elif taken in ([0], [tried[-1]]):
            said.append("contradicted")
            told += ", the least" if taken == [0] else ", the most"
        else:
            said.append("supported" if taken[0] > 0 and taken[-1] < tried[-1] else "cannot be told")
        why.append(told)
    verdict: Said = "contradicted" if "contradicted" in said else "cannot be told"
    if set(said) == {"supported"}:
        verdict = "supported"
    return verdict, f"Last layers of the best ones ({', '.join(p.name for p in best)}) {'; '.join(why)}."


# ---------------------------------------------------------------------------------------------------------------
# H3


def placement_over_rate(points: Sequence[Seen]) -> tuple[Said, str]:
    """The range of the held-out loss over placements that learn, against that over learning rates of one placement.

    Supported: the former is larger by more than the uncertainty of a difference; contradicted: the latter is.
    """
    by_name = {p.name: p for p in points if TASK.measure in p.at}
    rated = sorted({p.rate_of for p in by_name.values() if p.rate_of in by_name}, key=str)
    if not rated:
        return "cannot be told", "No point differs from another in its learning rates alone."
    widest = max(_range([p.at[TASK.measure] for p in by_name.values() if n in (p.name, p.rate_of)]) for n in rated)
    placed = [p.at[TASK.measure] for p in by_name.values() if p.llm is not None and (p.llm or p.vision)]
    if len(placed) < 2:
        return "cannot be told", "Fewer than two placements were measured."
    over, noise = _range(placed)[0], max(_range(placed)[1], widest[1])
    why = f"Held-out loss ranges over {over:.3g} with the layers and {widest[0]:.3g} with the rate (± {noise:.2g})."
    if over - widest[0] > noise:
        return "supported", why
    return ("contradicted" if widest[0] - over > noise else "cannot be told"), why


def _range(values: Sequence[Estimate]) -> tuple[float, float]:
    """From the lowest to the highest, and how uncertain their difference is."""
    low, high = min(values, key=lambda e: e.value), max(values, key=lambda e: e.value)
    return high.value - low.value, _uncertainty(low, high)


# ---------------------------------------------------------------------------------------------------------------
# H4


def drift_harms(points: Sequence[Seen], kept: Sequence[Limit]) -> tuple[Said, str]:
    """Runs that left a limit and went on: whether what had drifted was worse at the end, or within the limit again.

    Supported: worse in two thirds of at least two such runs; contradicted: back within it in two thirds.
    """
    harmed: list[str] = []
    back: list[str] = []
    neither: list[str] = []
    steady = sum(bool(run) for p in points for run in p.runs)
    for point in points:
        for run in point.runs:
            course = sorted(run, key=lambda r: r.step)
            first = next(
                ((k, limit) for k, r in enumerate(course) for limit in kept if r.step and _broken(limit, r)), None
            )
            if first is None:
                continue
            steady -= 1
            k, limit = first
            later = [r.values[limit.measure] for r in course[k + 1 :] if limit.measure in r.values]
            if not later:
                continue
            change = later[-1] - course[k].values[limit.measure]
            change = change if HARMS[limit.measure] == "lower" else -change
            told = f"{point.name} ({WORDS[limit.measure]} {change:+.3g} after step {course[k].step})"
            if not limit.broken_by(later[-1]):
                back.append(told)
            else:
                (harmed if change > 0 else neither).append(told)
    n = len(harmed + back + neither)
    if n < 2:
        return "cannot be told", (
            f"{n} runs left a limit and went on, and two are needed; {steady} runs with readings never left one. "
            "Runs that a guardrail stops at once do not show it."
        )
    why = f"Of {n} runs that left a limit and went on {len(harmed)} got worse, {len(back)} came back: "
    why += _few([*harmed, *back, *neither]) + "."
    if len(harmed) >= ENOUGH * n:
        return "supported", why
    return ("contradicted" if len(back) >= ENOUGH * n else "cannot be told"), why


def _broken(limit: Limit, reading: Reading) -> bool:
    value = reading.values.get(limit.measure)
    return value is not None and limit.broken_by(value)


def _few(told: Sequence[str]) -> str:
    return ", ".join(told[:4]) + (f" and {len(told) - 4} more" if len(told) > 4 else "")


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
