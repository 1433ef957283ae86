"""The places of several images as a picture: a row for each number of images, a column for each place.

Pure functions of the `Evidence`; how the picture looks is the business of `template.html` and `report.markdown`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from beholder.config import usual_gate
from beholder.evidence import Evidence, GateResult, Measurement
from beholder.evidence.gates import bounds
from beholder.report.words import fmt, interval

JUDGED_FROM = usual_gate("every_slot_counts").min_n
MOST_SPREAD = usual_gate("slot_spread").at_most or 0.0
"""A place is weak whose accuracy is so much below that of the best place of as many images; the run's own bound, where
it has one."""

Standing = Literal["blind", "weak", "few", "looks"]

_SLOT = re.compile(r"image (\d+) of (\d+)")


@dataclass(frozen=True, slots=True)
class Slot:
    """One place among so many images."""

    place: int
    of: int
    cost: Measurement | None
    """Nats per token that another sample's image costs there."""
    right: Measurement | None
    """Share of right answers when the image that decides stands there."""
    shade: float
    """The cost as a share of the largest of the table, 0 to 1."""
    standing: Standing
    """``blind``: a wrong image there costs nothing that was shown; ``weak``: less often right than the best place;
    ``few``: too few samples to say."""

    @property
    def name(self) -> str:
        return f"image {self.place} of {self.of}"

    @property
    def told(self) -> str:
        """Why it is marked."""
        if self.standing == "blind" and self.cost is not None:
            return f"{self.name}: another sample’s image there costs {fmt(self.cost)}{interval(self.cost)}"
        if self.standing == "weak" and self.right is not None:
            return f"{self.name}: right {fmt(self.right)}{interval(self.right)} when what decides stands there"
        return f"{self.name}: too few samples to judge"


def grid(measurements: Sequence[Measurement], gates: Sequence[GateResult] = ()) -> list[list[Slot]]:
    """Rows by number of images, places in order; empty where places were not measured."""
    found: dict[tuple[int, int], dict[str, Measurement]] = {}
    for m in measurements:
        if m.name in ("slots.delta.shuffled", "slots.accuracy") and (at := _SLOT.fullmatch(m.stratum or "")):
            found.setdefault((int(at[2]), int(at[1])), {})[m.name] = m
    top = max((own["slots.delta.shuffled"].value for own in found.values() if "slots.delta.shuffled" in own), default=0)
    declared = [edge for g in gates if g.name == "slot_spread" for sign, edge in bounds(g.bound) if sign == "≤"]
    most = min(declared, default=MOST_SPREAD)
    rows: dict[int, list[Slot]] = {}
    for (n, place), own in sorted(found.items()):
        cost, right = own.get("slots.delta.shuffled"), own.get("slots.accuracy")
        best = max(
            (x["slots.accuracy"].value for (m, _), x in found.items() if m == n and "slots.accuracy" in x), default=0.0
        )
        shade = 0.0 if cost is None or top <= 0 else max(0.0, cost.value) / top
        rows.setdefault(n, []).append(Slot(place, n, cost, right, shade, _standing(cost, right, best - most)))
    return list(rows.values())


def _standing(cost: Measurement | None, right: Measurement | None, least: float) -> Standing:
    if cost is not None and cost.n >= JUDGED_FROM and (cost.ci95 is None or cost.ci95[0] <= 0):
        return "blind"
    if right is not None and right.n >= JUDGED_FROM and right.value < least:
        return "weak"
    return "few" if min((m.n for m in (cost, right) if m is not None), default=0) < JUDGED_FROM else "looks"


def marked(measurements: Sequence[Measurement], gates: Sequence[GateResult] = ()) -> list[Slot]:
    """Places that are blind or weak."""
    return [s for row in grid(measurements, gates) for s in row if s.standing in ("blind", "weak")]


def summary(e: Evidence) -> list[Measurement]:
    """What is told of all places together and of swaps, in the order of the record: what no single image's replacement
    is about."""
    return [m for m in e.measurements if m.stratum is None and m.name.startswith("slots.") and m.name.count(".") == 1]


Replaced = tuple[Measurement | None, Measurement | None]
"""What a replacement costs, nats per token, and how many short answers are still exactly right with it."""


def replacements(e: Evidence) -> tuple[list[str], list[tuple[str, int, list[Replaced]]]]:
    """What each replacement does in each place: (their names, rows of (place, n, what it does))."""
    kinds = [m.name.rpartition(".")[2] for m in e.measurements if m.name.startswith("slots.delta.") and not m.stratum]
    rows = [
        (
            slot.name,
            0 if slot.cost is None else slot.cost.n,
            [(e.get(f"slots.delta.{c}", slot.name), e.get(f"slots.right.{c}", slot.name)) for c in kinds],
        )
        for row in grid(e.measurements, e.gates)
        for slot in row
    ]
    return kinds, rows
