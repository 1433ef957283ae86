"""A stage from start to evidence, on one page: `train_and_measure`. The commands that read a run are beside it.

Each line of it names a room; what a room does stands there. Which checkpoint a run starts from is written
down in `train.checkpoint`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from beholder.assessment import BASELINE, assess, measure_before, summarize_step, write_golden
from beholder.config import RunConfig
from beholder.config.file import config_hash, dump_config
from beholder.data.sources import missing_files
from beholder.evidence import Candidate, Evidence, load_evidence
from beholder.evidence.best import best_of
from beholder.evidence.gates import verdict
from beholder.model.adapters import adapter_config, adapter_tensors
from beholder.model.placement import render_sites
from beholder.model.plan import apply_train_plan, frozen_fingerprint, param_groups, plan_of
from beholder.probes import golden_history, loss
from beholder.runs import RunDir, atomic_write, provenance, stop_signals
from beholder.train import checkpoint, restore, same_run
from beholder.train.distributed import Dist, init_distributed, shutdown_distributed
from beholder.train.engine import LoopState, Record, fit
from beholder.train.nonfinite import NonFiniteError
from beholder.train.objectives import next_token
from beholder.train.optim import build_optimizer, optimizer_tensors
from beholder.types import Status, UserError
from beholder.workbench import Workbench, open_bench


@dataclass(frozen=True)
class Outcome:
    """How a run ended. The command line turns it into an exit code."""

    folder: Path
    status: Status
    step: int
    signal: int | None = None
    evidence: Evidence | None = None
    is_main: bool = True
    again: bool = False
    """The run had finished before; nothing was done."""


def run_stage(cfg: RunConfig, *, resume: str = "auto", promote_anyway: bool = False) -> Outcome:
    """Run a stage: build, start or resume, measure, train, measure again, judge, write the evidence and the report.

    ``resume``: ``auto`` goes on from the run folder's latest verified checkpoint if there is one; ``never`` refuses a
    folder that has one; anything else is a checkpoint to go on from. ``promote_anyway``: build on the checkpoint of a
    run whose gates failed. Raises `UserError` for wrong input and `NonFiniteError` when the loss or a gradient is not
    finite; ``run.json`` says how it ended in every case.
    """
    if cfg.sweep is not None:
        raise UserError("this config holds a sweep; run it with: beholder sweep CONFIG (or remove its sweep section)")
    run = RunDir(cfg.run_dir)
    started = run.checkpoints.is_dir()
    if not started and (missing := missing_files((*cfg.data.train_sources, *cfg.data.eval_sources))):
        raise UserError(f"data: {'; '.join(missing)}")  # before any weight is fetched
    dist = init_distributed(cfg.device)
    try:
        with stop_signals(), sole_writer(run, dist):
            source = find_start(cfg, run, resume)
            if dist.on_main(lambda: is_finished(run, source)):
                known = load_evidence(run.path)
                return Outcome(run.path, known.status, known.cost.steps, None, known, dist.is_main, again=True)
            if source is None:
                promoted = check_promoted(cfg, promote_anyway)
            else:  # asked when the run started
                promoted = run.read_json("run.json").get("promoted") if run.run_path.exists() else None
            with honest_status(run, dist):  # from here on it is this run's record; a refused command leaves it alone
                return train_and_measure(cfg, run, dist, source, promoted)
    finally:
        shutdown_distributed()


def train_and_measure(cfg: RunConfig, run: RunDir, dist: Dist, source: Path | None, promoted: str | None) -> Outcome:
    """The page: build, start or resume from ``source``, measure, train, measure again, judge."""
    if source is None:
        dist.on_main(lambda: fresh_folder(run))
    dist.on_main(lambda: announce(cfg, run, dist, promoted))

    bench = open_bench(cfg, run, dist, split_file=run.splits / split_name(cfg))  # what, on what
    table = apply_train_plan(bench.model, plan_of(cfg.model, cfg.stage_record))  # what learns
    bench.reporter.line("plan", "\n" + str(table))
    if bench.model.adapters:
        bench.reporter.line("adapters", "\n" + render_sites(bench.model.adapters))
        if (strength := cfg.model.lora.strength) < 1:
            bench.reporter.line("adapters", f"outside training at {strength:g} of their strength: model.lora.strength")
    optimizer = build_optimizer(
        param_groups(bench.model, asdict_of(cfg.train.lr), asdict_of(cfg.train.weight_decay)), cfg.train.betas
    )
    start, state = start_from(bench, source, optimizer)  # from where
    bench.frozen = frozen_fingerprint(bench.model)  # a connector that stays as it is has its weights only now
    bench.resumed = start > 0
    bench.gaps += [promoted] if promoted else []
    save = saver(bench, optimizer, state)
    if source is not None and source.parent.resolve() != run.checkpoints.resolve():
        dist.on_main(lambda: save(start))  # a checkpoint of another folder: this one must have its weights too
    total = bench.data.total_steps(cfg)
    bench.fill_features(start * cfg.effective_batch, total * cfg.effective_batch)
    before = measure_before(bench, fresh=start == 0)  # how good is it now

    with bench.phase("training"):
        result = fit(
            bench.model,
            next_token,
            bench.data.stream(bench.store, cfg, rank=dist.rank, world_size=dist.world_size),
            cfg=cfg.train,
            total_steps=total,
            optimizer=optimizer,
            run=run,
            seed=cfg.seed,
            save=save,
            dist=dist,
            start_step=start,
            state=state,
            callbacks=[Watch(bench, total)],
            reporter=bench.reporter,
        )
    if result.signal is not None:
        dist.on_main(lambda: run.set_status(Status.CANCELLED, step=result.step, signal=result.signal))
        return Outcome(run.path, Status.CANCELLED, result.step, result.signal, is_main=dist.is_main)

    best, correct = settle(bench, total)  # which checkpoint is it
    evidence = assess(bench, table, before, step=best, trained=total, status=Status.SUCCEEDED, correct=correct)
    return Outcome(run.path, Status.SUCCEEDED, total, evidence=evidence, is_main=dist.is_main)


# ---------------------------------------------------------------------------------------------------------------
# Before: the folder, where to start, what is measured first


def check_promoted(cfg: RunConfig, anyway: bool) -> str | None:
    """Refuses to build on a run that did not pass its gates; with ``anyway``, the sentence the report must carry."""
    origin = cfg.model.connector.load_checkpoint
    if origin is None:
        return None
    where = checkpoint.resolve_checkpoint(origin)
    folder = where.parent.parent if where.parent.name == "checkpoints" else where
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


def split_name(cfg: RunConfig) -> str:
    """``split_seed{seed}_eval{n}.json``, n as asked for."""
    return f"split_seed{cfg.measure_seed}_eval{cfg.data.eval_size or cfg.data.eval_ratio or 'default'}.json"


@contextmanager
def sole_writer(run: RunDir, dist: Dist) -> Iterator[None]:
    """The main process holds the folder's lock; an error there reaches the others."""
    lock = run.lock() if dist.is_main else nullcontext()
    error: BaseException | None = None
    try:
        lock.__enter__()
    except Exception as e:
        error = e
    dist.raise_together(error)
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


