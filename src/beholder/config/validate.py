"""Plain data against the schema: the config, or everything that is wrong with it, each at the place it was written."""

from __future__ import annotations

import difflib
import json
import re
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from beholder.config.inert import inert_settings
from beholder.config.others_names import translate
from beholder.config.parts import ModelConfig, with_native_parts
from beholder.config.run import EvalConfig, RunConfig
from beholder.config.section import Section, items_of, options_of, section_of, values_of
from beholder.config.stages import GateConfig, GuardrailConfig, complete_gates, complete_guardrails, stage_of
from beholder.config.tree import SettingPath, Tree, dotted, get_at, show
from beholder.config.wording import annotation_at, expected, nearest


def validate(tree: Tree) -> RunConfig | None:
    """The config, or None with everything wrong in ``tree.problems``.

    A wrong value hides what pydantic would have said about combinations with it, and about whole sections above it. So
    whatever is wrong is taken out (required settings get a stand-in), and the rest is validated again.
    """
    translate(tree)
    data = json.loads(json.dumps(tree.data))
    removed: set[str] = set()
    said: set[SettingPath] = set()
    for _ in range(40):  # each time something wrong is out; a few rounds do
        cfg, errors = _try(data)
        if cfg is not None:
            # Wrong values are out of `data`, so what is left and does nothing can be told, too.
            _complain_inert(tree, cfg)
            return None if tree.problems else cfg
        if all(e["type"] == "value_error" for e in errors):
            # pydantic asks no section that has a wrong one inside, so every section is asked here.
            made = _construct(RunConfig, data)
            _complain_combinations(tree, made, removed)
            if not tree.problems:
                _complain_combinations(tree, made, set())
            _complain_inert(tree, made)
            return None
        wrong = [error for error in errors if error["type"] != "value_error"]
        # All of them looked up before any is taken out: with a wrong item goes its whole list.
        for error, path in [(error, _written(error["loc"], data)) for error in wrong]:
            if path not in said:  # a union gives one error for each of its options
                said.add(path)
                _complain_value(tree, error, path)
            removed.update([str(p) for p in path if isinstance(p, str)][-1:])
            _repair(data, path)
    raise AssertionError("validation does not settle")


def _try(data: Any) -> tuple[RunConfig | None, list[Any]]:
    try:
        # Strict, and as JSON: "32" is no number and 1 no boolean, but a list may become a tuple.
        return RunConfig.model_validate_json(json.dumps(data), strict=True), []
    except ValidationError as e:
        errors = e.errors(include_url=False, include_context=False)
        return None, [error for error in errors if not _follows(error, errors)]


def _follows(error: Any, errors: list[Any]) -> bool:
    """Whether a list is too short only because what is in it is wrong."""
    where = error["loc"]
    inside = any(len(e["loc"]) > len(where) and e["loc"][: len(where)] == where for e in errors)
    return error["type"] == "too_short" and inside


def _written(loc: tuple[str | int, ...], data: Any) -> SettingPath:
    """The part of pydantic's location that names settings: a union adds the option it tried, which names none."""
    path: SettingPath = ()
    for step in loc:
        if annotation_at((*path, step)) is None and not (isinstance(data, dict) and step in data):
            break
        path = (*path, step)
        data = get_at(data, (step,))
    return path


def _complain_value(tree: Tree, error: Any, path: SettingPath) -> None:
    if error["type"] == "missing" and isinstance(path[-1], int):
        error, path = {**error, "type": "too_short"}, path[:-1]  # a list of fixed length
    annotation = annotation_at(path)
    if error["type"] == "extra_forbidden":
        section = section_of(annotation_at(path[:-1]))
        name = "the config" if len(path) == 1 else dotted(path[:-1])
        assert section is not None
        tree.complain(path, f"no such setting in {name}; {nearest(path)}")
    elif error["type"] == "missing":
        # Reported at the section that lacks it; one that is not there either is at the section around it.
        tree.complain(path, f"missing; expected {expected(annotation)}", at=path[:-1])
    else:
        got = get_at(tree.data, path)
        near = ""
        if isinstance(got, str):
            choices = [v for o in options_of(annotation) if get_origin(o) is Literal for v in get_args(o)]
            close = difflib.get_close_matches(got, [v for v in choices if isinstance(v, str)], n=1, cutoff=0.5)
            near = f"; nearest: {close[0]}" if close else ""
            if not close and re.fullmatch(r"[-+]?[0-9][0-9_,]*(?:\.[0-9]*)?(?:e[-+]?[0-9]+)?", got.strip(), re.I):
                bare = got.strip().replace("_", "").replace(",", "")
                wants_number = any(o in (int, float) for o in options_of(annotation))
                near = f"; write {bare} without quotes or separators" if wants_number else ""
        elif isinstance(got, float) and got.is_integer() and int in options_of(annotation):
            near = f"; write {int(got)}"
        elif isinstance(got, int | float) and not isinstance(got, bool) and options_of(annotation) == (str,):
            near = f"; write '\"{tree.mark(path).text}\"' in quotes"
        tree.complain(path, f"got {show(got)}; expected {expected(annotation)}{near}", value=True)


