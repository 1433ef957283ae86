"""Somebody else's Python that may never end, such as the chat template of a downloaded model, stopped after a time.

In a process's main thread a timer does it; other threads, which get no signals, are looked after by one of their own
(none is kept in a process that forks loader workers, where threads are not welcome). The error comes through at the
next Python instruction, so one long call into C is waited for.
"""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TookTooLong(Exception):
    """Raised inside `at_most` when its time is over."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises `TookTooLong` inside after so many seconds (in the main thread: of the process's own work). Not within
    itself, and around a call: a loop right inside jumps back by an instruction that Python 3.13 has in no ``with`` or
    ``try``, and an error that comes there would pass both."""
    timed = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    with _timer(seconds) if timed else _watched(seconds):
        yield


@contextmanager
def _timer(seconds: float) -> Iterator[None]:
    def over(_number: int, _frame: FrameType | None) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


_lock = threading.Lock()
_until: dict[int, float] = {}
"""Threads that are looked after, and when their time is over."""
_stopped: set[int] = set()
_looking: threading.Thread | None = None


@contextmanager
def _watched(seconds: float) -> Iterator[None]:
    global _looking
    me = threading.get_ident()
    with _lock:
        _until[me] = time.monotonic() + seconds
        if _looking is None or not _looking.is_alive():
            _looking = threading.Thread(target=_look, name="bounded", daemon=True)
            _looking.start()
    try:
        yield
    finally:
        with _lock:
            _until.pop(me, None)
            if me in _stopped:  # it may not have come through yet
                _stopped.discard(me)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(me), None)


def _look() -> None:
    while True:
        time.sleep(0.25)
        with _lock:
            now = time.monotonic()
            for thread in [t for t, until in _until.items() if until < now]:
                del _until[thread]
                _stopped.add(thread)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TookTooLong))
