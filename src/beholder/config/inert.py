"""Which settings have no effect in a config.

The rules stand at the settings themselves (`section.Inert`); `validate` turns a broken one into a message,
`file.dump_config` leaves such settings out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from beholder.config import section
from beholder.config.run import RunConfig
from beholder.config.tree import SettingPath, dotted, get_at


@dataclass(frozen=True)
class Inert:
    path: SettingPath
    why: str
    because: tuple[str, ...]
    """The settings that make it so, dotted."""
    at_default: bool
    """It stands at its default: nobody expects anything of it."""


def inert_settings(cfg: RunConfig) -> list[Inert]:
    """Every setting of this config that has no effect, given or not."""
    return list(_inert(cfg, cfg, (), ()))


def _inert(cfg: RunConfig, own: BaseModel, path: SettingPath, around: Sequence[section.Inert]) -> Iterator[Inert]:
    """``around``: rules of the sections around, which hold for everything in them."""
    for name, info in type(own).model_fields.items():
        value, here = getattr(own, name), (*path, name)
        rules = [*around, *(m for m in info.metadata if isinstance(m, section.Inert))]
        # Of a config in error a list is what was written, and no tuple yet.
        plain = (tuple(value) if isinstance(value, list) else value) == info.get_default(call_default_factory=True)
        if isinstance(value, section.Section):
            yield from _inert(cfg, value, here, rules)
            continue
        for rule in rules:
            if rule.applies(cfg, own):
                because = (dotted((*path, b[1:])) if b.startswith(".") else b for b in rule.because.split())
                yield Inert(here, rule.why, tuple(because), plain)
        for k, item in enumerate(value) if isinstance(value, tuple) else ():
            if isinstance(item, section.Section):
                yield from _inert(cfg, item, (*here, k), ())


def without_inert(cfg: RunConfig) -> RunConfig:
    """The same run, with every setting that has no effect back at its default."""
    raw = cfg.model_dump(mode="json")
    for inert in inert_settings(cfg):
        drop(raw, inert.path)
    return RunConfig.model_validate_json(json.dumps(raw))


def drop(data: Any, path: SettingPath) -> None:
    section = get_at(data, path[:-1])
    if isinstance(section, dict):
        section.pop(path[-1], None)
