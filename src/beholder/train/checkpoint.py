"""Checkpoints: written so that no crash can spoil them, read only when their hashes hold.

A checkpoint is a folder ``step_<n>`` with the connector, the adapters if there are any, the optimizer state and the
position in the run, as safetensors and JSON; never a pickle. Adapters lie in it as PEFT writes them, so
``PeftModel.from_pretrained(base, "…/step_<n>")`` reads the folder. What is trained and when it is saved is decided
elsewhere; so is which step is the best, which ``best.json`` beside the folders remembers.

Where a stage's weights come from, in this order (`stages` follows it):
1. resume this run: the latest checkpoint of the same run folder (``--resume auto``), or the one that is named;
2. start from another run: ``model.connector.load_checkpoint``, its connector and, where it has any, its adapters (a run
   of stage align has none, so they start fresh); optimizer and step fresh;
3. fresh: the connector's and the adapters' own initialisation from the seed. Frozen parts always come from their own
   files.
To use a run (generate, chat, start the next stage from it), its best checkpoint is taken, where none is marked the
latest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from beholder.model.language import LanguageModel
from beholder.runs import Warn, atomic_write, fsync_dir, sha256_file, to_json, warn_to_stderr, write_durably
from beholder.train.optim import load_optimizer_tensors
from beholder.types import UserError

FORMAT = "beholder-checkpoint/1"
MANIFEST = "MANIFEST.json"
CONNECTOR, CONNECTOR_INFO, OPTIMIZER, TRAINER = (
    "connector.safetensors", "connector.json", "optimizer.safetensors", "trainer.json",
)  # fmt: skip
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""PEFT's own names, which its ``from_pretrained`` looks for."""
BEST = "best.json"
_STEP = re.compile(r"step_(\d+)")
_LEFTOVER = re.compile(r"\.(?:tmp|old|prune)-\d+-(\d+)")
_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}


# ---------------------------------------------------------------------------------------------------------------
# Save


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    connector: Mapping[str, Tensor],
    connector_info: Mapping[str, Any],
    optimizer_state: Mapping[str, Tensor],
    trainer: Mapping[str, Any],
    keep: int,
    adapter: Mapping[str, Tensor] | None = None,
    adapter_config: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``folder/step_<step>`` so that at every instant at least the checkpoints of before are whole.

    Files go into ``.tmp-<step>-<pid>/`` and are flushed, then a manifest of sizes and hashes, then the folder; only
    then it gets its name, and only then old ones beyond the newest ``keep`` (at least 2) are removed; the one marked as
    best never is. ``adapter`` and ``adapter_config`` (`model.lora.adapter_tensors`, `adapter_config`) come together.
    ``trainer`` carries ``config`` (resolved, as a dict), ``config_hash`` and ``data_cursor`` besides whatever the
    caller needs to go on. A full disk is a `UserError`; the earlier checkpoints stay as they are.
    """
    assert keep >= 2, keep
    assert (adapter is None) == (adapter_config is None), "an adapter and its config come together"
    folder.mkdir(parents=True, exist_ok=True)
    _clean_leftovers(folder)
    payloads = {
        # One entry only: safetensors writes several in random order, and equal weights should be equal files.
        CONNECTOR: safetensors.torch.save(_plain(connector), metadata={"format": FORMAT}),
        CONNECTOR_INFO: (to_json(dict(connector_info), indent=2) + "\n").encode(),
        OPTIMIZER: safetensors.torch.save(_plain(optimizer_state)),
        TRAINER: (to_json({**trainer, "step": step}, indent=2) + "\n").encode(),
    }
    if adapter is not None and adapter_config is not None:
        payloads[ADAPTER] = safetensors.torch.save(_plain(adapter), metadata={"format": "pt"})
        payloads[ADAPTER_CONFIG] = (to_json(dict(adapter_config), indent=2) + "\n").encode()
    manifest = {
        "format": FORMAT,
        "step": step,
        "config_hash": trainer.get("config_hash"),
        "data_cursor": trainer.get("data_cursor"),
        "files": {n: {"size": len(b), "sha256": hashlib.sha256(b).hexdigest()} for n, b in payloads.items()},
    }
    temporary = folder / f".tmp-{step}-{os.getpid()}"
    final = folder / f"step_{step}"
    try:
        temporary.mkdir()
        for name, payload in payloads.items():
            write_durably(temporary / name, payload)
        write_durably(temporary / MANIFEST, (to_json(manifest, indent=2) + "\n").encode())
        fsync_dir(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    aside = folder / f".old-{step}-{os.getpid()}"
    if final.exists():  # a run resumed from an earlier step comes by again, or what is there is broken
        final.rename(aside)
    temporary.rename(final)
    fsync_dir(folder)
    shutil.rmtree(aside, ignore_errors=True)
    _prune(folder, keep, spare=final)
    return final


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Copies, because safetensors refuses tensors that share memory; a view would also be written whole.
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def _clean_leftovers(folder: Path) -> None:
    """Remove what writers left behind that died in the middle. Another live writer's files are not touched."""
    for path in folder.iterdir():
        match = _LEFTOVER.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1]))):
            if path.name.startswith(".old-"):  # died between the two renames: that one was whole
                original = folder / f"step_{path.name.split('-')[1]}"
                if not original.exists():
                    path.rename(original)
                    continue
            shutil.rmtree(path, ignore_errors=True)


