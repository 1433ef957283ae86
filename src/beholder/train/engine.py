"""The one training loop, and the only backward pass of the package.

It takes parts (model, objective, stream, optimizer) and knows no stage, no probe and no config beyond the train
section. What is minimised is in `objectives`, who learns in `model.plan`, where samples come from in `data.collate`.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from beholder.config import TrainConfig
from beholder.runs import RunDir, hang_up_signals, stop_signals
from beholder.train.distributed import Dist
from beholder.train.nonfinite import NonFiniteError, not_finite, only, samples_with_bad_loss
from beholder.train.objectives import Objective
from beholder.train.optim import lr_at, moments, named_parameters, set_lr, trainable_parameters
from beholder.train.reporter import Reporter
from beholder.types import Batch, UserError

__all__ = ["Asked", "Callback", "FitResult", "LoopState", "NonFiniteError", "StepStream", "fit"]

Record = dict[str, Any]


class StepStream(Protocol):
    """Batches of each optimizer step, a pure function of the step: `data.collate.TrainStream`."""

    @property
    def samples_per_step(self) -> int: ...

    @property
    def mixture(self) -> Sized:
        """The training samples; their number makes an epoch."""
        ...

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """The micro-batches of this process for steps ``start`` to ``stop - 1`` (0-based)."""
        ...


@dataclass(frozen=True)
class Asked:
    """What a callback wants of the loop, on every process alike."""

    keep: bool = False
    """A checkpoint of this step, although none is due."""
    stop: str = ""
    """Why training ends with this step, whose checkpoint is then written; empty: it goes on."""


class Callback(Protocol):
    """Called on every process after every optimizer step, before the checkpoint of that step is written."""

    def on_step(self, step: int, record: Record) -> Asked | None: ...


@dataclass
class LoopState:
    """The loop's memory besides weights, optimizer and step. Save `as_dict`, give `from_dict` back on resume."""

    loss_scale: float = 2.0**16
    """fp16 only: what the loss is multiplied with so that small gradients do not vanish. A power of two: exact."""
    clean_steps: int = 0
    """fp16 only: steps since the scale last changed."""
    pending: Record | None = None
    """Record of a step whose callbacks were put off because the run was told to stop. They come first on resume."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoopState:
        """Of `as_dict`. Raises `UserError` for anything else."""
        numbers = [values.get("loss_scale"), values.get("clean_steps")]
        if (
            values.keys() != cls().as_dict().keys()
            or not all(isinstance(n, int | float) for n in numbers)
            or not isinstance(values["pending"], dict | None)
        ):
            raise UserError(f"the loop's state in trainer.json is {str(values)[:80]}; use another step of the same run")
        return cls(**values)


@dataclass(frozen=True)
class FitResult:
    step: int
    """Optimizer steps done, counted from the start of the run."""
    status: Literal["succeeded", "cancelled", "stopped"]
    """cancelled: a signal asked the run to stop; stopped: a callback did. A checkpoint of ``step`` has been saved."""
    signal: int | None = None
    """The signal's number when cancelled: the command exits with 128 + it (130 for Ctrl-C, 143 for SIGTERM)."""
    steps_run: int = 0
    last: Record | None = None
    """Record of the last step this call ran."""


