"""Loading a checkpoint: strictly, and with the config field at fault when it does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from beholder.config.file import flatten
from beholder.model.learned import learned_base, load_changed
from beholder.model.placement import Part
from beholder.model.weights import listed
from beholder.runs import to_json
from beholder.train.checkpoint import (
    CONNECTOR,
    CONNECTOR_INFO,
    MANIFEST,
    OPTIMIZER,
    TRAINER,
    part_files,
    parts_in,
    resolve_checkpoint,
)
from beholder.train.optim import load_optimizer_tensors
from beholder.train.same_run import ANOTHER, shown
from beholder.types import TrainedPart, UserError


@dataclass(frozen=True)
class TrainState:
    """What a run goes on from."""

    step: int
    """Optimizer steps done."""
    trainer: dict[str, Any]
    """What ``save_checkpoint`` was given as ``trainer``, and ``step``."""


class Learner(Protocol):
    """A model whose trained parts a checkpoint holds (`VisionLanguageModel`)."""

    @property
    def connector(self) -> nn.Module: ...
    def parts(self) -> Mapping[str, Part]: ...
    def connector_info(self) -> Mapping[str, Any]: ...


def load_trained(path: str | Path, model: Learner) -> None:
    """Put everything that was learned back into ``model``, bit for bit: connector, adapters, and weights of tower and
    language model that learn themselves. The way back of `VisionLanguageModel.trained_state`.

    ``path`` is anything `resolve_checkpoint` takes; ``model`` was built on the checkpoint's base (`read_base`).
    Raises `UserError` as `load_connector` and `load_adapters` do.
    """
    path = resolve_checkpoint(path)
    load_adapters(path, model.parts())
    for part in model.parts().values():
        if part.changed:
            try:
                load_changed(part, read_part(path, part.name))
            except UserError as e:
                raise UserError(f"checkpoint {path}: {e}") from e
    load_connector(path, model.connector, model.connector_info())


def load_start(path: Path, model: Learner, mode: Literal["continue", "merge", "fresh"]) -> str | None:
    """Start from another run: its connector, and its adapters as ``mode`` (``model.lora.adapters``) says; a sentence
    about what became of them, or None where neither run has any.

    ``model`` was built on `start_base` of the same. Raises `UserError` as `load_trained` does, with the ways out when
    the adapters cannot go on.
    """
    load_connector(path, model.connector, model.connector_info(), start=True)
    parts = model.parts()
    here = any(part.adapters for part in parts.values())
    new = "new ones start" if here else "this run has none"
    if not adapters_in(path):
        return f"{new}: {path} has none" if here else None
    if mode == "merge":
        return f"merge: those of {path} are part of the base's weights now; {new}"
    if mode == "fresh":
        return f"fresh: those of {path} are dropped; {new}"
    try:
        more = load_adapters(path, parts, start=True)
    except UserError as e:
        raise UserError(
            f"model.lora.adapters: continue: {e}\nOr start otherwise: model.lora.adapters: merge makes them part of "
            "the base's weights and starts new ones, fresh drops them and starts new ones."
        ) from e
    return f"continue: those of {path} go on learning" + "".join(f"; new ones start on the {part}" for part in more)


def load_for_resume(path: Path, model: Learner, optimizer: torch.optim.Optimizer) -> TrainState:
    """`load_trained`, and the optimizer's state, from checkpoint folder ``path``.

    Verifies the manifest first. Raises `UserError` for a checkpoint with adapters and a config without, or the reverse.
    Compare ``TrainState.trainer["config"]`` with the current config (`same_run.check_same_config`) before building
    anything large: `read_trainer` gives it without loading weights.
    """
    path = resolve_checkpoint(path, prefer="latest")
    load_trained(path, model)
    load_optimizer_tensors(optimizer, _read_tensors(path / OPTIMIZER))
    trainer = read_trainer(path)
    return TrainState(step=int(trainer["step"]), trainer=trainer)


def read_trainer(path: Path) -> dict[str, Any]:
    """``trainer.json`` of a verified checkpoint folder: config, config hash, data cursor, step."""
    trainer = _read_object(path / TRAINER)
    step, config = trainer.get("step"), trainer.get("config")
    if not isinstance(step, int) or isinstance(step, bool):
        raise UserError(f"{path / TRAINER}: step is {shown(step)}, expected a number. {ANOTHER}")
    if not isinstance(config, dict):
        raise UserError(f"{path / TRAINER}: config is {shown(config)[:60]}, expected an object. {ANOTHER}")
    return trainer


def entry(trainer: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object that a run writes into ``trainer.json`` (``fingerprints``, ``loop``). Raises `UserError` without it."""
    value = trainer.get(name)
    if not isinstance(value, dict):
        raise UserError(f"{TRAINER}: {name} is {shown(value)[:60]}, expected an object. {ANOTHER}")
    return value


