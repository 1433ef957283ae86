"""A footprint study as a page, as Markdown and on a terminal, from ``footprint.json`` alone: the answer first."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from beholder.evidence.catalogue import quantity
from beholder.report.markdown import escaped, table
from beholder.report.page import page
from beholder.report.words import duration, number
from beholder.studies.footprint_record import (
    COLUMNS,
    PAGE,
    TWIN,
    FootprintPoint,
    FootprintRecord,
    FootprintRow,
    answer,
    explanation,
    line_over_start,
    role,
    text_loss_of_start,
)
from beholder.studies.frontier import AXES, KEPT, SEEN, TASK, Axis, Estimate
from beholder.studies.matrix import BASELINE
from beholder.studies.record import write_pages
from beholder.studies.scatter import Dot, Span, scatter
from beholder.types import printable

TONES = {"supported": "good", "contradicted": "bad", "cannot be told": "weak"}
KINDS = {"best": "best", "near": "near", "refused": "flagged", "usable": "usable"}
"""Class of a point in the drawings, by its role."""


def render_footprint(record: FootprintRecord | str | Path, folder: str | Path) -> tuple[Path, ...]:
    """Write ``footprint.html`` and ``footprint.md``; ``record``: content or place of a ``footprint.json``."""
    known = record if isinstance(record, FootprintRecord) else FootprintRecord.load(record)
    return write_pages(folder, {PAGE: render_html(known), TWIN: render_markdown(known)})


def render_html(record: FootprintRecord) -> str:
    choice = record.choice
    sure = choice.winner is not None and not choice.near
    return page(
        "footprint.html", folder=Path(__file__).parent, r=record, answer=answer(record), why=explanation(record),
        tone="good" if sure else "weak" if choice.winner else "bad", points=_in_order(record), role=_role_of(record),
        columns=_columns(record), shown=_shown, params=_params, cost=_cost_of(record), rows=_by_point(record),
        drawings=_drawings(record), tones=TONES, stopped=[r for r in record.rows if r.stopped], duration=duration,
        axes=[a.words for a in AXES if a.measure in record.axes], words=_limit_words(record), chance=_chance(record),
        basis=_basis(record),
    )  # fmt: skip


def render_markdown(record: FootprintRecord) -> str:
    columns = _columns(record)
    out = [f"# How many layers should learn? {escaped(answer(record))}", "", escaped(explanation(record))]
    for warning in record.warnings:
        out += ["", f"> **{escaped(warning)}**"]
    head = ["point", "what learns", "parameters", *columns.values(), "frontier", "", "time"]
    lines = []
    cost, named = _cost_of(record), _role_of(record)
    for p in _in_order(record):
        lines.append([
            p.name, p.where, _params(p), *(_shown(m, p.at.get(m)) for m in columns),
            "yes" if p.on_frontier else "", named(p), cost(p),
        ])  # fmt: skip
    out += ["", *table(head, lines), "## Hypotheses", ""]
    out += [f"- **{v.name} {v.said}** ({escaped(v.claim)}): {escaped(v.why)}" for v in record.verdicts]
    out += ["", "## Stopped by a guardrail", ""]
    out += [f"- {escaped(r.name)}: {escaped(r.stopped)}" for r in record.rows if r.stopped] or ["None."]
    out += [
        "",
        *(f"Note: {escaped(note)}" for note in record.notes),
        "",
        f"{_chance(record)} {_basis(record)} Written {record.created}.",
    ]
    return "\n".join(out) + "\n"


def print_footprint(record: FootprintRecord, console: Console) -> None:
    """The table of the points, warnings, the answer, the verdicts."""
    columns = _columns(record)
    narrow = console.width < 100  # the page has every column
    columns = {m: words for m, words in columns.items() if not (narrow and m == "retention.loss_ratio_styled")}
    shown = Table(title=f"Footprint {record.name}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("point", "parameters", *columns.values(), "time", ""):
        left = heading in ("point", "")
        shown.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=left)
    cost, named = _cost_of(record), _role_of(record)
    for p in _in_order(record):
        kind = role(record, p)
        style = {"best": "bold green", "refused": "dim"}.get(kind, "")
        cells = (_shown(m, p.at.get(m), interval=False) for m in columns)
        short = {"best": "best", "near": "≈", "refused": "refused", "": "missing"}.get(kind, "")
        shown.add_row(Text(p.name + " ◦" * p.on_frontier, style=style), _params(p), *cells, cost(p), short)
    console.print(shown)
    say = console.print
    say("◦ on the frontier: no other point is better in one thing and worse in none", style="dim", soft_wrap=True)
    say("≈ cannot be told from the best", style="dim", soft_wrap=True)
    for p in _in_order(record):
        if (kind := role(record, p)) in ("refused", "") and (why := named(p)):
            say(Text(printable(f"{p.name} {'refused' if kind else 'missing'}: {why}")), soft_wrap=True)
    for row in record.rows:
        if row.stopped:
            say(Text(printable(f"{row.name} was stopped by its guardrail {row.stopped}")), soft_wrap=True)
    for warning in record.warnings:
        say(Text(printable(f"warning: {warning}"), style="bold red"), soft_wrap=True)
    for v in record.verdicts:
        say(Text(printable(f"{v.name} {v.said}: {v.why}")), soft_wrap=True)
    say(Text(printable(f"{answer(record)}. {explanation(record)}"), style="bold"), soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------------
# Cells


def _columns(record: FootprintRecord) -> dict[str, str]:
    """What was measured at some point."""
    return {m: words for m, words in COLUMNS.items() if any(m in p.at for p in record.points)}


def _in_order(record: FootprintRecord) -> list[FootprintPoint]:
    """The winner, those that cannot be told from it, the other usable ones by their loss, the others."""
    rank = {"best": 0, "near": 1, "usable": 2, "refused": 3, "": 4}
    far = Estimate(float("inf"), 0, 0)
    return sorted(record.points, key=lambda p: (rank[role(record, p)], p.at.get(TASK.measure, far).value))


def _role_of(record: FootprintRecord) -> Any:
    def told(p: FootprintPoint) -> str:
        kind = role(record, p)
        if kind == "refused":
            return record.choice.refused[p.name]
        missing = "; ".join(dict.fromkeys(r.reason or r.status for r in record.rows if r.point == p.name))
        return {"best": "best", "near": "cannot be told from the best", "usable": "", "": missing}[kind]

    return told


def _params(p: FootprintPoint) -> str:
    if not p.runs:
        return "–" if p.planned is None or p.name == BASELINE else f"{p.planned:,}"
    return f"{p.learns:,}"


def _shown(measure: str, e: Estimate | None, *, interval: bool = True) -> str:
    """Four decimals of what is compared by differences; shares in per cent."""
    if e is None:
        return "–"
    if quantity(measure)[0].unit == "share":
        low, high = (number(v, "share") for v in (e.low, e.high))
        return number(e.value, "share") + (f" ({low} … {high})" if interval and e.high > e.low else "")
    return f"{e.value:.4f}" + (f" ({e.low:.4f} … {e.high:.4f})" if interval and e.high > e.low else "")


def _by_point(record: FootprintRecord) -> dict[str, list[FootprintRow]]:
    return {p.name: [r for r in record.rows if r.point == p.name] for p in record.points}


def _cost_of(record: FootprintRecord) -> Any:
    rows = _by_point(record)

    def told(p: FootprintPoint) -> str:
        seconds = [r.wall_s for r in rows[p.name] if r.wall_s is not None]
        return duration(sum(seconds) / len(seconds)) if seconds else "–"

    return told


def _limit_words(record: FootprintRecord) -> list[str]:
    return [f"{COLUMNS.get(limit.measure, limit.measure)} {limit.words}" for limit in record.limits]


def _chance(record: FootprintRecord) -> str:
    if any(e.error is not None for p in record.points for e in p.at.values()):
        return (
            "Two points are told apart when they differ by more than twice the standard error over seeds, pooled over "
            "the points; intervals shown are over held-out samples, which are the same for all."
        )
    return "Without repeats two points are told apart when their 95 % intervals over held-out samples are apart."


def _basis(record: FootprintRecord) -> str:
    """What loss on plain text is compared with; empty where none is."""
    if not any(KEPT.measure in p.at for p in record.points):
        return ""
    return (
        "Loss on plain text is over A0's for every point, also for one whose adapters were put on another run; the "
        "guardrails in a run compare with its own base."
    )


# ---------------------------------------------------------------------------------------------------------------
# Drawings


def _drawings(record: FootprintRecord) -> list[tuple[str, Markup]]:
    """Held-out loss against what it costs: language, and seeing. Bottom left is where to be."""
    found = []
    for axis in (KEPT, SEEN):
        if axis.measure in record.axes:
            limit = next((x.most for x in record.limits if x.measure == axis.measure), None)
            drawing = scatter(
                _dots(record, axis), axis.words, "held-out loss, nats per token",
                f"{axis.words} against held-out loss, for each point", limit=limit,
            )  # fmt: skip
            found.append((axis.words, drawing))
    return found


def _dots(record: FootprintRecord, axis: Axis) -> list[Dot]:
    dots = []
    for p in _in_order(record):
        x, y = p.at.get(axis.measure), p.at.get(TASK.measure)
        if x is None or y is None:
            continue
        kind = role(record, p)
        dots.append(
            Dot(
                p.name, KINDS[kind], _span(x), _span(y), cross=kind == "refused", large=kind == "best",
                ring=p.on_frontier, trail=_trail(record, p, axis),
            )
        )  # fmt: skip
    return dots


def _trail(record: FootprintRecord, p: FootprintPoint, axis: Axis) -> list[tuple[float, float]]:
    """The point at other strengths of its adapters, the mean over its runs, from the baseline on; itself at its own."""
    start = text_loss_of_start(record)
    rows = [r for r in record.rows if r.point == p.name and r.status == "finished"]
    by_strength: dict[float, list[tuple[float, float]]] = {}
    for row in rows:
        for at in line_over_start(row, start):
            if axis.measure in at.values and TASK.measure in at.values and at.strength != row.strength:
                by_strength.setdefault(at.strength, []).append((at.values[axis.measure], at.values[TASK.measure]))
    if not by_strength:
        return []
    trail = {s: (_mean(x for x, _ in at), _mean(y for _, y in at)) for s, at in by_strength.items()}
    trail[_mean(r.strength for r in rows)] = (p.at[axis.measure].value, p.at[TASK.measure].value)
    base = next((q.at for q in record.points if q.name == BASELINE), {})
    if p.kind in ("matrix", "control") and axis.measure in base and TASK.measure in base:
        trail[0.0] = (base[axis.measure].value, base[TASK.measure].value)
    return [trail[s] for s in sorted(trail)]


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _span(e: Estimate) -> Span:
    return e.value, e.low, e.high
