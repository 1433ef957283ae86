"""The run folder: its paths, its lock, its metrics log, and the record of where a run came from.

Everything written here survives a SIGKILL at any instant: whole files appear by rename, log lines by one append.
What is in a checkpoint is `train.checkpoint`'s business; what a result means is `evidence`'s.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import psutil

from beholder.types import Status, UserError, printable

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_ORPHAN_WAIT_S = 15.0
"""How long a lock whose holder is dead may still be held by the holder's loader processes, which notice within 5 s."""


# ---------------------------------------------------------------------------------------------------------------
# Files that are there whole or not at all


def write_durably(path: Path, data: bytes) -> None:
    """Create (or truncate) ``path`` with ``data`` and flush it to the device. Not atomic: see `atomic_write`.

    Raises `UserError` naming the file when the disk does not take it.
    """
    _put(path, data, os.O_TRUNC, sync=True)


def _put(path: Path, data: bytes, how: int, *, sync: bool) -> None:
    with writing(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view[: 1 << 26]) :]  # one write() moves at most 2 GB
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the disk refuses meanwhile is a `UserError` that names ``path`` and says what to do."""
    try:
        yield
    except OSError as e:
        free = ""
        if e.errno in _DISK_FULL:
            with suppress(OSError):
                free = f"; {psutil.disk_usage(str(path.parent)).free / 1e6:,.0f} MB are free there"
        shown = str(path) if len(str(path)) < 300 else f"{str(path)[:150]} … {str(path)[-50:]}"
        raise UserError(
            f"cannot write {shown}: {os.strerror(e.errno) if e.errno else e}{free}. {_ADVICE.get(e.errno or 0, _OTHER)}"
        ) from e


_ADVICE = {
    **dict.fromkeys(
        _DISK_FULL,
        "Nothing that was saved before is touched. Free some space (or set output_dir to another disk) and start again "
        "with --resume auto.",
    ),
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM),
        "Nothing that was saved before is touched. Make the folder writable, or set output_dir to one that is.",
    ),
    errno.ENAMETOOLONG: "Set a shorter run_name or output_dir.",
    **dict.fromkeys(
        (errno.ENOENT, errno.ESTALE),
        "Its folder is not there, or was removed meanwhile with what was in it. Start again; where the folder is back, "
        "the run goes on from its checkpoints.",
    ),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "Set output_dir or run_name to something else."),
}
"""What to do about an error of the disk, by its number."""
_OTHER = "Nothing that was saved before is touched. See to the disk and start again with --resume auto."


def fsync_dir(path: Path) -> None:
    """Make the entries of a folder durable: a rename is only safe from power loss after this."""
    with writing(path):
        fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:  # some network file systems cannot fsync a folder; nothing more can be done there
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file so that any reader, and any crash, sees the old content or the new one, never a part.

    Raises `UserError` when the disk does not take it; the old content stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_durably(temporary, data.encode() if isinstance(data, str) else data)
        with writing(path):
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync_dir(path.parent)


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON (RFC 8259): NaN and infinities, which JSON does not know, become the strings "nan", "inf", "-inf"."""
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, indent=indent, default=_plain)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, ensure_ascii=False, indent=indent, default=_plain)


def _plain(value: Any) -> Any:
    for convert in ("tolist", "model_dump"):  # numpy and torch scalars and arrays; pydantic records
        if hasattr(value, convert):
            return getattr(value, convert)()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, str | int | bool) or value is None:
        return value
    return _finite(_plain(value))


# ---------------------------------------------------------------------------------------------------------------
# The cache all runs share