def read_connector_info(path: Path) -> dict[str, Any]:
    """``connector.json`` of a verified checkpoint folder: what the connector was built for."""
    info = _read_object(path / CONNECTOR_INFO)
    if not info:
        raise UserError(
            f"{path / CONNECTOR_INFO} is empty: nobody can tell what its connector was built for. {ANOTHER}"
        )
    return info


def adapters_in(path: Path) -> list[str]:
    """The adapters that a verified checkpoint folder holds: ``adapter`` of the language model, ``vision_adapter``."""
    return [part for part in ("adapter", "vision_adapter") if part in parts_in(_read_object(path / MANIFEST)["files"])]


def read_part(path: Path, part: str) -> TrainedPart:
    """A part of what was learned, from a verified checkpoint folder; its tensors on the CPU."""
    tensors, facts = part_files(part)
    return TrainedPart(_read_tensors(path / tensors), _read_object(path / facts))


def read_base(path: Path) -> dict[str, TrainedPart]:
    """What of the base that a verified checkpoint was trained on is not as in its files, in the order in which it
    became so: adapters of earlier runs (``merged_1``, ``vision_merged_1``, …), then weights that learned themselves
    (``vision``, ``language``), which are kept as they are after all that, and the connector of a native model that has
    learned."""
    there = parts_in(_read_object(path / MANIFEST)["files"])
    names = [name for before in ("", "vision_") for name in _merged_in(path, there, f"{before}merged")]
    base = {part: read_part(path, part) for part in [*names, *(p for p in there if p in ("language", "vision"))]}
    if "native" in read_connector_info(path) and (own := _read_tensors(path / CONNECTOR)):
        base["connector"] = TrainedPart(own, read_connector_info(path))
    return base


def _merged_in(path: Path, parts: Iterable[str], kind: str) -> list[str]:
    """``merged_1`` … ``merged_n``, as they are numbered when they are written. Raises `UserError` for other numbers:
    the order is what they were merged in, and a gap is a part of the base that is lost."""
    found = {part for part in parts if part.startswith(kind)}
    names = [f"{kind}_{k}" for k in range(1, 1 + len(found))]
    if found != set(names):
        raise UserError(
            f"checkpoint {path} has the earlier adapters {listed(found)}, expected {listed(names)}: what its base was "
            f"made of is not known. {ANOTHER}"
        )
    return names


def start_base(path: str | Path, mode: Literal["continue", "merge", "fresh"]) -> dict[str, TrainedPart]:
    """What is part of the base of a run that starts from ``path``: what was of that run's, under merge its adapters.

    Raises `UserError` for merge where there are none.
    """
    path = resolve_checkpoint(path)
    base = read_base(path)
    if mode != "merge":
        return base
    adapters = adapters_in(path)
    if not adapters:
        raise UserError(
            f"model.lora.adapters is merge, but {path} (model.connector.load_checkpoint) has no adapters to merge; "
            "leave the setting out, and new ones start"
        )
    for name in adapters:
        before = name.removesuffix("adapter")
        _trained_alpha(path, name, read_adapter_config(path, name))
        base[f"{before}merged_{1 + sum(p.startswith(f'{before}merged_') for p in base)}"] = read_part(path, name)
    return base


