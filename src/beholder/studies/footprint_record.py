"""What is known of a footprint study (``footprint.json``, ``footprint.csv``): runs, points, frontier, choice, verdicts.

Everything that is said follows from the runs' rows (`conclude`), so an old record can be judged again.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from beholder.config import STRENGTH_LINE, WATCHED, FootprintConfig
from beholder.evidence import Measurement, Record
from beholder.evidence.guardrails import Limit, Reading
from beholder.studies.frontier import (
    AXES,
    KEPT,
    SEEN,
    TASK,
    Choice,
    Contender,
    Estimate,
    choose,
    coordinates,
    estimates,
    frontier,
    limits,
    measured_axes,
)
from beholder.studies.hypotheses import Seen, Verdict, judge
from beholder.studies.matrix import BASELINE, Kind
from beholder.studies.record import read_record

RECORD, TABLE, PAGE, TWIN = "footprint.json", "footprint.csv", "footprint.html", "footprint.md"

COLUMNS = {
    TASK.measure: "held-out loss", "answer.accuracy.correct": "answers right", KEPT.measure: "text loss, × A0's",
    "retention.loss_ratio_styled": "on over off, style aside", **{name: w.column for name, w in WATCHED.items()},
    "ablation.delta.shuffled": "Δshuffle",
}  # fmt: skip
"""What a run is compared by, and what it is called in a narrow table."""
TEXT, ON_OVER_OFF = "retention.loss", "retention.loss_ratio"
"""The loss on plain text, and by how much a run's own adapters changed it. The latter has another base in a run that
goes on from another one, so `KEPT` is made of the former, and of A0's."""
MEASURED = (*(m for m in COLUMNS if m != KEPT.measure), TEXT, ON_OVER_OFF)
"""What is kept of a run."""
LINE = {there: name for name, there in STRENGTH_LINE.items() if name in {TASK.measure, ON_OVER_OFF, SEEN.measure}}
"""What is kept of the line from the base to the trained weights, and what it is at full strength."""


class LinePoint(Record):
    """A run at part of its adapters' strength."""

    strength: float
    values: dict[str, float]
    """By the measurement that it is one of."""


class FootprintRow(Record):
    """One run."""

    name: str
    point: str
    seed: int
    folder: str
    """Below the study's folder."""
    config_hash: str
    settings: dict[str, Any]
    status: Literal["finished", "failed", "interrupted", "waiting"]
    """finished: it left evidence, also when a guardrail stopped it. waiting: not run yet."""
    reason: str = ""
    """failed: what it said."""
    stopped: str = ""
    """What a guardrail said that ended it early."""
    stopped_by: str = ""
    """The measurement that the guardrail judged."""
    measured: dict[str, Measurement] = Field(default_factory=dict)
    """Over all samples, by name."""
    line: tuple[LinePoint, ...] = ()
    strength: float = 1.0
    """Of what its adapters learned, the share that all else was measured at."""
    readings: tuple[Reading, ...] = ()
    """What the monitors said on the way; step 0 is before training."""
    learns: int = 0
    """Parameters that learn, at a learning rate above 0."""
    gates_failed: tuple[str, ...] = ()
    steps: int | None = None
    wall_s: float | None = None
    """Seconds from start to end; None where the run was interrupted and continued."""
    step_s: float | None = None
    peak_memory_mb: float | None = None
    device: str = ""


class FootprintPoint(Record):
    """What its runs say together."""

    name: str
    kind: Kind
    where: str
    """What learns, in words: ``language model last-2, vision tower none``."""
    llm: int | None = None
    vision: int | None = None
    """Last layers that learn, of points of the matrix."""
    planned: int | None = None
    """Adapter parameters, counted before anything was loaded."""
    equal_to: str | None = None
    rate_of: str | None = None
    """The point that it differs from in learning rates alone."""
    runs: tuple[str, ...] = ()
    """Finished ones."""
    learns: int = 0
    stopped: str = ""
    at: dict[str, Estimate] = Field(default_factory=dict)
    on_frontier: bool = False


class FootprintRecord(Record):
    """``footprint.json``: all that table, pages and verdicts are made from."""

    schema_version: Literal[1] = 1
    name: str
    created: str
    start: str
    """The run that all points go on from."""
    seeds: list[int]
    keep: dict[str, float]
    """The bounds of `FootprintConfig` that a point must keep."""
    rows: list[FootprintRow]
    """In the order they are run."""
    points: list[FootprintPoint]
    axes: tuple[str, ...] = ()
    """The measurements that the frontier is over."""
    limits: tuple[Limit, ...] = ()
    choice: Choice = Choice()
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()
    """Known before anything was run: what is not measured."""
    warnings: tuple[str, ...] = ()

    def point(self, name: str) -> FootprintPoint:
        return next(p for p in self.points if p.name == name)

    @classmethod
    def load(cls, path: str | Path) -> FootprintRecord:
        """Read ``footprint.json``, given as the file or as the study's folder."""
        return read_record(cls, Path(path), RECORD, "footprint", "a footprint study")


