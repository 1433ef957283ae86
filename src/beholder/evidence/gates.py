"""Gates: what the evidence of a run must show before a later stage may be built upon it (S11-7).

A gate is a bound on a measurement, declared in the config (a stage's own stand in its record). Judging is a pure
function of the declared gates and the measurements, so a report can be judged again from its evidence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from beholder.config import GateConfig
from beholder.evidence.catalogue import unmeasured
from beholder.evidence.record import Evidence, GateResult, Measurement


def judge(gates: Mapping[str, GateConfig], measurements: Sequence[Measurement]) -> list[GateResult]:
    """One result for every gate that is not switched off, in their order.

    What was not measured does not pass: a gate says that something has been shown, not that nothing was noticed.
    """
    return [_judge(name, gate, measurements) for name, gate in gates.items() if gate.enable]


def unmeasurable(gates: Mapping[str, GateConfig]) -> list[str]:
    """Gates that could never pass, for what they judge is no measurement of a run."""
    return [
        f"gates.{name}: {why}"
        for name, gate in gates.items()
        if gate.enable and gate.measure is not None and (why := unmeasured(gate.measure)) is not None
    ]


def _judge(name: str, gate: GateConfig, measurements: Sequence[Measurement]) -> GateResult:
    assert gate.measure is not None, name
    found = [m for m in measurements if m.name == gate.measure]
    overall = next((m for m in found if m.stratum == gate.stratum), None)  # None: all samples
    groups = [m for m in found if m.stratum is not None] if gate.strata else []
    small = [m for m in groups if m.n < gate.min_n]
    judged = [m for m in (overall, *groups) if m is not None and m not in small]

    def result(passed: bool, m: Measurement | None, value: float | None, note: str) -> GateResult:
        return GateResult(
            name=name, passed=passed, why=gate.why, bound=gate.bound, end=gate.end, measure=gate.measure or "",
            stratum=gate.stratum if m is None else m.stratum, value=value, unit="" if m is None else m.unit, note=note,
        )  # fmt: skip

    if overall is None:
        there = sorted({str(m.stratum) for m in found if m.stratum is not None})
        groups_there = f"; groups: {', '.join(there)}" if gate.stratum is not None and there else ""
        return result(False, None, None, f"not measured{groups_there}")
    if groups and len(small) == len(groups):
        return result(False, overall, None, f"no group has {gate.min_n} samples, so none could be judged by itself")
    if gate.stratum is not None and overall.n < gate.min_n:
        return result(False, overall, None, f"{overall.n} samples are fewer than min_n {gate.min_n}")
    numbers = [(m, at_end(m, gate.end)) for m in judged]
    unknown = [m for m, number in numbers if number is None]
    if unknown:
        where = "" if unknown[0].stratum is None else f" for {unknown[0].stratum}"
        return result(False, unknown[0], None, f"no interval{where}: {unknown[0].n} samples are too few for one")
    worst, value = min(((m, v) for m, v in numbers if v is not None), key=lambda pair: _margin(pair[1], gate))
    note = f"worst of {len(judged) - 1} groups and all together" if len(judged) > 1 else ""
    if small:
        names = ", ".join(f"{m.stratum} (n={m.n})" for m in small)
        note += f"{'; ' if note else ''}fewer than {gate.min_n} samples, not judged: {names}"
    return result(_passes(value, gate), worst, value, note)


def bounds(text: str) -> list[tuple[str, float]]:
    """What a gate demands, from its text: ``> 0.25 and ≤ 1`` → (``>``, 0.25), (``≤``, 1)."""
    return [(sign, float(edge)) for sign, edge in re.findall(r"([>≥≤]) (\S+)", text)]


def at_end(m: Measurement, end: Literal["value", "low", "high"]) -> float | None:
    """What is judged of a measurement: its value or an end of its interval; None where it has no interval."""
    if end == "value":
        return m.value
    return None if m.ci95 is None else m.ci95[end == "high"]


def _passes(value: float, gate: GateConfig) -> bool:
    return (
        (gate.above is None or value > gate.above)
        and (gate.at_least is None or value >= gate.at_least)
        and (gate.at_most is None or value <= gate.at_most)
    )


def _margin(value: float, gate: GateConfig) -> float:
    """How far the value is on the right side of its nearest bound."""
    lower = [bound for bound in (gate.above, gate.at_least) if bound is not None]
    return min([value - bound for bound in lower] + ([] if gate.at_most is None else [gate.at_most - value]))


def verdict(evidence: Evidence) -> str:
    """What the gates say, in one line for a terminal or an error."""
    failed = evidence.failed_gates
    if not evidence.gates:
        return "no gate was judged"
    if not failed:
        return f"all {len(evidence.gates)} gates passed"
    unjudged = sum(gate.value is None for gate in failed)
    counted = f"{len(failed) - unjudged} of {len(evidence.gates)} gates failed"
    counted += f" and {unjudged} could not be judged" if unjudged else ""
    return f"{counted}: " + "; ".join(map(told, failed))


def told(gate: GateResult) -> str:
    """``looks_clearly (ablation.ratio.shuffled is 1.002 at its lower end, must be > 1.05)``."""
    if gate.value is None:
        return f"{gate.name} ({gate.measure}: {gate.note})"
    end = {"value": "", "low": " at its lower end", "high": " at its upper end"}[gate.end]
    where = "" if gate.stratum is None else f" for {gate.stratum}"
    return f"{gate.name} ({gate.measure}{where} is {gate.value:.4g}{end}, must be {gate.bound})"