def read_adapter_config(path: Path, part: str = "adapter") -> dict[str, Any]:
    """``adapter_config.json`` of a verified checkpoint folder with adapters, in PEFT's words; or the tower's."""
    file = path / part_files(part)[1]
    config = _read_object(file)
    missing = [key for key in _ADAPTER_REQUIRED if key not in config]
    if missing:
        raise UserError(
            f"{file} lacks {', '.join(missing)}: without these nobody can tell what its adapters compute. {ANOTHER}"
        )
    return config


_ADAPTER_REQUIRED = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias",
)  # fmt: skip
"""Entries of ``adapter_config.json`` that change what adapters compute."""


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object a file of a checkpoint holds. Raises `UserError` for anything else: a manifest vouches for the
    bytes that somebody wrote, not for their sense."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} is not a JSON file ({type(e).__name__}: {e}). {ANOTHER}") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {shown(value)[:60]}, expected a JSON object. {ANOTHER}")
    return value


def load_adapters(path: str | Path, parts: Mapping[str, Part], *, start: bool = False) -> list[str]:
    """Load a checkpoint's adapters strictly into the parts of a model, bit for bit.

    ``path`` is anything `resolve_checkpoint` takes. Raises `UserError` naming the config field at fault: adapters in
    the checkpoint and none in the config or the reverse, another rank or alpha, other modules, another base, weights
    that are not finite. Nothing is loaded then into that part. Without adapters on both sides nothing is to be done.
    ``start``: for a run that starts from the checkpoint's. It may use its adapters at another strength, and adapters on
    a part where the checkpoint has none start anew, as long as it has some elsewhere; gives the names of these parts.
    """
    path = resolve_checkpoint(path)
    if not start:  # whose base was made of the checkpoint's, and may let more learn
        _check_base(path, parts)
    there, new = adapters_in(path), list[str]()
    for name in ("adapter", "vision_adapter"):
        part = parts.get("language" if name == "adapter" else "vision")
        if start and there and name not in there and part is not None and part.adapters:
            new.append(part.called)
            continue
        _load_adapter(path, name, part, name in there, start)
    return new


def _load_adapter(path: Path, name: str, part: Part | None, there: bool, start: bool) -> None:
    here = part is not None and bool(part.adapters)
    called, field = ("language model", "llm") if name == "adapter" else ("vision tower", "vit")
    if there and not here:
        raise UserError(
            f"checkpoint {path} has adapters on the {called}, but this config has none; its connector was "
            "trained with them. Set model.lora as in the config.yaml of its run folder."
        )
    if here and not there:
        raise UserError(
            f"this config has adapters on the {called} (model.lora.enable: true, {field}_layers), but checkpoint "
            f"{path} has none: it is of a run without them (stage align). To start stage instruct from it, name it in "
            "model.connector.load_checkpoint instead, which takes its connector alone."
        )
    if part is None or not here:
        return
    from beholder.model import adapters

    config, own = read_adapter_config(path, name), adapters.adapter_config(part)
    fields = _ADAPTER_FIELDS
    if start:
        # What both trained with; how much of it is used outside training is each run's own affair.
        fields = fields | {"lora_alpha": "model.lora.alpha"}
        config |= {"lora_alpha": _trained_alpha(path, name, config)}
        own |= {"lora_alpha": adapters.trained_alpha(part)}
    complaints = [
        f"{fields.get(key, key)}: checkpoint {shown(config[key])}, config {shown(own[key])}"
        for key in sorted((config.keys() & own.keys()) - _ADAPTER_FREE)
        if config[key] != own[key]
    ]
    base, mine = config.get("base_model_name_or_path"), own["base_model_name_or_path"]
    if complaints:
        raise UserError(
            f"the adapters in {path} (on {base}) do not fit this config (on {mine}):\n  "
            + "\n  ".join(complaints)
            + "\nUse the config the checkpoint was trained with (config.yaml in its run folder), or another checkpoint."
        )
    try:
        adapters.load_adapter_tensors(part, read_part(path, name).tensors)
    except UserError as e:
        raise UserError(f"the adapters in {path} (on {base}; this config: {mine}) cannot be used: {e}") from e