def cache_dir() -> Path:
    """``$BEHOLDER_CACHE``, else ``~/.cache/beholder``. Not created here."""
    given = os.environ.get("BEHOLDER_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "beholder"


# ---------------------------------------------------------------------------------------------------------------
# The run folder


class RunDir:
    """``outputs/<run_name>/``: where everything one run leaves behind lives.

    The object holds paths only and may be made anywhere; `lock` is what makes a process the folder's single writer.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.run_path = self.path / "run.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.splits = self.path / "splits"
        self.qual = self.path / "qual"
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []
        """Told every record that `log` has written."""
        self._held: int | None = None
        """The folder's inode while `lock` holds it."""

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    def create(self) -> RunDir:
        """Make the folder and its subfolders; what is there already stays."""
        for folder in (self.path, self.checkpoints, self.splits, self.qual):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as e:
                raise UserError(
                    f"the run folder {self.path} cannot be made: {e.filename} is a file, not a folder. "
                    "Set output_dir or run_name to something else."
                ) from e
            except OSError as e:
                with writing(folder):
                    raise e
        return self

    @contextmanager
    def lock(self) -> Iterator[RunDir]:
        """Hold the folder for this process; a second one gets a `UserError` that names the holder."""
        self.create()
        with ExitStack() as stack:
            with writing(self.path):
                stack.enter_context(held(self.path, "run"))
                self._held = self.path.stat().st_ino
            try:
                yield self
            finally:
                self._held = None

    def _check(self) -> None:
        """`UserError` when the folder this process holds is gone, also when somebody made another one of that name."""
        if self._held is None:
            return
        try:
            there = self.path.stat().st_ino
        except FileNotFoundError:
            there = None
        if there != self._held:
            raise UserError(
                f"the run folder {self.path} was {'removed' if there is None else 'replaced'} while its run went on, "
                "with what was in it. Start again in a folder that stays."
            )

    # -- metrics.jsonl

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``: one write, so that readers and crashes see whole lines."""
        self._check()
        _put(self.metrics_path, (to_json(dict(record)) + "\n").encode(), os.O_APPEND, sync=False)
        for listener in self.listeners:
            listener(record)

    def sync_metrics(self) -> None:
        """Flush ``metrics.jsonl`` to the device, so that no checkpoint outlives the lines that led to it."""
        if self.metrics_path.exists():
            with writing(self.metrics_path), self.metrics_path.open("rb") as file:
                os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """The whole lines of ``metrics.jsonl``. A torn last line (a crash) is left out; any other is an error."""
        return [record for _, record in self.numbered_metrics()]

    def numbered_metrics(self) -> list[tuple[int, dict[str, Any]]]:
        """The same, each with its line's number from 1."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_bytes().split(b"\n")
        records = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"{type(record).__name__} instead of an object")
                records.append((number, record))
            except (ValueError, RecursionError) as e:
                if number == len(lines):
                    continue
                raise UserError(f"{self.metrics_path}:{number}: not a JSON line ({e}); repair or remove it") from e
        return records

    def trim_metrics(self, step: int) -> int:
        """Drop the lines of steps after ``step`` and a torn last line; gives how many lines were dropped.

        Called on resume: the steps between the checkpoint and the crash are going to be made again.
        Lines without a ``step`` stay.
        """
        if not self.metrics_path.exists():
            return 0
        kept = [r for r in self.metrics() if not isinstance(r.get("step"), int) or r["step"] <= step]
        before = self.metrics_path.read_bytes()
        after = "".join(to_json(r) + "\n" for r in kept).encode()
        if after != before:
            atomic_write(self.metrics_path, after)
        return before.count(b"\n") + (not before.endswith(b"\n") and bool(before)) - len(kept)

    # -- JSON beside it

    def write_json(self, name: str, value: Any) -> Path:
        """Write ``<run>/<name>`` atomically as indented strict JSON."""
        self._check()
        path = self.path / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, to_json(value, indent=2) + "\n")
        return path

    def read_json(self, name: str) -> Any:
        """Read ``<run>/<name>``; a `UserError` when it is missing or not JSON."""
        path = self.path / name
        try:
            value = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; is {self.path} a run folder?") from None
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path} is not JSON: {e}") from e
        if not isinstance(value, dict):
            raise UserError(f"{path} holds {type(value).__name__}, not an object; it is damaged, remove it")
        return value

    def read_status(self) -> Status:
        """How the run ended, or is; a `UserError` when ``run.json`` does not say."""
        record = self.read_json("run.json")
        try:
            return Status(record.get("status"))
        except ValueError:
            raise UserError(
                f"{self.run_path}: status is {record.get('status')!r}; expected one of {', '.join(Status)}. It is "
                "damaged; remove it and run the command again"
            ) from None

    def set_status(self, status: Status, **facts: Any) -> None:
        """Merge ``status`` and ``facts`` into ``run.json``. A fact given before and not now stays."""
        record = self.read_json("run.json") if self.run_path.exists() else {"created": now()}
        stale = {"error", "signal", *(("step", "phases_s") if status == Status.RUNNING else ())}
        record = {key: value for key, value in record.items() if key not in stale}  # told of an earlier end
        self.write_json("run.json", {**record, **facts, "status": Status(status).value, "updated": now()})


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Hold an existing ``folder`` for this process; a second one gets a `UserError` that names the holder.

    The lock is the operating system's, so it is gone the moment its holder is, also after SIGKILL: there is no stale
    lock file to remove by hand. ``what``: whose folder it is, for the message.
    """
    lock = filelock.FileLock(folder / ".lock")
    info_path = folder / ".lock.json"
    try:
        with locking(folder, _ELSEWHERE):
            lock.acquire(timeout=0)
    except filelock.Timeout:
        holder = _holder(info_path)
        here = holder.get("host") in (None, platform.node())
        try:
            # Loader processes of a killed run may have inherited the lock; they end within seconds.
            lock.acquire(timeout=_ORPHAN_WAIT_S if here and not _is_alive(holder) else 0)
        except filelock.Timeout:
            raise UserError(
                f"the {what} folder {folder} is in use by {_describe(holder)}. Two {what}s cannot share a folder: "
                "wait for it, stop it (kill -TERM lets it save), or set another run_name or output_dir."
            ) from None
    try:
        me = psutil.Process()
        atomic_write(
            info_path,
            to_json({"pid": me.pid, "host": platform.node(), "started": me.create_time(), "command": sys.argv}),
        )
        yield
    finally:
        with suppress(OSError):
            info_path.unlink()
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether another process holds ``folder``."""
    if not (folder / ".lock").exists():
        return False
    lock = filelock.FileLock(folder / ".lock")
    try:
        with locking(folder, _ELSEWHERE):
            lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    lock.release()
    return False


