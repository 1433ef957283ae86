"""Points in a plane with their intervals and names, as an inline drawing whose colours are the page's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from beholder.report.plots import round_steps_around
from beholder.types import printable

WIDTH, HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 14, 46

Span = tuple[float, float, float]
"""Value, lower and upper end of its interval."""


@dataclass(frozen=True, slots=True)
class Dot:
    label: str
    kind: str
    """Its class in the page's style."""
    x: Span
    y: Span
    cross: bool = False
    """Drawn as one: it is not to be used."""
    large: bool = False
    ring: bool = False
    trail: Sequence[tuple[float, float]] = ()
    """A thin line that it lies on, from end to end."""


def scatter(
    dots: Sequence[Dot], x_label: str, y_label: str, title: str, *, x_from_zero: bool = False,
    limit: float | None = None,
) -> Markup:  # fmt: skip
    """``x_from_zero``: the axis holds 0, marked. ``limit``: a dashed line there, beyond which nothing may be taken."""
    if not dots:
        return Markup("")
    xs = [*(x for d in dots for x in d.x[1:]), *(x for d in dots for x, _ in d.trail)]
    ys = [*(y for d in dots for y in d.y[1:]), *(y for d in dots for _, y in d.trail)]
    xs += [0.0] if x_from_zero else []
    if limit is not None and limit <= max(xs) + (max(xs) - min(xs)) / 2:  # one far beyond would squeeze the points
        xs.append(limit)
    x_ticks, y_ticks = round_steps_around(min(xs), max(xs)), round_steps_around(min(ys), max(ys))

    def px(x: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def py(y: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(title)}">']
    for t in y_ticks:
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{py(t):.1f}" y2="{py(t):.1f}"/>')
        out.append(f'<text x="{_LEFT - 8}" y="{py(t) + 4:.1f}" text-anchor="end">{t:g}</text>')
    for t in x_ticks:
        out.append(f'<text x="{px(t):.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="middle">{t:g}</text>')
    for at in [0.0] * x_from_zero + [x for x in [limit] if x is not None and x <= x_ticks[-1]]:
        out.append(f'<line class="axis" x1="{px(at):.1f}" x2="{px(at):.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
    out += [
        f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{_text(x_label)}</text>',
        f'<text transform="translate(14 {(_TOP + HEIGHT - _BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{_text(y_label)}</text>",
    ]
    placed = [(px(d.x[0]), py(d.y[0])) for d in dots]
    labels: list[tuple[float, float]] = []
    for d, (x, y) in zip(dots, placed, strict=True):
        out.append(f'<g class="{d.kind}">')
        if d.trail:
            path = " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in d.trail)
            out.append(f'<polyline class="trail" points="{path}"/>')
        out.append(f'<line class="ci" x1="{px(d.x[1]):.1f}" x2="{px(d.x[2]):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<line class="ci" x1="{x:.1f}" x2="{x:.1f}" y1="{py(d.y[1]):.1f}" y2="{py(d.y[2]):.1f}"/>')
        if d.ring:
            out.append(f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="10"/>')
        if d.cross:
            out.append(f'<path class="cross" d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"/>')
        else:
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{7 if d.large else 5}"/>')
        lx, ly = _free_place(x, y, placed, labels)
        labels.append((lx, ly))
        side = "start" if len(d.label) > 2 and lx > x + 6 else "end" if len(d.label) > 2 and lx < x - 6 else "middle"
        out.append(
            f'<text class="label" x="{lx:.1f}" y="{ly + 4:.1f}" text-anchor="{side}">{_text(d.label)}</text></g>'
        )
    return Markup("\n".join([*out, "</svg>"]))


def _text(words: str) -> Markup:
    return escape(printable(words, one_line=True))


def _free_place(
    x: float, y: float, points: Sequence[tuple[float, float]], labels: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """The place around a point that is farthest from other points and labels, within the drawing."""
    places = [
        (x + radius * math.cos(angle), y - radius * math.sin(angle))
        for radius in (15, 24)
        for angle in (math.pi * k / 4 for k in (1, 3, 0, 2, 7, 5, 4, 6))
    ]
    inside = [p for p in places if _LEFT < p[0] < WIDTH - 6 and 8 < p[1] < HEIGHT - _BOTTOM] or places

    def room(p: tuple[float, float]) -> float:
        others = [q for q in (*points, *labels) if q != (x, y)]
        return min([13.0, *(math.dist(p, q) for q in others)])  # more than enough is no better

    return max(inside, key=room)  # the first of equals
