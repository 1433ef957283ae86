"""Reference pages from the records they are about: settings, commands, stages, gates and guardrails."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from rich.text import Text

from beholder.cli import app
from beholder.config import GUARDRAILS, STAGES, GuardrailConfig, RunConfig, Stage
from beholder.config.section import items_of, section_of, values_of
from beholder.config.tree import SettingPath
from beholder.config.wording import annotation_at, expected
from beholder.evidence.catalogue import called


def cell(text: str) -> str:
    """Text in a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


# ---------------------------------------------------------------------------------------------------------------
# Settings


def section_names() -> list[str]:
    """The sections of a config, in its order; each has a page."""
    return [name for name, info in RunConfig.model_fields.items() if _inner((name,), info.annotation)]


def settings_page() -> str:
    """The settings that stand in no section, and where the others are."""
    rows = [
        "# Settings",
        "Every setting of a config file. `beholder schema` prints the same as a JSON schema for your editor, and "
        "`--set KEY=VALUE` gives any of them on the command line.",
        "\n".join(_table(RunConfig, ())),
        "## Sections",
        "\n".join(
            f"- [`{name}`]({name}.md)" + (f": {said}" if (said := _about((name,))) else "") for name in section_names()
        ),
    ]
    return "\n\n".join(rows) + "\n"


def settings_section(name: str) -> str:
    """The page of a section: its settings, and those of every section in it."""
    path = _inner((name,), RunConfig.model_fields[name].annotation)
    assert path is not None, name
    return "\n\n".join([f"# `{name}`", *_section(path)]) + "\n"


def _section(path: SettingPath) -> Iterator[str]:
    model = _model(path)
    if sum(isinstance(step, str) for step in path) > 1 and path[1:] != ("NAME",):
        yield f"## `{_dotted(path)}`"
    if said := _about(path):
        yield said[0].upper() + said[1:]
    yield "\n".join(_table(model, path))
    for name, info in model.model_fields.items():
        if (inner := _inner((*path, name), info.annotation)) is not None:
            yield from _section(inner)


def _inner(path: SettingPath, annotation: Any) -> SettingPath | None:
    """The path of the section that a setting is, or that the entries of its list or its own names are."""
    if section_of(annotation) is not None:
        return path
    if (item := items_of(annotation)) is not None and section_of(item) is not None:
        return (*path, 0)
    if (value := values_of(annotation)) is not None and section_of(value) is not None:
        return (*path, "NAME")
    return None


def _model(path: SettingPath) -> type[BaseModel]:
    annotation = annotation_at(path)
    for entry in (items_of, values_of):  # the page of a list is about its entries
        if section_of(annotation) is None and (inner := entry(annotation)) is not None:
            annotation = inner
    model = section_of(annotation)
    assert model is not None, path
    return model


def _about(path: SettingPath) -> str:
    """What its description says, else its class's docstring; nothing, where neither says anything."""
    *above, name = (step for step in path if step not in (0, "NAME"))
    info = (_model(tuple(above)) if above else RunConfig).model_fields[str(name)]
    return " ".join((info.description or inspect.cleandoc(_model(path).__doc__ or "")).split())


def _dotted(path: SettingPath) -> str:
    return (
        "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".").replace("[0]", "[]")
    )


def _table(model: type[BaseModel], path: SettingPath) -> Iterator[str]:
    yield "| setting | takes | default | |"
    yield "|---|---|---|---|"
    for name, info in model.model_fields.items():
        own = (*path, name)
        inner = _inner(own, info.annotation)
        if inner is not None and not path:
            continue  # it has a page
        takes = "a section, below" if inner == own else _ENDLESS.sub("", expected(annotation_at(own)))
        if inner is not None and inner != own:
            takes = (
                "a list of sections, below" if isinstance(inner[-1], int) else "sections with names of your own, below"
            )
        yield f"| `{name}` | {cell(takes)} | {_default(info, inner)} | {cell(info.description or '')} |"


_ENDLESS = re.compile(" (and )?of at (most|least -)1000000000")
"""Said of every count, so that one more digit than meant is noticed; here it would only be in the way."""


def _default(info: Any, inner: SettingPath | None) -> str:
    if info.is_required():
        return "**required**"
    value = info.get_default(call_default_factory=True)
    if value is PydanticUndefined or isinstance(value, BaseModel) or (inner is not None and not value):
        return ""
    if isinstance(value, tuple):
        value = list(value)
    told = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else str(value)
    return f"`{cell(str(told))}`" if told else "(empty)"


# ---------------------------------------------------------------------------------------------------------------
# Commands


def commands() -> dict[str, Any]:
    """Every command by its words after ``beholder``, in the order of ``--help``."""
    return dict(_commands(typer.main.get_command(app), ()))


def _commands(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "list_commands"):
        yield " ".join(words), command
        return
    context = _context(command, words)
    if command.invoke_without_command and words:
        yield " ".join(words), command
    for name in command.list_commands(context):
        yield from _commands(command.get_command(context, name), (*words, name))


