"""The one thread that has the model: what waits is written together, a token at a time for all.

A batch is the model's own ``generate`` on prompts of different lengths. It may be cut between two tokens: then those
who are not through go back into the queue, their prompts longer by what they have said, and the next batch begins with
whoever is there. So newcomers need not wait for the longest answer, and who has ended or left takes no row for long.
"""

from __future__ import annotations

import copy
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from beholder.config import GenerateConfig
from beholder.types import Encoded
from beholder.use.stream import beyond, settled
from beholder.use.vlm import Prompt, Vlm

if TYPE_CHECKING:
    import torch

FEWEST_STEPS = 8
"""Tokens that a batch writes before it may be cut."""
PREFILLS = 4.0
"""A batch is not cut before it has written for so many times what its prompts took to read: beginning again costs at
most a fifth."""

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Done:
    """The answer is over, and everything of it was given out."""

    reason: Reason
    num_tokens: int


Event = str | Done | BaseException
"""A piece of the answer, its end, or what went wrong instead."""


@dataclass(eq=False)
class Job:
    """An answer to be written. ``tell`` is called by the model's thread, for every piece and once for the end."""

    prompt: Prompt
    how: GenerateConfig
    tell: Callable[[Event], None]
    seed: int | None = None
    """With one, what is drawn depends on nothing else: the job is written alone, and not cut."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""
    ids: list[int] = field(default_factory=list)
    said: str = ""
    over: bool = False
    cancelled: bool = False
    """Set by whoever no longer wants it; the model's thread sees it at the next token."""

    @property
    def live(self) -> bool:
        return not (self.over or self.cancelled)

    @property
    def limit(self) -> int:
        return min(self.how.max_new_tokens, self.prompt.room)

    @property
    def left(self) -> int:
        return self.limit - len(self.ids)

    @property
    def greedy(self) -> bool:
        return self.how.temperature < 1e-4

    def goes_with(self, other: Job) -> bool:
        """Whether one batch can write both."""
        if self.greedy or other.greedy:
            return self.greedy and other.greedy
        same = (self.how.temperature, self.how.top_p) == (other.how.temperature, other.how.top_p)
        return same and self.seed is None and other.seed is None

    def so_far(self) -> Encoded:
        """The prompt with what was already written after it."""
        encoded = self.prompt.encoded
        if not self.ids:
            return encoded
        ids = np.concatenate([encoded.ids, np.array(self.ids, dtype=encoded.ids.dtype)])
        return replace(encoded, ids=ids, supervise=np.zeros(len(ids), dtype=bool))

    def write(self, token: int, decode: Callable[[Sequence[int]], str], ends: frozenset[int]) -> None:
        """One more token."""
        self.ids.append(token)
        ended = token in ends
        last = ended or self.left < 1
        text = settled(decode(self.ids), over=last)
        cut = min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=None)
        if cut is not None:
            text, last, ended = text[:cut], True, True
        elif not last:
            text = text[: len(text) - _begun(text, self.stop)]
        if piece := beyond(self.said, text, over=last):
            self.said += piece
            self.tell(piece)
        if last:
            self.end("stop" if ended else "length")

    def end(self, reason: Reason) -> None:
        self.over = True
        self.tell(Done(reason, len(self.ids)))

    def fail(self, error: BaseException) -> None:
        self.over = True
        self.tell(error)


@dataclass(eq=False)
class Task:
    """Something else that the model is needed for, between two batches. The model's thread calls ``work`` with what
    says whether it still is, and ``tell`` once, with what came of it or went wrong."""

    work: Callable[[Callable[[], bool]], object]
    tell: Callable[[object], None]
    cancelled: bool = False

    def run(self) -> None:
        try:
            self.tell(self.work(lambda: not self.cancelled))
        except Exception as error:
            self.tell(error)


