"""Whether a run may be built upon: asked before a run starts, and before a study of many does."""

from __future__ import annotations

from beholder.config import RunConfig
from beholder.evidence import Evidence, load_evidence
from beholder.evidence.gates import verdict
from beholder.train import checkpoint, restore
from beholder.types import Status, UserError


def check_promoted(cfg: RunConfig, anyway: bool) -> str | None:
    """Refuses to build on a run that did not pass its gates; with ``anyway``, the sentence the report must carry."""
    origin = cfg.model.connector.load_checkpoint
    if origin is None:
        return None
    where = checkpoint.resolve_checkpoint(origin)
    folder = checkpoint.run_of(where)
    if not (folder / "evidence.json").is_file():
        why = f"{folder} has no evidence.json: its run did not finish, or the checkpoint was copied out of it"
    else:
        known = load_evidence(folder)
        judged = known.cost.steps if known.step is None else known.step
        if known.promotable and judged == restore.read_trainer(where)["step"]:
            return None
        why = f"{folder}: {verdict(known)}"
        if known.promotable:
            why = f"{folder}: its gates were judged after step {judged}, not for {where.name}"
        elif known.status != Status.SUCCEEDED:
            why = f"{folder} ended as {known.status.value}"
    if anyway:
        return f"Started from {origin} with --promote-anyway: {why}."
    raise UserError(
        f"model.connector.load_checkpoint: {why}. A stage built on it inherits what is wrong; look at its report.html, "
        "or say --promote-anyway"
    )


def start_evidence(cfg: RunConfig) -> Evidence | None:
    """What the run that this one starts from says for itself; None where it starts from none, or that has none."""
    origin = cfg.model.connector.load_checkpoint
    folder = None if origin is None else checkpoint.run_of(checkpoint.resolve_checkpoint(origin))
    return load_evidence(folder) if folder is not None and (folder / "evidence.json").is_file() else None
