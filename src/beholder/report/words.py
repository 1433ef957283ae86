"""How numbers, names and other people's text read in a report: rounding, units, labels, visible control characters.

Pure functions from values to text. What is shown where is decided in `report.render`.
"""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Any

from beholder.evidence import Measurement

CONDITION_NAMES = {"correct": "its own image", "shuffled": "another image", "zero": "no image"}

NBSP = "\u00a0"

METRIC_NAMES = {
    "eval.loss": "loss", "eval.perplexity": "perplexity", "eval.token_accuracy": "token accuracy",
    "eval.tokens": "supervised tokens", "exact_match": "exact match", "bleu1": "BLEU-1", "bleu2": "BLEU-2",
    "bleu3": "BLEU-3", "bleu4": "BLEU-4", "rouge_l": "ROUGE-L", "cider_d": "CIDEr-D", "length": "length",
    "distinct": "different captions", "empty": "empty captions", "unfinished": "cut-off captions",
}  # fmt: skip


def fmt(m: Measurement, unit: bool = True) -> str:
    """A measurement's value as a person writes it: ``97.6 %``, ``0.0643 nats/token``, ``54x``."""
    return _value(m.value, m.unit) + (f" {m.unit}" if unit and m.unit == "nats/token" else "")


def fmt_ci(m: Measurement) -> str:
    """Such as ``96.1 to 98.5 %`` with a dash; empty when there is no interval."""
    if m.ci95 is None:
        return ""
    low, high = (_value(v, m.unit) for v in m.ci95)
    low = low.removesuffix(f"{NBSP}%").removesuffix("×")
    return f"{low} … {high}" if low.startswith("-") or high.startswith("-") else f"{low}–{high}"


def _value(value: float, unit: str) -> str:
    match unit:
        case "share":
            percent = 100 * value
            return f"{percent:.0f}{NBSP}%" if percent in (0, 100) else f"{percent:.1f}{NBSP}%"
        case "ratio":
            if abs(value) < 2:  # near 1 the decimals are what matters
                return f"{value:.3f}×"
            return f"{value:.3g}×" if abs(value) < 100 else f"{value:,.0f}×"
        case "tokens":
            return count(round(value))
        case _:
            if value == 0:
                return "0"
            digits = 2 - math.floor(math.log10(abs(value)))
            return f"{value:,.{min(max(digits, 0), 6)}f}" if 1e-4 <= abs(value) < 1e7 else f"{value:.3g}"


def count(n: int) -> str:
    """``558,000``."""
    return f"{n:,}"


def duration(seconds: float) -> str:
    """``42 s``, ``6 min 12 s``, ``3 h 05 min``."""
    s = round(seconds)
    if s < 60:
        return f"{seconds:.3g} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"


def metric_name(name: str) -> str:
    """A measurement's name for people: ``caption.exact_match.correct`` → ``exact match``."""
    parts = name.split(".")
    if parts[0] == "caption" and len(parts) == 3:
        return METRIC_NAMES.get(parts[1], parts[1])
    if parts[0] == "ablation" and len(parts) == 3:
        what = {"loss": "loss", "delta": "loss difference", "ratio": "loss ratio"}.get(parts[1], parts[1])
        return f"{what}, {CONDITION_NAMES.get(parts[2], parts[2])}"
    return METRIC_NAMES.get(name, name)


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested provenance as (dotted key, text) rows."""
    if isinstance(value, dict):
        return [row for key, item in value.items() for row in flatten(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list):
        return [(prefix, " ".join(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in value))]
    return [(prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]


def visible(text: str) -> str:
    """The text with control and direction characters as visible symbols, so that none can act on the page.

    C0 controls become their pictures (U+2400 …), others and Unicode's direction marks become ``\\u202e``-like
    escapes; line breaks and tabs stay.
    """
    return "".join(c if c in "\n\t" else _shown(c) for c in text)


def _shown(c: str) -> str:
    if ord(c) < 32:
        return chr(0x2400 + ord(c))
    if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\u200d":  # the joiner holds emoji together
        return f"\\u{ord(c):04x}"
    return c
