"""What every group of settings has in common: strict, immutable, and able to say which combinations cannot be.

And what a single setting says of itself beside its type, default and docstring: what it decides, beside which others it
does nothing, what it becomes in a smoke run. Whoever asks such a question of all settings derives the answer from here
(`settings`, `decided_by`): what may change on resume, what `beholder evaluate` may override, what a sweep may vary,
what compare shows, what is inert, what smoke shrinks.
"""

from __future__ import annotations

import re
import types as pytypes
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

Cadence = Literal["epoch", "end", "never"]
Positive = Annotated[int, Field(gt=0, le=10**9)]
Natural = Annotated[int, Field(ge=0, le=10**9)]
"""Counts end at a billion: more is a slip of the finger, and beyond 63 bits it would crash. Where less is nonsense
already, the setting says ``Field(le=…)`` itself."""
Fraction = Annotated[float, Field(ge=0, le=1)]
Bound = Annotated[float, Field(ge=-(10**9), le=10**9)]
Rise = Annotated[float, Field(gt=0, le=10**9)]
"""Of a measurement, in its own unit."""

Decided = Literal["weights", "data", "held_out", "measuring", "watching", "speed", "place", "start", "run"]
"""What a setting decides.

weights: what is learned. data: what it is learned from. held_out: which samples are kept for measuring. measuring: what
a run is measured by. watching: what is measured, shown and saved while it trains. speed: how fast, not what. place:
where parts and data lie; whether they are the same there, fingerprints say. start: which run it begins from. run: its
own name and folder.
"""


# ---------------------------------------------------------------------------------------------------------------
# What a setting says of itself: in ``Annotated[type, …]``


@dataclass(frozen=True, slots=True)
class Decides:
    """What the setting decides, and every setting below it that does not say otherwise."""

    what: frozenset[Decided]


def decides(*what: Decided) -> Decides:
    return Decides(frozenset(what))


@dataclass(frozen=True, slots=True)
class Inert:
    """Beside which others the setting has no effect. Set to something other than its default, it is then an error, or
    a note where those others were written off (false, 0, never): `validate` tells."""

    applies: Callable[[Any, Any], bool]
    """(the whole config, the section the setting stands in) -> whether it does nothing."""
    why: str
    because: str
    """The settings that make it so, separated by spaces; those that begin with a dot stand in the same section."""


@dataclass(frozen=True, slots=True)
class Tiny:
    """What it is in a smoke run: at most ``at_most``, exactly ``value``, or what ``make`` makes of it."""

    at_most: int | None = None
    value: Any = None
    make: Callable[[Any], Any] | None = None

    def of(self, value: Any) -> Any:
        if self.make is not None:
            return self.make(value)
        if self.at_most is None:
            return self.value
        return None if value is None else min(value, self.at_most)


@dataclass(frozen=True, slots=True)
class Written:
    """What a text may be, in words, where a pattern decides."""

    words: str


Filled = Annotated[str, Field(pattern=r"\S"), Written("text that is not blank")]
"""What is searched for, or opened: a blank one would be found everywhere, or stand for the working directory."""


class Section(BaseModel):
    """A group of settings: unknown keys are errors, values are not coerced, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
    all_decide: ClassVar[Decides | None] = None
    """What its settings decide that do not say so themselves; None: what the section around it says."""

    def impossible(self) -> list[str]:
        """Combinations of this section's settings that cannot be, one message each, naming the settings."""
        return []

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if wrong := self.impossible():
            raise ValueError("\n".join(wrong))
        return self


def no_pattern(pattern: str) -> str | None:
    """Why a text is no regular expression; None where it is one."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        return "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
    return None


def given_twice(name: str, values: object) -> list[str]:
    """What is wrong with a list in which each may stand once; of a setting in words, nothing."""
    if not isinstance(values, tuple | list) or not (twice := [v for k, v in enumerate(values) if v in values[:k]]):
        return []
    return [f"{name} is {list(values)}, which has {twice[0]!r} twice; give each once"]


# ---------------------------------------------------------------------------------------------------------------
# The schema read back


def options_of(annotation: Any) -> tuple[Any, ...]:
    """What a setting may be, ``Annotated`` and unions taken apart."""
    while get_origin(annotation) is typing.Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (typing.Union, pytypes.UnionType):
        return tuple(o for arg in get_args(annotation) for o in options_of(arg))
    return (annotation,)


def section_of(annotation: Any) -> type[BaseModel] | None:
    return next((o for o in options_of(annotation) if isinstance(o, type) and issubclass(o, BaseModel)), None)


def items_of(annotation: Any) -> Any | None:
    """Annotation of the items of a list-like option."""
    for option in options_of(annotation):
        if get_origin(option) in (tuple, list):
            return get_args(option)[0]
    return None


def values_of(annotation: Any) -> Any | None:
    """Annotation of the values of an option that is a section with names of the user's own."""
    for option in options_of(annotation):
        if get_origin(option) is dict:
            return get_args(option)[1]
    return None


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of the schema."""

    path: str
    """Dotted."""
    info: FieldInfo
    decides: frozenset[Decided]

    @property
    def tiny(self) -> Tiny | None:
        return next((m for m in self.info.metadata if isinstance(m, Tiny)), None)


def settings(
    schema: type[BaseModel], prefix: str = "", around: frozenset[Decided] = frozenset(("weights",))
) -> Iterator[Setting]:
    """Every setting of a schema, sections and what is in them; lists and names of the user's own count whole."""
    for name, info in schema.model_fields.items():
        section = section_of(info.annotation)
        said = [*info.metadata, getattr(section, "all_decide", None)]
        here = next((m.what for m in said if isinstance(m, Decides)), around)
        yield Setting(prefix + name, info, here)
        if section is not None:
            yield from settings(section, f"{prefix}{name}.", here)


def decided_by(schema: type[BaseModel], path: str) -> frozenset[Decided]:
    """What the setting at a dotted path decides; one that the schema does not know decides the weights."""
    known = {s.path: s.decides for s in settings(schema)}
    while path and path not in known:
        path = path.rpartition(".")[0]  # an entry of a list, or a name of the user's own
    return known.get(path, frozenset(("weights",)))