def _context(command: Any, words: Sequence[str]) -> Any:
    return command.context_class(command, info_name=" ".join(("beholder", *words)))


def commands_page() -> str:
    """What ``--help`` says of every command."""
    parts = [
        "# Commands",
        "What `beholder COMMAND --help` says. Every command names the Python function behind it.",
        _plain(typer.main.get_command(app).epilog or ""),
    ]
    for words, command in commands().items():
        context = _context(command, words.split())
        usage = " ".join(command.get_usage(context).split()).removeprefix("Usage: ")
        usage = re.sub(r"\{(\w+)\}|\[(\[\w+\])\]", r"\1\2", usage)
        parts += [f"## `beholder {words}`", _text(command.help or ""), f"```text\n{usage}\n```"]
        rows = [r for p in command.get_params(context) if p.name != "help" and (r := p.get_help_record(context))]
        if rows:
            rows = [f"| `{cell(_plain(name))}` | {cell(_text(said))} |" for name, said in rows]
            parts.append("\n".join(["| | |", "|---|---|", *rows]))
        if command.epilog:
            label, _, example = _plain(command.epilog).partition(": ")
            assert label == "Example", command.epilog
            parts.append(f"Example: `{example}`")
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(text: str) -> str:
    return Text.from_markup(inspect.cleandoc(text)).plain


def _text(said: str) -> str:
    """Help as Markdown: brackets, stars and the like are text."""
    return re.sub(r"([<>*_\[\]])", r"\\\1", inspect.cleandoc(said))


# ---------------------------------------------------------------------------------------------------------------
# Stages, gates, guardrails


def stages_table() -> str:
    """The stages side by side."""
    rows: list[tuple[str, typing.Callable[[Stage], str]]] = [
        ("goes on from", lambda s: f"`{s.builds_on}`" if s.builds_on else ""),
        (
            "learns",
            lambda s: "connector and adapters, or a student's language model" if s.adapters else "the connector",
        ),
        ("minimises", lambda s: f"`{s.objective}`"),
        ("layout of a sample", lambda s: f"`{s.template}`"),
        ("images a sample, unless told otherwise", lambda s: f"at most {s.max_images}"),
        ("target tokens", lambda s: f"{s.hygiene.min_tokens} to {s.hygiene.max_tokens or 'any number'}"),
        ("is asked to write", lambda s: f"{'an' if s.writes == 'answer' else 'a'} {s.writes}"),
        ("shown", lambda s: ", ".join(f"`{c}`" for c in s.conditions)),
        ("golden set", lambda s: f"{s.golden_size}, by {s.golden_by}"),
        ("gates", lambda s: f"{len(s.gates)}"),
        ("guardrails, where their data are given", lambda s: f"{len(s.guardrails)}" if s.guardrails else ""),
    ]
    names = [f"`{name}`" for name in STAGES]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {label} | {' | '.join(told(s) for s in STAGES.values())} |" for label, told in rows]
    return "\n".join(lines)


def gate_names() -> list[str]:
    """The gates of all stages, each once."""
    return list(dict.fromkeys(name for stage in STAGES.values() for name in stage.gates))


def gate_facts(name: str) -> str:
    """What is judged, by the records of the stages that have the gate."""
    by_stage = {stage.name: stage.gates[name] for stage in STAGES.values() if name in stage.gates}
    first, *others = dict.fromkeys(by_stage.values())
    assert all((g.measure, g.bound, g.end) == (first.measure, first.bound, first.end) for g in others), name
    why = "; ".join(
        gate.why if not others else f"{gate.why} ({', '.join(s for s, g in by_stage.items() if g == gate)})"
        for gate in (first, *others)
    )
    end = {"value": "", "low": " at the lower end of its interval", "high": " at the upper end of its interval"}[
        first.end
    ]
    everywhere = ", in every group of samples as well" if first.strata else ""
    stages = ", ".join(f"`{stage}`" for stage in by_stage)
    return (
        f"*{why[0].upper()}{why[1:]}.*\n\n"
        f"`{first.measure}` ({called(first.measure or '')}) must be **{first.bound}**{end}{everywhere}. "
        f"Stages: {stages}."
    )


def guardrail_facts(name: str) -> str:
    """When the guardrail stops a run, by its record."""
    rule: GuardrailConfig = GUARDRAILS[name]
    bounds = {
        "falls": "more than {:.0%} lower than the baseline", "rises": "more than {:g} higher than the baseline",
        "below": f"below {{:g}}, {rule.times} evaluations in a row",
        "above": f"above {{:g}}, {rule.times} evaluations in a row",
        "widens": f"more than {{:g}} over its lowest value so far, having risen over {rule.times} evaluations",
    }  # fmt: skip
    said = [words.format(value) for field, words in bounds.items() if (value := getattr(rule, field)) is not None]
    return (
        f"*{rule.why[0].upper()}{rule.why[1:]}.*\n\n"
        f"Stops the run when `{rule.measure}` ({called(rule.measure or '')}) is {', or '.join(said)}."
    )
