"""A grid of short runs: each a process of its own, resumable, and one summary (``beholder sweep``).

    plan      config + grid + seeds -> one resolved config a run, all on one split and one golden set
    run       what is not finished yet, as ``python -m beholder run FILE``, as many at once as there are devices
    collect   the runs' evidence.json -> sweep.json, summary.csv, sweep.html, sweep.md

The sweep folder is the config's own run folder (``output_dir``):

    configs/<name>.yaml   the resolved config of a run       <name>/        its run folder
    logs/<name>.log       what it printed                    golden.jsonl   the fixed set all runs caption
    sweep.json            everything known of the sweep; the pages are rendered from it

A run is named after what the grid sets: the last part of the setting and its value, ``lr5e-5_vision_ln0`` for
``train.lr.connector: 5e-5`` and ``model.connector.vision_ln: false``. A setting per group of parameters (``…connector``
or ``…lora`` below a learning rate or a weight decay) goes by the part before. Where two settings would then be called
the same, both have their full dotted name. Values: 0 and 1 for false and true, 5e-5 for 0.00005, text without the
characters that a path cannot have. Repeats end in ``_s<seed>``.
"""

from __future__ import annotations

import csv
import ctypes
import io
import itertools
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import filelock
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from beholder.config import RunConfig, SweepConfig
from beholder.configfile import ConfigError, config_hash, diff_configs, dump_config, load_config
from beholder.evidence import Evidence, Measurement, Record, Status, load_evidence
from beholder.report.compare import held_out
from beholder.report.words import duration
from beholder.runs import atomic_write, now, to_json
from beholder.study.score import Entry, Ranking, flags, rank, score
from beholder.types import UserError

SUMMARY, RECORD = "summary.csv", "sweep.json"
GATES_FAILED = 3
"""Exit code of a run that finished and whose gates failed; for a sweep it is a result like any other."""
POLL_S = 0.2
TELL_EVERY_S = 60.0
"""Between status lines where there is no terminal to keep one up to date on."""
BUSY_WAIT_S = 90.0
"""How long a run folder that another process holds is waited for: the run of a killed sweep saves and ends."""

Value = bool | int | float | str

FIXED = (
    "run_name", "output_dir", "sweep", "gates", "data.split_seed", "data.split_mode", "data.eval_size",
    "data.eval_ratio", "data.eval_sources", "data.len_buckets", "data.max_samples", "eval.golden", "ablation",
    "model.llm.name_or_path",
)  # fmt: skip
"""Settings a grid may not vary: runs of a sweep are measured on the same samples, in the same tokens, by one rule."""


# ---------------------------------------------------------------------------------------------------------------
# Records: sweep.json


class Row(Record):
    """One run of the sweep."""

    name: str
    point: str
    """Its combination of settings: the name without the seed."""
    settings: dict[str, bool | int | float | str]
    seed: int
    folder: str
    """Below the sweep's folder."""
    config_hash: str
    status: Literal["finished", "failed", "interrupted", "waiting"]
    """waiting: not run yet."""
    reason: str = ""
    """failed: what it said."""
    eval_loss: Measurement | None = None
    """On all held-out samples, at the end."""
    buckets: tuple[Measurement, ...] = ()
    """The same by target length."""
    d_shuffle: Measurement | None = None
    d_zero: Measurement | None = None
    d_noise: Measurement | None = None
    """Loss with the wrong image minus loss with the own one."""
    score: float | None = None
    flags: tuple[str, ...] = ()
    """Why it must not be used."""
    gates_failed: tuple[str, ...] = ()
    steps: int | None = None
    wall_s: float | None = None
    """Seconds from start to end; None where the run was interrupted and continued."""


class SweepRecord(Record):
    """``sweep.json``: all that the table, the pages and the verdict are made from."""

    schema_version: Literal[1] = 1
    name: str
    created: str
    grid: dict[str, list[bool | int | float | str]]
    seeds: list[int]
    ablation_weight: float
    collapsed_below: float
    rows: list[Row]
    """In the order of the grid."""
    ranking: Ranking
    warnings: tuple[str, ...] = ()

    def by_rank(self) -> list[Row]:
        """Best first: usable points, flagged ones, then runs without a score."""
        place = {p.point: k for k, p in enumerate(self.ranking.places)}
        last = len(place)
        return sorted(
            self.rows,
            key=lambda r: (last if r.score is None else place[r.point], r.score if r.score is not None else 0.0),
        )

    @classmethod
    def load(cls, path: str | Path) -> SweepRecord:
        """Read ``sweep.json``, given as the file or as the sweep's folder."""
        file = Path(path) / RECORD if Path(path).is_dir() else Path(path)
        try:
            return cls.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{file}: no such file; beholder sweep CONFIG writes it") from None
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(map(str, first["loc"])) or "(top)"
            raise UserError(f"{file}: not the record of a sweep: {where}: {first['msg']}") from e


