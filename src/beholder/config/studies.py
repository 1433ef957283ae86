"""Settings of several runs as one question, and the runbook's sizes of one run."""

from __future__ import annotations

import difflib
import itertools
import re
from typing import Annotated, ClassVar

from pydantic import Field

from beholder.config.section import Fraction, Natural, Positive, Section


class StudyConfig(Section):
    """What every study has: repeats, and how many runs at a time."""

    command: ClassVar[str]
    """What of beholder runs it."""

    seeds: tuple[Annotated[int, Field(ge=0, le=2**32 - 1)], ...] = ()
    """Repeat every point with these seeds, to tell a difference from chance; none: the config's seed alone."""
    parallel: Annotated[Positive | None, Field(le=1024)] = None
    """Runs at a time; default one for each GPU, one on a CPU."""

    def impossible(self) -> list[str]:
        return ["seeds has a number twice"] if len(set(self.seeds)) < len(self.seeds) else []


# ---------------------------------------------------------------------------------------------------------------
# sweep


class SweepConfig(StudyConfig):
    """Short runs over a grid of settings, on one split and one golden set (``beholder sweep``)."""

    command = "sweep"

    grid: dict[str, tuple[bool | int | float | str, ...]]
    """Dotted setting -> the values it takes; every combination is a run."""
    ablation_weight: Annotated[float, Field(ge=0, le=1_000_000)] = 0.1
    """Score = held-out loss - this x (shuffled minus correct loss + zero minus correct loss); lower is better."""
    collapsed_below: Fraction = 0.1
    """Runs whose shuffled minus correct loss is below this share of the grid's median are marked "do not use"."""

    def impossible(self) -> list[str]:
        wrong = super().impossible()
        wrong += [] if self.grid else ["grid is empty; give at least one setting with its values"]
        wrong += [f"grid {key} has no values" for key, values in self.grid.items() if not values]
        wrong += [f"grid {key} has a value twice" for key, v in self.grid.items() if len(set(map(repr, v))) < len(v)]
        return wrong


# ---------------------------------------------------------------------------------------------------------------
# footprint

PointSetting = bool | int | float | str | tuple[int | str, ...] | None
"""What a point may set: a value, or a list of names or numbers."""

GROUPS = ("matrix", "priority", "controls")
"""Groups of points that every footprint study has; ``groups:`` adds some."""


class PointConfig(Section):
    """A point of one's own: settings on top of the base config's."""

    like: str | None = None
    """A point whose settings come first, so that only what differs is said."""
    after: str | None = None
    """A point whose run of the same seed it starts from, in place of the study's start: its adapters are merged, and
    new ones begin (progressive unfreezing)."""
    set: dict[str, PointSetting] = Field(default_factory=dict)
    """Dotted setting -> value."""


