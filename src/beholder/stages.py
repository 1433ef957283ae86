"""A stage from start to evidence, on one page: `train_and_measure`. The commands that read a run are beside it.

Each line of it names a room; what a room does stands there. Which checkpoint a run starts from is written
down in `train.checkpoint`.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from beholder.config import RunConfig
from beholder.configfile import config_hash, diff_configs, dump_config, load_config
from beholder.data import build_data
from beholder.data.preview import PreviewItem, preview
from beholder.evidence import (
    Cost,
    DataFacts,
    Evidence,
    Measurement,
    Prediction,
    Sample,
    Status,
    TextOnly,
    TrainableRow,
    load_evidence,
    thin,
    thumbnail,
)
from beholder.model.connector import resolve_num_tokens
from beholder.model.language import load_tokenizer
from beholder.model.plan import ALIGN, TrainableTable, apply_train_plan, frozen_fingerprint, param_groups
from beholder.model.vision import load_vision
from beholder.probes import captions, golden, loss, textonly
from beholder.report import render
from beholder.runs import RunDir, atomic_write, now, provenance, to_json
from beholder.train import checkpoint
from beholder.train.distributed import Dist, init_distributed, shutdown_distributed
from beholder.train.engine import LoopState, Record, fit
from beholder.train.guardrails import NonFiniteError
from beholder.train.objectives import next_token
from beholder.train.optim import build_optimizer, optimizer_tensors
from beholder.types import UserError
from beholder.workbench import Workbench, open_bench

BASELINE = "baseline.json"
GREEDY = captions.GREEDY
NOT_YET = (
    "Hallucination rate (CHAIR), question-answer sanity set, CLIPScore, noise-image loss, gates: not measured; they "
    "come with stage 1.1.",
)
NUM_SHOWN = 24
"""Samples with pictures in the report when there is no golden set."""


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


def run_stage(cfg: RunConfig, *, resume: str = "auto") -> Outcome:
    """Run a stage: build, start or resume, measure, train, measure again, write the evidence and the report.

    ``resume``: ``auto`` goes on from the run folder's latest verified checkpoint if there is one; ``never`` refuses a
    folder that has one; anything else is a checkpoint to go on from. Raises `UserError` for wrong input and
    `NonFiniteError` when the loss or a gradient is not finite; ``run.json`` says how it ended in every case.
    """
    dist = init_distributed(cfg.device)
    run = RunDir(cfg.run_dir)
    try:
        with stop_signals(), sole_writer(run, dist):
            source = find_start(cfg, run, resume)
            if dist.on_main(lambda: is_finished(run, source)):
                known = load_evidence(run.path)
                return Outcome(run.path, known.status, known.cost.steps, None, known, dist.is_main, again=True)
            with honest_status(run, dist):  # from here on it is this run's record; a refused command leaves it alone
                return train_and_measure(cfg, run, dist, source)
    finally:
        shutdown_distributed()


def train_and_measure(cfg: RunConfig, run: RunDir, dist: Dist, source: Path | None) -> Outcome:
    """The page: build, start or resume from ``source``, measure, train, measure again."""
    if source is None:
        dist.on_main(lambda: fresh_folder(run))
    dist.on_main(lambda: announce(cfg, run, dist))

    bench = open_bench(cfg, run, dist, split_file=run.splits / split_name(cfg))  # what, on what
    table = apply_train_plan(bench.model, ALIGN)  # what learns
    bench.reporter.line("plan", "\n" + str(table))
    optimizer = build_optimizer(
        param_groups(bench.model, asdict_of(cfg.train.lr), asdict_of(cfg.train.weight_decay)), cfg.train.betas
    )
    start, state = start_from(bench, source, optimizer)  # from where
    bench.resumed = start > 0
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

    evidence = write_evidence(bench, table, before, step=total, status=Status.SUCCEEDED)
    return Outcome(run.path, Status.SUCCEEDED, total, evidence=evidence, is_main=dist.is_main)


def evaluate_run(folder: str, overrides: list[str] | None = None) -> Outcome:
    """Measure the latest checkpoint of a run again and rewrite its evidence and report.

    ``overrides``: settings of ``eval``, ``ablation`` and the like; one that changes what was trained is refused.
    """
    path = run_folder(folder)
    saved = load_config(path / "config.yaml")
    cfg = load_config(path / "config.yaml", overrides or [])
    measured_only = ("eval.", "ablation.", "features.", "device", "train.num_threads", "data.num_workers")
    # Parts and data may have been moved; fingerprints, not paths, say whether they are the same.
    moved = ("model.llm.name_or_path", "model.vision.name_or_path", "model.vision.weights", *checkpoint.MOVED_DATA)
    refused = [f for f, _, _ in diff_configs(saved, cfg) if not f.startswith(measured_only + moved)]
    if refused:
        raise UserError(
            f"{', '.join(refused)}: evaluate can only change how a run is measured (eval.*, ablation.*, features.*, "
            "device, threads, workers) or where its parts and data lie; start a new run to train with other settings"
        )
    dist = init_distributed(cfg.device)
    run = RunDir(path)
    try:
        with stop_signals(), sole_writer(run, dist):
            status = run.read_status()  # measuring a stopped run does not finish it
            where = checkpoint.resolve_checkpoint(path)
            bench = open_bench(cfg, run, dist, split_file=run.splits / split_name(cfg))
            table = apply_train_plan(bench.model, ALIGN)
            checkpoint.load_connector(where, bench.model.connector, bench.model.connector_info())
            trainer = checkpoint.read_trainer(where)
            checkpoint.check_same_fingerprints(trainer["fingerprints"], bench.fingerprints)
            step = int(trainer["step"])
            bench.fill_features(0, 0)
            before = measure_before(bench, fresh=False)
            known = load_evidence(path).cost if (path / "evidence.json").is_file() else None
            evidence = write_evidence(bench, table, before, step=step, status=status, known=known)
            return Outcome(run.path, evidence.status, step, evidence=evidence, is_main=dist.is_main)
    finally:
        shutdown_distributed()


# ---------------------------------------------------------------------------------------------------------------
# Before: the folder, where to start, what is measured first


def split_name(cfg: RunConfig) -> str:
    """``split_seed{seed}_eval{n}.json``, n as asked for."""
    return f"split_seed{cfg.seed}_eval{cfg.data.eval_size or cfg.data.eval_ratio or 'default'}.json"


def run_folder(name: str) -> Path:
    """The folder of a finished or interrupted run, or a `UserError` that says what is missing."""
    path = Path(name)
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is not a run folder: it has no config.yaml. Give the output_dir of a run.")
    return path


@contextmanager
def stop_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process like an exception, so that its record and lock are put in order.

    Inside the training loop `train.engine` takes over: there they finish the step and save.
    """

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals nowhere else
        numbers = []
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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
        status = Status.STOPPED_BY_GUARDRAIL if isinstance(e, NonFiniteError) else Status.FAILED
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
        found = checkpoint.resolve_checkpoint(resume)
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
        saved = checkpoint.read_trainer(found)["config"]
        checkpoint.check_same_config(saved, cfg.model_dump(mode="json"), same_data=True)
    return found


