"""The points of a footprint study, from its settings alone: which there are, in which order, what each sets.

Nothing is read, counted or run here. What a control needs to be made equal (a rank, layers chosen by similarity) is
said on its `Planned` and found out by whoever can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from beholder.config import FootprintConfig, PointSetting

Kind = Literal["matrix", "restart", "control", "own"]

LLM, VISION = "model.lora.llm_layers", "model.lora.vit_layers"
TARGETS, RANK, ALPHA = "model.lora.target_modules", "model.lora.r", "model.lora.alpha"
START = "model.connector.load_checkpoint"
BASELINE = "A0"
"""The point at which nothing learns: what the others are measured against, so it comes along with any of them."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A point before anything of it is known but what it sets."""

    name: str
    kind: Kind
    settings: Mapping[str, PointSetting] = field(default_factory=dict)
    llm: int | None = None
    vision: int | None = None
    """matrix: how many last layers of each tower get adapters."""
    after: str | None = None
    """It starts from this point's run."""
    equal_to: str | None = None
    """Its rank is chosen so that its adapters have as many parameters as this point's."""
    similar: int = 0
    """So many layers of the language model are to be chosen by similarity."""


def plan(study: FootprintConfig, *, connector_learns: bool) -> list[Planned]:
    """The selected points, in the order in which they are run: the baseline, the plan's priorities, the restart, the
    controls, what is left of the matrix (the smaller numbers of layers first), then the user's own.

    ``connector_learns``: by the base config; where it does not, nothing at all learns at the baseline.
    """
    points = every_point(study, connector_learns=connector_learns)
    members = groups(study)
    usual = ("priority", *(["restart"] if study.restart else []), "controls")

    def names(words: tuple[str, ...]) -> set[str]:
        return {name for word in words for name in members.get(word, (word,))}

    wanted = {BASELINE, *names(usual if study.select is None else study.select)} - names(study.leave_out)
    for name in list(wanted):  # a run that another one starts from
        while (name := points[name].after or "") and name not in wanted:
            wanted.add(name)
    first = [BASELINE, *members["priority"], "restart", *members["controls"], *members["matrix"], *study.points]
    return [points[name] for name in dict.fromkeys(first) if name in wanted]


def groups(study: FootprintConfig) -> dict[str, tuple[str, ...]]:
    """The groups of points: the study's own and those that every study has."""
    # The least tower and the most language model are left for later: stage 3 had drifted by the latter already.
    smallest = study.vision_blocks[1:2] if len(study.vision_blocks) > 2 else ()
    priority = tuple(
        name
        for name, (llm, vision) in study.matrix().items()
        if vision not in smallest and not (vision and llm in study.llm_layers[2:])
    )
    return {"matrix": tuple(study.matrix()), "priority": priority, "controls": study.controls(), **study.groups}


def every_point(study: FootprintConfig, *, connector_learns: bool) -> dict[str, Planned]:
    """All points by name, selected or not, with the settings of those that they are ``like``."""
    found = {p.name: p for p in _matrix(study, connector_learns)}
    if study.restart:
        like = found[study.like or next((n for n in ("C2", "C1") if n in found), list(found)[-1])]
        settings = {**like.settings, START: study.restart}
        found["restart"] = replace(like, name="restart", kind="restart", settings=settings)
    found |= {p.name: p for p in _controls(study)}
    while left := [name for name in study.points if name not in found]:
        for name in left:
            own = study.points[name]
            if own.like is None or own.like in found:
                base = Planned("", "own") if own.like is None else found[own.like]
                found[name] = replace(
                    base, name=name, kind="own", settings={**base.settings, **own.set},
                    # what it sets itself is not found out for it
                    after=own.after or (None if START in own.set else base.after),
                    equal_to=None if RANK in own.set else base.equal_to,
                    similar=0 if LLM in own.set else base.similar,
                )  # fmt: skip
    return found


def _matrix(study: FootprintConfig, connector_learns: bool) -> Iterator[Planned]:
    for name, (llm, vision) in study.matrix().items():
        settings: dict[str, PointSetting] = {LLM: _end("last", llm), VISION: _end("last", vision)}
        if not llm and not vision:
            # The start as it is, measured by the same code: adapters that cannot learn change nothing.
            settings |= {LLM: "last-1", "train.lr.lora": 0.0}
            settings |= {} if connector_learns else {"train.train_steps": 1}
            settings |= {"gates.learned.enable": False, "gates.settled.enable": False}
        yield Planned(name, "matrix", settings, llm, vision)


def _end(which: Literal["first", "last"], number: int) -> str:
    return f"{which}-{number}" if number else "none"


def _controls(study: FootprintConfig) -> Iterator[Planned]:
    """Other layers, then other modules of the same layers; those of the language model only where it learns."""
    if (name := study.reference()) is None:
        return
    llm, vision = study.matrix()[name]
    first: dict[str, PointSetting] = {LLM: _end("first", llm), VISION: _end("first", vision)}
    same: dict[str, PointSetting] = {LLM: _end("last", llm), VISION: _end("last", vision)}
    made = {
        "first": Planned("first", "control", first, equal_to=name),
        "similar": Planned("similar", "control", {VISION: same[VISION]}, equal_to=name, similar=llm),
        "attention": Planned("attention", "control", {**same, TARGETS: study.attention}, equal_to=name),
        "gate_up": Planned("gate_up", "control", {**same, TARGETS: study.gate_up}, equal_to=name),
    }
    yield from (made[control] for control in study.controls())
