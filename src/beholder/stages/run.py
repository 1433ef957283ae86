"""A stage from start to evidence, on one page: `train_and_measure`.

What is done stands in the files it imports from. Which checkpoint a run starts from is written down in
`train.checkpoint`.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from beholder.config import RunConfig, decided_by
from beholder.config.file import diff_configs, load_config
from beholder.data.sources import missing_files
from beholder.evidence import Evidence, GateResult, load_evidence
from beholder.evidence.gates import unmeasurable
from beholder.model.native import NativeModel
from beholder.model.placement import render_sites
from beholder.model.plan import apply_train_plan, param_groups, plan_of
from beholder.model.weights import listed
from beholder.runs import RunDir, stop_signals, writing
from beholder.stages.begin import announce, base_of, find_start, fresh_folder, start_from
from beholder.stages.guard import check_baseline, check_history, standing_stop
from beholder.stages.keep import saver, settle
from beholder.stages.lifetime import honest_status, is_finished, sole_writer
from beholder.stages.measure import measure, measure_before
from beholder.stages.measured import Trained
from beholder.stages.session import Session, open_session
from beholder.stages.teachers import check_teachers, learning_from
from beholder.stages.watch import Watch
from beholder.train.distributed import joined
from beholder.train.engine import fit
from beholder.train.objectives import OBJECTIVES
from beholder.train.optim import build_optimizer
from beholder.train.promoted import check_promoted
from beholder.train.tracking import check_installed
from beholder.types import Status, UserError

_APART = {"run", "place", "speed"}
"""What settings decide that no result follows from."""


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
    stopped: str = ""
    """The guardrail that ended it early, in words."""
    unheard: tuple[str, ...] = ()
    """Settings that this config has otherwise than the finished run: ``eval.answer_tokens: 64 → 8``."""
    smoke: bool = False
    """Random parts and a few steps prove the plumbing and cannot pass a gate: none is judged."""

    @property
    def failed_gates(self) -> list[GateResult]:
        return [] if self.evidence is None or self.smoke else self.evidence.failed_gates

    def print(self, console: Console) -> None:
        """What a person does next; what the run measured stands in its report."""
        say = partial(console.print, markup=False, soft_wrap=True)
        report = self.folder / "report.html"
        if self.signal is not None:
            name = signal.Signals(self.signal).name
            say(f"stopped by {name} after step {self.step}; saved in {self.folder}. The same command continues.")
        elif self.again:
            say(
                f"{self.folder} had finished before; its report is {report}. To measure it again: beholder evaluate "
                f"{self.folder}. To train anew choose another output folder."
            )
        if self.stopped:
            say(
                f"\nSTOPPED BY ITS GUARDRAIL {self.stopped}. {report} is about the run's best checkpoint. The same "
                "command does not go on; to go on past it, change the guardrail or switch it off ("
                f"--set guardrails.{self.stopped.partition(':')[0]}.enable=false)."
            )
        if self.unheard:
            say(
                f"Not done with what the config says otherwise now: {'; '.join(self.unheard)}. "
                f"To measure with it: beholder evaluate {self.folder} --set KEY=VALUE."
            )
        if self.smoke and self.signal is None:
            say(
                "smoke run, on generated data and tiny random parts: everything ran; gates are not judged, it cannot "
                "pass them"
            )
        if (failed := self.failed_gates) and self.evidence is not None:
            say(
                f"\nGATES FAILED: {len(failed)} of {len(self.evidence.gates)} ({', '.join(g.name for g in failed)}). "
                f"Read {report} before you build on this run; a later stage refuses it unless it is told "
                "--promote-anyway."
            )


def run_stage(cfg: RunConfig, *, resume: str = "auto", promote_anyway: bool = False) -> Outcome:
    """Run a stage: build, start or resume, measure, train, measure again, judge, write the evidence and the report.

    ``resume``: ``auto`` goes on from the run folder's latest verified checkpoint if there is one; ``never`` refuses a
    folder that has one; anything else is a checkpoint to go on from. ``promote_anyway``: build on the checkpoint of a
    run whose gates failed. Raises `UserError` for wrong input and `NonFiniteError` when the loss or a gradient is not
    finite; ``run.json`` says how it ended in every case.
    """
    for name, study in cfg.studies.items():
        raise UserError(
            f"this config holds a {name}; run it with: beholder {study.command} CONFIG (or remove its {name} section)"
        )
    if wrong := unmeasurable(cfg.gates):
        raise UserError("; ".join(wrong))
    run = RunDir(cfg.run_dir)
    with writing(run.path):  # a name that is too long, a folder that may not be entered
        started = run.checkpoints.is_dir()
    if not started and (missing := missing_files((*cfg.data.train_sources, *cfg.data.eval_sources))):
        raise UserError(f"data: {'; '.join(missing)}")  # before any weight is fetched
    with joined(cfg.device, cfg.train.timeout_s) as dist, stop_signals(), sole_writer(run, dist):
        source = find_start(cfg, run, resume)
        dist.same_on_all_ranks("the checkpoint to go on from", str(source))
        if dist.on_main(lambda: is_finished(run, source, cfg)):
            known = load_evidence(run.path)
            saved = load_config(run.config_path)
            unheard = tuple(
                f"{f}: {a} → {b}" for f, a, b in diff_configs(saved, cfg) if not decided_by(RunConfig, f) & _APART
            )
            return Outcome(
                run.path, known.status, known.cost.steps, None, known, dist.is_main, again=True, unheard=unheard,
                stopped="" if known.stopped is None else known.stopped.sentence,
            )  # fmt: skip
        check_installed(cfg.tracking)
        if source is None:
            promoted = check_promoted(cfg, promote_anyway)
        else:  # asked when the run started
            promoted = run.read_json("run.json").get("promoted") if run.run_path.exists() else None
        with honest_status(run, dist):  # from here on it is this run's record; a refused command leaves it alone
            if source is None:
                dist.on_main(lambda: fresh_folder(run))
            dist.on_main(lambda: announce(cfg, run, dist, promoted))
            with open_session(cfg, run, dist, base_of(cfg, source)) as session:  # what, on what
                if promoted:
                    session.gap(promoted)
                if (before := cfg.stage_record.builds_on) and cfg.model.starts_from_nothing:
                    session.gap(
                        f"Starts from no earlier run: stage {cfg.stage_name} is meant to go on from a run of stage "
                        f"{before} whose gates passed (model.connector.load_checkpoint)."
                    )
                return train_and_measure(session, source)


def train_and_measure(session: Session, source: Path | None) -> Outcome:
    """The page: start or resume from ``source``, measure, train, measure again, judge."""
    cfg, run, dist = session.cfg, session.run, session.dist
    stage, model, line = cfg.stage_record, session.model, session.reporter.line
    table = apply_train_plan(model, plan_of(cfg.model, stage))  # what learns
    line("plan", "", str(table))
    for name, part in model.parts().items():
        if part.adapters:
            line("adapters", f"on {name}", render_sites(part.adapters))
        if part.unfrozen:
            line("unfrozen", f"of {name}: {listed(part.unfrozen)}")
    if isinstance(model, NativeModel) and cfg.model.connector.trainable:
        line("unfrozen", f"of its connector: {listed(model.connector.within)}")
    if model.adapters and (strength := cfg.model.lora.strength) < 1:
        line("adapters", f"outside training at {strength:g} of their strength: model.lora.strength")
    rates, decays = cfg.train.lr.model_dump(), cfg.train.weight_decay.model_dump()
    optimizer = build_optimizer(param_groups(model, rates, decays), cfg.train.betas)

    start, state = start_from(session, source, optimizer)  # from where
    save = saver(session, optimizer, state)
    if source is not None and source.parent.resolve() != run.checkpoints.resolve():
        dist.on_main(lambda: save(start))  # a checkpoint of another folder: this one must have its weights too
    total = session.data.total_steps(cfg)
    seen = start * cfg.effective_batch, total * cfg.effective_batch
    check_teachers(session, *seen)
    session.fill_features(*seen)
    session.keep_layers()
    session.track(start)
    before = measure_before(session, fresh=start == 0)  # how good is it now

    check_history(session)
    check_baseline(session)
    stop, done = standing_stop(session, total), start  # of a run that ended before its evidence was written
    if stop is None:
        with learning_from(session) as (readers, asked), session.phase("training"):
            result = fit(
                model,
                OBJECTIVES[stage.objective](cfg, total, asked),
                session.data.stream(session.store, cfg, rank=dist.rank, world_size=dist.world_size, teachers=readers),
                cfg=cfg.train,
                total_steps=total,
                optimizer=optimizer,
                run=run,
                seed=cfg.seed,
                save=save,
                dist=dist,
                start_step=start,
                state=state,
                callbacks=[Watch(session, total)],
                reporter=session.reporter,
            )
        if result.signal is not None:
            dist.on_main(lambda: run.set_status(Status.CANCELLED, step=result.step, signal=result.signal))
            return Outcome(run.path, Status.CANCELLED, result.step, result.signal, is_main=dist.is_main)
        stop, done = standing_stop(session, total) if result.status == "stopped" else None, result.step

    told = "" if stop is None else stop.sentence
    if stop is not None:
        line("guardrail", f"STOPPED {told}{f': {stop.why}' if stop.why else ''}")
    if mixed := session.data.mixture(cfg, done):
        line("mixture", ", ".join(mixed))
    best, losses = settle(session, done)  # which checkpoint is it
    status = Status.SUCCEEDED if stop is None else Status.STOPPED_BY_GUARDRAIL
    trained = Trained(best, done, status, whole=start == 0, stopped=stop)
    evidence = measure(session, table, before, trained, losses)
    return Outcome(run.path, status, done, evidence=evidence, is_main=dist.is_main, stopped=told)