def is_finished(run: RunDir, source: Path | None) -> bool:
    """Whether the run's last step was trained and its evidence written: then there is nothing left to do."""
    if source is None or not (run.path / "evidence.json").is_file():
        return False
    record = run.read_json("run.json")
    return record.get("status") == Status.SUCCEEDED and record.get("step") == checkpoint.read_trainer(source)["step"]


def fresh_folder(run: RunDir) -> None:
    """Remove what a run that never reached a checkpoint left: its steps are going to be made again."""
    run.trim_metrics(-1)
    for path in (run.path / BASELINE, *run.splits.glob("split_*.json"), *run.qual.glob("step_*.jsonl")):
        path.unlink(missing_ok=True)


def announce(cfg: RunConfig, run: RunDir, dist: Dist) -> None:
    """The resolved config and the provenance, before any weight is loaded."""
    run.create()
    atomic_write(run.config_path, dump_config(cfg))
    run.set_status(
        Status.RUNNING,
        run_name=cfg.run_name,
        stage=cfg.stage_name,
        config_hash=config_hash(cfg),
        processes=dist.world_size,
        **provenance(seed=cfg.seed, device=str(dist.device)),
    )


def start_from(bench: Workbench, source: Path | None, optimizer: Any) -> tuple[int, LoopState]:
    """Steps already done and the loop's state, weights put in place: the written order of `train.checkpoint`."""
    info = bench.model.connector_info()
    if source is not None:
        done = checkpoint.load_for_resume(source, bench.model.connector, info, optimizer)
        checkpoint.check_same_fingerprints(done.trainer["fingerprints"], bench.fingerprints)
        if bench.dist.is_main:
            bench.run.trim_metrics(done.step)
        bench.dist.barrier()
        bench.reporter.line("resume", f"from {source} after step {done.step}")
        return done.step, LoopState.from_dict(done.trainer["loop"])
    origin = bench.cfg.model.connector.load_checkpoint
    if origin is not None:
        where = checkpoint.resolve_checkpoint(origin)
        checkpoint.load_connector(where, bench.model.connector, info)
        bench.reporter.line("start", f"connector of {where}")
    return 0, LoopState()


