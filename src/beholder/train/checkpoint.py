"""Checkpoints: written so that no crash can spoil them, read only when their hashes hold.

A checkpoint is a folder ``step_<n>`` with what was learned, by part (the connector; of language model and tower the
adapters if there are any, those that were merged into the base, and weights that learned themselves), the optimizer
state and the position in the run, as safetensors and JSON; never a pickle. The language model's adapters lie in it as
PEFT writes them, so ``PeftModel.from_pretrained(base, "…/step_<n>")`` reads the folder. What is trained and when it is
saved is decided elsewhere; so is which step is the best, which ``best.json`` beside the folders remembers.

Where a stage's weights come from, in this order (`stages` follows it):
1. resume this run: the latest checkpoint of the same run folder (``--resume auto``), or the one that is named;
2. start from another run: ``model.connector.load_checkpoint``, its connector, its base (with what was merged into it,
   and weights of tower and student that learned themselves) and, where it has any, its adapters as
   ``model.lora.adapters`` says: they go on learning, are merged into the base, or are dropped (a run of stage align has
   none, so new ones start); optimizer and step fresh;
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
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import psutil
import safetensors
import safetensors.torch
from torch import Tensor

from beholder.runs import Warn, atomic_write, fsync_dir, sha256_file, to_json, warn_to_stderr, write_durably, writing
from beholder.types import TrainedPart, UserError

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


def part_files(part: str) -> tuple[str, str]:
    """Files of a part of what was learned: its weights, and what it was made for."""
    return (ADAPTER, ADAPTER_CONFIG) if part == "adapter" else (f"{part}.safetensors", f"{part}.json")


_CONNECTOR_AND_STATE = {CONNECTOR, CONNECTOR_INFO, OPTIMIZER, TRAINER}


def parts_in(files: Iterable[str]) -> list[str]:
    """Names of the parts, besides the connector, of which a manifest lists a file."""
    stems = {Path(name).stem for name in files if name not in _CONNECTOR_AND_STATE}
    own = {Path(ADAPTER).stem, Path(ADAPTER_CONFIG).stem}
    return sorted({"adapter" if stem in own else stem for stem in stems})


# ---------------------------------------------------------------------------------------------------------------
# Save


def save_checkpoint(
    folder: Path,
    step: int,
    parts: Mapping[str, TrainedPart],
    *,
    optimizer_state: Mapping[str, Tensor],
    trainer: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write ``folder/step_<step>`` so that at every instant at least the checkpoints of before are whole.

    Files go into ``.tmp-<step>-<pid>/`` and are flushed, then a manifest of sizes and hashes, then the folder; only
    then it gets its name, and only then old ones beyond the newest ``keep`` (at least 2) are removed; the one marked as
    best never is. ``parts``: what was learned (`VisionLanguageModel.trained_state`), the connector among it.
    ``trainer`` carries ``config`` (resolved, as a dict), ``config_hash`` and ``data_cursor`` besides whatever
    the caller needs to go on. A disk that is full or takes nothing is a `UserError`; the earlier checkpoints stay as
    they are.
    """
    assert keep >= 2, keep
    assert "connector" in parts, sorted(parts)
    with writing(folder):
        folder.mkdir(exist_ok=True)  # not its parents: a run folder that was removed meanwhile is not made anew
        _clean_leftovers(folder)
    payloads = {
        OPTIMIZER: safetensors.torch.save(_plain(optimizer_state)),
        TRAINER: (to_json({**trainer, "step": step}, indent=2) + "\n").encode(),
    }
    for part, learned in parts.items():
        tensors, facts = part_files(part)
        # One entry only: safetensors writes several in random order, and equal weights should be equal files.
        form = FORMAT if part == "connector" else "pt"
        payloads[tensors] = safetensors.torch.save(_plain(learned.tensors), metadata={"format": form})
        payloads[facts] = (to_json(dict(learned.facts), indent=2) + "\n").encode()
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
        with writing(temporary):
            temporary.mkdir()
        for name, payload in payloads.items():
            write_durably(temporary / name, payload)
        write_durably(temporary / MANIFEST, (to_json(manifest, indent=2) + "\n").encode())
        fsync_dir(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    aside = folder / f".old-{step}-{os.getpid()}"
    with writing(final):
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
        for name in files:
            if Path(name).name != name:
                return f"its manifest names a file outside the folder: {name!r}"
        missing_entries = _CONNECTOR_AND_STATE - set(files)
        for part in parts_in(files):
            missing_entries |= set(part_files(part)) - set(files)
        if missing_entries:
            return f"its manifest does not list {', '.join(sorted(missing_entries))}"
        for name, facts in files.items():
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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
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


def checkpoint_to_resume(folder: Path, *, warn: Warn = warn_to_stderr) -> Path | None:
    """`latest_checkpoint`, for who would start afresh without one: None only where there is nothing to go on from.

    Raises `UserError` with the reason of each where there are checkpoints and none verifies: what a run has learned is
    thrown away by a person, never by a command that was meant to go on.
    """
    found = latest_checkpoint(folder, warn=warn)
    if found is None and (steps := _steps(folder)):
        raise UserError(
            f"no usable checkpoint in {folder}; every one was tried:\n  "
            + "\n  ".join(f"{path.name}: {problem(path)}" for _, path in steps)
            + "\nPut one of them back from a copy, or name another place with --resume. To start afresh choose another "
            f"run_name or output_dir, or remove {folder}."
        )
    return found


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
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
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
    found = checkpoint_to_resume(inside, warn=warn)
    if found is None:
        raise UserError(f"no usable checkpoint in {inside}: it holds no step_<n> folder")
    return found


def run_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint folder lies in; the folder itself where it was copied out of one."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