def bounds(study: FootprintConfig) -> dict[str, float]:
    return {
        "max_text_ratio": study.max_text_ratio, "max_hallucination_rise": study.max_hallucination_rise,
        "max_irrelevant_fall": study.max_irrelevant_fall,
    }  # fmt: skip


def conclude(record: FootprintRecord) -> FootprintRecord:
    """The record with what its rows say: estimates, frontier, the point to take, verdicts. Pure."""
    runs = {p.name: [r for r in record.rows if r.point == p.name and r.status == "finished"] for p in record.points}
    known: dict[str, dict[str, Estimate]] = {p.name: {} for p in record.points}
    start = text_loss_of_start(record)
    measured = {r.name: {**r.measured, **over_start(r, start)} for rows in runs.values() for r in rows}
    for measure in COLUMNS:
        by_point = {
            name: [measured[r.name][measure] for r in rows if measure in measured[r.name]]
            for name, rows in runs.items()
        }
        for name, e in estimates(by_point).items():
            known[name][measure] = e
    axes = measured_axes(known)
    edge = frontier(coordinates(known, axes)) if axes else frozenset()
    points = []
    for p in record.points:
        rows = runs[p.name]
        stopped = next((f"stopped by its guardrail {r.stopped}" for r in rows if r.stopped), "")
        points.append(p.model_copy(update={
            "runs": tuple(r.name for r in rows), "learns": max((r.learns for r in rows), default=0),
            "stopped": stopped, "at": known[p.name], "on_frontier": p.name in edge,
        }))  # fmt: skip
    kept = limits(known.get(BASELINE, {}), **record.keep)
    choice = choose([Contender(p.name, p.learns, p.at, p.stopped) for p in points if p.runs], kept)
    seen = [
        Seen(
            p.name, p.llm, p.vision, p.at, frozenset(_judged(r.stopped_by) for r in runs[p.name] if r.stopped_by),
            p.rate_of, [_by_start(r.readings, start) for r in runs[p.name]],
        )
        for p in points
    ]  # fmt: skip
    return record.model_copy(update={
        "points": points, "axes": tuple(a.measure for a in axes), "limits": tuple(kept), "choice": choice,
        "verdicts": judge(seen, choice, kept),
    })  # fmt: skip


def text_loss_of_start(record: FootprintRecord) -> float | None:
    """A0's loss on plain text; None where it was not measured."""
    found = [r.measured[TEXT].value for r in record.rows if r.point == BASELINE and TEXT in r.measured]
    return statistics.fmean(found) if found else None


def over_start(row: FootprintRow, start: float | None) -> dict[str, Measurement]:
    """`KEPT` of a run; nothing where it or A0 was not measured.

    Its interval is that of the run's own ratio, of the same texts read twice: without what the run it went on from is
    uncertain by.
    """
    loss, own = row.measured.get(TEXT), row.measured.get(ON_OVER_OFF)
    if loss is None or own is None or not start or not own.value:
        return {}
    value = loss.value / start
    low, high = (end * value / own.value for end in own.ci95 or (own.value, own.value))
    known = {"name": KEPT.measure, "value": value, "ci95": (low, high), "caveat": "the same texts, over A0's"}
    return {KEPT.measure: own.model_copy(update=known)}


def line_over_start(row: FootprintRow, start: float | None) -> tuple[LinePoint, ...]:
    """`FootprintRow.line` with `KEPT`: what was measured against the run's own base, against A0."""
    own, base = row.measured.get(ON_OVER_OFF), over_start(row, start).get(KEPT.measure)
    if own is None or base is None:
        return row.line
    scale = base.value / own.value
    return tuple(
        p.model_copy(update={"values": {**p.values, KEPT.measure: p.values[ON_OVER_OFF] * scale}})
        if ON_OVER_OFF in p.values
        else p
        for p in row.line
    )


def _by_start(readings: Sequence[Reading], start: float | None) -> list[Reading]:
    """The readings with `KEPT`."""
    return [
        replace(r, values={**r.values, KEPT.measure: r.values[TEXT] / start}) if start and TEXT in r.values else r
        for r in readings
    ]


def _judged(measure: str) -> str:
    """What a guardrail's stop says was lost: those on plain text judge it against the run's own base."""
    return KEPT.measure if measure.startswith("retention.") else measure