# ---------------------------------------------------------------------------------------------------------------
# Plan


@dataclass(frozen=True, slots=True)
class Planned:
    """One run before it is run."""

    name: str
    point: str
    settings: dict[str, Value]
    cfg: RunConfig
    folder: Path
    config_file: Path
    log: Path

    @property
    def hash(self) -> str:
        return config_hash(self.cfg)


@dataclass(frozen=True, slots=True)
class Plan:
    folder: Path
    name: str
    sweep: SweepConfig
    device: str
    runs: list[Planned]


def plan_sweep(config: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Every run of the sweep with its resolved config. Nothing is written.

    Raises `UserError` for a config without ``sweep:``, for a grid that varies what the runs are measured on, and with
    everything that is wrong with any combination.
    """
    base = load_config(config, overrides)
    sweep = base.sweep
    if sweep is None:
        raise UserError(
            f"{config}: has no sweep: section, so there is nothing to vary; add one, for example\n"
            "  sweep:\n    grid:\n      train.lr.connector: [5e-5, 1e-4, 2e-4]\nor use beholder run"
        )
    _refuse(sweep, base)
    folder = Path(base.run_dir)
    points = _points(sweep)
    runs: list[Planned] = []
    wrong: list[str] = []
    for (point, settings), seed in itertools.product(points.items(), sweep.seeds or (None,)):
        name = point if seed is None else f"{point}_s{seed}"
        given = {
            **settings,
            "seed": base.seed if seed is None else seed,
            "data.split_seed": base.measure_seed,
            "run_name": name,
            "output_dir": str(folder / name),
        }
        if base.eval.golden_set_path is None and base.eval.golden_size and base.eval.run_golden_every != "never":
            given["eval.golden_set_path"] = str(folder / "golden.jsonl")
        lines = [
            *overrides,
            *(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items()),
        ]
        try:
            cfg = load_config(config, lines).model_copy(update={"sweep": None})
        except ConfigError as e:
            wrong.append(f"{name}: {e}")
            continue
        files = folder / "configs" / f"{name}.yaml", folder / "logs" / f"{name}.log"
        runs.append(Planned(name, point, settings, cfg, folder / name, *files))
    if wrong:
        raise UserError("these combinations of the grid cannot be run:\n" + "\n".join(wrong))
    return Plan(folder, base.run_name, sweep, base.device, runs)


def _refuse(sweep: SweepConfig, base: RunConfig) -> None:
    wrong = []
    if "seed" in sweep.grid:
        wrong.append("sweep.grid varies seed; list the seeds in sweep.seeds, so that they count as repeats")
    for key in sweep.grid:
        if any(key == f or key.startswith((f + ".", f + "_")) for f in FIXED):
            wrong.append(
                f"sweep.grid varies {key}; runs of a sweep must be measured on the same samples by the same rule"
            )
    missing = {"shuffled", "zero"} - set(base.ablation.conditions)
    if missing:
        wrong.append(
            f"ablation.conditions leaves out {', '.join(sorted(missing))}, which the score needs; add what is missing"
        )
    if wrong:
        raise UserError("this sweep cannot be run:\n  " + "\n  ".join(wrong))


def _points(sweep: SweepConfig) -> dict[str, dict[str, Value]]:
    """Name -> settings of every combination; the last setting of the grid varies fastest."""
    heads = titles(list(sweep.grid))
    labels = {key: _labels(values) for key, values in sweep.grid.items()}
    points = {}
    for choice in itertools.product(*(range(len(v)) for v in sweep.grid.values())):
        picked = list(zip(sweep.grid, choice, strict=True))
        name = "_".join(heads[key] + labels[key][i] for key, i in picked)
        points[name] = {key: sweep.grid[key][i] for key, i in picked}
    return points


def titles(keys: Sequence[str]) -> dict[str, str]:
    """Dotted setting -> what it is called in the names of runs."""

    def short(key: str) -> str:
        parts = key.split(".")
        group = parts[-1] in ("connector", "lora") and len(parts) > 1 and parts[-2] in ("lr", "weight_decay")
        return parts[-2] if group else parts[-1]

    found = {key: short(key) for key in keys}
    taken = list(found.values())
    return {key: title if taken.count(title) == 1 else key for key, title in found.items()}


def _labels(values: Sequence[Value]) -> list[str]:
    """A path-safe word for each value, all different."""
    words = [re.sub(r"[^A-Za-z0-9_.+-]+", "-", word(v)) for v in values]
    if len(set(words)) < len(words) or not all(words):
        return [f"{word}-{k}" for k, word in enumerate(words, 1)]
    return words


def word(value: Value) -> str:
    """A value as it stands in the names of runs: ``0``, ``5e-5``, the last part of a path."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, str):
        return Path(value).name
    if isinstance(value, float) and value and abs(value) < 1e-3:
        sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
        assert isinstance(exponent, int)
        text = "".join(map(str, digits))
        fraction = f".{text[1:]}" if text[1:] else ""
        return f"{'-' * sign}{text[0]}{fraction}e{exponent + len(digits) - 1}"
    return repr(value)


def check_folders(plan: Plan) -> None:
    """`UserError` naming the settings for every run folder that holds a run of other settings."""
    wrong = []
    for run in plan.runs:
        record = _read(run.folder / "run.json")
        if record is None or record.get("config_hash") == run.hash:
            continue
        try:
            changed = diff_configs(load_config(run.folder / "config.yaml"), run.cfg)
            told = [f"{path}: {to_json(old)} there, {to_json(new)} here" for path, old, new in changed]
        except UserError as e:
            told = [f"its config.yaml cannot be read: {str(e).splitlines()[-1].strip()}"]
        wrong.append(f"{run.folder}:\n    " + "\n    ".join(told or ["written by another version of beholder"]))
    if wrong:
        raise UserError(
            "these folders hold runs of other settings than this sweep's:\n  "
            + "\n  ".join(wrong)
            + "\nPut the settings back to continue that sweep, or set another run_name or output_dir for a new one."
        )


def is_finished(run: Planned) -> bool:
    """Whether the run succeeded with these settings and left its evidence."""
    record = _read(run.folder / "run.json")
    return (
        record is not None
        and record.get("status") == Status.SUCCEEDED
        and record.get("config_hash") == run.hash
        and (run.folder / "evidence.json").is_file()
    )


def _read(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        record = json.loads(path.read_bytes())
        if isinstance(record, dict):
            return record
    return None


# ---------------------------------------------------------------------------------------------------------------
# Run


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


def run_sweep(config: str | Path, overrides: Sequence[str] = (), *, console: Console | None = None) -> SweepResult:
    """Run what is missing of a sweep, then write, print and return its summary.

    A run that finished with the same settings is not run again, an interrupted one goes on from its last checkpoint,
    one that fails is named and the others go on (the same command tries it again). Ctrl-C (or SIGTERM) lets the running
    ones finish their step and save.
    Raises `UserError` for a config that cannot be swept, for run folders of other settings, and when another process
    sweeps the same folder.
    """
    console = console or Console(highlight=False)
    plan = plan_sweep(config, overrides)
    if (plan.folder / "run.json").exists():
        raise UserError(f"{plan.folder} is the folder of a single run; set another run_name or output_dir for a sweep")
    with _sole_sweep(plan.folder):
        check_folders(plan)
        for run in plan.runs:
            for file in (run.config_file, run.log):
                file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(run.config_file, dump_config(run.cfg))
        stopped, failed = _Runner(plan, console).run()
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

    def __init__(self, plan: Plan, console: Console) -> None:
        self.plan, self.console = plan, console
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
        with _stop_signals(), self.console.status("") if live else nullcontext() as status:
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
            if _is_busy(run.folder) and time.monotonic() - since < BUSY_WAIT_S:
                continue
            self.left.remove(run)
            slot = free.pop(0)
            self.running.append(_Running(run, _spawn(run, self.slots[slot]), slot))
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


def _spawn(run: Planned, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "beholder", "run", str(run.config_file)]
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


def _is_busy(folder: Path) -> bool:
    """Whether another process holds the run folder's lock."""
    if not (folder / ".lock").exists():
        return False
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    lock.release()
    return False


@contextmanager
def _sole_sweep(folder: Path) -> Iterator[None]:
    """Hold the sweep's folder for this process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as e:
        raise UserError(f"{folder} cannot be made: {e.filename} is a file. Set output_dir to something else.") from e
    lock, holder = filelock.FileLock(folder / ".lock"), folder / ".lock.json"
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        who = _read(holder) or {}
        name = f"process {who['pid']} on {who['host']}" if {"pid", "host"} <= who.keys() else "another process"
        raise UserError(
            f"the sweep folder {folder} is in use by {name}: wait for it, stop it (Ctrl-C lets its runs save), or set "
            "another run_name or output_dir"
        ) from None
    try:
        atomic_write(holder, to_json({"pid": os.getpid(), "host": platform.node()}))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP stop the sweep like Ctrl-C does."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    # nohup ignores SIGHUP on purpose.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals nowhere else
        numbers = []
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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
    measured_on = {(held_out(plan.folder / name), e.data.eval) for name, e in evidence.items()}
    if len(measured_on) > 1:
        yield "The runs were not measured on the same held-out samples: a setting of the grid changes which they are."


def write_summary(record: SweepRecord, folder: Path) -> None:
    """``sweep.json``, ``summary.csv``, ``sweep.html`` and ``sweep.md``, each whole or not at all."""
    from beholder.study.page import render_sweep

    atomic_write(folder / RECORD, json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
    atomic_write(folder / SUMMARY, summary_csv(record))
    render_sweep(record, folder)


def summary_csv(record: SweepRecord) -> str:
    """A row per run in the order of the grid; an empty cell is a number that was not measured. Full precision."""
    buckets = list(dict.fromkeys(m.stratum for r in record.rows for m in r.buckets if m.stratum))
    head = [
        "name", *record.grid, "seed", "eval_loss_end", *(f"eval_loss_{b}" for b in buckets), "d_shuffle",
        "d_shuffle_low", "d_shuffle_high", "d_zero", "d_noise", "score", "flags", "steps", "wall_s", "status",
        "config_hash",
    ]  # fmt: skip
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for r in record.rows:
        by_bucket = {m.stratum: m.value for m in r.buckets}
        low, high = r.d_shuffle.ci95 if r.d_shuffle and r.d_shuffle.ci95 else (None, None)
        writer.writerow([
            r.name, *(r.settings[key] for key in record.grid), r.seed, _value(r.eval_loss),
            *(by_bucket.get(b) for b in buckets), _value(r.d_shuffle), low, high, _value(r.d_zero), _value(r.d_noise),
            r.score, "; ".join(r.flags), r.steps, r.wall_s, r.status, r.config_hash,
        ])  # fmt: skip
    return out.getvalue()


def _value(m: Measurement | None) -> float | None:
    return None if m is None else m.value


def _figures(run: Planned) -> str:
    e = load_evidence(run.folder)
    loss, shuffle = e.get("eval.loss"), e.get("ablation.delta.shuffled")
    told = [f"loss {loss.value:.4g}"] if loss else []
    told += [f"shuffled image +{shuffle.value:.4g}"] if shuffle and shuffle.value >= 0 else []
    told += [f"shuffled image {shuffle.value:.4g}"] if shuffle and shuffle.value < 0 else []
    told += [f"gates failed: {', '.join(g.name for g in e.failed_gates)}"] if e.failed_gates else []
    return ", ".join(told)


def print_record(record: SweepRecord, console: Console) -> None:
    """The table of a sweep, best first, its warnings and its verdict."""
    table = Table(title=f"Sweep {record.name}: score = loss - {record.ablation_weight:g} x (Δshuffle + Δzero)")
    table.title_justify = "left"
    for heading in ("run", "score", "loss", "Δshuffle", "Δzero", "Δnoise", "time", "do not use"):
        table.add_column(heading, justify="left" if heading in ("run", "do not use") else "right", overflow="fold")
    for r in record.by_rank():
        if r.status != "finished":
            table.add_row(r.name, *[""] * 6, Text(r.status, style="red"))
            continue
        best = not r.flags and r.point == record.ranking.winner
        table.add_row(
            Text(r.name, style="bold green" if best else "dim" if r.flags else ""),
            *("–" if v is None else f"{v:.4f}" for v in (r.score, _value(r.eval_loss))),
            *("–" if v is None else f"{v:.4f}" for v in map(_value, (r.d_shuffle, r.d_zero, r.d_noise))),
            "–" if r.wall_s is None else duration(r.wall_s),
            Text(", ".join(r.flags), style="red"),
        )
    console.print(table)
    for warning in record.warnings:
        console.print(Text(f"warning: {warning}", style="bold red"), soft_wrap=True)
    console.print(Text(record.ranking.verdict, style="bold"), soft_wrap=True)