def _prune(folder: Path, keep: int, spare: Path) -> None:
    """Remove all but the newest ``keep`` checkpoints, the best, and ``spare``, the one just written (a run that was
    resumed from an earlier step has higher numbers beside it). One that is visibly broken does not count as kept."""
    kept = 0
    best = _pointed(folder)
    for step, path in _steps(folder):
        if kept >= keep and path not in (spare, best):
            doomed = folder / f".prune-{step}-{os.getpid()}"
            with suppress(OSError):  # renamed first: a half-deleted folder never carries a checkpoint's name
                path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        elif problem(path, hashes=False) is None:
            kept += 1


# ---------------------------------------------------------------------------------------------------------------
# Find


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything named like a checkpoint, newest first."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _STEP.fullmatch(p.name)) and p.is_dir()]
    return sorted(found, reverse=True)


def steps_on_disk(checkpoints: Path) -> set[int]:
    """Steps of everything named like a checkpoint."""
    return {step for step, _ in _steps(checkpoints)}


def problem(path: Path, *, hashes: bool = True) -> str | None:
    """Why the checkpoint folder ``path`` may not be loaded, or None when its manifest verifies."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files: Mapping[str, Mapping[str, Any]] = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']!r}, this version reads {FORMAT!r}"
        if f"step_{manifest['step']}" != path.name and _STEP.fullmatch(path.name):
            return f"its manifest is of step {manifest['step']}"
        adapter = {ADAPTER, ADAPTER_CONFIG}
        missing_entries = {CONNECTOR, CONNECTOR_INFO, OPTIMIZER, TRAINER} - set(files)
        if adapter & set(files):
            missing_entries |= adapter - set(files)
        if missing_entries:
            return f"its manifest does not list {', '.join(sorted(missing_entries))}"
        for name, facts in files.items():
            if Path(name).name != name:
                return f"its manifest names a file outside the folder: {name!r}"
            file = path / name
            if not file.is_file() or file.is_symlink():
                return f"{name} is missing"
            if file.stat().st_size != facts["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {facts['size']}"
            if hashes and sha256_file(file) != facts["sha256"]:
                return f"{name} does not have the content that was saved (sha256 differs)"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except OSError as e:
        return f"it cannot be read: {e}"
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        return f"its {MANIFEST} is damaged ({type(e).__name__}: {e})"
    return None


def latest_checkpoint(folder: Path, *, warn: Warn = warn_to_stderr) -> Path | None:
    """The checkpoint of the highest step whose manifest verifies, or None. Others are named to ``warn``, not loaded."""
    for _, path in _steps(folder):
        reason = problem(path)
        if reason is None:
            return path
        warn(f"checkpoint {path} is passed over: {reason}")
    return None


def set_best(checkpoints: Path, step: int, facts: Mapping[str, Any]) -> None:
    """Mark ``step_<step>`` as the run's best: ``best.json``, written at once or not at all, with ``facts`` (why) beside
    the step. The mark saves that checkpoint from being pruned. Raises `UserError` when it is not there or not whole."""
    path = checkpoints / f"step_{step}"
    reason = problem(path)
    if reason is not None:
        raise UserError(f"step {step} cannot be marked as the best: {path}: {reason}")
    atomic_write(checkpoints / BEST, to_json({**facts, "step": step}, indent=2) + "\n")


def clear_best(checkpoints: Path) -> None:
    """Unmark the best: no step may be it any more."""
    if (checkpoints / BEST).exists():
        (checkpoints / BEST).unlink()
        fsync_dir(checkpoints)


def best_facts(checkpoints: Path) -> dict[str, Any] | None:
    """What ``best.json`` says (``step`` and why it was chosen), or None where no step is marked."""
    file = checkpoints / BEST
    try:
        said = json.loads(file.read_bytes())
        if not isinstance(said["step"], int):
            raise ValueError(f"step is {said['step']!r}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{file} cannot be read ({type(e).__name__}: {e}). Remove it to use the latest checkpoint, or name a "
            "step_<n> folder."
        ) from e
    return said


def best_checkpoint(checkpoints: Path) -> Path | None:
    """The verified checkpoint that is marked as the best, or None where none is marked.

    Raises `UserError` when the marked one is missing or damaged: another one must not silently take its place.
    """
    facts = best_facts(checkpoints)
    if facts is None:
        return None
    path = checkpoints / f"step_{facts['step']}"
    reason = problem(path) if path.is_dir() else "it does not exist"
    if reason is not None:
        there = ", ".join(p.name for _, p in _steps(checkpoints) if p != path) or "none"
        raise UserError(
            f"{checkpoints / BEST} marks {path.name} as the best checkpoint, which cannot be used: {reason}. Name one "
            f"of those that are there ({there}), or remove {BEST} to use the latest."
        )
    return path


def _pointed(checkpoints: Path) -> Path | None:
    """The folder that is marked as the best, whatever its state; a damaged mark spares nothing."""
    try:
        facts = best_facts(checkpoints)
    except UserError:
        return None
    return None if facts is None else checkpoints / f"step_{facts['step']}"


def resolve_checkpoint(
    path: str | Path, *, prefer: Literal["best", "latest"] = "best", warn: Warn = warn_to_stderr
) -> Path:
    """The checkpoint folder a person means by a run folder, a ``checkpoints`` folder or a ``step_<n>`` folder.

    Of a run, the one marked as its best, or the latest where none is; ``prefer="latest"`` (to resume) passes the mark
    over. A `UserError` says what is wrong with anything else.
    """
    path = Path(path)
    if path.suffix.lower() in _PICKLES:
        raise UserError(
            f"{path} would be a pickle, which can run any code when it is opened; Beholder neither writes nor loads "
            "one. Give the run folder (outputs/<run_name>) or one of its checkpoints/step_<n> folders."
        )
    if not path.is_dir():
        if path.is_file():
            raise UserError(f"{path} is a file; give the run folder or one of its checkpoints/step_<n> folders")
        siblings = [p.name for _, p in _steps(path.parent)]
        there = f" There are: {', '.join(siblings[:8])}." if siblings else ""
        raise UserError(f"there is no checkpoint at {path}.{there} Give a run folder or a checkpoints/step_<n> folder.")
    if _STEP.fullmatch(path.name) or (path / MANIFEST).exists():
        reason = problem(path)
        if reason is not None:
            raise UserError(f"checkpoint {path} cannot be used: {reason}. Use another step of the same run.")
        return path
    inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    best = best_checkpoint(inside) if prefer == "best" else None
    if best is not None:
        return best
    reasons: list[str] = []
    found = latest_checkpoint(inside, warn=lambda m: (reasons.append(m), warn(m))[0])
    if found is None:
        why = "; ".join(reasons) or "it holds no step_<n> folder"
        raise UserError(f"no usable checkpoint in {inside}: {why}")
    return found


# ---------------------------------------------------------------------------------------------------------------
# Load


@dataclass(frozen=True)
class TrainState:
    """What a run goes on from."""

    step: int
    """Optimizer steps done."""
    trainer: dict[str, Any]
    """What ``save_checkpoint`` was given as ``trainer``, and ``step``."""
    path: Path


def load_for_resume(
    path: Path,
    connector: nn.Module,
    info: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    language: LanguageModel | None = None,
) -> TrainState:
    """Put the weights of the connector and of ``language``'s adapters and the optimizer's state back, bit for bit, from
    checkpoint folder ``path``. ``language`` None: a run without adapters.

    Verifies the manifest first. Raises `UserError` for a checkpoint with adapters and a config without, or the reverse.
    Compare ``TrainState.trainer["config"]`` with the current config (`check_same_config`) before building anything
    large: `read_trainer` gives it without loading weights.
    """
    path = resolve_checkpoint(path, prefer="latest")
    load_adapter(path, language)
    load_connector(path, connector, info)
    load_optimizer_tensors(optimizer, _read_tensors(path / OPTIMIZER))
    trainer = read_trainer(path)
    return TrainState(step=int(trainer["step"]), trainer=trainer, path=path)


def read_trainer(path: Path) -> dict[str, Any]:
    """``trainer.json`` of a verified checkpoint folder: config, config hash, data cursor, step."""
    trainer = _read_object(path / TRAINER)
    step, config = trainer.get("step"), trainer.get("config")
    if not isinstance(step, int) or isinstance(step, bool):
        raise UserError(f"{path / TRAINER}: step is {_show(step)}, expected a number. {_ANOTHER}")
    if not isinstance(config, dict):
        raise UserError(f"{path / TRAINER}: config is {_show(config)[:60]}, expected an object. {_ANOTHER}")
    return trainer


def entry(trainer: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object that a run writes into ``trainer.json`` (``fingerprints``, ``loop``). Raises `UserError` without it."""
    value = trainer.get(name)
    if not isinstance(value, dict):
        raise UserError(f"{TRAINER}: {name} is {_show(value)[:60]}, expected an object. {_ANOTHER}")
    return value