def line_of(measurements: Sequence[Measurement]) -> tuple[LinePoint, ...]:
    """The line from the base to the trained weights, by strength."""
    found: dict[float, dict[str, float]] = {}
    for m in measurements:
        if m.name in LINE and m.stratum is not None:
            found.setdefault(float(m.stratum), {})[LINE[m.name]] = m.value
    return tuple(LinePoint(strength=s, values=found[s]) for s in sorted(found))


# ---------------------------------------------------------------------------------------------------------------
# In words


def answer(record: FootprintRecord) -> str:
    """How many layers should learn, in one sentence."""
    choice = record.choice
    if choice.winner is None:
        return "No point may be taken" if choice.refused else "Nothing is measured yet"
    if (missing := without_result(record)) and len(missing) == len(record.points) - 1:
        return f"Nothing is compared yet: {choice.winner} alone has a result"
    told = f"Train {record.point(choice.winner).where} ({choice.winner})"
    least = choice.smallest
    if least in (None, choice.winner) or record.point(least).at[TASK.measure].error is None:
        return told  # without repeats little is told apart: no reason to learn less
    return f"{told}, or, with fewer parameters, {record.point(least).where} ({least})"


def explanation(record: FootprintRecord) -> str:
    """Why, who comes near, what costs least, who is out."""
    choice = record.choice
    if choice.winner is None:
        return "; ".join(f"{name}: {why}" for name, why in choice.refused.items()) or "No run has a result."
    best = record.point(choice.winner)
    loss = best.at[TASK.measure]
    missing = without_result(record)
    compared = len(record.points) - len(missing)
    kept = _and([COLUMNS.get(limit.measure, limit.measure) for limit in record.limits])
    it = f"{best.name} has a" if missing and compared == 1 else "It has the lowest"
    told = [
        f"{it} held-out loss{',' if compared > 1 or not missing else ' of'} {loss.value:.4g} nats/token"
        + (f", of the points that keep {kept} within bounds." if record.limits and compared > 1 else ".")
    ]
    if KEPT.measure not in {limit.measure for limit in record.limits}:
        told.append("What points keep of language does not count: A0's loss on plain text was not measured.")
    if choice.near:
        told.append(f"{_and(choice.near)} cannot be told from it.")
        if choice.smallest not in (None, choice.winner):
            least = record.point(choice.smallest)
            told.append(f"Of these {least.name} trains least: {least.where}, {least.learns:,} parameters.")
    elif compared - len(choice.refused) > 1:
        told.append(f"It is told apart from every other one{' that has a result' if missing else ''}.")
    if missing:
        told.append(f"Without a result, and so not compared: {_and(missing)}.")
    if loss.error is None:
        told.append("Without repeats (footprint.seeds) intervals over samples decide, which tell little apart.")
    if choice.refused:
        told.append(f"Not to be taken: {', '.join(choice.refused)}.")
    return " ".join(told)


def without_result(record: FootprintRecord) -> list[str]:
    """Points of which no run has finished: nothing is known of them."""
    return [p.name for p in record.points if not p.runs]


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def role(record: FootprintRecord, point: FootprintPoint) -> str:
    """``best``, ``near``, ``refused``, ``usable``, or empty for what was not run."""
    choice = record.choice
    if not point.runs:
        return ""
    if point.name == choice.winner:
        return "best"
    return "near" if point.name in choice.near else "refused" if point.name in choice.refused else "usable"


def footprint_csv(record: FootprintRecord) -> str:
    """A row per run in their order; an empty cell is a number that was not measured. Full precision."""
    head = ["name", "point", "seed", "where", "learns", "adapter_params"]
    head += [x for m in COLUMNS for x in (m, f"{m}.low", f"{m}.high")]
    head += ["on_frontier", "role", "stopped", "gates_failed", "steps", "wall_s", "step_s", "peak_memory_mb", "status",
             "config_hash"]  # fmt: skip
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    by_name: Mapping[str, FootprintPoint] = {p.name: p for p in record.points}
    start = text_loss_of_start(record)
    for r in record.rows:
        p = by_name[r.point]
        measured = {**r.measured, **over_start(r, start)}
        cells: list[Any] = [r.name, r.point, r.seed, p.where, r.learns if r.status == "finished" else None, p.planned]
        for measure in COLUMNS:
            m = measured.get(measure)
            cells += [None, None, None] if m is None else [m.value, *(m.ci95 or (None, None))]
        cells += [p.on_frontier, role(record, p), r.stopped, "; ".join(r.gates_failed), r.steps, r.wall_s, r.step_s,
                  r.peak_memory_mb, r.status, r.config_hash]  # fmt: skip
        writer.writerow(cells)
    return out.getvalue()


assert {a.measure for a in AXES} <= COLUMNS.keys()
