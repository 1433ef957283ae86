"""The processes of a study: as many runs at a time as there are devices, each asked once to stop."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.text import Text

from beholder.config.file import dump_config
from beholder.evidence import load_evidence
from beholder.report.words import duration
from beholder.runs import atomic_write, held, is_held, now, stop_signals
from beholder.studies.points import Point, Points, check_folders, is_finished, needs
from beholder.types import UserError, printable

RESULTS = (0, 3, 4)
"""Exit codes of a run that left evidence: it finished, its gates failed, a guardrail stopped it."""
POLL_S = 0.2
TELL_EVERY_S = 60.0
"""Between status lines where there is no terminal to keep one up to date on."""
BUSY_WAIT_S = 90.0
"""How long a run folder that another process holds is waited for: the run of a killed study saves and ends."""


R = TypeVar("R")


@dataclass(slots=True)
class _Running:
    run: Point
    process: subprocess.Popen[bytes]
    slot: int
    started: float = field(default_factory=time.monotonic)


def run_points(
    points: Points, console: Console, promote_anyway: bool, write: Callable[[int | None, Mapping[str, str]], R]
) -> R:
    """Run what is missing of a study in its folder, then ``write`` (signal that stopped it, reason by failed run).

    Raises `UserError` for a folder that is none, holds a single run or runs of other settings, or is in use.
    """
    folder, kind = points.folder, points.kind
    if (folder / "run.json").exists():
        raise UserError(f"{folder} is the folder of a single run; set another run_name or output_dir for a {kind}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as e:
        raise UserError(f"{folder} cannot be made: {e.filename} is a file. Set output_dir to something else.") from e
    with held(folder, kind):
        _lay_out(points)
        return write(*Runner(points, console, promote_anyway).run())


def _lay_out(points: Points) -> None:
    """The runs' configs as files. Raises `UserError` for run folders that hold runs of other settings."""
    check_folders(points)
    for run in points.runs:
        for file in (run.config_file, run.log):
            file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(run.config_file, dump_config(run.cfg))


def tell(console: Console, kind: str, line: str) -> None:
    console.print(f"[{kind}] {printable(line, one_line=True)}", markup=False, highlight=False, soft_wrap=True)


def exit_code(stopped: int | None, statuses: Sequence[str]) -> int:
    """Of a study. 0: every run has a result. 1: some failed. 128 + signal: interrupted."""
    if stopped is not None:
        return 128 + stopped
    return 0 if all(s == "finished" for s in statuses) else 1


def tell_end(console: Console, folder: Path, page: str, stopped: int | None) -> None:
    """Where the page is, and that the same command continues what a signal stopped."""
    say = partial(console.print, markup=False, soft_wrap=True)
    say(f"Page: {folder / page}")
    if stopped is not None:
        name = signal.Signals(stopped).name
        say(f"stopped by {name}; what was done is saved in {folder}. The same command continues.")