@contextmanager
def honest_status(run: RunDir, dist: Dist) -> Iterator[None]:
    """Whatever ends a run early is written into ``run.json`` as what it is."""
    try:
        yield
    except BaseException as e:
        # The second is an evaluation whose loss is not finite.
        status = Status.STOPPED_BY_GUARDRAIL if isinstance(e, NonFiniteError | FloatingPointError) else Status.FAILED
        if isinstance(e, KeyboardInterrupt | SystemExit):
            status = Status.CANCELLED
        if dist.is_main and run.run_path.exists():
            run.set_status(status, error=f"{type(e).__name__}: {e}")
        raise


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
        found = checkpoint.latest_checkpoint(run.checkpoints) if run.checkpoints.is_dir() else None
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


def is_finished(run: RunDir, source: Path | None) -> bool:
    """Whether the run's last step was trained and its evidence written: then there is nothing left to do."""
    if source is None or not (run.path / "evidence.json").is_file():
        return False
    record = run.read_json("run.json")
    return record.get("status") == Status.SUCCEEDED and record.get("step") == restore.read_trainer(source)["step"]


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


def start_from(bench: Workbench, source: Path | None, optimizer: Any) -> tuple[int, LoopState]:
    """Steps already done and the loop's state, weights put in place: the written order of `train.checkpoint`."""
    info = bench.model.connector_info()
    if source is not None:
        language = bench.model.language if bench.model.adapters else None
        done = restore.load_for_resume(source, bench.model.connector, info, optimizer, language)
        same_run.check_same_fingerprints(restore.entry(done.trainer, "fingerprints"), bench.fingerprints)
        if bench.dist.is_main:
            bench.run.trim_metrics(done.step)
            for step, path in golden_history.steps_of(bench.run.qual):
                if step > done.step:  # of a history that is made again
                    path.unlink()
        bench.dist.barrier()
        bench.reporter.line("resume", f"from {source} after step {done.step}")
        return done.step, LoopState.from_dict(restore.entry(done.trainer, "loop"))
    origin = bench.cfg.model.connector.load_checkpoint
    if origin is not None:
        where = checkpoint.resolve_checkpoint(origin)
        bench.load(where)
        bench.reporter.line("start", f"from {where}")
    return 0, LoopState()