def _trained_alpha(path: Path, name: str, config: Mapping[str, Any]) -> Any:
    """The alpha that a checkpoint's adapters learned with: its run's own. ``adapter_config.json`` has it times the
    strength that they are used at; adapters of which it says otherwise, or that have another rank than the run's, are
    refused: continued they would be other adapters than merged."""
    from beholder.model.adapters import alpha_at_rest

    run = flatten(read_trainer(path)["config"])
    rank, alpha, strength = (run.get(f"model.lora.{key}") for key in ("r", "alpha", "strength"))
    told = [f"r {shown(config['r'])}, expected {shown(rank)}"] if rank is not None and config["r"] != rank else []
    if isinstance(alpha, int) and isinstance(strength, int | float):
        used = alpha_at_rest(alpha, strength)
        if config["lora_alpha"] != used:
            told.append(f"lora_alpha {shown(config['lora_alpha'])[:60]}, expected {used} (alpha * strength)")
    if told:
        raise UserError(
            f"{path / part_files(name)[1]} says {', '.join(told)} by model.lora in {path / TRAINER}: one of the two "
            f"files is not of this checkpoint. {ANOTHER}"
        )
    return config["lora_alpha"] if alpha is None else alpha


def _check_base(path: Path, parts: Mapping[str, Part]) -> None:
    """Refuse a model whose base is not the checkpoint's: other adapters, or none, were merged into it, or other weights
    of its tower have learned themselves."""
    there = {name: learned for name, learned in read_base(path).items() if name != "connector"}  # `load_connector`
    here = {name: learned for part in parts.values() for name, learned in learned_base(part).items()}
    same = there.keys() == here.keys() and all(
        a.tensors.keys() == here[name].tensors.keys()
        and (name in ("language", "vision") or all(torch.equal(t, here[name].tensors[k]) for k, t in a.tensors.items()))
        for name, a in there.items()
    )
    if not same:
        raise UserError(
            f"checkpoint {path} was trained on another base: what earlier runs merged into it or let learn is "
            f"{_listed(there)}, of this model {_listed(here)}, or with other weights. Open its run folder, which puts "
            "them in place, or set model.vision.unfreeze and model.student as there"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


_ADAPTER_FIELDS = {"r": "model.lora.r", "lora_alpha": "model.lora.alpha * strength", "bias": "model.lora.bias"}
"""Config field of settings in ``adapter_config.json``."""

_ADAPTER_FREE = {
    # The modules are compared by the weights themselves, the base by their shapes and the run's fingerprints.
    "target_modules", "base_model_name_or_path", "revision", "peft_version", "lora_dropout", "inference_mode",
}  # fmt: skip
"""Entries that may differ: none changes what the loaded adapters compute."""


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f"{path} is not a safetensors file: {e}. {ANOTHER}") from e


_FIELDS = {
    "vision_ln": "model.connector.vision_ln",
    "resampler": "model.connector.resampler.kind",
    "projector": "model.connector.projector.kind",
    "projector.fc.bias": "model.connector.projector.bias",
    "output_norm": "model.connector.output_norm",
}
"""Config field that decides whether a connector has weights under this first name, or this single one."""

_INFO_FIELDS = {
    **_FIELDS,
    "num_visual_tokens": "model.connector.num_visual_tokens",
    "d_vision": "model.vision.name_or_path (width of the tower)",
    "num_patches": "model.vision.name_or_path (patches of the tower)",
    "d_text": "model.llm.name_or_path (width of the language model)",
    "vision": "model.vision.name_or_path",
    "language": "model.llm.name_or_path",
    "llm": "model.llm.name_or_path",
    "connector": "model.connector",
    "native": "model.native.name_or_path",
}
"""Names in ``connector.json`` that are spelled differently in the config."""


