"""The start of a run: what is refused before anything is loaded, the folder, and where weights come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from beholder.config import RunConfig
from beholder.config.file import config_hash, dump_config
from beholder.probes import golden_history
from beholder.runs import RunDir, atomic_write, provenance
from beholder.stages.measure import BASELINE
from beholder.stages.session import Session
from beholder.train import checkpoint, restore, same_run
from beholder.train.distributed import Dist
from beholder.train.engine import LoopState
from beholder.types import Status, TrainedPart, UserError


def find_start(cfg: RunConfig, run: RunDir, resume: str) -> Path | None:
    """The checkpoint this run goes on from, or None for a fresh start."""
    if not resume:
        raise UserError("--resume is empty; give auto, never, or a run or checkpoint folder")
    if resume not in ("auto", "never"):
        found = checkpoint.resolve_checkpoint(resume, prefer="latest")
        latest = checkpoint.latest_checkpoint(run.checkpoints) if run.checkpoints.is_dir() else None
        if latest is not None and found.resolve() != latest.resolve():
            raise UserError(
                f"{run.path} already goes on to {latest.name}, and --resume names {found}: two histories do not fit "
                "into one folder. Choose another output_dir, or remove the later checkpoints to go back."
            )
    else:
        found = checkpoint.checkpoint_to_resume(run.checkpoints)
        if found is not None and resume == "never":
            raise UserError(
                f"{run.path} already holds checkpoints (latest {found.name}) and --resume is never: choose another "
                "run_name or output_dir, remove the folder, or use --resume auto to go on"
            )
    if found is not None:
        # Paths may only differ when the data turns out to be the same; `start_from` compares the fingerprints.
        saved = as_read_now(restore.read_trainer(found)["config"])
        same_run.check_same_config(saved, cfg.model_dump(mode="json"), same_data=True)
    return found


def as_read_now(saved: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's config with the defaults of settings that are younger than it: they are what was done before."""
    try:
        return RunConfig.model_validate_json(json.dumps(saved), strict=True).model_dump(mode="json")
    except ValidationError:  # a setting is gone or means something else; the comparison names it
        return saved


def fresh_folder(run: RunDir) -> None:
    """Remove what a run that never reached a checkpoint left: its steps are going to be made again."""
    run.trim_metrics(-1)
    for path in (
        run.path / BASELINE,
        run.checkpoints / "best.json",
        *run.splits.glob("split_*.json"),
        *run.qual.glob("step_*.jsonl"),
        run.path / "golden.jsonl",
    ):
        path.unlink(missing_ok=True)


def announce(cfg: RunConfig, run: RunDir, dist: Dist, promoted: str | None) -> None:
    """The resolved config and the provenance, before any weight is loaded."""
    run.create()
    atomic_write(run.config_path, dump_config(cfg))
    run.set_status(
        Status.RUNNING,
        run_name=cfg.run_name,
        stage=cfg.stage_name,
        config_hash=config_hash(cfg),
        promoted=promoted,
        processes=dist.world_size,
        **provenance(seed=cfg.seed, device=str(dist.device)),
    )


def base_of(cfg: RunConfig, source: Path | None) -> dict[str, TrainedPart]:
    """What earlier runs have learned and is part of this run's base: as the checkpoint says that it goes on from, or as
    ``model.lora.adapters`` says of the run it starts from."""
    if source is not None:
        return restore.read_base(source)
    origin = cfg.model.connector.load_checkpoint
    return {} if origin is None else restore.start_base(origin, cfg.model.lora.adapters)


def start_from(session: Session, source: Path | None, optimizer: torch.optim.Optimizer) -> tuple[int, LoopState]:
    """Steps already done and the loop's state, weights put in place: the written order of `train.checkpoint`."""
    if source is not None:
        done = restore.load_for_resume(source, session.model, optimizer)
        saved = restore.entry(done.trainer, "fingerprints")
        same_run.check_same_fingerprints(saved, session.fingerprints)
        if (why := session.rounded_then(saved)) is not None:
            raise UserError(
                f"{source}: {why}; going on would mix the two. Start a new run in another folder, which may go on from "
                "this one (model.connector.load_checkpoint)"
            )
        if session.dist.is_main:
            session.run.trim_metrics(done.step)
            for step, path in golden_history.steps_of(session.run.qual):
                if step > done.step:  # of a history that is made again
                    path.unlink()
        session.dist.barrier()
        session.reporter.line("resume", f"from {source} after step {done.step}")
        return done.step, LoopState.from_dict(restore.entry(done.trainer, "loop"))
    origin = session.cfg.model.connector.load_checkpoint
    if origin is not None:
        where = checkpoint.resolve_checkpoint(origin)
        became = restore.load_start(where, session.model, session.cfg.model.lora.adapters)
        session.reporter.line("start", f"from {where}")
        if became is not None:
            session.reporter.line("adapters", became)
            session.dist.on_main(lambda: session.run.set_status(Status.RUNNING, adapters=became))
    return 0, LoopState()