def saver(bench: Workbench, optimizer: Any, state: LoopState) -> Callable[[int], None]:
    """``save(step)`` for the loop: connector, optimizer, position; nothing frozen."""

    def save(step: int) -> None:
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
        )

    return save


@dataclass(frozen=True)
class Before:
    """What was measured before training."""

    measurements: list[Measurement]
    frozen: dict[str, str]
    text: textonly.TextLogits


def measure_before(bench: Workbench, *, fresh: bool) -> Before:
    """Held-out loss of the untrained connector and the language model's text logits.

    The loss is measured once, at the true start, and kept in the run folder: after a resume it could not be
    measured any more. The text logits are those of the weights as loaded from their own files, in every process.
    """
    # Found out before hours of training, not after: whether the held-out images can be shuffled at all.
    for field, size in (
        ("ablation.num_samples", bench.cfg.ablation.num_samples),
        ("eval.caption_samples", bench.cfg.eval.caption_samples),
    ):
        try:
            if size:
                loss.shuffle_images(bench.data.eval_examples[:size], bench.content_key, bench.cfg.seed)
        except UserError as e:
            raise UserError(f"{field} is {size}: {e}") from e
    text = textonly.text_logits(bench.model, bench.tokenizer)
    path = bench.run.path / BASELINE
    if fresh:
        measured = bench.eval_summary(bench.eval_losses())
        if bench.dist.is_main:
            record = {"measurements": [m.model_dump(mode="json") for m in measured], "frozen": bench.frozen}
            bench.run.write_json(BASELINE, record)
        bench.reporter.eval(measured[0].value, step=0)
    elif path.is_file():
        saved = bench.run.read_json(BASELINE)
        try:
            measured = [Measurement.model_validate(m) for m in saved["measurements"]]
            return Before(measured, dict(saved["frozen"]), text)
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(
                f"{path} is damaged ({type(e).__name__}); what was measured before training cannot be measured again. "
                "Remove the file to go on without a baseline."
            ) from e
    else:
        measured = []
        bench.gaps.append("Baseline: not measured, because this run went on from a checkpoint of another folder.")
    return Before(measured, bench.frozen, text)


# ---------------------------------------------------------------------------------------------------------------
# During: what is measured while training