def saver(bench: Workbench, optimizer: Any, state: LoopState) -> Callable[[int], None]:
    """``save(step)`` for the loop: connector, adapters, optimizer, position; nothing frozen.

    The best checkpoint so far gets its pointer here, so that pruning spares it from the next save on.
    """

    def save(step: int) -> None:
        language = bench.model.language if bench.model.adapters else None
        checkpoint.save_checkpoint(
            bench.run.checkpoints,
            step,
            connector=bench.model.connector.state_dict(),
            connector_info=bench.model.connector_info(),
            optimizer_state=optimizer_tensors(optimizer),
            trainer={
                "config": bench.cfg.model_dump(mode="json"),
                "config_hash": config_hash(bench.cfg),
                "data_cursor": step * bench.cfg.effective_batch,
                "fingerprints": bench.fingerprints,
                "loop": state.as_dict(),
            },
            keep=bench.cfg.train.keep_checkpoints,
            adapter=None if language is None else adapter_tensors(language),
            adapter_config=None if language is None else adapter_config(language),
        )
        point_to_best(bench)

    return save


def candidates(bench: Workbench) -> list[Candidate]:
    """What was measured at each checkpoint of the run so far, oldest first."""
    found = [Candidate.model_validate(r["candidate"]) for r in bench.run.metrics() if "candidate" in r]
    return sorted({c.step: c for c in found}.values(), key=lambda c: c.step)


def point_to_best(bench: Workbench) -> int | None:
    """Make the pointer name the best candidate that is on disk; its step, or None when none may be the best."""
    folder = bench.run.checkpoints
    best = best_of(candidates(bench), checkpoint.steps_on_disk(folder))
    if best is None:
        checkpoint.clear_best(folder)
        return None
    if (checkpoint.best_facts(folder) or {}).get("step") != best.step:
        checkpoint.set_best(folder, best.step, best.model_dump(mode="json"))
    return best.step


def settle(bench: Workbench, total: int) -> tuple[int, list[loss.SampleLoss]]:
    """The step of the run's best checkpoint with its weights in place, and its held-out losses.

    The last step is a candidate like those measured on the way; where it is not the best, the best one's weights are
    put back. When none may be the best it is the last, whose gates then tell why.
    """
    correct = bench.eval_losses()
    last = summarize_step(bench, correct, total, write=True)
    if bench.dist.is_main and all(c.step != total for c in candidates(bench)):  # told by a process that died since
        bench.run.log({"step": total, "candidate": last.model_dump(mode="json")})
        bench.run.sync_metrics()
    best: int | None = bench.dist.on_main(lambda: point_to_best(bench))
    if best is None or best == total:
        return total, correct
    bench.load(bench.run.checkpoints / f"step_{best}")
    bench.reporter.line("best", f"step {best}: the lowest held-out loss of those that look; its weights are measured")
    return best, bench.eval_losses()


