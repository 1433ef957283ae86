"""How the processes of a job learn that one of them has failed, hangs or is gone.

A process that fails says why in the job's key-value store before it leaves. Whoever waits for others does it here, in
slices: signals are heard meanwhile, a failure that was told is passed on as the cause, and nobody waits for ever. A
thread ends a process that is stuck somewhere else while the job has failed.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
from torch.distributed import Work
from torch.distributed.distributed_c10d import Store

from beholder.train.nonfinite import NonFiniteError
from beholder.types import ProcessError, UserError

STOP_WAIT_S = 20.0
"""Longest wait for others once a signal asked to stop: torchrun and Slurm kill 30 s after theirs."""
_LEAVE_S = 4.0
"""How long a process has to end by itself once another one has failed."""
_LOOK_S = 0.5
"""Between looks into the store while waiting."""
_FAILED, _WHO, _ALIVE, _WAITS, _LEFT = (f"beholder/{word}" for word in ("failed", "who", "alive", "waits", "left"))
"""Keys in the store; all but the first and third end with a rank."""


class Peers:
    """The other processes of this one's job. ``store``: the job's, as ``torch.distributed`` made it."""

    def __init__(self, rank: int, world_size: int, store: Store, timeout_s: float) -> None:
        self.rank, self.world_size = rank, world_size
        self.timeout_s = timeout_s
        """Longest wait without a sign of life from the others."""
        self.in_use = True
        """False after a wait was given up: an exchange is under way that will never end."""
        self.on_failure: Callable[[BaseException], None] = lambda error: None
        """Called by the thread before it ends a process that is stuck."""
        self._store = store
        self._left = threading.Event()
        self._stop_at: float | None = None
        self._beat = 0.0
        store.set(f"{_WHO}/{rank}", json.dumps([platform.node(), os.getpid()]))
        threading.Thread(target=self._watch, args=(store.clone(),), daemon=True, name="peers").start()

    # -- what this process tells

    def tell(self, error: BaseException) -> None:
        """Say why this process leaves. The first one that does is the cause of what the others then meet."""
        said = error.code if isinstance(error, SystemExit) else describe(error)
        with suppress(RuntimeError):  # the store is gone with the process that kept it
            self._store.compare_set(_FAILED, "", json.dumps({"rank": self.rank, "kind": kind_of(error), "said": said}))

    def leave(self) -> None:
        """This process is about to end by itself."""
        self._left.set()
        with suppress(RuntimeError):
            self._store.set(f"{_LEFT}/{self.rank}", "")

    def alive(self) -> None:
        """A sign of life during long work of one's own; others that wait begin to count anew."""
        if time.monotonic() - self._beat > 1:
            self._beat = time.monotonic()
            with suppress(RuntimeError):
                self._store.add(_ALIVE, 1)

    def stopping(self) -> None:
        """A signal asked to stop: from now on the others are waited for `STOP_WAIT_S` at most."""
        self._stop_at = time.monotonic() + STOP_WAIT_S

    # -- what it hears

    def failure(self) -> BaseException | None:
        """Why another process left, as this one's error; None while all are well."""
        return self._failure(self._store)

    def _failure(self, store: Store) -> BaseException | None:
        try:
            if not store.check([_FAILED]):
                return None
            told = json.loads(store.get(_FAILED))
        except RuntimeError:
            return _killed("the process that kept this job together")
        if told["rank"] == self.rank:
            return None
        return error_of(told["rank"], told["kind"], told["said"])

    def gone(self) -> ProcessError | None:
        """A process of this machine that has died without a word, as an error."""
        for rank in range(self.world_size):
            with suppress(RuntimeError, ValueError, psutil.Error):
                if not self._store.check([f"{_WHO}/{rank}"]) or self._store.check([f"{_LEFT}/{rank}"]):
                    continue
                host, pid = json.loads(self._store.get(f"{_WHO}/{rank}"))
                if host == platform.node() and (
                    not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
                ):
                    return _killed(f"process {rank} (pid {pid})")
        return None

    def cause(self) -> BaseException | None:
        """`failure`, else `gone`."""
        return self.failure() or self.gone()

    def wait(self, work: Work) -> None:
        """Until an exchange with the others is done. Raises the error of the one that failed (`error_of`), or
        `ProcessError` for one that is gone or has given no sign of life for `timeout_s`."""
        pause, began = 5e-5, time.monotonic()
        look, beats = began + _LOOK_S, -1
        try:
            while not work.is_completed():
                now = time.monotonic()
                if now >= look:
                    look = now + _LOOK_S
                    if (failure := self.failure()) is not None:
                        raise failure
                    beats, before = self._beats(), beats
                    began = now if beats != before and before >= 0 else began
                    if now - began > self.timeout_s:
                        raise self._hangs()
                    if self._stop_at is not None and now > self._stop_at:
                        raise SystemExit(143)
                time.sleep(pause)
                pause = min(pause * 1.2, 0.01)
        except BaseException:
            self.in_use = False
            raise
        try:
            work.wait()
        except RuntimeError as e:
            self.in_use = False
            time.sleep(0.2)  # one that was killed takes a moment to be gone
            raise self.cause() or _killed("another process") from e

    def _beats(self) -> int:
        try:
            return self._store.add(_ALIVE, 0)
        except RuntimeError as e:
            raise _killed("the process that kept this job together") from e

    def _hangs(self) -> ProcessError:
        with suppress(RuntimeError):
            self._store.set(f"{_WAITS}/{self.rank}", "")
            time.sleep(1.0)  # the others that wait give up about now, too
            late = [r for r in range(self.world_size) if not self._store.check([f"{_WAITS}/{r}"])]
            named = " and ".join(f"process {r}" for r in late) or "another process"
            return ProcessError(
                f"{named} did not come to where the others wait, and gave no sign of life for {self.timeout_s:g} s: it "
                "hangs, for instance on a disk or a GPU. The same command goes on from the latest checkpoint. If the "
                "work was only slow, raise train.timeout_s."
            )
        return _killed("the process that kept this job together")

    def _watch(self, store: Store) -> None:
        while not self._left.wait(1.0):
            error = self._failure(store)
            if error is not None and not self._left.wait(_LEAVE_S):
                with suppress(Exception):
                    self.on_failure(error)
                os.write(2, f"[stop] {describe(error)}; this process was stuck and is ended\n".encode())
                os._exit(1)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def kind_of(error: BaseException) -> str:
    """How an error of one process is told to the others."""
    if isinstance(error, UserError):
        return "input"
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return "signal"
    return "guardrail" if isinstance(error, NonFiniteError | FloatingPointError) else "fault"


def error_of(rank: int, kind: Any, said: Any) -> BaseException:
    """What the failure of process ``rank`` is to the others: wrong input is wrong input, a bug is not."""
    match kind:
        case "input":
            return UserError(f"process {rank} failed: {said}")
        case "guardrail":
            return FloatingPointError(f"process {rank} stopped: {said}")
        case "signal":
            return SystemExit(said) if isinstance(said, int) else KeyboardInterrupt()
        case _:
            return ProcessError(f"process {rank} failed: {said}")


def _killed(who: str) -> ProcessError:
    return ProcessError(
        f"{who} of this job ended without a word; it was killed, perhaps because memory ran out. The same command goes "
        "on from the latest checkpoint."
    )
