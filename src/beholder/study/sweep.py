"""A grid of short runs: each a process of its own, resumable, and one summary (``beholder sweep``).

    plan      config + grid + seeds -> one resolved config a run, all on one split and one golden set
    run       what is not finished yet, as ``python -m beholder run FILE``, as many at once as there are devices
    collect   the runs' evidence.json -> sweep.json, summary.csv, sweep.html, sweep.md

The sweep folder is the config's own run folder (``output_dir``):

    configs/<name>.yaml   the resolved config of a run       <name>/        its run folder
    logs/<name>.log       what it printed                    golden.jsonl   the fixed set all runs caption
    sweep.json            everything known of the sweep; the pages are rendered from it

What the runs are called: `study.record`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from beholder.config import SweepConfig
from beholder.config.file import dump_config
from beholder.evidence import Evidence, held_out_hashes, load_evidence
from beholder.report.words import duration
from beholder.runs import atomic_write, held, is_held, now, stop_signals
from beholder.study.page import print_record, render_sweep
from beholder.study.plan import Plan, Planned, check_folders, is_finished, plan_sweep
from beholder.study.record import RECORD, SUMMARY, Row, SweepRecord, summary_csv
from beholder.study.score import Entry, flags, rank, score
from beholder.types import UserError

GATES_FAILED = 3
"""Exit code of a run that finished and whose gates failed; for a sweep it is a result like any other."""
POLL_S = 0.2
TELL_EVERY_S = 60.0
"""Between status lines where there is no terminal to keep one up to date on."""
BUSY_WAIT_S = 90.0
"""How long a run folder that another process holds is waited for: the run of a killed sweep saves and ends."""


@dataclass(frozen=True, slots=True)
class SweepResult:
    """How the sweep ended. The command line leaves with `exit_code`."""

    folder: Path
    record: SweepRecord
    signal: int | None = None
    """The signal that stopped it; the same command continues."""

    @property
    def exit_code(self) -> int:
        """0: every run has a result. 1: some failed. 128 + signal: interrupted."""
        if self.signal is not None:
            return 128 + self.signal
        return 0 if all(r.status == "finished" for r in self.record.rows) else 1

    @property
    def failed(self) -> list[str]:
        """Names of the runs that failed."""
        return [r.name for r in self.record.rows if r.status == "failed"]


@dataclass(slots=True)
class _Running:
    run: Planned
    process: subprocess.Popen[bytes]
    slot: int
    started: float = field(default_factory=time.monotonic)


def run_sweep(
    config: str | Path, overrides: Sequence[str] = (), *, console: Console | None = None, promote_anyway: bool = False
) -> SweepResult:
    """Run what is missing of a sweep, then write, print and return its summary.

    A run that finished with the same settings is not run again, an interrupted one goes on from its last checkpoint,
    one that fails is named and the others go on (the same command tries it again). Ctrl-C (or SIGTERM) lets the running
    ones finish their step and save. ``promote_anyway``: a run may start from a checkpoint that failed its gates.
    Raises `UserError` for a config that cannot be swept, for run folders of other settings, and when another process
    sweeps the same folder.
    """
    console = console or Console(highlight=False)
    plan = plan_sweep(config, overrides)
    if (plan.folder / "run.json").exists():
        raise UserError(f"{plan.folder} is the folder of a single run; set another run_name or output_dir for a sweep")
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as e:
        raise UserError(
            f"{plan.folder} cannot be made: {e.filename} is a file. Set output_dir to something else."
        ) from e
    with held(plan.folder, "sweep"):
        check_folders(plan)
        for run in plan.runs:
            for file in (run.config_file, run.log):
                file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(run.config_file, dump_config(run.cfg))
        stopped, failed = _Runner(plan, console, promote_anyway).run()
        record = collect(plan, failed, interrupted=stopped is not None)
        write_summary(record, plan.folder)
    print_record(record, console)
    console.print(f"Page: {plan.folder / 'sweep.html'}", markup=False, soft_wrap=True)
    if stopped is not None:
        console.print(
            f"stopped by {signal.Signals(stopped).name}; what was done is saved in {plan.folder}. "
            "The same command continues.",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    return SweepResult(plan.folder, record, stopped)


class _Runner:
    """Keeps the slots busy until nothing is left, and stops the children when it is stopped."""

    def __init__(self, plan: Plan, console: Console, promote_anyway: bool) -> None:
        self.plan, self.console, self.promote_anyway = plan, console, promote_anyway
        self.slots = _slots(plan)
        self.done = [r for r in plan.runs if is_finished(r)]
        self.left = [r for r in plan.runs if not is_finished(r)]
        self.running: list[_Running] = []
        self.failed: dict[str, str] = {}
        self.seconds: list[float] = []
        """Of the runs that finished in this process."""
        self.busy_since: dict[str, float] = {}

    def run(self) -> tuple[int | None, dict[str, str]]:
        """(The signal that stopped it or None, name -> reason of the runs that failed)."""
        if self.done:
            self._say(f"{len(self.done)} of {len(self.plan.runs)} runs are finished already")
        live = self.console.is_terminal and bool(self.left)
        with stop_signals(), self.console.status("") if live else nullcontext() as status:
            told = time.monotonic()
            try:
                while self.left or self.running:
                    self._start()
                    time.sleep(POLL_S)
                    self._reap()
                    line = f"{len(self.done)}/{len(self.plan.runs)} finished · {self._doing()}"
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
            if code in (0, GATES_FAILED) and is_finished(run):
                self.done.append(run)
                self.seconds.append(seconds)
                self._say(
                    f"{len(self.done)}/{len(self.plan.runs)} {run.name} finished in {duration(seconds)}: "
                    f"{_figures(run)}{self._eta()}"
                )
            else:
                self.failed[run.name] = f"exit code {code}: {_last_words(run.log)}"
                self._say(f"{run.name} FAILED after {duration(seconds)}, {self.failed[run.name]} (log {run.log})")

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
        mean = statistics.fmean(self.seconds)
        spent = sum(min(time.monotonic() - child.started, mean) for child in self.running)
        return f" · about {duration(max(ahead * mean - spent, 1.0) / len(self.slots))} left"

    def _doing(self) -> str:
        if not self.running:
            return f"waiting for {self.left[0].name}, whose folder another process holds" if self.left else ""
        return " · ".join(
            f"{child.run.name} {_progress(child.run)}{duration(time.monotonic() - child.started)}"
            for child in self.running
        )

    def _say(self, line: str) -> None:
        self.console.print(f"[sweep] {line}", markup=False, highlight=False, soft_wrap=True)


def _slots(plan: Plan) -> list[dict[str, str]]:
    """The environment of each place a run can take: one a GPU, or shares of the CPU's cores."""
    gpus: list[str] = []
    if plan.device in ("auto", "cuda"):
        import torch

        count = torch.cuda.device_count()
        given = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
        gpus = given[:count] if given else [str(i) for i in range(count)]
    number = plan.sweep.parallel or max(len(gpus), 1)
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[k % len(gpus)]} for k in range(number)]
    if number == 1 or "OMP_NUM_THREADS" in os.environ:
        return [{} for _ in range(number)]
    return [{"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // number))} for _ in range(number)]


def _spawn(run: Planned, environment: Mapping[str, str], promote_anyway: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "beholder", "run", str(run.config_file)]
    command += ["--promote-anyway"] if promote_anyway else []
    with open(run.log, "ab") as log:
        log.write(f"--- {now()} {' '.join(command[1:])}\n".encode())
        log.flush()
        # A session of its own: Ctrl-C of the terminal reaches the sweep alone, which then asks each child once.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            start_new_session=True, preexec_fn=_child_setup(),
        )  # fmt: skip


def _child_setup() -> Callable[[], None]:
    """What a child does before it becomes ``beholder run``: listen to SIGINT, and end when the sweep is killed.

    A shell's background job ignores SIGINT and hands that on. On Linux the kernel sends SIGTERM when the parent dies,
    so that no run trains on unwatched after a SIGKILL; elsewhere it goes on and the next sweep waits for its folder.
    """
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def setup() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if libc is not None:
            libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    return setup


def _progress(run: Planned) -> str:
    """``step 40/100, `` of a run under way; empty before its first step."""
    with suppress(OSError, ValueError, LookupError, TypeError):
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


# ---------------------------------------------------------------------------------------------------------------
# Collect


def collect(plan: Plan, failed: Mapping[str, str] | None = None, *, interrupted: bool = False) -> SweepRecord:
    """What the finished runs' evidence says, scored, flagged and ranked."""
    failed = failed or {}
    evidence = {r.name: load_evidence(r.folder) for r in plan.runs if is_finished(r)}
    deltas = [m.value for e in evidence.values() if (m := e.get("ablation.delta.shuffled"))]
    median = statistics.median(deltas) if deltas else 0.0
    rows = []
    for run in plan.runs:
        known: dict[str, Any] = {
            "name": run.name, "point": run.point, "settings": run.settings, "seed": run.cfg.seed,
            "folder": run.folder.name, "config_hash": run.hash,
        }  # fmt: skip
        if run.name in evidence:
            rows.append(Row(**known, status="finished", **_measured(evidence[run.name], plan.sweep, median)))
        elif run.name in failed:
            rows.append(Row(**known, status="failed", reason=failed[run.name]))
        else:
            begun = interrupted and (run.folder / "run.json").exists()
            rows.append(Row(**known, status="interrupted" if begun else "waiting"))
    broken = {r.point for r in rows if r.status == "failed"}
    entries = [
        Entry(r.name, r.point, r.score, (*r.flags, *(["a repeat failed"] if r.point in broken else [])))
        for r in rows
        if r.score is not None
    ]
    return SweepRecord(
        name=plan.name,
        created=now(),
        grid={key: list(values) for key, values in plan.sweep.grid.items()},
        seeds=list(plan.sweep.seeds),
        ablation_weight=plan.sweep.ablation_weight,
        collapsed_below=plan.sweep.collapsed_below,
        rows=rows,
        ranking=rank(entries),
        warnings=tuple(_warnings(plan, evidence, rows)),
    )


def _measured(e: Evidence, sweep: SweepConfig, median: float) -> dict[str, Any]:
    loss, shuffle, zero, noise = (
        e.get(name) for name in ("eval.loss", "ablation.delta.shuffled", "ablation.delta.zero", "ablation.delta.noise")
    )
    failed = tuple(g.name for g in e.failed_gates)
    facts: dict[str, Any] = {
        "eval_loss": loss, "d_shuffle": shuffle, "d_zero": zero, "d_noise": noise, "gates_failed": failed,
        "buckets": tuple(
            m for m in e.measurements if m.name == "eval.loss" and m.stratum is not None and m.by in (None, "length")
        ),
        "steps": e.cost.steps, "wall_s": e.cost.wall_s,
    }  # fmt: skip
    if loss is not None and shuffle is not None and zero is not None:
        facts["score"] = score(loss.value, shuffle.value, zero.value, sweep.ablation_weight)
        facts["flags"] = flags(
            d_shuffle=shuffle.value, d_shuffle_low=shuffle.ci95[0] if shuffle.ci95 else None, grid_median=median,
            collapsed_below=sweep.collapsed_below, failed_gates=failed,
        )  # fmt: skip
    return facts


def _warnings(plan: Plan, evidence: Mapping[str, Evidence], rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.status == "failed":
            yield f"{row.name} failed: {row.reason}"
        elif row.status == "finished" and row.score is None:
            yield f"{row.name} has no score: the held-out loss or one of its loss differences was not measured"
    unfinished = [r.name for r in rows if r.status in ("interrupted", "waiting")]
    if unfinished:
        yield f"The sweep is not finished: {', '.join(unfinished)}. The same command continues."
    hashes = held_out_hashes([(plan.folder / name, e) for name, e in evidence.items()])
    if len(set(hashes)) > 1 or len({e.data.eval for e in evidence.values()}) > 1:
        yield "The runs were not measured on the same held-out samples: a setting of the grid changes which they are."


def write_summary(record: SweepRecord, folder: Path) -> None:
    """``sweep.json``, ``summary.csv``, ``sweep.html`` and ``sweep.md``, each whole or not at all."""
    atomic_write(folder / RECORD, json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
    atomic_write(folder / SUMMARY, summary_csv(record))
    render_sweep(record, folder)


def _figures(run: Planned) -> str:
    e = load_evidence(run.folder)
    loss, shuffle = e.get("eval.loss"), e.get("ablation.delta.shuffled")
    told = [f"loss {loss.value:.4g}"] if loss else []
    told += [f"shuffled image +{shuffle.value:.4g}"] if shuffle and shuffle.value >= 0 else []
    told += [f"shuffled image {shuffle.value:.4g}"] if shuffle and shuffle.value < 0 else []
    told += [f"gates failed: {', '.join(g.name for g in e.failed_gates)}"] if e.failed_gates else []
    return ", ".join(told)
