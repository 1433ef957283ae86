"""The points of a footprint study, from its settings alone: which there are, in which order, what each sets.

Nothing is read, counted or run here. What a control needs to be made equal (a rank, layers chosen by similarity) is
said on its `Planned` and found out by whoever can.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from beholder.config import FootprintConfig, PointSetting

Kind = Literal["matrix", "restart", "control", "own"]

LLM, VISION = "model.lora.llm_layers", "model.lora.vit_layers"
TARGETS, RANK, ALPHA = "model.lora.target_modules", "model.lora.r", "model.lora.alpha"
START = "model.connector.load_checkpoint"
BASELINE = "A0"
"""The point at which nothing learns: what the others are measured against."""


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

    wanted = names(usual if study.select is None else study.select) - names(study.leave_out)
    for name in list(wanted):  # a run that another one starts from
        while (name := points[name].after or "") and name not in wanted:
            wanted.add(name)
    first = [BASELINE, *members["priority"], "restart", *members["controls"], *members["matrix"], *study.points]
    return [points[name] for name in dict.fromkeys(first) if name in wanted]


def groups(study: FootprintConfig) -> dict[str, tuple[str, ...]]:
    """The groups of points: the study's own and those that every study has."""
    deferred = {row_name(i, j) for i, j in itertools.product(range(2, len(study.llm_layers)), range(99)) if j}
    smallest = {row_name(i, 1) for i in range(len(study.llm_layers)) if len(study.vision_blocks) > 2}
    matrix = study.matrix_names()
    # The least tower and the most language model are left for later: stage 3 had drifted by the latter already.
    priority = tuple(name for name in matrix if name not in deferred | smallest)
    control = reference(study)
    controls = tuple(c.name for c in _controls(study)) if control is not None else ()
    return {"matrix": tuple(matrix), "priority": priority, "controls": controls, **study.groups}


def row_name(i: int, j: int) -> str:
    """``C2``: the i-th number of layers of the language model with the j-th of the tower's blocks."""
    return f"A{i}" if j == 0 else f"{chr(ord('B') + i)}{j}"


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
                    base, name=name, kind="own", settings={**base.settings, **own.set}, after=own.after or base.after
                )
    return found


def _matrix(study: FootprintConfig, connector_learns: bool) -> Iterator[Planned]:
    for (i, llm), (j, vision) in itertools.product(enumerate(study.llm_layers), enumerate(study.vision_blocks)):
        settings: dict[str, PointSetting] = {LLM: _last(llm), VISION: _last(vision)}
        if not llm and not vision:
            # The start as it is, measured by the same code: adapters that cannot learn change nothing.
            settings |= {LLM: "last-1", "train.lr.lora": 0.0}
            settings |= {} if connector_learns else {"train.train_steps": 1}
            settings |= {"gates.learned.enable": False, "gates.settled.enable": False}
        yield Planned(row_name(i, j), "matrix", settings, llm, vision)


def _last(number: int) -> str:
    return f"last-{number}" if number else "none"


def reference(study: FootprintConfig) -> tuple[str, int, int] | None:
    """(name, layers, blocks) of the point that the controls are compared with; None where no layer learns anywhere."""
    named = {
        row_name(i, j): (llm, vision)
        for (i, llm), (j, vision) in itertools.product(enumerate(study.llm_layers), enumerate(study.vision_blocks))
    }
    name = study.controls_of or "A1"
    return (name, *named[name]) if name in named and named[name] != (0, 0) else None


def _controls(study: FootprintConfig) -> Iterator[Planned]:
    """Other layers, then other modules of the same layers; those of the language model only where it learns."""
    if (known := reference(study)) is None:
        return
    name, llm, vision = known
    first: dict[str, PointSetting] = {
        LLM: f"first-{llm}" if llm else "none", VISION: f"first-{vision}" if vision else "none",
    }  # fmt: skip
    yield Planned("first", "control", first, equal_to=name)
    if not llm:
        return
    same: dict[str, PointSetting] = {LLM: _last(llm), VISION: _last(vision)}
    yield Planned("similar", "control", {VISION: _last(vision)}, equal_to=name, similar=llm)
    yield Planned("attention", "control", {**same, TARGETS: study.attention}, equal_to=name)
    yield Planned("gate_up", "control", {**same, TARGETS: study.gate_up}, equal_to=name)
