"""Figures of the report: curves over steps and histograms as inline SVG, intervals as positions on an axis.

Drawing only; what is drawn is decided in `report.content`. Colours are CSS variables of the page, so that one drawing
serves the light and the dark theme, and text is text in the page's own font.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from beholder.evidence import Curve, Histogram, Measurement
from beholder.report.words import MINUS, NBSP, count, fmt, fmt_ci, number
from beholder.types import printable

# Matplotlib wants hex colours; each of these stands for a CSS variable and is replaced in the SVG text.
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_SERIES = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005")
MAX_LINES = len(_SERIES)
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--line"} | {c: f"--s{k}" for k, c in enumerate(_SERIES, 1)}

LOG_FROM = 20.0
"""A positive curve whose largest value is this many times its smallest is drawn on a logarithmic axis."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawing and the legend that the page writes above it."""

    svg: Markup
    legend: list[tuple[str, str]]
    """(CSS class of the key: ``s1`` … ``s5``, label)."""
    note: str = ""


def curves(
    lines: Sequence[tuple[str, Curve]], *, title: str, width: float = 13.6, height: float = 3.9,
    bands: Sequence[tuple[str, float]] = (), log: bool | None = None,
) -> Plot:  # fmt: skip
    """Up to five labelled curves over optimizer steps; ``title`` is read out by screen readers.

    ``log``: whether the axis is logarithmic; None decides by the range of the values.
    ``bands``: labelled levels drawn across, in the unit of the curves, to read them against.

    A measured curve with more than 40 points is drawn faint, with its running mean on top (time constant: a thirtieth
    of the points); a shorter one gets dots, because its points are measurements of their own.
    """
    assert 0 < len(lines) <= len(_SERIES)
    values = [y for _, curve in lines for y in curve.y]
    if log is None:
        log = bool(values) and min(values) > 0 and max(values) / min(values) >= LOG_FROM
    from matplotlib.ticker import LogLocator

    with _figure(width, height) as (figure, axes):
        for color, (_, curve) in zip(_SERIES, lines, strict=False):
            if curve.name.startswith("lr."):  # set, not measured: there is no noise to smooth away
                axes.plot(curve.x, curve.y, color=color, linewidth=1.8)
            elif len(curve.x) > 40:
                axes.plot(curve.x, curve.y, color=color, linewidth=0.7, alpha=0.28)
                axes.plot(curve.x, smooth(curve.y, log), color=color, linewidth=1.8)
            else:
                axes.plot(curve.x, curve.y, color=color, linewidth=1.8, marker="o", markersize=4.2)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if height > 2.5 else (1,)))
            axes.yaxis.set_minor_locator(LogLocator(subs=()))
            axes.yaxis.set_major_formatter(_plain)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(printable(lines[0][1].unit))
        axes.margins(x=0.01)
        _draw_bands(axes, bands, log, height)
        svg = _svg(figure, title)
    legend = [(f"s{k}", label) for k, (label, _) in enumerate(lines, 1)]
    return Plot(svg, legend, "logarithmic axis" if log else "")


def _draw_bands(axes: Any, bands: Sequence[tuple[str, float]], log: bool, height: float) -> None:
    """Dashed lines with their names at the right edge, moved apart where they would be written over each other."""
    drawn = [(label, level) for label, level in bands if level > 0 or not log]
    dashes = ((0, (6, 3)), (0, (1.5, 2)), (0, (6, 2, 1.5, 2)))
    for k, (_, level) in enumerate(drawn):
        axes.axhline(level, color=_MUTED, linewidth=1.2, linestyle=dashes[k % 3])
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)  # what is measured decides where a name stands
    gap = 0.21 / height  # a line of text, as a share of the axes
    floor = 0.0
    for label, level in sorted(drawn, key=lambda band: band[1]):
        share = math.log(level / low) / math.log(high / low) if log else (level - low) / (high - low)
        floor = max(share, floor)
        name = printable(f"{label} {number(level, '')}")
        axes.text(1.008, floor, name, transform=axes.transAxes, va="center", color=_MUTED, fontsize=11)
        floor += gap


@dataclass(frozen=True, slots=True)
class Lane:
    """One interval: positions are per cent of the axis' length."""

    label: str
    kind: str
    """CSS class: the condition's colour, or how much the group looks."""
    left: float
    width: float
    dot: float
    text: str
    interval: str
    note: str


@dataclass(frozen=True, slots=True)
class Lanes:
    """Intervals over one axis. The page draws them as elements, so that they wrap and scale with its text."""

    rows: list[Lane]
    ticks: list[tuple[float, str]]
    reference: float
    """Where "no difference" stands."""
    axis: str
    log: bool