def fit(
    model: torch.nn.Module,
    objective: Objective,
    stream: StepStream,
    *,
    cfg: TrainConfig,
    total_steps: int,
    optimizer: torch.optim.Optimizer,
    run: RunDir,
    seed: int,
    save: Callable[[int], None],
    dist: Dist | None = None,
    start_step: int = 0,
    state: LoopState | None = None,
    callbacks: Sequence[Callback] = (),
    reporter: Reporter | None = None,
) -> FitResult:
    """Train from ``start_step`` to ``total_steps`` optimizer steps, or until a signal.

    A step: pull its micro-batches; count its supervised tokens over all processes; for each micro-batch, loss sum
    divided by that count, and backward; sum gradients over processes; stop if anything is not finite; clip; set the
    learning rate; AdamW; stop if what learns is not finite; log; callbacks; save when due. Because the one divisor is
    known before the first backward, accumulation and processes give the gradient of one large batch (no mean of means).

    ``save(step)`` writes a checkpoint; it is called on the main process only, after ``metrics.jsonl`` is flushed. A run
    is exactly resumable when it saves weights, ``optimizer_tensors`` and ``state.as_dict()``: order and dropout are
    functions of (seed, step, rank), not of a generator's past.

    SIGTERM or SIGINT: the step is finished and saved, and the result says ``cancelled``; a second signal ends training
    at once (`KeyboardInterrupt`, or `SystemExit` 143). Raises `NonFiniteError` with the sample ids, before the weights
    are touched, or with the weights, before they are saved, and `UserError` from data or disk; on several processes all
    of them stop.
    """
    dist = dist or Dist()
    state = state if state is not None else LoopState()
    steps_per_epoch = len(stream.mixture) / stream.samples_per_step
    reporter = reporter or Reporter(
        total_steps=total_steps, steps_per_epoch=steps_per_epoch, samples_per_step=stream.samples_per_step,
        log_every=cfg.log_every, progress_percent=cfg.progress_percent,
        live=False if cfg.tqdm_disable else None, enabled=dist.is_main,
    )  # fmt: skip
    fp16 = cfg.precision == "fp16"
    parameters = trainable_parameters(optimizer)
    device = parameters[0].device
    step, record, why = start_step, None, ""

    signals = _Signals(dist)
    with stop_signals(signals.handle, signal.SIGINT), reporter:
        reporter.start(start_step)
        if state.pending is not None:
            pending, state.pending = state.pending, None
            why = _ask(callbacks, start_step, pending).stop
        last = start_step if why else total_steps
        batches_of_step = iter(stream.steps(start_step, last))
        for step in range(start_step + 1, last + 1):
            # -- data
            started = time.perf_counter()
            batches = _pull(batches_of_step, dist, step)
            data_wait_s = time.perf_counter() - started
            counts = _count(batches, dist)
            rejected = _rejected(batches, counts, dist)

            # -- gradients
            model.train()
            tokens = int(counts["tokens"])
            loss: float | None = None
            parts: dict[str, float] = {}
            weights: Mapping[str, float] = {}
            grad_norm: float | None = None
            if tokens:
                batches = [b for b in batches if b.num_targets]
                while True:
                    scale = state.loss_scale if fp16 else 1.0
                    _seed(seed, step, dist.rank)
                    sums, weights = _accumulate(model, objective, batches, scale / tokens, dist)
                    loss, parts = sums["loss"] / tokens, {k: v / tokens for k, v in sums.items()}
                    dist.sum_gradients(parameters)
                    gradients = [p.grad for p in parameters if p.grad is not None]
                    if scale != 1.0:
                        for gradient in gradients:
                            gradient.div_(scale)
                    norm = torch.nn.utils.get_total_norm(gradients, error_if_nonfinite=False)
                    grad_norm = float(norm)
                    if np.isfinite(loss) and not np.isfinite(grad_norm) and scale > 1.0:
                        state.loss_scale, state.clean_steps = scale / 4, 0  # fp16 overflowed: the same step, smaller
                        optimizer.zero_grad(set_to_none=True)
                        continue
                    break
                if not (np.isfinite(loss) and np.isfinite(grad_norm)):
                    which = "loss" if not np.isfinite(loss) else "gradient"
                    optimizer.zero_grad(set_to_none=True)
                    culprits = _culprits(which, model, objective, batches, optimizer, seed, step, dist)
                    raise NonFiniteError(which, step, culprits)
                if cfg.grad_clip is not None:
                    torch.nn.utils.clip_grads_with_norm_(parameters, cfg.grad_clip, norm)

            # -- update
            factor = lr_at(step - 1, total_steps, cfg.warmup_ratio, cfg.lr_scheduler, cfg.min_lr_ratio)
            lrs = set_lr(optimizer, factor)
            if tokens:  # else every sample of the step was rejected: counted and named, nothing to learn from
                optimizer.step()
                _refuse_not_finite("weights", named_parameters(optimizer), step, dist)
                if fp16:
                    state.clean_steps += 1
                    if state.clean_steps >= 2000 and state.loss_scale < 2.0**24:
                        state.loss_scale, state.clean_steps = state.loss_scale * 2, 0
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            step_time_s = time.perf_counter() - started

            # -- record
            reporter.time(step_time_s)
            samples = max(counts["samples"], 1.0)
            record = {
                "step": step,
                "epoch": round(step / steps_per_epoch, 6),
                "loss": loss,
                **parts,
                **weights,
                **lrs,
                "grad_norm": grad_norm,
                **({"loss_scale": state.loss_scale} if fp16 else {}),
                "tokens": tokens,
                "positions": int(counts["positions"]),
                "samples": int(counts["samples"]),
                "images": int(counts["images"]),
                "truncated_pct": 100 * counts["truncated"] / samples,
                "label_zero_pct": 100 * counts["label_zero"] / samples,
                "padding_pct": 100 * (1 - counts["used_positions"] / max(counts["positions"], 1.0)),
                **({"rejected": rejected} if rejected else {}),
                "step_time_s": step_time_s,
                "tokens_per_s": counts["used_positions"] / step_time_s,
                "samples_per_s": counts["samples"] / step_time_s,
                "images_per_s": counts["images"] / step_time_s,
                "data_wait_share": data_wait_s / step_time_s,
                "load_s": counts["load_s"],
                "peak_memory_mb": peak_memory_mb(device),
                "eta_s": reporter.eta_s(step),
            }
            if dist.is_main:
                run.log(record)
            reporter.step(record)

            # -- callbacks, checkpoint, stop
            stop, asked = _agree(signals, dist), Asked()
            if stop is None:
                asked = _ask(callbacks, step, record)
                stop = _agree(signals, dist) if callbacks else None
            elif callbacks:
                state.pending = record
            why = asked.stop
            if step % cfg.save_every == 0 or step == total_steps or stop is not None or asked.keep or why:
                _refuse_not_finite("optimizer state", moments(optimizer), step, dist)
                dist.on_main(lambda step=step: _save(run, save, step))
            state.pending = None
            if stop is not None or why:
                break
        stop = _agree(signals, dist)  # one that came while the last checkpoint was written counts too
    status = "cancelled" if stop is not None else "stopped" if why else "succeeded"
    return FitResult(step, status, stop, step - start_step, record)