class FootprintConfig(StudyConfig):
    """How many layers of each tower should learn? (``beholder footprint``, stage 4.) Every point is a run that goes on
    from ``model.connector.load_checkpoint``."""

    command = "footprint"

    llm_layers: tuple[Natural, ...] = (0, 2, 4)
    """Last layers of the language model that get adapters; 0 first, then rising. With ``vision_blocks`` they make the
    points: A0, A1, … are the language model alone, B1, … the tower alone, C1, … and D1, … the second and third count
    with the tower."""
    vision_blocks: tuple[Natural, ...] = (0, 2, 4, 6)
    """Last blocks of the vision tower that do; 0 first, then rising."""
    select: tuple[str, ...] | None = None
    """Points and groups of points that are run, in the study's own order. Default ``priority`` (A0, A1, A2, B2, B3, C2,
    C3), ``controls``, and ``restart`` where it is given; ``matrix``: all counts. A0 comes along, unless
    ``leave_out`` names it: what language and seeing have lost is told against it."""
    leave_out: tuple[str, ...] = ()
    """Points and groups that are not."""
    points: dict[str, PointConfig] = Field(default_factory=dict)
    """Points of one's own by name; run when ``select`` names them or their group."""
    groups: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Names for several points, for ``select`` and ``leave_out``."""
    restart: str | None = None
    """A stage-2 run: the point ``restart`` is ``like`` a point of the matrix, but starts from there."""
    like: str | None = None
    """The point of the matrix whose placement ``restart`` has; default C2."""
    controls_of: str | None = None
    """The point of the matrix that the controls are compared with: other layers, or other modules of the same layers,
    with as many adapter parameters. Default A1."""
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """``model.lora.target_modules`` of the control ``attention``."""
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    """``model.lora.target_modules`` of the control ``gate_up``."""
    similarity_samples: Annotated[Positive, Field(ge=4, le=4096)] = 64
    """Held-out samples on which the control ``similar`` chooses its layers."""
    max_text_ratio: Annotated[float, Field(gt=1, le=1_000_000)] = 1.05
    """A point whose loss on plain text is higher than so many times A0's has forgotten too much to win. A0 is the
    study's start, whatever a point's adapters were put on (a run's own guardrails compare with its own base)."""
    max_hallucination_rise: Annotated[float, Field(ge=0, le=1)] = 0.10
    """One that hallucinates more often than A0 by more than this has, too."""
    max_irrelevant_fall: Fraction = 0.10
    """And one that says of unrelated images that they are, less often than A0 by more than this share of it."""

    def impossible(self) -> list[str]:
        wrong = super().impossible()
        for name, counts in (("llm_layers", self.llm_layers), ("vision_blocks", self.vision_blocks)):
            if not counts or counts[0] != 0 or any(a >= b for a, b in itertools.pairwise(counts)):
                wrong.append(f"{name} is {list(counts)}; give 0 first, then rising numbers, such as [0, 2, 4]")
        for name, modules in (("attention", self.attention), ("gate_up", self.gate_up)):
            if not modules:
                wrong.append(f"{name} is empty; name its modules, or leave the control out (leave_out: [{name}])")
        own = {**dict.fromkeys(self.points, "points"), **dict.fromkeys(self.groups, "groups")}
        made = {*self.matrix(), *CONTROLS, *GROUPS, "restart"}
        for name, section in own.items():
            if name in made or (name in self.points and name in self.groups):
                wrong.append(f"{section} has {name!r}, which is a point or a group already; give it another name")
            wrong += _no_name(section, name)
        matrix = self.matrix()
        points = [*matrix, *self.controls(), *(["restart"] if self.restart else []), *self.points]
        named: list[tuple[str, tuple[str, ...], set[str]]] = [
            (setting, names or (), {*points, *GROUPS, *self.groups})
            for setting, names in (("select", self.select), ("leave_out", self.leave_out))
        ]
        named += [(f"groups {name}", members, set(points)) for name, members in self.groups.items()]
        for name, point in self.points.items():
            others = {"like": point.like, "after": point.after}
            named += [(f"points {name} {k}", (v,), set(points) - {name}) for k, v in others.items() if v is not None]
        for setting, name in (("like", self.like), ("controls_of", self.controls_of)):
            named += [(setting, (name,), set(matrix))] if name is not None else []
        for setting, names, known in named:
            for name in names:
                if name == "restart" and not self.restart:
                    wrong.append(f"{setting} names restart; say in restart which stage-2 run it starts from")
                elif name in CONTROLS and name not in known and setting not in ("like", "controls_of"):
                    wrong.append(f"{setting} names {name}, a control that this study has not: {self._uncontrolled()}")
                elif name not in known:
                    wrong.append(f"{setting} names {name!r}, which is no point here; {_near(name, known)}")
        if self.select is not None and len(set(self.select)) < len(self.select):
            wrong.append("select has a name twice")
        return wrong + ([] if wrong else self._circles())

    def matrix(self) -> dict[str, tuple[int, int]]:
        """A0, A1, …, B1, …, C1, …, in the plan's order, each with its last layers of the language model and of the
        tower. ``C2``: the second row of those with the tower, and the second number of its blocks."""
        alone = {f"A{k}": (llm, 0) for k, llm in enumerate(self.llm_layers)}
        return alone | {
            f"{chr(ord('B') + i)}{j}": (llm, blocks)
            for i, llm in enumerate(self.llm_layers)
            for j, blocks in enumerate(self.vision_blocks)
            if j
        }

    def reference(self) -> str | None:
        """The point that the controls are compared with; None where no layer learns there."""
        name = self.controls_of or "A1"
        return name if any(self.matrix().get(name, ())) else None

    def controls(self) -> tuple[str, ...]:
        """Those that there are: of the language model's layers only where they learn at the reference."""
        if (name := self.reference()) is None:
            return ()
        return CONTROLS if self.matrix()[name][0] else CONTROLS[:1]

    def _uncontrolled(self) -> str:
        name = self.controls_of or "A1"
        if self.reference() is None:
            return f"no layer learns at {name}, which controls are compared with (controls_of)"
        return f"{name}, which controls are compared with (controls_of), has no layer of the language model"

    def _circles(self) -> list[str]:
        for name in self.points:
            for step in ("like", "after"):
                seen, at = [name], getattr(self.points[name], step)
                while at in self.points and at not in seen:
                    seen, at = [*seen, at], getattr(self.points[at], step)
                if at == name:
                    return [f"points {' → '.join([*seen, name])} go round in a circle ({step})"]
        return []


def _no_name(section: str, name: str) -> list[str]:
    if name in ("caches", "configs", "logs"):
        return [f"{section} has {name!r}, which is a folder that every study has; give it another name"]
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}", name):
        return []
    return [f"{section} has {name!r}; a name is part of a path: letters, digits, and _ . + - after one"]