def read_connector_info(path: Path) -> dict[str, Any]:
    """``connector.json`` of a verified checkpoint folder: what the connector was built for."""
    info = _read_object(path / CONNECTOR_INFO)
    if not info:
        raise UserError(
            f"{path / CONNECTOR_INFO} is empty: nobody can tell what its connector was built for. {_ANOTHER}"
        )
    return info


def has_adapter(path: Path) -> bool:
    """Whether a verified checkpoint folder holds adapters."""
    return ADAPTER in _read_object(path / MANIFEST)["files"]


def read_adapter_config(path: Path) -> dict[str, Any]:
    """``adapter_config.json`` of a verified checkpoint folder with adapters, in PEFT's words."""
    config = _read_object(path / ADAPTER_CONFIG)
    missing = [key for key in _ADAPTER_REQUIRED if key not in config]
    if missing:
        raise UserError(
            f"{path / ADAPTER_CONFIG} lacks {', '.join(missing)}: without these nobody can tell what its adapters "
            f"compute. {_ANOTHER}"
        )
    return config


_ADAPTER_REQUIRED = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias",
)  # fmt: skip
"""Entries of ``adapter_config.json`` that change what adapters compute."""

_ANOTHER = "Use another step of the same run."


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object a file of a checkpoint holds. Raises `UserError` for anything else: a manifest vouches for the
    bytes that somebody wrote, not for their sense."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} is not a JSON file ({type(e).__name__}: {e}). {_ANOTHER}") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {_show(value)[:60]}, expected a JSON object. {_ANOTHER}")
    return value