# ---------------------------------------------------------------------------------------------------------------
# The pieces of a step


def _ask(callbacks: Sequence[Callback], step: int, record: Record) -> Asked:
    """What the callbacks want, together; the first reason to stop."""
    wishes = [asked for callback in callbacks if (asked := callback.on_step(step, record)) is not None]
    return Asked(any(a.keep for a in wishes), next((a.stop for a in wishes if a.stop), ""))


def _pull(batches_of_step: Iterator[list[Batch]], dist: Dist, step: int) -> list[Batch]:
    """The step's micro-batches. An error of one process's data stops every process."""
    error: BaseException | None = None
    batches: list[Batch] = []
    try:
        batches = next(batches_of_step)
    except StopIteration:
        error = AssertionError(f"the stream ended before step {step}")
    except Exception as e:  # raised again below, on all processes
        error = e
    if dist.world_size == 1 and error is not None:
        raise error
    if dist.world_size > 1 and dist.all_reduce_sum([float(error is not None)])[0]:
        dist.raise_together(error)
    return batches


def _count(batches: Sequence[Batch], dist: Dist) -> dict[str, float]:
    """Sums over the whole effective batch, all processes; the divisor of the loss among them."""
    local = {
        "tokens": sum(b.num_targets for b in batches),
        "used_positions": sum(b.num_tokens for b in batches),
        "positions": sum(b.input_ids.numel() for b in batches),
        "samples": sum(len(b.ids) for b in batches),
        "images": sum(len(b.images) for b in batches),
        "truncated": sum(b.truncated for b in batches),
        "rejected": sum(len(b.rejected) for b in batches),
        "label_zero": sum(len(b.ids) - int(b.sample_index[b.supervise].unique().numel()) for b in batches),
        "load_s": sum(b.load_s for b in batches),
    }
    return dict(zip(local, dist.all_reduce_sum([float(v) for v in local.values()]), strict=True))


def _rejected(batches: Sequence[Batch], counts: dict[str, float], dist: Dist) -> list[list[str]]:
    """[sample id, reason] of every sample that could not be had, from all processes."""
    if not counts["rejected"]:
        return []
    mine = [list(pair) for b in batches for pair in b.rejected]
    return [pair for theirs in dist.gather_objects(mine) for pair in theirs]


