"""YAML text to plain data that remembers where every setting was written, and overrides on top of it.

Nothing here knows the schema. Only the node graph of PyYAML is used: scalars are read by YAML 1.2's rules, and no tag
makes an object. The author is trusted: nothing bounds what a file of theirs may unfold to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import yaml

from beholder.types import UserError

SettingPath = tuple[str | int, ...]


class ConfigError(UserError):
    """Everything wrong with a config, one line each: ``file:line:col: path.to.key: what; nearest; what to do``."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(dict.fromkeys(problems), key=lambda p: (p.line == 0, p.line, p.column, p.path)))
        super().__init__("\n".join(str(p) for p in self.problems))


@dataclass(frozen=True)
class Problem:
    name: str
    """File, or ``--set a.b.c``."""
    line: int
    """1-based; 0 for an override."""
    column: int
    path: str
    """Dotted path of the setting, "" for the whole file."""
    text: str

    def __str__(self) -> str:
        where = f"{self.name}:{self.line}:{self.column}" if self.line else self.name
        # An override's name already is its path.
        shown = self.path if self.path and self.name != f"--set {self.path}" else ""
        return f"{where}: {shown}: {self.text}" if shown else f"{where}: {self.text}"


# ---------------------------------------------------------------------------------------------------------------
# YAML