def load_adapter(path: str | Path, language: LanguageModel | None) -> None:
    """Load a checkpoint's adapters strictly into ``language``, bit for bit; None: a model without language adapters.

    ``path`` is anything `resolve_checkpoint` takes. Raises `UserError` naming the config field at fault: adapters in
    the checkpoint and none in the config or the reverse, another rank or alpha, other modules, another base, weights
    that are not finite. Nothing is loaded then. Without adapters on both sides nothing is to be done.
    """
    path = resolve_checkpoint(path)
    here, there = language is not None and bool(language.adapters), has_adapter(path)
    if there and not here:
        raise UserError(
            f"checkpoint {path} has adapters on the language model, but this config has none; its connector was "
            "trained with them. Set model.lora as in the config.yaml of its run folder."
        )
    if here and not there:
        raise UserError(
            f"this config has adapters on the language model (model.lora.enable: true), but checkpoint {path} has "
            "none: it is of a run without them (stage align). To start stage instruct from it, name it in "
            "model.connector.load_checkpoint instead, which takes its connector alone."
        )
    if language is None or not here:
        return
    from beholder.model import adapters

    config, own = read_adapter_config(path), adapters.adapter_config(language)
    complaints = [
        f"{_ADAPTER_FIELDS.get(key, key)}: checkpoint {_show(config[key])}, config {_show(own[key])}"
        for key in sorted((config.keys() & own.keys()) - _ADAPTER_FREE)
        if config[key] != own[key]
    ]
    base, name = config.get("base_model_name_or_path"), own["base_model_name_or_path"]
    if complaints:
        raise UserError(
            f"the adapters in {path} (on {base}) do not fit this config (on {name}):\n  "
            + "\n  ".join(complaints)
            + "\nUse the config the checkpoint was trained with (config.yaml in its run folder), or another checkpoint."
        )
    try:
        adapters.load_adapter_tensors(language, _read_tensors(path / ADAPTER))
    except UserError as e:
        raise UserError(f"the adapters in {path} (on {base}; this config: {name}) cannot be used: {e}") from e


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
    except safetensors.SafetensorError as e:
        raise UserError(f"{path} is not a safetensors file: {e}") from e


