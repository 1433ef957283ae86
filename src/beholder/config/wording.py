"""The schema read back in words: what a setting takes, and which name was probably meant."""

from __future__ import annotations

import difflib
import types as pytypes
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from beholder.config.run import RunConfig
from beholder.config.section import Written, items_of, section_of, settings, values_of
from beholder.config.tree import SettingPath


def annotation_at(path: SettingPath) -> Any | None:
    """The annotation of the setting at ``path``, None when the schema has no such setting."""
    annotation: Any = RunConfig
    for step in path:
        section = section_of(annotation)
        if isinstance(step, int):
            annotation = items_of(annotation)
        elif section is not None and step in section.model_fields:
            info = section.model_fields[step]
            annotation = typing.Annotated[info.annotation, info] if info.metadata else info.annotation
        elif (values := values_of(annotation)) is not None:
            annotation = values
        else:
            return None
        if annotation is None:
            return None
    return annotation


def expected(annotation: Any) -> str:
    """The values an annotation takes, in words."""
    return " or ".join(dict.fromkeys(_described(annotation)))


def _described(annotation: Any, bounds: Mapping[str, str] | None = None) -> Iterator[str]:
    if get_origin(annotation) is typing.Annotated:
        inner, *extras = get_args(annotation)
        if said := [m.words for e in extras for m in (e, *getattr(e, "metadata", ())) if isinstance(m, Written)]:
            yield from said
            return
        found = {name: words for extra in extras for name, words in _bounds(extra)}
        yield from _described(inner, {**found, **(bounds or {})})  # what is said further out is the closer bound
        return
    if get_origin(annotation) in (typing.Union, pytypes.UnionType):
        for arg in get_args(annotation):
            yield from _described(arg, bounds)
        return
    told = [(bounds or {}).get(name) for name in ("ge" if "ge" in (bounds or {}) else "gt", "lt", "le")]
    told = [words for words in told if words]
    suffix = f" {' and '.join(told)}" if told else ""
    if get_origin(annotation) is Literal:
        yield from ("true" if v is True else "false" if v is False else str(v) for v in get_args(annotation))
    elif get_origin(annotation) in (tuple, list):
        args = get_args(annotation)
        each = " or ".join(_described(args[0]))
        yield f"a list of {len(args)} values, each {each}" if args[-1] is not ... else f"a list, each {each}"
    elif get_origin(annotation) is dict:
        yield "a section with names of your own, each " + " or ".join(_described(get_args(annotation)[1]))
    elif annotation is type(None):
        yield "null"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield f"a section with {', '.join(annotation.model_fields)}"
    else:
        yield {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[annotation] + suffix


def _bounds(extra: Any) -> Iterator[tuple[str, str]]:
    for item in (extra, *getattr(extra, "metadata", ())):
        for attribute, words in (("gt", "above"), ("ge", "of at least"), ("lt", "below"), ("le", "of at most")):
            if (limit := getattr(item, attribute, None)) is not None:
                number = str(limit) if isinstance(limit, int) else f"{limit:g}"
                yield attribute, f"{words} {number}"


_OTHERS = {
    "freeze_llm": "model.lora.llm_layers: none for true; all, last-K, … for false; of a student model.student.learns",
    "freeze_embeddings": "model.student.learns: layers for true, all for false",
    "freeze_vit": "model.lora.vit_layers (adapters) and model.vision.unfreeze (weights); none and [] for true",
    "freeze_aligner": "model.connector.trainable: false for true",
    "modules_to_save": "model.connector.trainable: true where the aligner is listed, else false",
    "target_regex": "model.lora.target_modules: a list that holds it",
    "lora_rank": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "learning_rate": "train.lr.lora",
    "vit_lr": "train.lr.vision",
    "aligner_lr": "train.lr.connector",
}
"""What ms-swift and PEFT call a setting, and what says it here."""


def nearest(path: SettingPath) -> str:
    """Advice for a key that does not exist: what says it here where others have it, the nearest name here, or the place
    where that name does exist."""
    section = section_of(annotation_at(path[:-1]))
    key = str(path[-1])
    if key in _OTHERS:
        return f"here it is {_OTHERS[key]}"
    names = list(section.model_fields) if section is not None else []
    elsewhere = [s.path for s in settings(RunConfig) if s.path.rsplit(".", 1)[-1] == key]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.75)
    # "batch_size" for "micro_batch_size", "lr_schedule" for "lr_scheduler".
    near = near or [n for n in names if len(key) >= 3 and (key in n or n in key)][:1]
    near = near or difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    advice = f"nearest: {near[0]}" if near else ""
    if elsewhere:
        advice += ("; or " if advice else "") + f"{key} exists as {', '.join(elsewhere[:3])}"
    return advice or f"valid here: {', '.join(names)}"
