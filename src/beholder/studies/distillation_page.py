"""A distillation study as a page, as Markdown and on a terminal, from ``distillation.json`` alone: the answer first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from beholder.evidence import Measurement
from beholder.report.markdown import escaped, table
from beholder.report.page import page
from beholder.report.words import duration
from beholder.studies.distillation_record import (
    ACCURACY,
    COLUMNS,
    DISTANCE,
    JUDGED,
    KD,
    PAGE,
    TWIN,
    Arm,
    BreakEven,
    Difference,
    DistillationRecord,
    Longer,
    Mean,
    TeacherFacts,
    answer,
    difference_text,
    kinds_of,
    mean_text,
    sizes,
)
from beholder.studies.record import write_pages
from beholder.types import printable

INTERVALS = "Student's, 95 %, over seeds; of an arm's shares and scores on the scale of their log-odds"
TONES = {"helps": "good", "does not help": "bad", "cannot be told": "weak"}


def render_distillation(record: DistillationRecord | str | Path, folder: str | Path) -> tuple[Path, ...]:
    """Write ``distillation.html`` and ``distillation.md``; ``record``: content or place of a ``distillation.json``."""
    known = record if isinstance(record, DistillationRecord) else DistillationRecord.load(record)
    return write_pages(folder, {PAGE: render_html(known), TWIN: render_markdown(known)})


def render_html(record: DistillationRecord) -> str:
    said = {v.said for v in record.verdicts if v.measure == ACCURACY}
    tone = TONES[said.pop()] if len(said) == 1 else "weak"
    return page(
        "distillation.html", folder=Path(__file__).parent, r=record, answer=answer(record), sizes=sizes(record),
        tone=tone, tones=TONES, columns=_columns(record), kinds=_kinds(record), arm_cell=_cells, teacher_cell=_measured,
        kind_cell=_kind_cell, teacher_kind=_teacher_kind, seconds=_seconds, step=_step, number=_count,
        words={m: c.words for m, c in COLUMNS.items()}, differences=_whole(record), strip=_strips(record),
        told=difference_text, intervals=INTERVALS, seed_told=_by_seed, duration=duration, lines=_lines(record),
        by_kind=[d for d in record.differences if d.kind and d.arm == KD],
    )  # fmt: skip


def render_markdown(record: DistillationRecord) -> str:
    out = [f"# Does a teacher help? {escaped(answer(record))}", ""]
    out += [escaped(f"{sizes(record)}.") if sizes(record) else "", ""]
    out += [f"> **{escaped(w)}**\n" for w in record.warnings]
    out += [f"- **at {v.basis}, {COLUMNS[v.measure].words}: {v.said}** ({escaped(v.why)})" for v in record.verdicts]
    out += ["", "## Arms", ""]
    out += table(*_arm_table(record))
    out += ["## Differences", ""]
    head = ["taught", "without", "at", "what", "difference", "says", "by seed"]
    out += table(head, [
        [d.arm, d.against, d.basis, COLUMNS[d.measure].words, difference_text(d.measure, d.mean), d.said or "",
         _by_seed(d)]
        for d in _whole(record)
    ])  # fmt: skip
    if kinds := _kinds(record):
        out += ["## Answers right by kind", ""]
        rows = [[a.name, *(_kind_cell(a, k) for k in kinds)] for a in record.arms]
        rows += [[f"teacher {t.name}", *(_teacher_kind(t, k) for k in kinds)] for t in record.teachers if t.measured]
        out += table(["arm", *kinds], rows)
    out += ["## Time", ""]
    rows = [[r.name, r.status, _count(r.steps), _step(r.step_s), _seconds(r.cache_s), _seconds(r.total_s)]
            for r in record.rows]  # fmt: skip
    out += table(["run", "status", "steps", "s a step", "kept words", "in all"], rows)
    out += [f"{escaped(line)}\n" for line in _lines(record)]
    out += [f"Intervals: {INTERVALS}. Written {record.created}."]
    return "\n".join(out) + "\n"


def print_distillation(record: DistillationRecord, console: Console) -> None:
    """The arms beside the teacher, the differences, warnings, the answer."""
    narrow = console.width < 120
    head, rows = _arm_table(record, intervals=not narrow)
    shown = Table(title=f"Distillation {record.name}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for k, heading in enumerate(head):
        shown.add_column(heading, justify="right" if k else "left", overflow="fold", no_wrap=not k)
    for row in rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))
    console.print(shown)
    say = console.print
    for line in _lines(record):
        say(Text(printable(line), style="dim"), soft_wrap=True)
    for warning in record.warnings:
        say(Text(printable(f"warning: {warning}"), style="bold red"), soft_wrap=True)
    for v in record.verdicts:
        say(Text(printable(f"at {v.basis}, {COLUMNS[v.measure].words}: {v.said}: {v.why}")), soft_wrap=True)
    told = f"{answer(record)}. " + (f"{sizes(record)[0].upper()}{sizes(record)[1:]}." if sizes(record) else "")
    say(Text(printable(told), style="bold"), soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------------
# Cells


def _columns(record: DistillationRecord) -> list[str]:
    """What was measured of some arm or teacher."""
    return [m for m in COLUMNS if any(m in x for x in [*(a.at for a in record.arms),
                                                       *(t.measured for t in record.teachers)])]  # fmt: skip


def _arm_table(record: DistillationRecord, *, intervals: bool = True) -> tuple[list[str], list[list[str]]]:
    columns = _columns(record)
    rows = [
        [a.name, *(_cells(m, a, intervals) for m in columns), _count(a.steps), _step(a.step_s), _seconds(a.total_s)]
        for a in record.arms
    ]
    rows += [[f"teacher {t.name}", *(_measured(m, t) for m in columns), "", "", ""] for t in record.teachers]
    return ["arm", *(COLUMNS[m].words for m in columns), "steps", "s a step", "in all"], rows


def _cells(measure: str, arm: Arm, intervals: bool = True) -> str:
    text = mean_text(measure, arm.at.get(measure))
    return text if intervals else text.partition(" (")[0]


def _measured(measure: str, teacher: TeacherFacts) -> str:
    m = teacher.measured.get(measure)
    return mean_text(measure, None if m is None else Mean(value=m.value))


def _kinds(record: DistillationRecord) -> list[str]:
    return list(dict.fromkeys(kind for a in record.arms for kind in a.by_kind))


def _kind_cell(arm: Arm, kind: str) -> str:
    return mean_text(ACCURACY, arm.by_kind.get(kind))


def _teacher_kind(teacher: TeacherFacts, kind: str) -> str:
    m: Measurement | None = kinds_of(teacher.by_kind).get(kind)
    return mean_text(ACCURACY, None if m is None else Mean(value=m.value))


def _count(n: float | None) -> str:
    return "–" if n is None else f"{n:,.0f}"


def _step(s: float | None) -> str:
    return "–" if s is None else f"{s:.3f}"


def _seconds(s: float | None) -> str:
    return "–" if s is None else duration(s)


def _whole(record: DistillationRecord) -> list[Difference]:
    """Those over all questions, what is judged first."""
    order = [*JUDGED, *(m for m in COLUMNS if m not in JUDGED)]
    found = [d for d in record.differences if not d.kind]
    return sorted(found, key=lambda d: (d.arm != KD, d.arm, d.basis, order.index(d.measure)))


def _by_seed(d: Difference) -> str:
    told = {seed: difference_text(d.measure, Mean(value=v)) for seed, v in sorted(d.by_seed.items())}
    return ", ".join(f"{seed}: {text.removesuffix(' points')}" for seed, text in told.items())


def _lines(record: DistillationRecord) -> list[str]:
    """What must be known to read the numbers."""
    out: list[str] = []
    if record.longer is not None:
        out.append(_longer_told(record.longer))
    out += [_break_even_told(b) for b in record.break_even]
    ways: dict[str, list[str]] = {}
    for row in record.rows:
        if DISTANCE in row.measured and row.arm not in ways.setdefault(row.kl_of, []):
            ways[row.kl_of].append(row.arm)
    if len(ways) > 1:
        told = "; ".join(f"over {way}: {', '.join(arms)}" for way, arms in ways.items())
        out.append(f"KL to its teacher does not compare between arms in which it is told otherwise ({told}).")
    out += [f"Teacher {t.name}: {t.note}." for t in record.teachers if t.note]
    return [*out, *(f"Note: {note}." for note in record.notes)]


def _longer_told(x: Longer) -> str:
    return (
        f"{x.steps:,} steps without a teacher ({x.step_s:.3f} s each) take the time of the taught ones "
        f"({duration(x.kd_s)}) and of what is kept of the teachers for them ({duration(x.cache_s)}), by the runs of "
        "the first seed."
    )


def _break_even_told(b: BreakEven) -> str:
    pays = "never pays" if b.epochs is None else f"has paid for itself after {b.epochs:.1f} epochs"
    return (
        f"A step of {b.kept} is {b.faster:.2f} times as fast as one of {b.online}, where teachers are asked "
        f"online; over the whole run, with what is kept counted, {b.faster_in_all:.2f} times. Keeping the "
        f"teachers' words {pays}."
    )


# ---------------------------------------------------------------------------------------------------------------
# Drawings

_WIDE, _HIGH = 220, 22


def _strips(record: DistillationRecord) -> Callable[[Difference], Markup]:
    """A difference as a line around 0 with a dot a seed; one scale for all of a measurement."""
    far: dict[str, float] = {}
    for d in record.differences:
        ends = [*d.by_seed.values(), d.mean.low or 0.0, d.mean.high or 0.0]
        far[d.measure] = max(far.get(d.measure, 0.0), *map(abs, ends))

    def draw(d: Difference) -> Markup:
        scale = far[d.measure] or 1.0

        def x(value: float) -> str:
            return f"{_WIDE / 2 + value / scale * (_WIDE / 2 - 8):.1f}"

        mid = _HIGH / 2
        tone = TONES.get(d.said or "", "plain")
        out = [f'<svg class="strip {tone}" viewBox="0 0 {_WIDE} {_HIGH}" width="{_WIDE}" height="{_HIGH}" '
               'role="img" aria-label="difference with its interval and seeds">',
               f'<line class="zero" x1="{x(0)}" x2="{x(0)}" y1="0" y2="{_HIGH}"/>']  # fmt: skip
        if d.mean.low is not None and d.mean.high is not None:
            out.append(f'<line class="ci" x1="{x(d.mean.low)}" x2="{x(d.mean.high)}" y1="{mid}" y2="{mid}"/>')
        out += [f'<circle class="seed" cx="{x(v)}" cy="{mid}" r="3"/>' for v in d.by_seed.values()]
        out.append(f'<circle cx="{x(d.mean.value)}" cy="{mid}" r="5"/></svg>')
        return Markup("".join(out))

    return draw