class Watch:
    """Evaluations that come due between steps: a function of the step alone, so that a resume repeats them."""

    def __init__(self, bench: Workbench, total_steps: int) -> None:
        self.bench, self.total = bench, total_steps
        self.per_epoch = len(bench.data.train) / bench.cfg.effective_batch
        self.golden = bench.golden_items()
        self.quick = bench.data.quick_examples(bench.cfg.train.quick_eval_size, bench.cfg.seed)

    def on_step(self, step: int, record: Record) -> None:
        """Called by the loop after every step; the last step is measured by `write_evidence`."""
        bench, cfg = self.bench, self.bench.cfg
        if self.golden and step < self.total and self._golden_due(step):
            write_golden(bench, self.golden, step)
        if step == self.total:
            return
        ablate = self._due(cfg.ablation.run_every, step)
        if ablate or self._due(cfg.train.full_eval_every, step):
            losses = bench.eval_losses()
            self._told(step, "eval_loss", losses)
            if ablate:
                self._log(step, {m.name: m.value for m in bench.ablation(losses)})
        elif cfg.train.quick_eval_size and cfg.train.quick_eval_steps and step % cfg.train.quick_eval_steps == 0:
            with bench.phase("evaluation"):
                self._told(step, "quick_eval_loss", bench.losses(self.quick))

    def _told(self, step: int, name: str, losses: list[loss.SampleLoss]) -> None:
        measured = loss.summarize(losses, "eval", seed=self.bench.cfg.seed)
        self.bench.reporter.eval(measured[0].value, step=step)
        self._log(step, {name: measured[0].value, "eval_examples": len(losses)})

    def _log(self, step: int, values: dict[str, float]) -> None:
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


def write_golden(bench: Workbench, items: list[tuple[int, golden.GoldenItem]], step: int) -> None:
    """Caption the fixed set and store it as ``qual/step_{n}_golden{m}.jsonl``."""
    e = bench.cfg.eval
    with bench.phase("captions"):
        records = bench.captions(
            [bench.data.eval_examples[i] for i, _ in items], e.golden_generate, "correct", e.golden_batch_size
        )
    if bench.dist.is_main:
        rows = golden.join([item for _, item in items], records)
        golden.save(golden.captions_path(bench.run.qual, step, len(items)), rows)


# ---------------------------------------------------------------------------------------------------------------
# After: evidence and report


def write_evidence(
    bench: Workbench,
    table: TrainableTable,
    before: Before,
    *,
    step: int,
    status: Status,
    known: Cost | None = None,
) -> Evidence:
    """Measure the trained model and write ``evidence.json``, ``metrics.json``, ``report.html`` and ``report.md``.

    ``known``: what the training cost, when an earlier process has told it already.
    """
    cfg, data, run = bench.cfg, bench.data, bench.run
    say = bench.reporter
    correct = bench.eval_losses()
    measured = bench.eval_summary(correct)
    say.eval(measured[0].value, step=step)
    if bench.dist.is_main:
        run.log({"step": step, "eval_loss": measured[0].value, "eval_examples": len(data.eval_examples)})
    measured += bench.ablation(correct)

    records: list[captions.CaptionRecord] = []
    n = min(cfg.eval.caption_samples, len(data.eval_examples))
    if n:
        with bench.phase("captions"):
            for condition in ("correct", "shuffled", "zero"):
                records += bench.captions(data.eval_examples[:n], GREEDY, condition, cfg.eval.batch_size)
        measured += captions.score(records, seed=cfg.seed)
    else:
        bench.gaps.append("Captions: none were generated (eval.caption_samples is 0).")
    items = bench.golden_items()
    if items:
        write_golden(bench, items, step)

    text = textonly.compare(before.text, textonly.text_logits(bench.model, bench.tokenizer))
    after = frozen_fingerprint(bench.model)
    _say_figures(bench, measured, text)
    bench.dist.barrier()
    return bench_evidence(bench, table, before, after, measured, records, items, text, step, status, known)


