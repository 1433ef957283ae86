"""What a run keeps: its checkpoints, and which of them is the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from beholder.config.file import config_hash
from beholder.evidence import Candidate, Measurement
from beholder.evidence.best import best_of
from beholder.probes import collapse, golden, loss
from beholder.probes.loss import SampleLoss
from beholder.stages import panel
from beholder.stages.guard import best_limits, history, overall, read_monitors
from beholder.stages.measured import Measured
from beholder.stages.session import Session
from beholder.train import checkpoint, restore
from beholder.train.engine import LoopState
from beholder.train.optim import optimizer_tensors


def saver(session: Session, optimizer: torch.optim.Optimizer, state: LoopState) -> Callable[[int], None]:
    """``save(step)`` for the loop: what was learned, optimizer, position; nothing frozen.

    The best checkpoint so far gets its pointer here, so that pruning spares it from the next save on.
    """

    def save(step: int) -> None:
        checkpoint.save_checkpoint(
            session.run.checkpoints,
            step,
            session.model.trained_state(),
            optimizer_state=optimizer_tensors(optimizer),
            trainer={
                "config": session.cfg.model_dump(mode="json"),
                "config_hash": config_hash(session.cfg),
                "data_cursor": step * session.cfg.effective_batch,
                "fingerprints": session.fingerprints,
                "loop": state.as_dict(),
            },
            keep=session.cfg.train.keep_checkpoints,
        )
        point_to_best(session)

    return save


def candidates(session: Session) -> list[Candidate]:
    """What was measured at each checkpoint of the run so far, oldest first."""
    found = [Candidate.model_validate(r["candidate"]) for r in session.run.metrics() if "candidate" in r]
    return sorted({c.step: c for c in found}.values(), key=lambda c: c.step)


def point_to_best(session: Session) -> int | None:
    """Make the pointer name the best candidate that is on disk; its step, or None when none may be the best."""
    folder = session.run.checkpoints
    on_disk, rule = checkpoint.steps_on_disk(folder), session.cfg.stage_record.best
    best = best_of(candidates(session), on_disk, rule, best_limits(session))
    if best is None:
        checkpoint.clear_best(folder)
        return None
    if (checkpoint.best_facts(folder) or {}).get("step") != best.step:
        checkpoint.set_best(folder, best.step, best.model_dump(mode="json"))
    return best.step


def candidate(session: Session, m: Measured, *, write: bool, monitors: Mapping[str, float] | None = None) -> Candidate:
    """The checkpoint of ``m.step`` as a candidate for the run's best: its loss, image reliance and golden outputs.

    Where ``m`` holds no ablation, the shuffled images are shown. ``write``: whether the golden set is to be written for
    it; else only what has been written of this step is judged. ``monitors``: what they say of it.
    """
    cfg, held = session.cfg, session.held_out
    ablated: Sequence[Measurement] = m.measurements
    if not m.ablated and "shuffled" in cfg.ablation.conditions:
        indices = held.ablation_sample
        with session.phase("ablation"):
            losses = session.together.ablation_losses(
                indices, ("correct", "shuffled"), {"correct": [m.losses[i] for i in indices]}
            )
        ablated = loss.compare_conditions(losses, held.groups(indices), seed=held.seed)
    delta = next((x.value for x in ablated if x.name == "ablation.delta.shuffled" and x.stratum is None), None)
    worst: float | None = None
    if write:
        panel.write_golden(session, m.step)
    if panel.has_golden(session, m.step):
        path = golden.captions_path(session.run.qual, m.step, len(held.golden_items))
        rows = session.dist.on_main(lambda: [(r.pred_text, r.gt_text) for r in golden.load_captions(path)])
        found = collapse.symptoms([p for p, _ in rows], [t for _, t in rows], seed=held.seed)
        worst = max((s.share for s in found), default=None)
    total = loss.summarize(m.losses, "eval", seed=held.seed)[0].value
    return Candidate(step=m.step, eval_loss=total, delta_shuffled=delta, collapse=worst, monitors=dict(monitors or {}))


def settle(session: Session, total: int) -> tuple[int, list[SampleLoss]]:
    """The step of the run's best checkpoint with its weights in place, and its held-out losses.

    The last step is a candidate like those measured on the way; where it is not the best, the best one's weights are
    put back. When none may be the best it is the last, whose gates then tell why.
    """
    correct = session.eval_losses()
    read = session.dist.on_main(lambda: next((dict(r.values) for r in history(session) if r.step == total), None))
    read = overall(read_monitors(session, total)) if read is None else read
    last = candidate(session, Measured(total, correct), write=True, monitors=read)
    if session.dist.is_main and all(c.step != total for c in candidates(session)):  # told by a process that died since
        session.run.log({"step": total, "candidate": last.model_dump(mode="json")})
        session.run.sync_metrics()
    best: int | None = session.dist.on_main(lambda: point_to_best(session))
    if best is None or best == total:
        return total, correct
    restore.load_trained(session.run.checkpoints / f"step_{best}", session.model)
    session.reporter.line("best", f"step {best}: the lowest held-out loss of those that look; its weights are measured")
    return best, session.eval_losses()