class Loader(yaml.SafeLoader):
    """Composes nodes only; plain scalars are resolved by YAML 1.2's core schema.

    PyYAML follows YAML 1.1, where ``1e-4`` is text and ``off``, ``no`` and ``12:30`` are not.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's name)


def _resolve(tag: str, pattern: str, first: str) -> None:
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))


_resolve("null", "~|null|Null|NULL|", "~nN\0")
Loader.yaml_implicit_resolvers.setdefault("", []).append(("tag:yaml.org,2002:null", re.compile("^$")))
_resolve("bool", "true|True|TRUE|false|False|FALSE", "tTfF")
_resolve("int", "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789")
_resolve("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789")
_resolve("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.")


@dataclass(frozen=True)
class Mark:
    """Where a setting was written: its key and its value."""

    name: str
    line: int = 0
    column: int = 0
    value_line: int = 0
    value_column: int = 0
    text: str | None = None
    """A scalar as it was spelled."""

    @property
    def overridden(self) -> bool:
        return self.name.startswith("--set ")


@dataclass
class Tree:
    """Plain data of one config with the origin of every setting."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    marks: dict[SettingPath, Mark] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    """What is told and does not keep the config from loading."""

    def mark(self, path: SettingPath) -> Mark:
        """Of the setting, or of the nearest section around it that was written."""
        while path and path not in self.marks:
            path = path[:-1]
        return self.marks.get(path) or Mark(self.name, 1, 1, 1, 1)

    def complain(
        self, path: SettingPath, text: str, *, at: SettingPath | None = None, value: bool = False,
        to: list[Problem] | None = None,
    ) -> None:  # fmt: skip
        mark = self.mark(path if at is None else at)
        line, column = (mark.value_line, mark.value_column) if value else (mark.line, mark.column)
        (self.problems if to is None else to).append(Problem(mark.name, line, column, dotted(path), text))


def dotted(path: Iterable[str | int]) -> str:
    return ".".join(str(p) for p in path)


def compose(text: str, name: str) -> yaml.Node | None:
    """The node graph of one YAML document. Raises `ConfigError` for text that is not YAML."""

    def fail(line: int, column: int, what: str) -> ConfigError:
        return ConfigError([Problem(name, line, column, "", what)])

    try:
        return yaml.compose(text, Loader=Loader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        what = ", ".join(x for x in (e.context, e.problem) if x)
        raise fail(mark.line + 1 if mark else 1, mark.column + 1 if mark else 1, f"not valid YAML: {what}") from e
    except yaml.YAMLError as e:  # a character YAML does not allow
        position = getattr(e, "position", 0)
        before = text[:position]
        line, column = before.count("\n") + 1, position - before.rfind("\n")
        raise fail(line, column, f"not valid YAML: {getattr(e, 'reason', e)}") from e


def read_node(tree: Tree, node: yaml.Node, path: SettingPath, label: str | None) -> Any:
    """Plain data of a node; marks of everything below ``path`` and complaints go into the tree."""
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        out: list[Any] = []
        for i, item in enumerate(node.value):
            tree.marks[(*path, i)] = _mark(tree, item, item, label)
            out.append(read_node(tree, item, (*path, i), label))
        return out
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        found: dict[str, Any] = {}
        for key_node, item in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key_node.tag == "tag:yaml.org,2002:null":
                _complain(tree, key_node, path, "a key must be a name", label)
            elif key in found:
                first = tree.marks[(*path, key)].line
                _complain(tree, key_node, (*path, key), f"given twice; first in line {first}. Keep one", label)
            else:
                tree.marks[(*path, key)] = _mark(tree, key_node, item, label)
                found[key] = read_node(tree, item, (*path, key), label)
        return found
    if isinstance(node, yaml.ScalarNode):
        return _scalar(tree, node, path, label)
    return _complain(tree, node, path, f"the tag {node.tag!r} is not allowed in a config", label)


def _scalar(tree: Tree, node: yaml.ScalarNode, path: SettingPath, label: str | None) -> Any:
    text = node.value
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    match kind:
        case "str":
            return text
        case "null":
            return None
        case "bool":
            if text.lower() in ("true", "false"):
                return text.lower() == "true"
        case "int":
            digits = text.lstrip("+-").lower()
            base = 8 if digits.startswith("0o") else 16 if digits.startswith("0x") else 10
            with suppress(ValueError):
                return int(text, base)
        case "float":
            with suppress(ValueError):  # float does not know YAML's .inf and .nan
                if math.isfinite(value := float(text)):
                    return value
            return _complain(tree, node, path, f"{text} is not a finite number", label)
        case _:
            return _complain(tree, node, path, f"the tag {node.tag!r} is not allowed in a config", label)
    return _complain(tree, node, path, f"{text[:40]!r} cannot be read as !!{kind}", label)


def _mark(tree: Tree, key: yaml.Node, value: yaml.Node, label: str | None) -> Mark:
    text = value.value if isinstance(value, yaml.ScalarNode) else None
    if label is not None:
        return Mark(label, text=text)
    k, v = key.start_mark, value.start_mark
    return Mark(tree.name, k.line + 1, k.column + 1, v.line + 1, v.column + 1, text)


def _complain(tree: Tree, node: yaml.Node, path: SettingPath, text: str, label: str | None) -> None:
    mark = _mark(tree, node, node, label)
    tree.problems.append(Problem(mark.name, mark.line, mark.column, dotted(path), text))


def override(tree: Tree, assignment: str) -> None:
    """Write one ``a.b.c=value`` into the tree, the value read as YAML."""
    key, equals, text = assignment.partition("=")
    key = key.strip()
    label = f"--set {key}"

    def complain(what: str) -> None:
        tree.problems.append(Problem(label, 0, 0, key, what))

    if not equals or not key or not all(key.split(".")):
        complain(f"{assignment!r} is not KEY=VALUE; expected for example train.lr.connector=2e-4")
        return
    try:
        node = compose(text, label)
    except ConfigError as e:
        complain(f"{text!r}: " + "; ".join(p.text for p in e.problems))
        return
    path: SettingPath = ()
    here: Any = None
    below: Any = tree.data
    step: Any = ""
    names = key.split(".")
    for depth, name in enumerate(names, 1):
        here, step = below, name
        if isinstance(here, list):
            if not name.isdecimal() or int(name) >= len(here):
                complain(f"{dotted(path)} is a list of {len(here)}; {name!r} is not one of its items")
                return
            step = int(name)
        elif not isinstance(here, dict):
            complain(f"{dotted(path)} is not a section (it is {show(here)})")
            return
        path = (*path, step)
        if depth < len(names) and isinstance(here, dict) and here.get(step) is None:
            here[step] = {}
            tree.marks[path] = Mark(label)
        below = get_at(here, (step,))
    for old in [p for p in tree.marks if p[: len(path)] == path]:
        del tree.marks[old]
    tree.marks[path] = Mark(label, text=node.value if isinstance(node, yaml.ScalarNode) else None)
    here[step] = None if node is None else read_node(tree, node, path, label)


def show(value: Any) -> str:
    """A value with the kind YAML gave it."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case dict():
            return "a section"
        case list():
            return f"a list of {len(value)}"
        case str():
            return f"the text {value[:60]!r}"
        case float():
            return f"the number {value}"
    return str(value)[:60]


def get_at(data: Any, path: SettingPath) -> Any:
    for step in path:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            return None
    return data