def _near(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"nearest: {', '.join(close)}" if close else f"there are {', '.join(sorted(known))}"


CONTROLS = ("first", "similar", "attention", "gate_up")
"""At equal numbers of adapter parameters (S4-6): the first layers in place of the last; the layers that change most
what passes through them; attention alone; gate and up alone."""


# ---------------------------------------------------------------------------------------------------------------
# distillation

ARMS = ("kd", "alone", "longer")
"""What every distillation study compares."""


class DistillationConfig(StudyConfig):
    """Does a teacher help? (``beholder distill``.) The student as the config says (``kd``); at the same steps without a
    teacher (``alone``); and without one for as long as the teacher costs (``longer``), each with every seed."""

    command = "distill"

    seeds: tuple[Annotated[int, Field(ge=0, le=2**32 - 1)], ...] = (0, 1, 2)
    """Repeat every arm with these seeds: intervals are over them."""
    longer: bool = True
    """Run the arm ``longer``: as ``alone``, for the time of the steps of ``kd`` and of what is kept of its teachers."""
    arms: dict[str, dict[str, PointSetting]] = Field(default_factory=dict)
    """Arms of one's own: name -> dotted setting -> value on top of the base config's, such as ``soft: {distill.preset:
    soft}``. A preset there counts more than what the base config says of alpha and temperature."""

    def impossible(self) -> list[str]:
        wrong = super().impossible()
        for name, given in self.arms.items():
            if name in ARMS:
                wrong.append(f"arms has {name!r}, which every study has; give it another name")
            else:
                wrong += _no_name("arms", name)
            if not given:
                wrong.append(f"arms {name} sets nothing, so it would be kd again; give its settings, or leave it out")
        return wrong


SCALES: dict[str, dict[str, bool | int | float | str | None]] = {
    "smoke": {"data.max_samples": 2000, "data.eval_size": 200, "train.train_steps": 200, "train.save_every": 200},
    "trial": {"data.max_samples": 20_000, "data.eval_size": 2000, "train.train_steps": None, "train.num_epochs": 1},
    "full": {},
}
"""The seed's runbook (S2-7): settings of ``beholder run CONFIG --scale NAME``; ``scales:`` in a config has its own."""
