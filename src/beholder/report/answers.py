"""The answers of a model that was taught to chat, by kind of question, beside those it gives without looking.

Pure functions of the `Evidence`, below `report.verdicts`, which judges by them, and `report.content`, which shows them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from beholder.config import usual_gate
from beholder.evidence import Condition, Evidence, Measurement
from beholder.evidence.catalogue import ALL_CONDITIONS, CATALOGUE, IMAGE_NAMES, Section, quantity
from beholder.report.words import count, fmt

JUDGED_FROM = usual_gate("answers_look").min_n
"""Kinds of question with fewer samples are shown but not judged."""
LIAR_FROM = 0.5
"""A kind that is mostly answered right is where a reader of the accuracy alone takes a guesser for one that sees."""

_OVER = {**IMAGE_NAMES["answer"], "shuffled": "another’s image"}


@dataclass(frozen=True, slots=True)
class AnswerKind:
    """One kind of question: how often its answers are right, with the image and without it."""

    by: str
    """The grouping it belongs to; empty for all samples."""
    stratum: str
    """Its name; empty for all samples."""
    right: Mapping[Condition, Measurement]
    """Share of right answers by what was shown."""
    gains: Mapping[Condition, Measurement]
    """What the own image adds over that, paired by sample."""

    @property
    def n(self) -> int:
        return next((m.n for m in (*self.right.values(), *self.gains.values())), 0)

    @property
    def name(self) -> str:
        return f"“{self.stratum}”" if self.stratum else "all questions"

    @property
    def least(self) -> Measurement | None:
        """The smallest gain: a model may fail without any image, which it never saw in training, and not look either.

        By the lower end where there is one, since that is what is judged.
        """
        return min(self.gains.values(), key=lambda m: m.value if m.ci95 is None else m.ci95[0], default=None)

    @property
    def standing(self) -> Literal["liar", "blind", "few", "looks", "unknown"]:
        """``blind``: no gain from the image was shown; ``liar``: and yet mostly right; ``few``: too few to say."""
        least = self.least
        if least is None:
            return "unknown"
        if self.n < JUDGED_FROM or any(m.ci95 is None for m in self.gains.values()):
            return "few"
        if any(m.ci95 is not None and m.ci95[0] <= 0 for m in self.gains.values()):
            own = self.right.get("correct")
            return "liar" if own is not None and own.value >= LIAR_FROM else "blind"
        return "looks"

    @property
    def worst_first(self) -> tuple[int, float]:
        """Sort key: those right without looking first, the most often right of them leading; then by what is gained."""
        own, least = self.right.get("correct"), self.least
        if own is not None and self.standing == "liar":
            return 0, -own.value
        if self.standing == "few" or least is None:
            return 2, -self.n
        return 1, least.value

    @property
    def told(self) -> str:
        """``“yes/no” (83.0 % right, +0.4 points over no image, n 389)``."""
        own, least = self.right.get("correct"), self.least
        parts = [] if own is None else [f"{fmt(own)} right"]
        parts += [] if least is None else [f"{fmt(least)} over {_OVER[quantity(least.name)[1]]}"]
        return f"{self.name} ({', '.join([*parts, f'n {count(self.n)}'])})"


def all_answers(e: Evidence) -> AnswerKind | None:
    """All samples together; None when no answer was scored."""
    return next((kind for kind in _kinds(e) if not kind.stratum), None)


def answer_kinds(e: Evidence) -> dict[str, list[AnswerKind]]:
    """Kinds of question by grouping, the worst first."""
    out: dict[str, list[AnswerKind]] = {}
    for kind in _kinds(e):
        if kind.stratum:
            out.setdefault(kind.by, []).append(kind)
    return {by: sorted(kinds, key=lambda k: k.worst_first) for by, kinds in out.items()}


def shown_without_looking(e: Evidence) -> list[AnswerKind]:
    """Kinds that are answered no better with the image than without, liars first; the same samples once."""
    found = [k for kinds in answer_kinds(e).values() for k in kinds if k.standing in ("liar", "blind")]
    same: dict[tuple[float, ...], AnswerKind] = {}
    for k in found:  # yes/no is a kind of question and a kind of answer: the very same samples are told once
        numbers = [m.value for m in (*k.right.values(), *k.gains.values())]
        same.setdefault((k.n, *numbers), k)
    return sorted(same.values(), key=lambda k: k.worst_first)


def _kinds(e: Evidence) -> list[AnswerKind]:
    names: dict[str, tuple[int, Condition]] = {
        f"answer.{what}.{c}": (k, c) for k, what in enumerate(("accuracy", "gain")) for c in ALL_CONDITIONS
    }
    kinds: list[AnswerKind] = []
    for (by, stratum), found in by_stratum(e, names).items():
        told: list[dict[Condition, Measurement]]
        told = [{names[n][1]: m for n, m in found.items() if names[n][0] == k} for k in (0, 1)]
        kinds.append(AnswerKind(by, stratum, *told))
    return kinds


def by_stratum(e: Evidence, names: Collection[str]) -> dict[tuple[str, str], dict[str, Measurement]]:
    """(grouping, stratum), both empty for all samples -> the measurements of these names, in the record's order."""
    found: dict[tuple[str, str], dict[str, Measurement]] = {}
    for m in e.measurements:
        if m.name in names:
            found.setdefault((m.by or "", m.stratum or ""), {})[m.name] = m
    return found


def conditions_of(e: Evidence) -> tuple[list[Condition], list[Condition]]:
    """Under which conditions answers were scored, and over which of them a gain was measured."""
    kinds = _kinds(e)
    return (
        [c for c in ALL_CONDITIONS if any(c in k.right for k in kinds)],
        # What it adds over no image is the question; over another's image is the check on it.
        sorted((c for c in ALL_CONDITIONS if any(c in k.gains for k in kinds)), key=lambda c: c != "none"),
    )


def by_condition(e: Evidence, section: Section) -> list[tuple[Condition, list[tuple[str, Measurement | None]]]]:
    """A section's scores by what was shown, all with the same names in the same order; empty if not measured."""
    rows = [row for row in CATALOGUE if row.section == section]
    found: dict[Condition, list[Measurement | None]] = {
        c: [e.get(f"{row.stem}.{c}") for row in rows] for c in ALL_CONDITIONS
    }
    kept = [k for k in range(len(rows)) if any(values[k] for values in found.values())]
    return [(c, [(rows[k].column, values[k]) for k in kept]) for c, values in found.items() if any(values)]