class Runner:
    """Keeps the slots busy until nothing is left, and stops the children when it is stopped."""

    def __init__(self, points: Points, console: Console, promote_anyway: bool) -> None:
        self.points, self.console, self.promote_anyway = points, console, promote_anyway
        self.slots = _slots(points)
        self.done = [r for r in points.runs if is_finished(r)]
        self.left = [r for r in points.runs if not is_finished(r)]
        self.running: list[_Running] = []
        self.failed: dict[str, str] = {}
        self.seconds: list[tuple[Point, float]] = []
        """Of the runs that finished in this process."""
        self.busy_since: dict[str, float] = {}

    def run(self) -> tuple[int | None, dict[str, str]]:
        """(The signal that stopped it or None, name -> reason of the runs that failed)."""
        number = len(self.points.runs)
        if self.done:
            self._say(f"{len(self.done)} of {number} runs are finished already")
        if self.left:
            told = "run" if number == 1 else "runs"
            at_a_time = f", {len(self.slots)} at a time" if len(self.slots) > 1 else ""
            still = f"{len(self.left)} of {number} {told} to go" if self.done else f"{number} {told}"
            self._say(f"{still}{at_a_time}: {', '.join(r.name for r in self.left)}")
        live = self.console.is_terminal and bool(self.left)
        with stop_signals(), self.console.status("") if live else nullcontext() as status:
            told = time.monotonic()
            try:
                while self.left or self.running:
                    self._start()
                    time.sleep(POLL_S)
                    self._reap()
                    line = f"{len(self.done)}/{len(self.points.runs)} finished · {self._doing()}"
                    if status is not None:
                        status.update(Text(line))
                    elif time.monotonic() - told > TELL_EVERY_S and self.running:
                        told = time.monotonic()
                        self._say(line)
            except (KeyboardInterrupt, SystemExit) as stop:
                code = 128 + signal.SIGINT if isinstance(stop, KeyboardInterrupt) else stop.code
                self._stop_children()
                return (code - 128 if isinstance(code, int) and code > 128 else int(signal.SIGTERM)), self.failed
            finally:
                for child in self.running:  # something of ours went wrong; nobody would watch them
                    child.process.terminate()
        return None, self.failed

    def _start(self) -> None:
        taken = {child.slot for child in self.running}
        free = [k for k in range(len(self.slots)) if k not in taken]
        for run in list(self.left):
            if not free:
                return
            if waits := [r.name for r in needs(run, self.points.runs) if r not in self.done]:
                if lost := [name for name in waits if name in self.failed]:
                    self.left.remove(run)
                    self.failed[run.name] = f"it needs {lost[0]}, which failed"
                    self._say(f"{run.name} not run: {self.failed[run.name]}")
                continue
            if run.command != "run" and any(child.run.command != "run" for child in self.running):
                continue
            since = self.busy_since.setdefault(run.name, time.monotonic())
            if is_held(run.folder) and time.monotonic() - since < BUSY_WAIT_S:
                continue
            self.left.remove(run)
            slot = free.pop(0)
            self.running.append(_Running(run, _spawn(run, self.slots[slot], self.promote_anyway), slot))
            self._say(f"started {run.name} (log {run.log})")

    def _reap(self) -> None:
        for child in list(self.running):
            code = child.process.poll()
            if code is None:
                continue
            self.running.remove(child)
            run, seconds = child.run, time.monotonic() - child.started
            if (code in RESULTS and is_finished(run)) if run.command == "run" else code == 0:
                self.done.append(run)
                self.seconds.append((run, seconds))
                self._plan_more()
                told = f": {_figures(run)}" if run.command == "run" else ""
                self._say(
                    f"{len(self.done)}/{len(self.points.runs)} {run.name} finished in {duration(seconds)}{told}"
                    f"{self._eta()}"
                )
            else:
                self.failed[run.name] = f"exit code {code}: {_last_words(run.log)}"
                self._say(f"{run.name} FAILED after {duration(seconds)}, {self.failed[run.name]} (log {run.log})")

    def _plan_more(self) -> None:
        """Take in what can be planned now, beside the runs of its seed: a study that is cut short has every point."""
        if not (more := self.points.later()):
            return
        order = list(self.points.study.seeds)
        self.points.runs.extend(more)
        self.left = sorted(
            [*self.left, *(r for r in more if not is_finished(r))],
            key=lambda r: order.index(r.cfg.seed) if r.cfg.seed in order else 0,
        )
        _lay_out(self.points)
        self._say(f"planned now: {', '.join(r.name for r in more)}")

    def _stop_children(self) -> None:
        """One SIGINT to each: it finishes its step, saves and ends. A second Ctrl-C ends them at once."""
        if self.running:
            names = ", ".join(child.run.name for child in self.running)
            self._say(f"stopping: {names} will finish the step and save; a second Ctrl-C ends them at once")
        for child in self.running:
            with suppress(ProcessLookupError):
                child.process.send_signal(signal.SIGINT)
        try:
            for child in self.running:
                child.process.wait()
        except (KeyboardInterrupt, SystemExit):
            for child in self.running:
                child.process.kill()
                child.process.wait()
        self.running = []

    def _eta(self) -> str:
        ahead = len(self.left) + len(self.running)
        if not ahead:
            return ""
        # A run that learns nothing makes one step (A0), which says little of those that learn.
        longest = max(map(_steps, self.points.runs))
        like = [s for run, s in self.seconds if _steps(run) == longest]
        mean = statistics.fmean(like or [s for _, s in self.seconds])
        spent = sum(min(time.monotonic() - child.started, mean) for child in self.running)
        word = "about" if like else "more than"
        return f" · {word} {duration(max(ahead * mean - spent, 1.0) / len(self.slots))} left"

    def _doing(self) -> str:
        if not self.running:
            return f"waiting for {self.left[0].name}, whose folder another process holds" if self.left else ""
        return " · ".join(
            f"{child.run.name} {_progress(child.run)}{duration(time.monotonic() - child.started)}"
            for child in self.running
        )

    def _say(self, line: str) -> None:
        tell(self.console, self.points.kind, line)