def lanes(rows: Sequence[tuple[str, str, Measurement]], *, reference: float, axis: str) -> Lanes:
    """Intervals of (label, CSS class, measurement); ``reference`` is the value that means "no difference".

    The axis always holds the reference. It is logarithmic when all ends are positive and span a wide range; for ratios
    already from 3, because 1.1 and 1.2 differ more than 9 and 12 do.
    """
    ends = [v for _, _, m in rows for v in (m.value, *(m.ci95 or ()))] + [reference]
    ratios = all(m.unit == "ratio" for _, _, m in rows)
    log = min(ends) > 0 and max(ends) / min(ends) >= (3 if ratios else LOG_FROM)

    def along(value: float) -> float:
        return math.log10(value) if log else value

    low, high = along(min(ends)), along(max(ends))
    room = (high - low) * 0.04 or max(abs(high), 1.0) * 0.1
    low, high = low - room, high + room

    def place(value: float) -> float:
        return 100 * (along(value) - low) / (high - low)

    drawn: list[Lane] = []
    for label, kind, m in rows:
        first, last = m.ci95 or (m.value, m.value)
        at, width, dot = place(first), place(last) - place(first), place(m.value)
        drawn.append(Lane(label, kind, at, width, dot, fmt(m, unit=False), fmt_ci(m), f"n{NBSP}{count(m.n)}"))
    unit = rows[0][2].unit if rows else ""
    levels = _decades(low, high) if log else _steps(low, high)
    marks = [v for v in levels if abs(place(v) - place(reference)) > 6] + [reference]  # it is named in any case
    ticks = [(place(v), _tick(v, unit)) for v in sorted(marks)]
    return Lanes(drawn, ticks, place(reference), axis, log)


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two logarithms; fewer of them over many decades."""
    for factors in ((1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(low), math.ceil(high) + 1)
        values = [v for p in powers for f in factors if (v := f * 10.0**p)]  # 0: a power too small for a float
        found = [v for v in values if low <= math.log10(v) <= high]
        if len(found) <= 7:
            return found
    return found[:: math.ceil(len(found) / 7)]


def _steps(low: float, high: float) -> list[float]:
    """About five round values between two bounds."""
    step = _round_step(low, high)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def round_steps_around(low: float, high: float) -> list[float]:
    """About five round values, the first and the last of which enclose the bounds; two or more."""
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    step = _round_step(low, high)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, max(last, first + 1) + 1)]


def _round_step(low: float, high: float) -> float:
    """A round fifth of the way between two bounds."""
    raw = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(raw))
    return next(f * size for f in (1, 2, 2.5, 5, 10) if f * size >= raw * 0.999)


def _tick(value: float, unit: str) -> str:
    match unit:
        case "share":
            return f"{100 * value:.4g}\u00a0%"
        case "ratio":
            return f"{value:.4g}×"
        case _:
            return f"{value:.4g}".replace("-", MINUS)


def histogram(
    data: Histogram, *, title: str, labels: Mapping[str, str], width: float = 13.6, height: float = 2.7
) -> Plot:
    """Up to five series of counts side by side over the same bins, named by ``labels`` where it has them."""
    names = list(data.series)[: len(_SERIES)]
    assert names
    # The conditions keep the colours they have elsewhere on the page.
    fixed = {"reference": 0, "correct": 1, "shuffled": 2, "zero": 3, "noise": 4}
    if "zero" not in names:
        fixed["none"] = 3
    slots = [fixed[n] for n in names] if set(names) <= set(fixed) else list(range(len(names)))
    slot = 0.84 / len(names)
    with _figure(width, height) as (figure, axes):
        for k, name in enumerate(names):
            places = [i - 0.42 + slot * (k + 0.5) for i in range(len(data.bins))]
            axes.bar(places, data.series[name], width=slot * 0.94, color=_SERIES[slots[k]], linewidth=0)
        axes.set_xticks(range(len(data.bins)), [printable(b) for b in data.bins])
        axes.set_xlabel(printable(data.unit))
        axes.set_ylabel("samples")
        svg = _svg(figure, title)
    return Plot(svg, [(f"s{s + 1}", labels.get(n, n)) for s, n in zip(slots, names, strict=True)])


def smooth(values: Sequence[float], log: bool) -> list[float]:
    """The running mean of what is drawn: of the logarithms on a logarithmic axis, where a mean of values would lag."""
    time_constant = len(values) / 30
    if not log:
        return running_mean(values, time_constant)
    return [math.exp(v) for v in running_mean([math.log(v) for v in values], time_constant)]


def running_mean(values: Sequence[float], time_constant: float) -> list[float]:
    """Exponential running mean, corrected for its start (the first value is not overweighted)."""
    keep = 1 - 1 / max(time_constant, 1.0)
    total = weight = 0.0
    out: list[float] = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return out


def _plain(value: float, _: object) -> str:
    return f"{value:g}"


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    # Imported here: a training process that never renders does not pay for matplotlib. No pyplot, so no global figure
    # list and no display.
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none", "text.parse_math": False, "font.size": 12, "axes.linewidth": 0.8,
        "axes.edgecolor": _GRID, "axes.labelcolor": _MUTED, "xtick.color": _MUTED, "ytick.color": _MUTED,
        "xtick.major.size": 0, "ytick.major.size": 0, "ytick.minor.size": 0, "axes.grid": True, "axes.grid.axis": "y",
        "grid.color": _GRID, "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.spines.top": False,
        "axes.spines.right": False, "axes.spines.left": False, "lines.solid_capstyle": "round",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        yield figure, axes


def _svg(figure: Any, title: str) -> Markup:
    """The figure as an inline ``<svg>``: CSS colours, the page's font, no ids but those that are referred to."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "beholder"}), warnings.catch_warnings():
        # Only widths are measured here; the browser draws the text and has fonts for every script.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    salt = "p" + hashlib.sha256((title + text).encode()).hexdigest()[:8]  # keeps the ids of several figures apart
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{salt}{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{salt}", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page's font
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    view = re.search(r'viewBox="([^"]+)"', text)
    assert view is not None
    head = f'<svg viewBox="{view[1]}" role="img" aria-label="{escape(printable(title))}">'
    return Markup(head + text[text.index(">") + 1 :].strip())
