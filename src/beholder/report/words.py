"""How numbers, names and other people's text read in a report: rounding, units, labels, visible control characters.

Pure functions from values to text. What is shown where is decided in `report.content`.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from beholder.evidence import Measurement, WordStat

CONDITION_NAMES: dict[str, str] = {
    "correct": "its own image", "shuffled": "another image", "zero": "no image", "noise": "noise",
    "none": "no image at all",
}  # fmt: skip
_CHAT_CONDITION_NAMES: dict[str, str] = CONDITION_NAMES | {"zero": "an empty image", "none": "no image"}
"""A model that answers is also asked without any image, so an empty one is no longer "no image"."""

NBSP = "\u00a0"
MINUS = "\u2212"

METRIC_NAMES = {
    "eval.loss": "loss", "eval.perplexity": "perplexity", "eval.token_accuracy": "token accuracy",
    "eval.tokens": "supervised tokens", "eval.truncated_pct": "held-out targets cut to length",
    "learn.delta": "fall of the held-out loss", "learn.delta_text": "held-out loss below the model's without image",
    "curve.late_share": "share of the loss's fall in the last quarter", "band.untrained": "untrained connector",
    "band.text_only": "language model, no image", "band.uniform": "uniform guessing",
    "exact_match": "exact match", "bleu1": "BLEU-1", "bleu2": "BLEU-2", "bleu3": "BLEU-3", "bleu4": "BLEU-4",
    "rouge_l": "ROUGE-L", "cider_d": "CIDEr-D", "length": "length", "distinct": "different captions",
    "empty": "empty captions", "unfinished": "cut-off captions",
    "chair.s": "captions naming an absent object (CHAIR-s)", "chair.i": "named objects that are absent (CHAIR-i)",
    "clipscore.correct": "CLIPScore", "refclipscore.correct": "RefCLIPScore", "qa.accuracy": "answers right",
    "collapse.empty": "empty outputs", "collapse.loop": "looping outputs",
    "collapse.template": "outputs of one template", "collapse.image_independent": "same output for another image",
    "collapse.worst": "worst collapse symptom", "audit.answerable.alone": "turns answerable without image",
    "audit.answerable.context": "turns answerable from earlier turns", "audit.leak": "leak from earlier turns",
    "audit.trained.answerable.alone": "turns the trained model answers from an empty image",
    "audit.trained.answerable.context": "turns it answers from an empty image and earlier turns",
    "audit.trained.leak": "leak from earlier turns, trained model",
    "data.truncated_pct": "targets cut to length", "data.label_zero_pct": "samples with nothing supervised",
    "frozen.changed": "frozen parts that changed", "text.changed": "text prompts answered differently",
    "retention.loss_base": "loss on plain text, adapters off", "retention.loss": "loss on plain text, adapters on",
    "retention.loss_ratio": "loss on plain text, on over off", "retention.kl": "divergence from the base (KL)",
    "merge.max_logit_diff": "largest change of a logit by merging",
    "merge.changed_pct": "next tokens of plain text changed by merging",
    "merge.tokens_changed_pct": "tokens of answers changed by merging",
}  # fmt: skip

_CHAT_METRIC_NAMES = {
    "band.untrained": "before this training", "distinct": "different answers", "empty": "empty answers",
    "unfinished": "cut-off answers", "chair.s": "answers naming an absent object (CHAIR-s)",
    "learn.delta_text": "held-out loss below the base model's without image",
    "text.changed": "text prompts answered differently, adapters off",
}  # fmt: skip
"""What reads differently when the model was taught to chat."""

_ANSWER_NAMES = {"accuracy": "answers right", "exact": "answers exactly right", "gain": "answers right, gain"}

POPE_NAMES = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1", "yes_rate": "says yes"}

GROUPING_NAMES = {"length": "target length", "turn": "turn", "question": "question", "answer": "kind of answer",
                  "kind": "kind of made-up question"}  # fmt: skip

RELIANCE_LEVELS = (
    (-1, f"below {MINUS}0.1: the image misleads"), (0, f"{MINUS}0.1 to 0.1: language alone"), (1, "0.1 to 0.5"),
    (2, "0.5 to 1.5"), (3, "1.5 to 3"), (4, "3 and more: the image decides"),
)  # fmt: skip
"""Marks of a word by the nats it loses without the image, as `reliance_level` gives them."""


def reliance_level(delta: float) -> int:
    """Mark of a word whose loss without the image is ``delta`` nats above that with it: -1 (the image hurts) to 4."""
    return -1 if delta < -0.1 else sum(delta >= edge for edge in (0.1, 0.5, 1.5, 3.0))


def condition_names(stage: str) -> Mapping[str, str]:
    """What the conditions are called in a report of that stage."""
    return _CHAT_CONDITION_NAMES if stage == "instruct" else CONDITION_NAMES


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


def unit_of(name: str, unit: str) -> str:
    """The unit a measurement is read in: a difference of two shares is ``points``, never ``%``."""
    return "points" if name.startswith("answer.gain.") and unit == "share" else unit


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

    def written(m: re.Match[str]) -> str:
        match unit:
            case "share":
                return f"{100 * float(m[0]):g}{NBSP}%"
            case "points":
                return f"{100 * float(m[0]):g} points"
            case "%":
                return f"{m[0]}{NBSP}%"
            case "ratio":
                return f"{m[0]}×"
            case _:
                return m[0]

    return re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", written, text)


def signed(value: float) -> str:
    """``+1.81`` or, with a real minus, ``-0.12``: for differences."""
    text = f"{value:+.2f}" if value == 0 or abs(value) >= 0.1 else f"{value:+.2g}"
    return text.replace("-", MINUS)


def listed(names: Sequence[str], limit: int = 4) -> str:
    """``a, b, c and 3 more``."""
    shown = list(names[:limit])
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")


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


def metric_name(name: str, stage: str = "") -> str:
    """A measurement's name for people: ``caption.exact_match.correct`` → ``exact match``.

    Some read differently in a report of stage ``instruct``.
    """
    names = METRIC_NAMES | _CHAT_METRIC_NAMES if stage == "instruct" else METRIC_NAMES
    if name in names:
        return names[name]
    parts = name.split(".")
    if len(parts) != 3:
        return names.get(".".join(parts[:2]), name)
    probe, what, condition = parts
    # Answers are scored under "none" beside, or instead of, "zero": their names are those of stage instruct anywhere.
    shown = condition_names("instruct" if probe in ("answer", "pope") else stage)
    image = shown.get(condition, condition)
    match probe:
        case "caption":
            return names.get(what, what)
        case "ablation":
            said = {"loss": "loss", "delta": "loss difference", "ratio": "loss ratio"}.get(what, what)
            return f"{said}, {image}"
        case "answer":
            return f"{_ANSWER_NAMES.get(what, what)}{' over' if what == 'gain' else ','} {image}"
        case "pope":
            return f"yes/no questions: {POPE_NAMES.get(what, what)}, {image}"
        case _:
            return names.get(f"{probe}.{what}", name)


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
