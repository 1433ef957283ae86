"""Contrast pairs, the four cells and the two kinds of blindness, as rows for the page and its Markdown twin.

Pure functions of the `Evidence`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from beholder.evidence import Condition, Evidence, Measurement
from beholder.evidence.catalogue import ALL_CONDITIONS
from beholder.report.answers import by_stratum
from beholder.report.words import fmt, with_ci


@dataclass(frozen=True, slots=True)
class PairRow:
    """Contrast pairs of one kind of question, or of all."""

    kind: str
    """Empty: all."""
    right: Mapping[Condition, Measurement]
    """Share with both answers right."""
    prior: Measurement | None

    @property
    def n(self) -> int:
        return next(iter(self.right.values())).n

    @property
    def told(self) -> str:
        """``98.3 % (96.6-99.5 %) of the contrast pairs both right, where guessing gives 9.6 %``."""
        guess = "" if self.prior is None else f", where guessing gives {fmt(self.prior)}"
        return f"{with_ci(self.right.get('correct'))} of the contrast pairs both right{guess}"


def pair_rows(e: Evidence) -> list[PairRow]:
    """All pairs, then kinds of question, those seldom right first; empty when none were measured."""
    names: dict[str, Condition] = {f"pairs.right.{c}": c for c in ALL_CONDITIONS}
    rows = [
        PairRow(stratum, {names[n]: m for n, m in found.items() if n in names}, found.get("pairs.prior"))
        for (_, stratum), found in by_stratum(e, {*names, "pairs.prior"}).items()
    ]
    rows = [r for r in rows if "correct" in r.right]
    return sorted(rows, key=lambda r: (r.kind != "", r.right["correct"].value))


@dataclass(frozen=True, slots=True)
class CellRow:
    """One question's two cells: loss and share of answers predicted, own image first."""

    question: str
    loss: tuple[Measurement | None, Measurement | None]
    accuracy: tuple[Measurement | None, Measurement | None]


def cell_rows(e: Evidence) -> list[CellRow]:
    """Own question, another's; empty when they were not measured."""
    rows: list[CellRow] = []
    for whose, name in (("own", "its own question"), ("other", "another’s question")):
        loss, accuracy = (
            (e.get(f"cells.{what}.{whose}.correct"), e.get(f"cells.{what}.{whose}.shuffled"))
            for what in ("loss", "accuracy")
        )
        if loss[0] is not None:
            rows.append(CellRow(name, loss, accuracy))
    return rows


def cells_told(e: Evidence) -> str:
    """What the two deltas mean, in a sentence."""
    question, image = e.get("cells.delta.question"), e.get("cells.delta.image")
    if question is None or image is None:
        return ""
    read = "The question is read" if question.ci95 and question.ci95[0] > 0 else "The question is not shown to be read"
    return (
        f"{read}: another’s question raises the loss of the own answer by {with_ci(question)}, another image by "
        f"{with_ci(image)}."
    )


def blind_lines(e: Evidence) -> list[str]:
    """Share, gain, leak and what words alone teach, a sentence each."""
    out: list[str] = []
    if (share := e.get("blind.share")) is not None:
        told, said = e.get("blind.share_told"), ""
        if told is not None:
            said = f"; {with_ci(told)} when the prompt says that it is missing and asks to guess"
        out.append(f"Blind share: without the image it is right {with_ci(share)} as often as with it{said}.")
    if (gain := e.get("blind.gain")) is not None:
        out.append(f"Gain: {with_ci(gain)} more right with the image than without.")
    if (leak := e.get("blind.leak")) is not None:
        base = e.get("blind.base")
        alone = "" if base is None else f", which gives {fmt(base)}"
        out.append(f"Leak: {with_ci(leak)} more right without the image than the base model alone{alone}.")
    if (learned := e.get("learner.accuracy")) is not None:
        usual = e.get("learner.majority")
        level = "" if usual is None else f"; the usual answer to each question gives {fmt(usual)}"
        out.append(
            f"Learnable blind: trained on the questions' words alone, a learner is right {with_ci(learned)}{level}. "
            "beholder audit RUN says which words tell."
        )
    return out