def bench_evidence(
    bench: Workbench,
    table: TrainableTable,
    before: Before,
    after: dict[str, str],
    measured: list[Measurement],
    records: list[captions.CaptionRecord],
    items: list[tuple[int, golden.GoldenItem]],
    text: TextOnly,
    step: int,
    status: Status,
    known: Cost | None,
) -> Evidence:
    """The measurements with everything that is needed to read them; the main process writes them down."""
    cfg, run, c = bench.cfg, bench.run, bench.data.counts
    steps = [r for r in run.metrics() if "step" in r]
    trained = [r for r in steps if "step_time_s" in r and r["step"] <= step]
    evidence = Evidence(
        run_name=cfg.run_name,
        stage=cfg.stage_name,
        status=status,
        created=now(),
        summary={
            "Language model": _short(bench.model.language.name),
            "Vision tower": _short(cfg.model.vision.name_or_path),
            "Connector": f"{cfg.model.connector.resampler.kind}, {bench.model.num_visual_tokens} visual tokens",
        },
        trainable=[
            TrainableRow(**asdict(r), sha256_before=before.frozen.get(r.part), sha256_after=after.get(r.part))
            for r in table.rows
        ],
        data=DataFacts(
            records=c["records"] + (c["eval_records"] if cfg.data.eval_sources else 0),
            train=c["train"],
            eval=c["eval"],
            sources=c["sources"],
            rejects=c["rejects"],
            duplicates=c["duplicates"],
            eval_buckets=c["eval_buckets"],
            truncated_pct=_weighted(trained, "truncated_pct", "samples"),
            label_zero_pct=_weighted(trained, "label_zero_pct", "samples"),
            eval_origin="their own files" if cfg.data.eval_sources else f"held out by split {cfg.data.split}",
            fingerprint=bench.data.train.fingerprint,
        ),
        baseline=before.measurements,
        measurements=measured,
        curves=[
            curve
            for name, unit, key in (
                ("train.loss", "nats/token", "loss"),
                ("eval.loss", "nats/token", "eval_loss"),
                ("quick_eval.loss", "nats/token", "quick_eval_loss"),
                ("lr.connector", "learning rate", "lr.connector"),
                ("grad_norm", "L2 norm", "grad_norm"),
            )
            if (curve := _curve(name, unit, key, steps, before)).x
        ],
        histograms=[captions.length_histogram(records)] if records else [],
        samples=_samples(bench, records, items, step),
        text_only=text,
        cost=known or _cost(bench, trained, step),
        provenance={k: v for k, v in run.read_json("run.json").items() if k not in ("status", "updated", "step")},
        config_yaml=dump_config(cfg),
        gaps=[*bench.gaps, *NOT_YET],
    )
    if bench.dist.is_main:
        rejects = "".join(to_json(asdict(r)) + "\n" for r in bench.data.rejects)
        atomic_write(run.path / "rejects.jsonl", rejects)
        if records:
            lines = "".join(to_json(asdict(r)) + "\n" for r in records)
            atomic_write(run.qual / f"step_{step}_captions{len(records)}.jsonl", lines)
        run.write_json("metrics.json", evidence.metrics())
        atomic_write(run.path / "evidence.json", evidence.to_json())
        render(evidence, run.path)
        run.set_status(status, step=step, phases_s=bench.phases_s)
        bench.reporter.line("report", str(run.path / "report.html"))
    return evidence


def _short(name: str) -> str:
    """A hub name as it is, a local path by its last part: reports are passed on."""
    return Path(name).name if Path(name).is_absolute() else name


def _say_figures(bench: Workbench, measured: list[Measurement], text: TextOnly) -> None:
    found = {m.name: m for m in measured if m.stratum is None}
    for name in (
        "eval.loss", "eval.perplexity", "ablation.loss.correct", "ablation.loss.shuffled", "ablation.loss.zero",
        "ablation.ratio.shuffled", "ablation.ratio.zero", "caption.exact_match.correct",
        "caption.exact_match.shuffled", "caption.exact_match.zero", "caption.exact_match.chance",
        "caption.cider_d.correct",
    ):  # fmt: skip
        if m := found.get(name):
            ci = f" (95 % {m.ci95[0]:.4g} to {m.ci95[1]:.4g})" if m.ci95 else ""
            bench.reporter.line("result", f"{name} = {m.value:.4g} {m.unit}{ci}, n={m.n}")
    bench.reporter.line("result", f"text-only logits bit-equal before and after: {'yes' if text.equal else 'NO'}")