def load_connector(path: str | Path, connector: nn.Module, info: Mapping[str, Any], *, start: bool = False) -> None:
    """Load a checkpoint's connector strictly into ``connector``, which was built from a config as ``info`` says.

    ``path`` is anything `resolve_checkpoint` takes. ``info`` (``VisionLanguageModel.connector_info()``) is compared
    with the checkpoint's ``connector.json``. Names of parts may differ where the ``fingerprint`` beside them is equal;
    without one, in the folder before the last name (a moved model). Raises `UserError` naming the keys *and* the config
    field at fault: missing or unexpected weights, shapes, a connector trained for another tower or language model,
    weights that are not finite. Nothing is loaded then. ``start``: for a run that starts from the checkpoint's; a
    native model's connector that has not learned there begins as it came.
    """
    path = resolve_checkpoint(path)
    saved, saved_info = _read_tensors(path / CONNECTOR), read_connector_info(path)
    own = connector.state_dict()
    as_it_came = start and "native" in info and not saved
    if as_it_came:
        own = {}
    complaints: list[str] = []
    unexpected, missing = sorted(set(saved) - set(own)), sorted(set(own) - set(saved))
    for first in dict.fromkeys(k.partition(".")[0] for k in [*unexpected, *missing]):
        more = [k for k in unexpected if k.partition(".")[0] == first]
        fewer = [k for k in missing if k.partition(".")[0] == first]
        named = next((k for k in [*more, *fewer] if k in _FIELDS and len(more) + len(fewer) == 1), first)
        field = _FIELDS.get(named, "model.connector")
        values = _both(saved_info, info, named)
        if more:
            complaints.append(f"checkpoint has {_shorten(first, more)}, which this config does not build")
        if fewer:
            complaints.append(f"this config builds {_shorten(first, fewer)}, which the checkpoint does not have")
        complaints[-1] += f" ({field}{values})"
    for key in sorted(set(saved) & set(own)):
        if saved[key].shape != own[key].shape:
            complaints.append(f"{key} is {list(saved[key].shape)} in the checkpoint, {list(own[key].shape)} here")
    for dotted, (then, here) in _info_differences(saved_info, info).items():
        complaints.append(f"{_field_of(dotted)}: checkpoint {then!r}, config {here!r}")
    if complaints:
        raise UserError(
            f"the connector in {path} does not fit this config:\n  "
            + "\n  ".join(complaints)
            + "\nUse the config the checkpoint was trained with (config.yaml in its run folder), or another checkpoint."
        )
    bad = [k for k, t in saved.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise UserError(
            f"the connector in {path} has weights that are NaN or infinite: {', '.join(bad)}. "
            "The run it comes from had diverged; use an earlier checkpoint."
        )
    if not as_it_came:
        connector.load_state_dict(saved, strict=True)


def _shorten(first: str, keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{first}.* ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"


def _both(saved: Mapping[str, Any], here: Mapping[str, Any], name: str) -> str:
    """``: checkpoint true, config false`` when both infos tell the field, else nothing."""
    if name not in saved or name not in here:
        return ""
    return f": checkpoint {json.dumps(saved[name])}, config {json.dumps(here[name])}"


def _info_differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    then, now = flatten(saved), flatten(json.loads(to_json(dict(here))))
    shared = then.keys() & now.keys()
    differing = {k: (then[k], now[k]) for k in shared if then[k] != now[k]}
    for key, (old, new) in list(differing.items()):
        section, _, last = key.rpartition(".")
        if last not in _NAMES:
            continue
        fingerprint = f"{section}.fingerprint"
        same = then[fingerprint] == now[fingerprint] if fingerprint in shared else _base(old) == _base(new)
        if same:
            del differing[key]
    return dict(sorted(differing.items()))


_NAMES = ("name", "name_or_path", "path", "revision", "llm", "language", "vision")


def _base(name: Any) -> str:
    """``Qwen3-8B-Base`` of ``Qwen/Qwen3-8B-Base`` and of ``/models/Qwen3-8B-Base/``."""
    return Path(str(name)).name


def _field_of(dotted: str) -> str:
    first, _, _ = dotted.partition(".")
    last = dotted.rpartition(".")[2]
    field = _INFO_FIELDS.get(last) or _INFO_FIELDS.get(first)
    return f"{dotted} ({field})" if field else dotted
