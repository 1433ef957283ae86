"""What a person sees while a run trains: a live bar on a terminal, the seed's log lines everywhere else.

``[data] [estimate] [progress] [eval]`` lines keep the seed's spelling, so that its log readers go on working. What is
measured is `engine`'s; the durable record of it is ``metrics.jsonl``.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)  # fmt: skip

from beholder.terminal import Terminal
from beholder.types import printable

_SMOOTHING_STEPS = 200
"""Steps the average step time remembers; the first step (warm-up of kernels and workers) is left out."""


class Reporter:
    """Prints the progress of one run. Silent when not ``enabled`` (every process but the main one).

    ``steps_per_epoch`` may be fractional. ``full_train_samples`` is the size of the whole training set, of which this
    run may use a part (``data.max_samples``): the estimate tells how long an epoch of it and the whole run on it take.
    ``live``: None decides by the terminal.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        steps_per_epoch: float,
        samples_per_step: int,
        full_train_samples: int | None = None,
        log_every: int = 20,
        progress_percent: float = 0.1,
        live: bool | None = None,
        enabled: bool = True,
        console: Console | None = None,
    ) -> None:
        self.console = console or Terminal(soft_wrap=True)
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.full_epoch_steps = (full_train_samples or steps_per_epoch * samples_per_step) / samples_per_step
        self.log_every = log_every
        self.progress_percent = progress_percent
        self.enabled = enabled
        self.live = enabled and (self.console.is_terminal if live is None else live)
        self._bar: Progress | None = None
        self._task: Any = None
        self._avg_step_s = math.nan
        self._seen = 0
        self._reported_part = -1

    # -- before and around the loop

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, step: int) -> None:
        """The loop starts after ``step`` steps (more than 0 when resumed)."""
        self._reported_part = self._part(step)
        if self.live:
            bar = Progress(
                TextColumn("[bold]step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(), TextColumn("ETA {task.fields[eta]}"),
                console=self.console, refresh_per_second=4,
            )  # fmt: skip
            self._task = bar.add_task("train", total=self.total_steps, completed=step, facts="", eta="…")
            bar.start()
            self._bar = bar

    def close(self) -> None:
        """Take the bar down; lines after this print plainly."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    # -- lines

    def line(self, tag: str, text: str, below: str = "") -> None:
        """``[tag] text``, a line whatever is in it, and a table ``below`` it; above the bar when there is one."""
        if self.enabled:
            told = f"[{tag}] {printable(text, one_line=True)}" + (f"\n{below}" if below else "")
            self.console.print(told, markup=False, highlight=False)

    def data(self, *, full_len: int, subset_train: int, subset_eval: int, full_train: int | None = None) -> None:
        """The seed's ``[data]`` line: records in the files, samples trained on, samples held out."""
        tail = "" if full_train is None else f" full_train={full_train}"
        self.line("data", f"full_len={full_len} subset_train={subset_train} subset_eval={subset_eval}{tail}")

    def eval(
        self, loss: float, *, step: int | None = None, epoch: int | None = None, more: Sequence[tuple[str, float]] = ()
    ) -> None:
        """``[eval] step=200 loss=3.9716`` or ``[eval] epoch=0 loss=3.5800``; ``more`` (name, number) follows it."""
        where = f"epoch={epoch}" if step is None else f"step={step}"
        tail = "".join(f" {k}={v:.4f}" for k, v in more)
        self.line("eval", f"{where} loss={loss:.4f}{tail}")

    def eta_s(self, step: int) -> float | None:
        """Seconds until the last step at the average pace, or None before it is known."""
        return None if math.isnan(self._avg_step_s) else (self.total_steps - step) * self._avg_step_s

    def step(self, record: Mapping[str, Any]) -> None:
        """One finished optimizer step: updates the bar, or prints a line when one is due."""
        step = int(record["step"])
        if not self.live and self.enabled and step % self.log_every == 0 and self.eta_s(step) is not None:
            self.line("estimate", self._estimate())
            self.line("train", self._facts(record))
        if self._bar is not None:
            eta = self.eta_s(step)
            self._bar.update(
                self._task, completed=step, facts=self._facts(record), eta="…" if eta is None else duration(eta)
            )
        part = self._part(step)
        if part != self._reported_part:
            self._reported_part = part
            if not self.live:
                self.line("progress", self._progress(step))

    @contextmanager
    def progress(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """A ``tick(done, total)`` for long work: see `ticking`."""
        with ticking(self.console, live=self.live, enabled=self.enabled) as tick:
            yield partial(tick, label)

    def time(self, step_time_s: float) -> None:
        """Take a finished step's seconds into the average. The first one of a process is left out: it warms up."""
        self._seen += 1
        if self._seen == 1:
            return
        n = min(self._seen - 1, _SMOOTHING_STEPS)
        previous = 0.0 if math.isnan(self._avg_step_s) else self._avg_step_s
        self._avg_step_s = previous + (step_time_s - previous) / n

    def _part(self, step: int) -> int:
        return math.floor(step / (self.steps_per_epoch * self.progress_percent) + 1e-9)

    def _progress(self, step: int) -> str:
        per_epoch = self.steps_per_epoch
        epoch = max(0, math.ceil(step / per_epoch - 1e-9) - 1)  # the step that completes an epoch belongs to it
        inside = step - epoch * per_epoch
        return f"epoch={epoch} step={inside:.0f}/{per_epoch:.0f} ({100 * inside / per_epoch:.0f}%)"

    def _estimate(self) -> str:
        epochs = self.total_steps / self.steps_per_epoch
        hours = self._avg_step_s * self.full_epoch_steps / 3600
        return f"avg_step={self._avg_step_s:.3f}s full_epoch≈{hours:.2f}h full_total≈{hours * epochs:.2f}h"

    @staticmethod
    def _facts(record: Mapping[str, Any]) -> str:
        loss = record.get("loss")
        lrs = " ".join(f"{k}={v:.2e}" for k, v in record.items() if k.startswith("lr."))
        shown = "loss=n/a" if loss is None else f"loss={loss:.4f}"
        return (
            f"step={record['step']} {shown} {lrs} grad_norm={record.get('grad_norm') or 0:.3f} "
            f"samples/s={record.get('samples_per_s', 0):.1f} tokens/s={record.get('tokens_per_s', 0):.0f} "
            f"data_wait={100 * record.get('data_wait_share', 0):.0f}%"
        )


@contextmanager
def ticking(
    console: Console, *, live: bool | None = None, enabled: bool = True
) -> Iterator[Callable[[str, int, int], None]]:
    """A ``tick(label, done, total)`` for long work: a bar a label with its ETA on a terminal, else a line every tenth.

    Work that takes less than two seconds is silent where lines are printed.
    """
    if console.is_terminal if live is None else live:
        bar = Progress(
            TextColumn("[bold]{task.description}"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
            console=console, transient=True,
        )  # fmt: skip
        with bar:
            tasks: defaultdict[str, TaskID] = defaultdict(lambda: bar.add_task("", total=None))
            yield lambda label, done, total: bar.update(tasks[label], description=label, completed=done, total=total)
        return
    started: dict[str, float] = {}
    last: dict[str, int] = {}

    def tick(label: str, done: int, total: int) -> None:
        elapsed = time.perf_counter() - started.setdefault(label, time.perf_counter())
        share = done / max(total, 1)
        if enabled and elapsed > 2 and int(10 * share) != last.get(label, 0):
            last[label] = int(10 * share)
            eta = duration(elapsed * (total - done) / max(done, 1))
            text = f"[progress] {label} {done}/{total} ({int(100 * share)}%) ETA {eta}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    yield tick


def duration(seconds: float) -> str:
    """``1:05:09`` or ``5:09``."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"