_FIELDS = {
    "vision_ln": "model.connector.vision_ln",
    "resampler": "model.connector.resampler.kind",
    "projector": "model.connector.projector.kind",
    "output_norm": "model.connector.output_norm",
}
"""Config field that decides whether a connector has weights under this first name."""

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
}
"""Names in ``connector.json`` that are spelled differently in the config."""


def load_connector(path: str | Path, connector: nn.Module, info: Mapping[str, Any]) -> None:
    """Load a checkpoint's connector strictly into ``connector``, which was built from a config as ``info`` says.

    ``path`` is anything `resolve_checkpoint` takes. ``info`` (``VisionLanguageModel.connector_info()``) is compared
    with the checkpoint's ``connector.json``. Names of parts may differ where the ``fingerprint`` beside them is equal;
    without one, in the folder before the last name (a moved model). Raises `UserError` naming the keys *and* the config
    field at fault: missing or unexpected weights, shapes, a connector trained for another tower or language model,
    weights that are not finite. Nothing is loaded then.
    """
    path = resolve_checkpoint(path)
    saved, saved_info = _read_tensors(path / CONNECTOR), read_connector_info(path)
    own = connector.state_dict()
    complaints: list[str] = []
    unexpected, missing = sorted(set(saved) - set(own)), sorted(set(own) - set(saved))
    for first in dict.fromkeys(k.partition(".")[0] for k in [*unexpected, *missing]):
        more = [k for k in unexpected if k.partition(".")[0] == first]
        fewer = [k for k in missing if k.partition(".")[0] == first]
        field = _FIELDS.get(first, "model.connector")
        values = _both(saved_info, info, first)
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


