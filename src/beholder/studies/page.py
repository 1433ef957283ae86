"""A sweep as a page, as Markdown and on a terminal, from ``sweep.json`` alone: verdict, table, drawings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from beholder.evidence import Measurement
from beholder.report.markdown import escaped, table
from beholder.report.page import page
from beholder.report.plots import round_steps_around
from beholder.report.words import duration
from beholder.studies.record import DELTAS, Row, SweepRecord, titles, value_of, word, write_pages
from beholder.studies.scatter import Dot, Span, scatter
from beholder.types import printable


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a bar, in per cent of the track's width."""

    kind: str
    left: float
    width: float
    title: str


@dataclass(frozen=True, slots=True)
class Bar:
    """One run: from its loss down to its score by what each wrong image costs."""

    number: int
    name: str
    flagged: bool
    best: bool
    segments: tuple[Segment, ...]
    loss: float
    """Where its loss is, per cent."""
    score: float
    text: str


def render_sweep(record: SweepRecord | str | Path, folder: str | Path) -> tuple[Path, ...]:
    """Write ``sweep.html`` and ``sweep.md`` into ``folder``; ``record``: content or place of a ``sweep.json``."""
    known = record if isinstance(record, SweepRecord) else SweepRecord.load(record)
    return write_pages(folder, {"sweep.html": render_html(known), "sweep.md": render_markdown(known)})


def render_html(record: SweepRecord) -> str:
    rows = record.by_rank()
    scored = [r for r in rows if r.score is not None]
    ticks, bars = _bars(record, scored)
    ranking = record.ranking
    good = ranking.winner is not None and ranking.tested and not ranking.ties
    return page(
        "sweep.html", folder=Path(__file__).parent, r=record, rows=rows, num=number, setting=setting,
        title=titles(list(record.grid)), duration=duration, buckets=_buckets(record), deltas=DELTAS, bars=bars,
        ticks=ticks, scatter=_scatter(record, scored),
        tone="good" if good else "weak" if ranking.winner else "bad", best=lambda row: _best(record, row),
        tied=lambda row: bool(ranking.ties) and row.point in (ranking.winner, *ranking.ties), answer=_answer(record),
    )  # fmt: skip


def render_markdown(record: SweepRecord) -> str:
    buckets = _buckets(record)
    head = ["#", "run", *titles(list(record.grid)).values(), "seed", "score", "loss",
            *(f"loss {b}" for b in buckets),
            *DELTAS, "steps", "time", "do not use"]  # fmt: skip
    lines = []
    for k, r in enumerate(record.by_rank(), 1):
        by_bucket = {m.stratum: m for m in r.buckets}
        lines.append([
            str(k), r.name, *(setting(r.settings[key]) for key in record.grid), str(r.seed), number(r.score),
            _with_ci(r.eval_loss), *(_with_ci(by_bucket.get(b)) for b in buckets), *map(_with_ci, r.deltas),
            "–" if r.steps is None else str(r.steps),
            "–" if r.wall_s is None else duration(r.wall_s), ", ".join(r.flags) if r.status == "finished" else r.status,
        ])  # fmt: skip
    out = [f"# Sweep {escaped(record.name)}: {escaped(_answer(record))}", ""]
    out += [escaped(record.ranking.verdict), "", _rule(record)]
    for warning in record.warnings:
        out += ["", f"> **{escaped(warning)}**"]
    out += ["", *table(head, lines), f"Written {record.created}."]
    return "\n".join(out) + "\n"


def _answer(record: SweepRecord) -> str:
    ranking = record.ranking
    if ranking.winner is None:
        return "No winner"
    if ranking.ties:
        return f"A tie: {', '.join([ranking.winner, *ranking.ties])}"
    usable = [p for p in ranking.places if not p.flags]
    return f"{ranking.winner} {'wins' if ranking.tested or len(usable) == 1 else 'is lowest, untested'}"


def _rule(record: SweepRecord) -> str:
    return (
        f"Score = held-out loss - {record.ablation_weight:g} × (Δshuffle + Δzero), nats per token, lower is better. "
        'A run is marked "do not use" when it failed a gate, or is collapsed: the interval of its Δshuffle reaches 0, '
        f"or its Δshuffle is below {record.collapsed_below:g} of the grid's median."
    )


def _best(record: SweepRecord, row: Row) -> bool:
    return row.point == record.ranking.winner and not row.flags