# ---------------------------------------------------------------------------------------------------------------
# During: what is measured while training


class Watch:
    """Evaluations that come due between steps: a function of the step alone, so that a resume repeats them."""

    def __init__(self, bench: Workbench, total_steps: int) -> None:
        self.bench, self.total = bench, total_steps
        self.per_epoch = len(bench.data.train) / bench.cfg.effective_batch
        self.golden = bench.golden_items
        self.quick = bench.examples(bench.quick_sample)

    def on_step(self, step: int, record: Record) -> bool:
        """Called by the loop after every step; the last step is measured by `settle` and `assessment.assess`.

        True when the whole held-out set was measured: such a checkpoint is a candidate for the best and must be there.
        """
        bench, cfg = self.bench, self.bench.cfg
        if step == self.total:
            return False
        full = self._due(cfg.train.full_eval_every, step)
        if cfg.stage_name == "instruct" and cfg.train.full_eval_every == "epoch":
            full |= step % cfg.train.save_every == 0
        saved = cfg.eval.run_golden_every == "save"  # as a candidate is
        if self.golden and (self._golden_due(step) or (full and saved)):
            write_golden(bench, self.golden, step)
        ablate = self._due(cfg.ablation.run_every, step)
        if ablate or full:
            losses = bench.eval_losses()
            self._told(step, "eval", losses, range(len(losses)))
            measured = bench.ablation(losses)[0] if ablate else []
            if measured:
                self._log(step, {m.key: m.value for m in measured})
            self._log(
                step, {"candidate": summarize_step(bench, losses, step, measured, write=saved).model_dump(mode="json")}
            )
            return True
        if cfg.train.quick_eval_size and cfg.train.quick_eval_steps and step % cfg.train.quick_eval_steps == 0:
            with bench.phase("evaluation"):
                self._told(step, "quick_eval", bench.losses(self.quick), bench.quick_sample)
        return False

    def _told(self, step: int, name: str, losses: list[loss.SampleLoss], indices: Sequence[int]) -> None:
        """Loss and share of exactly right targets, overall and by length or kind of question."""
        bench = self.bench
        full = len(losses) == len(bench.data.eval_examples)
        measured = bench.eval_summary(losses) if full else loss.summarize(losses, "eval", seed=0)
        by_length = {str(m.stratum): m.value for m in measured if m.name == "eval.loss" and m.by == "length"}
        exact = loss.exact_shares(losses, bench.groups(indices)["question"])
        overall = exact.pop(None)
        kinds = [(str(k), share) for k, share in exact.items()] if len(exact) > 1 else []
        bench.reporter.eval(measured[0].value, step=step, more=[*by_length.items(), ("exact", overall), *kinds])
        self._log(step, {
            f"{name}_loss": measured[0].value, "eval_examples": len(losses), f"{name}_exact": overall,
            **{f"{name}_loss_{stratum}": value for stratum, value in by_length.items()},
            **{f"{name}_exact/{kind}": share for kind, share in kinds},
        })  # fmt: skip

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if self.bench.dist.is_main:
            self.bench.run.log({"step": step, **values})

    def _golden_due(self, step: int) -> bool:
        every = self.bench.cfg.eval.run_golden_every
        if every == "save":
            return step % self.bench.cfg.train.save_every == 0
        return self._due(every, step)

    def _due(self, every: str | int, step: int) -> bool:
        if isinstance(every, int):
            return step % every == 0
        return every == "epoch" and math.floor(step / self.per_epoch) > math.floor((step - 1) / self.per_epoch)


def asdict_of(section: Any) -> dict[str, float]:
    """Peak learning rates or weight decays by part name."""
    return dict(section.model_dump())


__all__ = ["Outcome", "run_stage"]
