"""Guardrails: when a run stops itself before it forgets or stops looking (S4-3), and what its best may not fall below.

Judging is a pure function of what was recorded at the evaluations so far and of the declared rules. So a run that is
resumed decides as the straight one did, and a stopped run can be judged again. Recording stands in `stages.watch`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beholder.config import GuardrailConfig
from beholder.evidence.record import GuardrailStop


@dataclass(frozen=True, slots=True)
class Reading:
    """What the monitors said after ``step`` steps; step 0 is the baseline."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Limit:
    """What the run's best checkpoint must keep."""

    measure: str
    least: float | None = None
    most: float | None = None
    words: str = ""

    def broken_by(self, value: float) -> bool:
        return (self.least is not None and value < self.least) or (self.most is not None and value > self.most)


def readings(rows: Iterable[Mapping[str, Any]], before: int | None = None) -> list[Reading]:
    """The readings in a run's log, oldest first, one a step; of step 0 that of another run, where it is the baseline.

    ``before``: only those of earlier steps: a run cannot be stopped at its last.
    """
    found: dict[int, Reading] = {}
    given = False
    for row in rows:
        values, step = row.get("monitors"), row.get("step")
        if not isinstance(values, dict) or not isinstance(step, int) or (before is not None and step >= before):
            continue
        if step == 0:
            if given and "baseline_run" not in row:
                continue
            given = given or "baseline_run" in row
        found[step] = Reading(step, values)
    return [found[step] for step in sorted(found)]


def judge(history: Sequence[Reading], rules: Mapping[str, GuardrailConfig]) -> GuardrailStop | None:
    """The first stop that the history gives cause for; None when there is none.

    The baseline itself stops nothing. Of several rules that a reading breaks, the first in their order is told. A rule
    that compares with the baseline is silent where there is none.
    """
    steps = sorted(history, key=lambda r: r.step)
    for k, reading in enumerate(steps):
        if reading.step == 0:
            continue
        for name, rule in rules.items():
            if rule.enable and (stop := _judge(name, rule, steps[: k + 1])) is not None:
                return stop
    return None


def _judge(name: str, rule: GuardrailConfig, history: Sequence[Reading]) -> GuardrailStop | None:
    """Whether the last of the readings breaks the rule."""
    assert rule.measure is not None, name
    series = [(r.step, r.values[rule.measure]) for r in history if rule.measure in r.values]
    if not series or series[-1][0] != history[-1].step:
        return None
    (step, value), base = series[-1], next((v for s, v in series if s == 0), None)
    trained = [v for s, v in series if s > 0]
    recent = trained[-rule.times :]

    def stop(bound: float, told: str) -> GuardrailStop:
        return GuardrailStop(
            name=name, measure=rule.measure or "", step=step, value=value, bound=bound, baseline=base, told=told,
            why=rule.why,
        )  # fmt: skip

    row = "" if rule.times == 1 else f" {rule.times} evaluations in a row"
    if rule.falls is not None and base is not None and value < (bound := _lower(base, rule.falls)):
        return stop(bound, f"more than {rule.falls:.0%} below its baseline of {base:.4g} (less than {bound:.4g})")
    if rule.rises is not None and base is not None and value > (bound := base + rule.rises):
        return stop(bound, f"more than {rule.rises:g} above its baseline of {base:.4g} (more than {bound:.4g})")
    # A bound that the start does not keep is no sign of harm; being worse than the start is.
    if rule.below is not None and len(recent) == rule.times:
        bound = rule.below if base is None else min(rule.below, base)
        if all(v < bound for v in recent):
            return stop(bound, _beyond("below", rule.below, bound) + row)
    if rule.above is not None and len(recent) == rule.times:
        bound = rule.above if base is None else max(rule.above, base)
        if all(v > bound for v in recent):
            return stop(bound, _beyond("above", rule.above, bound) + row)
    if rule.widens is not None:
        values = [v for _, v in series]
        bound = min(values) + rule.widens
        course = values[-rule.times - 1 :]
        rose = len(course) == rule.times + 1 and all(a < b for a, b in itertools.pairwise(course))
        if value > bound and rose:
            return stop(
                bound, f"more than {rule.widens:g} above its best of {min(values):.4g} and rose over {rule.times} "
                "evaluations one after the other",
            )  # fmt: skip
    return None


def limits(history: Sequence[Reading], rules: Mapping[str, GuardrailConfig]) -> list[Limit]:
    """What the best checkpoint must keep, by the baseline in the history; none where there is no baseline."""
    base = next((r.values for r in history if r.step == 0), {})
    found: list[Limit] = []
    for rule in rules.values():
        if not rule.enable or rule.measure not in base:
            continue
        assert rule.measure is not None
        value = base[rule.measure]
        if rule.best_falls is not None:
            least = _lower(value, rule.best_falls)
            found.append(Limit(rule.measure, least=least, words=f"baseline {value:.4g} − {rule.best_falls:.0%}"))
        if rule.best_rises is not None:
            found.append(
                Limit(rule.measure, most=value + rule.best_rises, words=f"baseline {value:.4g} + {rule.best_rises:g}")
            )
    return found


def _beyond(word: str, asked: float, bound: float) -> str:
    return f"{word} {asked:g}" if bound == asked else f"{word} its baseline of {bound:.4g}, which is {word} {asked:g},"


def _lower(base: float, share: float) -> float:
    """The baseline less a share of its size, so that it is lower where the baseline is below 0, too."""
    return base - share * abs(base)