def writer_is_alive(folder: Path) -> bool | None:
    """Whether the process that holds ``folder`` runs, by what it has written there; None where that cannot be told (it
    is on another machine, or has let go). Looks without locking."""
    holder = _holder(folder / ".lock.json")
    if not holder or holder.get("host") != platform.node():
        return None
    return _is_alive(holder)


_ELSEWHERE = "Set output_dir to a folder on a local disk"


@contextmanager
def locking(folder: Path, way_out: str) -> Iterator[None]:
    """Around an attempt to lock: `UserError` with the ``way_out`` where the file system of ``folder`` has no locks."""
    try:
        yield
    except (OSError, NotImplementedError) as e:  # filelock before 4 raises the latter for ENOSYS
        number = e.errno if isinstance(e, OSError) else errno.ENOSYS
        if number not in _NO_LOCKS:
            raise
        raise UserError(
            f"{folder} cannot be locked ({os.strerror(number)}): the file system it lies on has no file locks, so two "
            f"processes could write there at once. {way_out}, or have this one mounted with locks (NFS: version 4, or "
            "lockd running and no nolock; Lustre: flock)."
        ) from e


def _holder(info_path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        info = json.loads(info_path.read_text())
        if isinstance(info, dict):
            return info
    return {}


def now() -> str:
    """UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _is_alive(holder: Mapping[str, Any]) -> bool:
    """Whether the process that wrote the lock's info still runs (same pid and same start time)."""
    try:
        return abs(psutil.Process(int(holder["pid"])).create_time() - float(holder["started"])) < 2
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _describe(holder: Mapping[str, Any]) -> str:
    if not holder:
        return "another process"
    since = ""
    with suppress(KeyError, TypeError, ValueError):
        minutes = (time.time() - float(holder["started"])) / 60
        since = f", running for {minutes:.0f} min"
    return f"process {holder.get('pid')} on {holder.get('host')}{since}"


# ---------------------------------------------------------------------------------------------------------------
# Signals


def hang_up_signals() -> list[signal.Signals]:
    """SIGHUP where there is one, unless it is ignored: nohup does so on purpose."""
    known = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []
    return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)


@contextmanager
def stop_signals(handler: Callable[[int, Any], None] = _end, *more: signal.Signals) -> Iterator[None]:
    """SIGTERM and SIGHUP (and ``more``) go to ``handler`` meanwhile; without one they end the process like an
    exception, so that its record and lock are put in order. The training loop has its own: finish the step and save.
    """
    main = threading.current_thread() is threading.main_thread()  # Python delivers signals nowhere else
    numbers = [*hang_up_signals(), signal.SIGTERM, *more] if main else []
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)


# ---------------------------------------------------------------------------------------------------------------
# Where a run came from

_PACKAGES = ("torch", "transformers", "timm", "tokenizers", "safetensors", "numpy", "pillow")


def provenance(*, seed: int | None = None, device: str | None = None, **facts: Any) -> dict[str, Any]:
    """What convicts a run later: code, versions, arguments, seeds, hardware; plus the caller's ``facts``.

    The host's name is left out on purpose: run folders are shared. ``git`` is None outside a checkout.
    """
    return {
        "created": now(),
        "beholder": version_of("beholder"),
        "git": _git(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: version_of(name) for name in _PACKAGES},
        "argv": list(sys.argv),
        "seed": seed,
        "device": device,
        "hardware": hardware(),
        **facts,
    }


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, RAM in GB (1e9 bytes), GPU names and memory."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            gpus.append({"name": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)})
    return {"cpu": _cpu_model(), "cores": cores, "ram_gb": round(psutil.virtual_memory().total / 1e9, 1), "gpus": gpus}


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout this package is imported from, or None."""

    def run(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        run("ls-files", "--error-unmatch", Path(__file__).name)  # an installed copy inside someone else's checkout
        return {"commit": run("rev-parse", "HEAD"), "dirty": bool(run("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def warn_to_stderr(message: str) -> None:
    """The default way of this layer to tell a person something without stopping."""
    print(f"[warning] {printable(message)}", file=sys.stderr, flush=True)


Warn = Callable[[str], None]