def _steps(run: Point) -> float:
    """By its config; by epochs it is more than any number."""
    if run.command != "run":
        return 0
    return run.cfg.train.train_steps or float("inf")


def _slots(points: Points) -> list[dict[str, str]]:
    """The environment of each place a run can take: one a GPU, or shares of the CPU's cores."""
    gpus: list[str] = []
    if points.device in ("auto", "cuda"):
        import torch

        count = torch.cuda.device_count()
        given = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
        gpus = given[:count] if given else [str(i) for i in range(count)]
    number = points.study.parallel or max(len(gpus), 1)
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[k % len(gpus)]} for k in range(number)]
    if number == 1 or "OMP_NUM_THREADS" in os.environ:
        return [{} for _ in range(number)]
    return [{"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // number))} for _ in range(number)]


def _spawn(run: Point, environment: Mapping[str, str], promote_anyway: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "beholder", run.command, str(run.config_file)]
    command += ["--promote-anyway"] if promote_anyway and run.command == "run" else []
    with open(run.log, "ab") as log:
        log.write(f"--- {now()} {' '.join(command[1:])}\n".encode())
        log.flush()
        # A session of its own: Ctrl-C of the terminal reaches the study alone, which then asks each child once.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            start_new_session=True, preexec_fn=_child_setup(),
        )  # fmt: skip


def _child_setup() -> Callable[[], None]:
    """What a child does before it becomes ``beholder run``: listen to SIGINT, and end when the study is killed.

    A shell's background job ignores SIGINT and hands that on. On Linux the kernel sends SIGTERM when the parent dies,
    so that no run trains on unwatched after a SIGKILL; elsewhere it goes on and the next study waits for its folder.
    """
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def setup() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if libc is not None:
            libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    return setup


def _progress(run: Point) -> str:
    """``step 40/100, `` of a run under way; empty before its first step."""
    with suppress(OSError, ValueError, RecursionError, LookupError, TypeError):
        with open(run.folder / "metrics.jsonl", "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 4096))
            line = json.loads(f.read().splitlines()[-1])
        total = f"/{run.cfg.train.train_steps}" if run.cfg.train.train_steps else ""
        return f"step {int(line['step'])}{total}, "
    return ""


def _last_words(log: Path) -> str:
    """The error a run ended with, from its log: the line that begins with ``error:`` or ``stopped:``, else the last."""
    with suppress(OSError):
        lines = [x.strip() for x in log.read_text(encoding="utf-8", errors="replace").splitlines() if x.strip()]
        start = max((k for k, x in enumerate(lines) if x.startswith("--- ")), default=-1)
        lines = lines[start + 1 :]
        told = [k for k, x in enumerate(lines) if x.startswith(("error:", "stopped:"))]
        if told:
            return " ".join(lines[told[-1] : told[-1] + 4])[:500]
        if lines:
            return lines[-1][:500]
    return "it said nothing"


def _figures(run: Point) -> str:
    e = load_evidence(run.folder)
    loss, shuffle = e.get("eval.loss"), e.get("ablation.delta.shuffled")
    told = [f"loss {loss.value:.4g}"] if loss else []
    told += [f"shuffled image {shuffle.value:+.4g}"] if shuffle else []
    told += [f"stopped by its guardrail {e.stopped.sentence}"] if e.stopped else []
    told += [f"gates failed: {', '.join(g.name for g in e.failed_gates)}"] if e.failed_gates else []
    return ", ".join(told)