def _complain_combinations(tree: Tree, section: Section, removed: set[str], path: SettingPath = ()) -> None:
    """What each section says cannot be, at the first setting it names that was written."""
    for line in section.impossible():
        named = re.findall(r"[a-z][a-z0-9_.]*[a-z0-9]", line)
        if any(n.rsplit(".", 1)[-1] in removed for n in named):
            continue  # a consequence of another mistake, not one more
        places = [place for n in named if (place := (*path, *n.split("."))) in tree.marks]
        tree.complain(path, line, at=places[0] if places else path)
    for name in type(section).model_fields:
        inner = getattr(section, name)
        entries = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, tuple) else ()
        entries = () if name in removed else entries  # stand-ins
        for below, each in (((), inner), *(((key,), each) for key, each in entries)):
            if isinstance(each, Section):
                _complain_combinations(tree, each, removed, (*path, name, *below))


_OFF = (False, 0, "never")


def _complain_inert(tree: Tree, cfg: RunConfig) -> None:
    """Settings that do nothing: silent at the default, as in a run's own resolved config; noted where what makes it so
    was written off; else an error, as somebody expects something of them."""
    for inert in inert_settings(cfg):
        mark = tree.marks.get(inert.path)
        if mark is None or inert.at_default:
            continue
        switches = {p: m for p, m in tree.marks.items() if dotted(p) in inert.because}
        if not mark.overridden and any(m.overridden for m in switches.values()):
            continue  # switched off from the command line; the file need not be edited for that
        already = (*tree.problems, *tree.notes)
        if any((p.name, p.line, p.column) == (mark.name, mark.line, mark.column) for p in already):
            continue  # one complaint a setting
        # Somebody who switches something off leaves what is beneath it in the file, but types none of it anew.
        meant = not mark.overridden and any(get_at(tree.data, p) in _OFF for p in switches)
        told = f"has no effect here: {inert.why}"
        tree.complain(inert.path, told if meant else f"{told}. Remove it", to=tree.notes if meant else None)


def _repair(data: Any, path: SettingPath) -> None:
    """Take the wrong value out; put a stand-in where a required one is missing."""
    parent = get_at(data, path[:-1])
    annotation = annotation_at(path)
    required = False
    owner = section_of(annotation_at(path[:-1]))
    if owner is not None and isinstance(path[-1], str) and path[-1] in owner.model_fields:
        required = owner.model_fields[path[-1]].is_required()
    if isinstance(parent, list) and isinstance(path[-1], int):
        _repair(data, path[:-1])
    elif isinstance(parent, dict):
        parent.pop(path[-1], None)
        if required:
            items = items_of(annotation)
            parent[path[-1]] = _stand_in(annotation) if items is None else [_stand_in(items)]


def _stand_in(annotation: Any) -> Any:
    named = section_of(annotation) is not None or values_of(annotation) is not None
    return {} if named else "x" if str in options_of(annotation) else 1


def _construct(model: type[BaseModel], data: Any) -> Any:
    """An instance with defaults filled in and nothing checked, to ask `section.Inert` about a config in error."""
    values: dict[str, Any] = {}
    data = with_native_parts(data) if model is ModelConfig else data
    for name, info in model.model_fields.items():
        if not isinstance(data, dict) or name not in data:
            values[name] = info.get_default(call_default_factory=True)
            continue
        section, items = section_of(info.annotation), items_of(info.annotation)
        inner = section_of(items) if items is not None else None
        if inner is not None and isinstance(data[name], list):
            values[name] = tuple(_construct(inner, item) for item in data[name])
        elif section is not None and items is None and data[name] is not None:
            values[name] = _construct(section, data[name])
        elif (named := section_of(values_of(info.annotation))) is not None and isinstance(data[name], dict):
            values[name] = {key: _construct(named, item) for key, item in data[name].items()}
        else:
            values[name] = data[name]
    if model is RunConfig and isinstance(values["gates"], dict):
        given = {k: g for k, g in values["gates"].items() if isinstance(g, GateConfig)}
        values["gates"] = complete_gates(given, stage_of(values["stage"], values["model"]))
    if model is RunConfig and isinstance(values["guardrails"], dict):
        rules = {k: g for k, g in values["guardrails"].items() if isinstance(g, GuardrailConfig)}
        watched = values["eval"].watched if isinstance(values["eval"], EvalConfig) else ()
        stage = stage_of(values["stage"], values["model"])
        values["guardrails"] = complete_guardrails(rules, stage, watched.__contains__)
    return model.model_construct(_fields_set=set(data) if isinstance(data, dict) else set(), **values)
