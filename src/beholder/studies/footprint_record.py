"""What is known of a footprint study (``footprint.json``, ``footprint.csv``): runs, points, frontier, choice, verdicts.

Everything that is said follows from the runs' rows (`conclude`), so an old record can be judged again.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from beholder.config import STRENGTH_LINE, WATCHED, FootprintConfig
from beholder.evidence import Measurement, Record
from beholder.evidence.guardrails import Limit, Reading
from beholder.studies.frontier import (
    AXES,
    KEPT,
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
from beholder.types import UserError

RECORD, TABLE, PAGE, TWIN = "footprint.json", "footprint.csv", "footprint.html", "footprint.md"

COLUMNS = {
    TASK.measure: "held-out loss", "answer.accuracy.correct": "answers right", KEPT.measure: "text loss, × base",
    "retention.loss_ratio_styled": "the same, style aside", **{name: w.column for name, w in WATCHED.items()},
    "ablation.delta.shuffled": "Δshuffle",
}  # fmt: skip
"""What is kept of a run, and what it is called in a narrow table."""
LINE = {there: name for name, there in STRENGTH_LINE.items() if name in {a.measure for a in AXES}}
"""What is kept of the line from the base to the trained weights, and which axis it is on."""


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
        file = Path(path) / RECORD if Path(path).is_dir() else Path(path)
        try:
            return cls.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{file}: no such file; beholder footprint CONFIG writes it") from None
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(map(str, first["loc"])) or "(top)"
            raise UserError(f"{file}: not the record of a footprint study: {where}: {first['msg']}") from e


def bounds(study: FootprintConfig) -> dict[str, float]:
    return {
        "max_text_ratio": study.max_text_ratio, "max_hallucination_rise": study.max_hallucination_rise,
        "max_irrelevant_fall": study.max_irrelevant_fall,
    }  # fmt: skip


def conclude(record: FootprintRecord) -> FootprintRecord:
    """The record with what its rows say: estimates, frontier, the point to take, verdicts. Pure."""
    runs = {p.name: [r for r in record.rows if r.point == p.name and r.status == "finished"] for p in record.points}
    known: dict[str, dict[str, Estimate]] = {p.name: {} for p in record.points}
    for measure in COLUMNS:
        by_point = {name: [r.measured[measure] for r in rows if measure in r.measured] for name, rows in runs.items()}
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
            p.name, p.llm, p.vision, p.at, frozenset(r.stopped_by for r in runs[p.name] if r.stopped_by), p.rate_of,
            [r.readings for r in runs[p.name]],
        )
        for p in points
    ]  # fmt: skip
    return record.model_copy(update={
        "points": points, "axes": tuple(a.measure for a in axes), "limits": tuple(kept), "choice": choice,
        "verdicts": judge(seen, choice, kept),
    })  # fmt: skip


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
    told = [
        f"It has the lowest held-out loss, {loss.value:.4g} nats/token, of the points that keep "
        f"{_and([COLUMNS.get(limit.measure, limit.measure) for limit in record.limits])} within bounds."
    ]
    if choice.near:
        told.append(f"{_and(choice.near)} cannot be told from it.")
        if choice.smallest not in (None, choice.winner):
            least = record.point(choice.smallest)
            told.append(f"Of these {least.name} trains least: {least.where}, {least.learns:,} parameters.")
    elif len(record.points) - len(choice.refused) > 1:
        told.append("It is told apart from every other one.")
    if loss.error is None:
        told.append("Without repeats (footprint.seeds) intervals over samples decide, which tell little apart.")
    if choice.refused:
        told.append(f"Not to be taken: {', '.join(choice.refused)}.")
    return " ".join(told)


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "nothing"


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
    for r in record.rows:
        p = by_name[r.point]
        cells: list[Any] = [r.name, r.point, r.seed, p.where, r.learns if r.status == "finished" else None, p.planned]
        for measure in COLUMNS:
            m = r.measured.get(measure)
            cells += [None, None, None] if m is None else [m.value, *(m.ci95 or (None, None))]
        cells += [p.on_frontier, role(record, p), r.stopped, "; ".join(r.gates_failed), r.steps, r.wall_s, r.step_s,
                  r.peak_memory_mb, r.status, r.config_hash]  # fmt: skip
        writer.writerow(cells)
    return out.getvalue()


assert {a.measure for a in AXES} <= COLUMNS.keys()
