"""How numbers, names and other people's text read in a report: rounding, units, labels, visible control characters.

Pure functions from values to text. What is shown where is decided in `report.content`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from beholder.config import STAGES
from beholder.evidence import Evidence, Measurement, WordStat
from beholder.evidence.catalogue import IMAGE_NAMES, Written, called, unit_of

NBSP = "\u00a0"
MINUS = "\u2212"

RELIANCE_LEVELS = (
    (-1, f"below {MINUS}0.1: the image misleads"), (0, f"{MINUS}0.1 to 0.1: language alone"), (1, "0.1 to 0.5"),
    (2, "0.5 to 1.5"), (3, "1.5 to 3"), (4, "3 and more: the image decides"),
)  # fmt: skip
"""Marks of a word by the nats it loses without the image, as `reliance_level` gives them."""


def reliance_level(delta: float) -> int:
    """Mark of a word whose loss without the image is ``delta`` nats above that with it: -1 (the image hurts) to 4."""
    return -1 if delta < -0.1 else sum(delta >= edge for edge in (0.1, 0.5, 1.5, 3.0))


def interval(m: Measurement) -> str:
    """`fmt_ci` behind a space and in brackets, or nothing."""
    return f" ({text})" if (text := fmt_ci(m)) else ""


def with_ci(m: Measurement | None) -> str:
    """``97.6 % (96.1-98.5 %)``; empty for what was not measured."""
    return "" if m is None else fmt(m) + interval(m)


def written(e: Evidence) -> Written:
    """What the model was taught to write; of a stage of another version, by whether its answers were scored."""
    if e.stage in STAGES:
        return STAGES[e.stage].writes
    return "answer" if any(m.name.startswith("answer.") for m in e.measurements) else "caption"


def condition_names(e: Evidence) -> Mapping[str, str]:
    """What the conditions are called in the report of that run."""
    return IMAGE_NAMES[written(e)]


def metric_name(e: Evidence, name: str) -> str:
    """What a measurement is called in the report of that run: ``caption.exact_match.correct`` → ``exact match``."""
    return called(name, written(e))


def fmt(m: Measurement, unit: bool = True) -> str:
    """A measurement's value as a person writes it: ``97.6 %``, ``0.0643 nats/token``, ``54x``."""
    shown = unit_of(m.name, m.unit)
    return number(m.value, shown) + (f" {shown}" if unit and shown in SPELLED_UNITS else "")


def fmt_ci(m: Measurement | WordStat) -> str:
    """Such as ``96.1 to 98.5 %`` with a dash; empty when there is no interval."""
    if m.ci95 is None:
        return ""
    low, high = (number(v, unit_of(m.name, m.unit) if isinstance(m, Measurement) else "nats") for v in m.ci95)
    low = low.removesuffix(f"{NBSP}%").removesuffix("×")
    with_signs = low.startswith(("-", "+", MINUS)) or high.startswith("-")
    return f"{low} … {high}" if with_signs else f"{low}–{high}"


SPELLED_UNITS = ("nats/token", "nats", "parts", "prompts", "points", "logits")
"""Units that follow their number in words; the others are in its form (``%``, ``x``) or in the metric's name."""


def number(value: float, unit: str) -> str:
    """A value without its unit's word: ``97.6 %``, ``0.0643``, ``54x``, ``1,234``."""
    match unit:
        case "share":
            percent = 100 * value
            return f"{percent:.0f}{NBSP}%" if percent in (0, 100) else f"{percent:.1f}{NBSP}%"
        case "points":
            return f"{100 * value:+.1f}".replace("-", MINUS)
        case "%":
            return f"{value:.3g}{NBSP}%"
        case "ratio":
            if abs(value) < 2:  # near 1 the decimals are what matters
                return f"{value:.3f}×"
            return f"{value:#.3g}×" if abs(value) < 99.95 else f"{value:,.0f}×"
        case "tokens" | "parts" | "prompts" | "samples":
            return count(round(value))
        case _:
            if value == 0 or (unit.startswith("score") and abs(value) < 1e-4):  # COCO's BLEU is never exactly 0
                return "0"
            digits = 2 - math.floor(math.log10(abs(value)))
            return f"{value:,.{min(max(digits, 0), 6)}f}" if 1e-4 <= abs(value) < 1e7 else f"{value:.3g}"


def bound(text: str, unit: str) -> str:
    """A gate's bound in the unit of its measurement: ``<= 0.5`` of a share reads ``<= 50 %``."""

    times = 100 if unit in ("share", "points") else None
    after = {"share": f"{NBSP}%", "points": " points", "%": f"{NBSP}%", "ratio": "×"}.get(unit, "")

    def written(m: re.Match[str]) -> str:
        return (m[0] if times is None else f"{times * float(m[0]):g}") + after

    return re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", written, text)


def signed(value: float) -> str:
    """``+1.81`` or, with a real minus, ``-0.12``: for differences."""
    text = f"{value:+.2f}" if value == 0 or abs(value) >= 0.1 else f"{value:+.2g}"
    return text.replace("-", MINUS)


def listed(names: Sequence[str], limit: int = 4) -> str:
    """``a, b, c and 3 more``."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def plural(n: int, one: str, many: str | None = None) -> str:
    """``1 finding``, ``3 findings``."""
    return f"{count(n)} {one if n == 1 else many or one + 's'}"


def count(n: int) -> str:
    """``558,000``."""
    return f"{n:,}"


def duration(seconds: float) -> str:
    """``42 s``, ``6 min 12 s``, ``3 h 05 min``."""
    s = round(seconds)
    if s < 60:
        return f"{seconds:.3g} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested provenance as (dotted key, text) rows."""
    if isinstance(value, dict):
        return [row for key, item in value.items() for row in flatten(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list):
        return [(prefix, " ".join(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in value))]
    return [(prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]