def _curve(name: str, unit: str, key: str, steps: list[Record], before: Before) -> Any:
    points = [(r["step"], r[key]) for r in steps if isinstance(r.get(key), int | float)]
    if key == "eval_loss" and before.measurements:
        points.insert(0, (0, before.measurements[0].value))
    return thin(name, unit, sorted(dict(points).items()))


def _weighted(records: list[Record], key: str, weight: str) -> float | None:
    total = sum(r[weight] for r in records)
    return sum(r[key] * r[weight] for r in records) / total if total else None


def _cost(bench: Workbench, trained: list[Record], step: int) -> Cost:
    if not trained:
        return Cost(steps=step, device=str(bench.dist.device), processes=bench.dist.world_size)
    seconds = sum(r["step_time_s"] for r in trained)
    samples, images = sum(r["samples"] for r in trained), sum(r["images"] for r in trained)
    tokens = sum(r["tokens_per_s"] * r["step_time_s"] for r in trained)
    return Cost(
        steps=step,
        epochs=trained[-1]["epoch"],
        samples=samples,
        images=images,
        tokens=round(tokens),
        target_tokens=sum(r["tokens"] for r in trained),
        wall_s=None if bench.resumed else sum(bench.phases_s.values()),  # the earlier process took its time along
        train_s=seconds,
        phases_s=bench.phases_s,
        step_s=seconds / len(trained),
        samples_per_s=samples / seconds,
        images_per_s=images / seconds,
        tokens_per_s=tokens / seconds,
        data_wait_share=_weighted(trained, "data_wait_share", "step_time_s"),
        peak_memory_mb=max(r["peak_memory_mb"] for r in trained),
        feature_store_mb=bench.fill.bytes_used / 1e6 if bench.fill else None,
        device=str(bench.dist.device),
        processes=bench.dist.world_size,
    )


def _samples(
    bench: Workbench, records: list[captions.CaptionRecord], items: list[tuple[int, golden.GoldenItem]], step: int
) -> list[Sample]:
    """Pictures with what the model wrote over the steps, and what it writes with the wrong image."""
    if not bench.dist.is_main:
        return []
    data = bench.data
    shown = [i for i, _ in items][:NUM_SHOWN] or list(range(min(NUM_SHOWN, len(data.eval_examples))))
    ids = {data.eval_examples[i].id: i for i in shown}
    told: dict[str, list[Prediction]] = {id: [] for id in ids}
    pattern = f"step_*_golden{len(items)}.jsonl"
    for path in sorted(bench.run.qual.glob(pattern), key=lambda p: int(p.name.split("_")[1])):
        at = int(path.name.split("_")[1])
        if at <= step:
            for row in golden.load_captions(path):
                if row.id in told:
                    told[row.id].append(Prediction(step=at, text=row.pred_text))
    for r in records:
        if r.id in told and (r.condition != "correct" or not items):
            told[r.id].append(Prediction(step=step, text=r.prediction, condition=r.condition))
    return [
        Sample(
            id=id,
            images=[thumbnail(data.pipeline.open(ref)) for ref in data.eval_examples[i].images],
            reference=data.eval_examples[i].target_text,
            predictions=told[id],
            bucket=data.eval_buckets[i],
        )
        for id, i in ids.items()
    ]


def preview_config(cfg: RunConfig, num: int, folder: Path, console: Console | None = None) -> list[PreviewItem]:
    """Show the first ``num`` training samples of a config as the model gets them; only the tower is loaded."""
    tower = load_vision(cfg.model.vision, torch.device("cpu"))
    num_visual_tokens = resolve_num_tokens(cfg.model.connector, tower.geometry.num_patches)
    data = build_data(cfg, load_tokenizer(cfg.model.llm), tower.geometry, num_visual_tokens)
    examples = [data.train.example_at(p) for p in range(min(num, len(data.train)))]
    return preview(examples, data.builder(None, train=True, cfg=cfg), folder, console)


def asdict_of(section: Any) -> dict[str, float]:
    """Peak learning rates or weight decays by part name."""
    return dict(section.model_dump())


__all__ = ["Outcome", "evaluate_run", "preview_config", "run_stage"]
