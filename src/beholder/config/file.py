"""YAML -> `RunConfig`, or everything that is wrong at once, each as ``file:line:col``.

Also: command-line overrides, the dump that loads back to an equal config, the hash, the difference of two configs, and
the JSON schema for editors.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from beholder.config.inert import drop, inert_settings, without_inert
from beholder.config.run import RunConfig
from beholder.config.stages import GateConfig
from beholder.config.studies import SCALES
from beholder.config.tree import ConfigError, Loader, Problem, Tree, compose, override, read_node, show
from beholder.config.validate import validate
from beholder.types import ConfigNote, UserError

__all__ = [
    "ConfigError", "Problem", "config_hash", "diff_configs", "dump_config", "json_schema", "load_config",
    "load_scaled", "parse_config", "scale_overrides", "without_inert",
]  # fmt: skip


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run config in a YAML file, with ``a.b.c=value`` overrides.

    Raises `ConfigError` with everything that is wrong: unknown keys, wrong types, impossible combinations, and settings
    that have no effect and stand at something other than their default. A setting of the file that loses its effect
    through an override is not an error; one beneath a switch that the file itself turns off is a `ConfigNote`.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > 4_000_000:
            raise UserError(f"{path}: {size:,} bytes is too large for a config; is this the file you mean?")
        raw = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e}). Give the path of a YAML config file.") from e
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw[: e.start].count(b"\n") + 1
        column = e.start - raw.rfind(b"\n", 0, e.start)
        problem = Problem(str(path), line, column, "", f"byte {raw[e.start]:#04x} is not UTF-8; save the file as UTF-8")
        raise ConfigError([problem]) from e
    return parse_config(text, str(path), overrides)


def parse_config(text: str, name: str = "<config>", overrides: Sequence[str] = ()) -> RunConfig:
    """As `load_config`, for YAML text; ``name`` stands for the file in errors."""
    try:
        return _parse(text, name, overrides)
    except RecursionError:
        problem = Problem(name, 1, 1, "", "nested too deeply to be read; does an alias contain itself?")
        raise ConfigError([problem]) from None


def _parse(text: str, name: str, overrides: Sequence[str]) -> RunConfig:
    root = compose(text, name)
    tree = Tree(name)
    if root is not None:
        found = read_node(tree, root, (), None)
        if isinstance(found, dict):
            tree.data = found
        elif found is not None:
            line, column = root.start_mark.line + 1, root.start_mark.column + 1
            text_ = f"got {show(found)}; expected settings such as 'run_name: my_run'"
            raise ConfigError([*tree.problems, Problem(name, line, column, "", text_)])
    for assignment in overrides:
        override(tree, assignment)
    # Values that could not be read are None in the data: right where null is, and otherwise reported already.
    before = {p.path for p in tree.problems}
    cfg = validate(tree)
    if tree.problems:
        raise ConfigError([p for p in tree.problems if not (p.path in before and "got null" in p.text)])
    assert cfg is not None
    for note in tree.notes:
        warnings.warn(str(note), ConfigNote, stacklevel=1)
    return without_inert(cfg)


def dump_config(cfg: RunConfig) -> str:
    """The complete resolved config as YAML; `parse_config` reads it back to an equal config.

    Settings that have no effect in this run are left out, as they would be refused.
    """
    raw = without_inert(cfg).model_dump(mode="json")
    for inert in inert_settings(cfg):
        drop(raw, inert.path)
    _drop_unsaid(raw["gates"], cfg.stage_record.gates)
    _drop_empty(raw)
    return yaml.dump(raw, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def scale_overrides(cfg: RunConfig, scale: str) -> list[str]:
    """``a.b.c=value`` overrides of ``--scale``: the config's own ``scales``, else the runbook's (`config.SCALES`)."""
    known = SCALES | cfg.scales
    if scale not in known:
        raise UserError(f"--scale {scale!r}: no such scale; this config has {', '.join(known)}")
    sets = dict(known[scale])
    if "data.eval_size" in sets and cfg.data.eval_ratio is not None:  # one or the other
        sets["data.eval_ratio"] = None
    return [f"{name}={json.dumps(value)}" for name, value in sets.items()]


def load_scaled(path: str | Path, scale: str, overrides: Sequence[str] = ()) -> tuple[RunConfig, list[str]]:
    """The config at a named scale, in a run folder of its own; and the settings of that scale.

    ``overrides`` come after the scale. The folder gets ``_<scale>`` at its end, unless they set ``output_dir``.
    """
    settings = scale_overrides(load_config(path, overrides), scale)
    cfg = load_config(path, [*settings, *overrides])
    if scale != "full" and not any(s.partition("=")[0].strip() == "output_dir" for s in overrides):
        cfg = cfg.model_copy(update={"output_dir": f"{cfg.run_dir}_{scale}"})
    return cfg, settings


def _drop_unsaid(gates: dict[str, dict[str, Any]], stage: Mapping[str, GateConfig]) -> None:
    """Leaves out of each gate what reading it back would fill in anyway."""
    plain = GateConfig().model_dump(mode="json")
    for name, gate in gates.items():
        own = stage[name].model_dump(mode="json") if name in stage else plain
        for key in [k for k, value in gate.items() if value == plain[k] == own[k]]:
            del gate[key]


def _drop_empty(data: dict[str, Any]) -> None:
    for key in list(data):
        if isinstance(data[key], dict):
            _drop_empty(data[key])
            if not data[key]:
                del data[key]


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.2 would read as something else, and writes lists of plain values on one line."""

    yaml_implicit_resolvers = Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _list(dumper: yaml.SafeDumper, data: Sequence[Any]) -> yaml.Node:
    flow = all(not isinstance(v, dict | list) for v in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


def _float(dumper: yaml.SafeDumper, data: float) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:float", repr(data))


_Dumper.add_representer(list, _list)
_Dumper.add_representer(float, _float)


def config_hash(cfg: RunConfig) -> str:
    """sha256 over the settings that have an effect, whatever order or file they came from."""
    raw = without_inert(cfg).model_dump(mode="json")
    return hashlib.sha256(json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def diff_configs(a: RunConfig, b: RunConfig) -> list[tuple[str, object, object]]:
    """Settings that differ: (dotted path, value in ``a``, value in ``b``), lists compared whole."""
    left, right = flatten(a.model_dump(mode="json")), flatten(b.model_dump(mode="json"))
    return [(p, left.get(p), right.get(p)) for p in dict.fromkeys((*left, *right)) if left.get(p) != right.get(p)]


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; lists stay values."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= flatten(item, f"{prefix}{name}.") if isinstance(item, Mapping) else {f"{prefix}{name}": item}
    return flat


def json_schema() -> dict[str, Any]:
    """The schema of a config file for editors: JSON Schema draft 2020-12, with the settings' descriptions."""
    schema = RunConfig.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Beholder run config", **schema}


def check_consent(cfg: RunConfig, overrides: Sequence[str]) -> None:
    """Refuses code that comes with a checkpoint unless this very call allows it: a run's own config is no consent."""
    for part, trusted in (("llm", cfg.model.llm.trust_remote_code), ("vision", cfg.model.vision.trust_remote_code)):
        name = f"model.{part}.trust_remote_code"
        if trusted and not any(o.partition("=")[0].strip() == name for o in overrides):
            raise UserError(
                f"the run's config sets {name}, which runs code that comes with the model; allow it with --set "
                f"{name}=true if you trust it"
            )