# ---------------------------------------------------------------------------------------------------------------
# Resume with the same settings

MAY_CHANGE = (
    "run_name", "output_dir", "device",
    # where the run starts from is settled once it has started
    "model.connector.load_checkpoint",
    # how fast, not what
    "data.num_workers", "data.prefetch_factor", "data.pin_memory", "data.persistent_workers", "data.verify_images",
    "features.dir", "features.max_gb", "train.num_threads", "model.llm.gradient_checkpointing",
    # what is shown, saved and measured
    "train.save_every", "train.keep_checkpoints", "train.log_every", "train.tqdm_disable", "train.progress_percent",
    "train.full_eval_every", "train.quick_eval_size", "train.quick_eval_steps",
    "eval", "ablation", "gates", "scales",
)  # fmt: skip
"""Settings (or whole sections) that may differ between an interrupted run and its resumption: none moves a weight."""

MOVED_DATA = ("data.json_path", "data.image_root", "data.sources", "data.eval_sources")
"""Paths, which may differ when the data's fingerprints are equal: the files were moved, not changed."""


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; lists stay values."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            flat.update(flatten(inner, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(inner) if isinstance(inner, tuple) else inner
    return flat


def check_same_config(
    saved: Mapping[str, Any], current: Mapping[str, Any], *, same_data: bool = False
) -> list[tuple[str, Any, Any]]:
    """`UserError` listing every setting that may not change on resume and did (old → new).

    Both are resolved configs as plain dicts (``RunConfig.model_dump(mode="json")``). ``same_data``: the data's
    fingerprints were compared and are equal, so paths may differ. Gives the allowed changes: (field, old, new).
    """
    then, now = flatten(json.loads(to_json(dict(saved)))), flatten(json.loads(to_json(dict(current))))
    changed = [(k, then.get(k, _ABSENT), now.get(k, _ABSENT)) for k in sorted(then.keys() | now.keys())]
    changed = [(k, a, b) for k, a, b in changed if a != b]
    allowed = MAY_CHANGE + (MOVED_DATA if same_data else ())
    refused = [c for c in changed if not any(c[0] == a or c[0].startswith(a + ".") for a in allowed)]
    if refused:
        raise UserError(
            "this run cannot go on with another config; these settings changed since the checkpoint:\n  "
            + "\n  ".join(f"{k}: {_show(a)} → {_show(b)}" for k, a, b in refused)
            + "\nPut them back to resume exactly, or start a new run: another run_name, or --resume never in an empty "
            "folder (model.connector.load_checkpoint can name this run to start from its connector)."
        )
    return changed


def check_same_fingerprints(saved: Mapping[str, str], current: Mapping[str, str]) -> None:
    """`UserError` naming each part (data, tower, language model, …) whose content is not that of the checkpoint."""
    changed = [k for k in saved.keys() & current.keys() if saved[k] != current[k]]
    if odd := [k for k in changed if not isinstance(saved[k], str)]:
        raise UserError(f"{TRAINER}: the fingerprints of {', '.join(odd)} are no text. {_ANOTHER}")
    if changed:
        raise UserError(
            "this run cannot go on: what is behind these parts changed since the checkpoint:\n  "
            + "\n  ".join(f"{k}: {saved[k][:12]} → {current[k][:12]}" for k in sorted(changed))
            + "\nPut the original files back, or start a new run in another folder."
        )


class _Absent:
    def __repr__(self) -> str:
        return "(not a setting)"


_ABSENT = _Absent()


def _show(value: Any) -> str:
    return repr(value) if isinstance(value, _Absent) else json.dumps(value, ensure_ascii=False)