def _begun(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of ``text`` may be the beginning of a stop."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


class _Cut(Exception):
    """The batch ends here."""


class _Rows:
    """What transformers calls as a streamer: a token of every row at each step."""

    def __init__(self, jobs: Sequence[Job], write: Callable[[Job, int], None], others_wait: Callable[[], bool]) -> None:
        self._jobs, self._write, self._others_wait = jobs, write, others_wait
        self._steps, self._begun, self._first = 0, time.monotonic(), 0.0

    def put(self, ids: torch.Tensor) -> None:
        tokens = ids.flatten().tolist()
        if not tokens:  # nothing at first: a prompt of embeddings has no ids
            return
        self._steps += 1
        if self._steps == 1:
            self._first = time.monotonic()
        for job, token in zip(self._jobs, tokens, strict=True):
            if job.live:
                self._write(job, int(token))
        live = [job for job in self._jobs if job.live]
        if not live or (self._worth_it() and (2 * len(live) <= len(self._jobs) or self._others_wait())):
            raise _Cut

    def end(self) -> None: ...

    def _worth_it(self) -> bool:
        if any(job.seed is not None and not job.greedy for job in self._jobs) or self._steps < FEWEST_STEPS:
            return False
        return time.monotonic() - self._first >= PREFILLS * (self._first - self._begun)


class Batcher:
    """Owns the model while it lives. ``watch`` is told the rows of every batch."""

    def __init__(self, vlm: Vlm, *, max_batch: int, watch: Callable[[int], None] = lambda rows: None) -> None:
        self._vlm, self._max_batch, self._watch = vlm, max_batch, watch
        # Another tokenizer than the one that prompts are made with: it is not promised that two threads may share one.
        self._decode = copy.deepcopy(vlm.encoder).decode
        self._ends = frozenset(vlm.encoder.eos_ids)
        self._waiting: deque[Job | Task] = deque()
        self._running: Sequence[Job | Task] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, job: Job | Task) -> None:
        with self._changed:
            if not self.alive:
                raise RuntimeError("the model is no longer there")
            self._waiting.append(job)
            self._changed.notify()

    def close(self, timeout_s: float = 30.0) -> None:
        """No more answers; what is being written stops at the next token."""
        with self._changed:
            self._closing = True
            for job in (*self._waiting, *self._running):
                job.cancelled = True
            self._changed.notify()
        self._thread.join(timeout_s)

    # -------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while jobs := self._next():
            if isinstance(jobs, Task):
                jobs.run()
                self._running = []
                continue
            self._watch(len(jobs))
            try:
                self._write(jobs)
            except Exception as error:
                for job in jobs:
                    if job.live:
                        job.fail(error)
            with self._changed:
                self._waiting.extend(job for job in jobs if job.live)  # behind those who waited meanwhile
                self._running = []

    def _next(self) -> list[Job] | Task:
        """Those who have waited longest and can be written together; nothing when it is over."""
        with self._changed:
            while True:
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
                if self._closing:
                    return []
                if self._waiting:
                    break
                self._changed.wait()
            first = self._waiting[0]
            if isinstance(first, Task):
                self._running = [self._waiting.popleft()]
                return first
            jobs: list[Job] = []
            for job in list(self._waiting):
                if len(jobs) == self._max_batch or isinstance(job, Task):
                    continue
                if not jobs or (job.goes_with(jobs[0]) and self._fit([*jobs, job])):
                    jobs.append(job)
                    self._waiting.remove(job)
            self._running = jobs
            return jobs

    def _fit(self, jobs: Sequence[Job]) -> bool:
        """Whether a model with a table of positions can write these side by side."""
        table = self._vlm.model.language.limits.positions
        longest = max(len(job.prompt.encoded.ids) + len(job.ids) for job in jobs)
        return table is None or longest + max(job.left for job in jobs) - 1 <= table

    def _write(self, jobs: Sequence[Job]) -> None:
        first = jobs[0]
        how = first.how.model_copy(update={"max_new_tokens": max(job.left for job in jobs)})
        seed = random.getrandbits(62) if first.seed is None else first.seed
        rows: Any = _Rows(jobs, self._one, lambda: bool(self._waiting))
        try:
            self._vlm.model.generate(
                [job.so_far() for job in jobs], [job.prompt.images for job in jobs], how,
                eos_ids=self._vlm.encoder.eos_ids, seed=seed, streamer=rows,
            )  # fmt: skip
        except _Cut:
            return
        for job in jobs:
            if job.live:  # at the end of the model's positions
                self._last(job)

    def _one(self, job: Job, token: int) -> None:
        try:
            job.write(token, self._decode, self._ends)
        except Exception as error:
            job.fail(error)

    def _last(self, job: Job) -> None:
        if piece := beyond(job.said, self._decode(job.ids), over=True):
            job.said += piece
            job.tell(piece)
        job.end("length")