def _accumulate(
    model: torch.nn.Module, objective: Objective, batches: Sequence[Batch], factor: float, dist: Dist
) -> tuple[dict[str, float], Mapping[str, float]]:
    """Add ``factor`` times the gradient of each batch's loss sum; gives the sums over all processes (fp64) of the loss
    and of the parts it is made of, and the parts' weights."""
    names = ("loss", *getattr(objective, "parts", ()))  # also on a process without a batch
    sums: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    weights: Mapping[str, float] = {}
    for batch in batches:
        terms = objective(model, batch)
        assert terms.tokens == batch.num_targets, (terms.tokens, batch.num_targets)
        (terms.total * factor).backward()
        weights = terms.settings
        for name, value in {"loss": terms.total.detach(), **terms.parts}.items():
            sums[name].append(value)
    everyone = dist.all_reduce_sum([sum(float(s) for s in own) for own in sums.values()])
    return dict(zip(names, everyone, strict=True)), weights


def _culprits(
    which: str, model: torch.nn.Module, objective: Objective, batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer, seed: int, step: int, dist: Dist,
) -> list[str]:  # fmt: skip
    """Replay the step to find the samples behind a loss or gradient that is not finite, as narrowly as possible."""
    found: list[str] = []
    alone = Dist(device=dist.device)
    _seed(seed, step, dist.rank)
    for batch in batches:
        if which == "loss":
            found += samples_with_bad_loss(model, batch)  # type: ignore[arg-type]
            continue
        for i in range(len(batch.ids)):
            sample = only(batch, i)
            if sample.num_targets:
                _accumulate(model, objective, [sample], 1.0 / sample.num_targets, alone)
            gradients = [p.grad for p in trainable_parameters(optimizer) if p.grad is not None]
            if not all(bool(torch.isfinite(g).all()) for g in gradients):
                found.append(batch.ids[i])
            optimizer.zero_grad(set_to_none=True)
    everyone = [i for ids in dist.gather_objects(found) for i in ids]
    return everyone or [i for ids in dist.gather_objects([i for b in batches for i in b.ids]) for i in ids]


def _refuse_not_finite(
    which: Literal["weights", "optimizer state"], tensors: Mapping[str, torch.Tensor], step: int, dist: Dist
) -> None:
    """`NonFiniteError` on every process when a tensor of any of them holds a NaN or an infinity."""
    mine = not_finite(tensors)
    if dist.all_reduce_sum([float(len(mine))])[0]:
        raise NonFiniteError(which, step, sorted({name for names in dist.gather_objects(mine) for name in names}))


def _save(run: RunDir, save: Callable[[int], None], step: int) -> None:
    run.sync_metrics()
    save(step)


def _seed(seed: int, step: int, rank: int) -> None:
    """Dropout of a step is a function of (seed, step, rank): nothing of the generators needs saving."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far in MB (1e6 bytes): of tensors on a CUDA device, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


# ---------------------------------------------------------------------------------------------------------------
# Signals


class _Signals:
    """Turns the first SIGTERM or SIGINT into a request to stop after the step; a second one ends the process."""

    def __init__(self, dist: Dist) -> None:
        self.received: int | None = None
        self._dist = dist
        self._pid = os.getpid()

    def handle(self, number: int, _frame: object) -> None:
        if number not in (signal.SIGTERM, signal.SIGINT):  # a closed terminal: as SIGTERM
            number = int(signal.SIGTERM)
        if os.getpid() != self._pid:  # a loader process that was forked from here
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return  # Ctrl-C reaches the whole group; the training process decides
        if self.received is not None:  # at once, by an exception; a third one does not even wait for Python
            for known in (*hang_up_signals(), signal.SIGTERM, signal.SIGINT):
                signal.signal(known, signal.SIG_DFL)
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self.received = number
        self._dist.stopping()
        name = signal.Signals(number).name
        os.write(2, f"[stop] {name}: finishing this step and saving; once more ends at once\n".encode())


def _agree(signals: _Signals, dist: Dist) -> int | None:
    """The signal to stop for, the same on every process, or None. torchrun may reach them between different steps."""
    terminate, interrupt = dist.all_reduce_sum(
        [float(signals.received == signal.SIGTERM), float(signals.received == signal.SIGINT)]
    )
    return int(signal.SIGTERM) if terminate else int(signal.SIGINT) if interrupt else None