def _buckets(record: SweepRecord) -> list[str]:
    found = list(dict.fromkeys(m.stratum for r in record.rows for m in r.buckets if m.stratum))
    return found if len(found) > 1 else []  # a single bucket says again what the loss says


def number(value: float | None) -> str:
    """Four decimals for what is compared by differences; a dash for what was not measured."""
    return "–" if value is None else f"{value:.4f}"


def setting(value: bool | int | float | str) -> str:
    """``on``, ``5e-5``, ``adamw``."""
    return ("on" if value else "off") if isinstance(value, bool) else word(value)


def _with_ci(m: Measurement | None) -> str:
    if m is None:
        return "–"
    return number(m.value) + (f" ({m.ci95[0]:.4f} … {m.ci95[1]:.4f})" if m.ci95 else "")


def print_record(record: SweepRecord, console: Console) -> None:
    """The table of a sweep, best first, its warnings and its verdict."""
    shown = Table(title=f"Sweep {record.name}: score = loss - {record.ablation_weight:g} x (Δshuffle + Δzero)")
    shown.title_justify = "left"
    for heading in ("run", "score", "loss", *DELTAS, "time", "do not use"):
        shown.add_column(heading, justify="left" if heading in ("run", "do not use") else "right", overflow="fold")
    for r in record.by_rank():
        if r.status != "finished":
            shown.add_row(Text(printable(r.name)), *[""] * 6, Text(r.status, style="red"))
            continue
        shown.add_row(
            Text(printable(r.name), style="bold green" if _best(record, r) else "dim" if r.flags else ""),
            *map(number, (r.score, *map(value_of, (r.eval_loss, *r.deltas)))),
            "–" if r.wall_s is None else duration(r.wall_s),
            Text(", ".join(r.flags), style="red"),
        )
    console.print(shown)
    for warning in record.warnings:
        console.print(Text(printable(f"warning: {warning}"), style="bold red"), soft_wrap=True)
    console.print(Text(printable(record.ranking.verdict), style="bold"), soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------------
# Drawings


def _bars(record: SweepRecord, rows: Sequence[Row]) -> tuple[list[tuple[float, str]], list[Bar]]:
    """Ticks of the axis (per cent, label) and a bar a run, on one axis that holds every loss and score.

    The axis need not start at 0: what is drawn is the way from the loss to the score, not an area.
    """
    weight = record.ablation_weight
    triples = [(_v(r.eval_loss), weight * _v(r.d_shuffle), weight * _v(r.d_zero)) for r in rows]
    points = [x for loss, s, z in triples for x in (loss, loss - s, loss - s - z)] or [0.0]
    ticks = round_steps_around(min(points), max(points))
    low, high = ticks[0], ticks[-1]

    def at(x: float) -> float:
        return 100 * (x - low) / (high - low)

    def segment(kind: str, a: float, b: float, title: str) -> Segment:
        return Segment(kind, at(min(a, b)), abs(at(b) - at(a)), title)

    bars = []
    for k, (r, (loss, s, z)) in enumerate(zip(rows, triples, strict=True), 1):
        parts = (
            segment("shuffled", loss, loss - s, f"{weight:g} × Δshuffle {_v(r.d_shuffle):.4f}"),
            segment("zero", loss - s, loss - s - z, f"{weight:g} × Δzero {_v(r.d_zero):.4f}"),
        )
        bars.append(Bar(k, r.name, bool(r.flags), _best(record, r), parts, at(loss), at(loss - s - z), number(r.score)))
    return [(at(t), f"{t:g}") for t in ticks], bars


def _v(m: Measurement | None) -> float:
    assert m is not None  # rows with a score have all three
    return m.value


def _scatter(record: SweepRecord, rows: Sequence[Row]) -> Markup:
    """Δshuffle against loss with both intervals; the numbers are those of the table. Bottom right is where to be."""
    dots = [
        Dot(
            str(k), "flagged" if r.flags else "best" if _best(record, r) else "usable", _span(r.d_shuffle),
            _span(r.eval_loss), cross=bool(r.flags), large=_best(record, r),
        )
        for k, r in enumerate(rows, 1)
    ]  # fmt: skip
    return scatter(
        dots, "Δshuffle, nats per token (more: it looks)", "held-out loss, nats per token",
        "Loss with another sample's image minus loss with the own one, against held-out loss, for each run",
        x_from_zero=True,
    )  # fmt: skip


def _span(m: Measurement | None) -> Span:
    assert m is not None
    return m.value, *(m.ci95 or (m.value, m.value))
