"""Encoded samples with their images → `Batch` rows, padded or packed; and the two streams of batches.

Step s of training is a pure function of s: which samples, how they are split over ranks and micro-batches, and how
they are laid out. Ids and templates are `chat`'s business, the order of samples is `mixture`'s.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from beholder.data.chat import ChatEncoder, EncodeError
from beholder.data.images import ImageError, as_input
from beholder.data.mixture import Mixture
from beholder.types import (
    Batch,
    Encoded,
    Example,
    FeatureReader,
    ImageInput,
    ImageRef,
    ProcessError,
    Taught,
    TeacherReader,
    UserError,
)

Sample = tuple[str, Encoded, list[ImageInput]]
"""Sample id, tokens, one input per image."""


@dataclass(frozen=True)
class Layout:
    """How samples become rows."""

    packing: bool
    """Several samples a row; else one."""
    pack_len: int
    """Longest packed row in tokens."""
    pad_to_multiple_of: int
    """Row lengths are rounded up to this."""


PADDED = Layout(packing=False, pack_len=0, pad_to_multiple_of=1)
"""A sample a row, as long as the longest."""


def collate(samples: Sequence[Sample], layout: Layout) -> Batch:
    """Lays samples out in rows; every sample in one piece, positions restarting at each.

    Padded: one sample a row, in order. Packed: first-fit-decreasing decides how many rows of at most ``pack_len`` are
    needed, then the rows are balanced where that makes the longest one shorter, because every row is padded to the
    longest. Both depend on the lengths alone, ties broken by order. No samples: one row of padding, so that every
    process can still take part in the step. Raises `UserError` naming a sample longer than ``pack_len``.
    """
    return _batch(samples, _rows(samples, layout), layout)


def collate_window(samples: Sequence[Sample], layout: Layout, micro_batch_size: int) -> list[Batch]:
    """The samples of several micro-batches, as batches of about ``micro_batch_size`` samples each; at least one batch.

    Padded: that many samples each, in order. Packed: all samples share the rows, and a batch is as many whole rows as
    that many samples fill on average, one at least. So micro-batches of a single sample are packed as well, and a batch
    has no more positions than ``micro_batch_size`` average samples in whole rows, or than one row of ``pack_len``.
    """
    return [batch for _, batch in _windows(samples, layout, micro_batch_size)]


def _windows(samples: Sequence[Sample], layout: Layout, micro_batch_size: int) -> Iterator[tuple[list[int], Batch]]:
    """The batches of `collate_window`, each with the numbers of its samples in order."""
    rows = _rows(samples, layout)
    step = max(1, len(rows) * micro_batch_size // max(1, len(samples)))
    for start in range(0, len(rows), step):
        chosen = rows[start : start + step]
        mine = sorted(i for row in chosen for i in row)
        number = {i: k for k, i in enumerate(mine)}
        yield mine, _batch([samples[i] for i in mine], [[number[i] for i in row] for row in chosen], layout)


def _rows(samples: Sequence[Sample], layout: Layout) -> list[list[int]]:
    """Which samples make up each row; at least one row."""
    if not layout.packing:
        return [[i] for i in range(len(samples))] or [[]]
    lengths = [len(encoded.ids) for _, encoded, _ in samples]
    for (sample_id, _, _), length in zip(samples, lengths, strict=True):
        if length > layout.pack_len:
            raise UserError(
                f"sample {sample_id!r} has {length} tokens, but train.pack_len is {layout.pack_len}; "
                "raise pack_len, or lower prompting.max_seq_len to cut long targets"
            )
    return pack(lengths, layout.pack_len) or [[]]


def _batch(samples: Sequence[Sample], rows: Sequence[Sequence[int]], layout: Layout) -> Batch:
    lengths = [len(encoded.ids) for _, encoded, _ in samples]
    width = max(1, *(sum(lengths[i] for i in row) for row in rows)) if samples else 1
    width = -(-width // layout.pad_to_multiple_of) * layout.pad_to_multiple_of

    shape = (len(rows), width)
    ids = np.zeros(shape, dtype=np.int64)  # any id will do at padding: nothing attends to it, nothing is read from it
    positions = np.zeros(shape, dtype=np.int64)
    supervise = np.zeros(shape, dtype=bool)
    sample_index = np.full(shape, -1, dtype=np.int64)
    start_of: dict[int, int] = {}
    for r, row in enumerate(rows):
        t = 0
        for i in row:
            here = slice(t, t + lengths[i])
            ids[r, here] = samples[i][1].ids
            positions[r, here] = np.arange(lengths[i])
            supervise[r, here] = samples[i][1].supervise
            sample_index[r, here] = i
            start_of[i] = r * width + t
            t += lengths[i]
        positions[r, t:] = np.arange(width - t)

    images: list[ImageInput] = []
    image_positions: list[np.ndarray] = []
    image_sample: list[int] = []
    for i, (sample_id, encoded, inputs) in enumerate(samples):
        assert len(inputs) == len(encoded.image_spans), (sample_id, len(inputs), encoded.image_spans)
        for k, image in enumerate(inputs):
            images.append(image)
            image_positions.append(start_of[i] + encoded.reserved(k).astype(np.int64))
            image_sample.append(i)
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        supervise=torch.from_numpy(supervise),
        sample_index=torch.from_numpy(sample_index),
        image_positions=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *image_positions])),
        image_lengths=torch.tensor([len(places) for places in image_positions], dtype=torch.int64),
        image_sample=torch.tensor(image_sample, dtype=torch.int64),
        images=images,
        ids=[sample_id for sample_id, _, _ in samples],
        truncated=sum(encoded.truncated for _, encoded, _ in samples),
        image_sizes=[size for _, encoded, _ in samples for size in encoded.image_sizes],
    )


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of sample numbers, each row at most ``capacity`` tokens; see `collate` for the rule."""
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows: list[list[int]] = []
    used: list[int] = []
    for i in longest_first:
        r = next((r for r, u in enumerate(used) if u + lengths[i] <= capacity), None)
        if r is None:
            r = len(rows)
            rows.append([])
            used.append(0)
        rows[r].append(i)
        used[r] += lengths[i]

    balanced: list[list[int]] = [[] for _ in rows]
    load = [0] * len(rows)
    for i in longest_first:
        r = min(range(len(load)), key=lambda r: (load[r], r))
        balanced[r].append(i)
        load[r] += lengths[i]
    return balanced if rows and max(load) < max(used) else rows


# ---------------------------------------------------------------------------------------------------------------
# Examples → samples


@dataclass(eq=False)
class SampleBuilder:
    """Encodes an example and gets its images, from the feature store where they are stored, else as pixels.

    Picklable, for loader processes. ``augment_seed``: seeds augmentation together with epoch and sample; None: none.
    ``on_bad_image`` skip: a sample with an unusable image becomes an entry of `Batch.rejected`; nothing takes its
    place. A sample that cannot be laid out (`EncodeError`: too long, a turn order its template refuses) becomes one
    under either policy: one record must not end a run.
    """

    encoder: ChatEncoder
    pipeline: Callable[[ImageRef, str | None], torch.Tensor | ImageInput]
    features: FeatureReader | None
    _: KW_ONLY
    on_bad_image: Literal["error", "skip"]
    augment_seed: int | None = None
    teachers: tuple[TeacherReader | AskedTeacher, ...] = ()
    """Who says of a batch's supervised tokens what it would have said (`Batch.taught`)."""

    def __post_init__(self) -> None:
        assert self.features is None or self.augment_seed is None, "stored features know nothing of augmentation"

    def build(self, example: Example, epoch: int = 0) -> Sample:
        """One sample. Raises `UserError` (`ImageError` for an image) whose message names the record."""
        try:
            encoded = self.encoder.encode(example)
        except ImageError as e:  # a native model's layout depends on how large its images are
            raise e.needed_by(example.where) from e
        return example.id, encoded, self.images(example, epoch)

    def images(self, example: Example, epoch: int = 0) -> list[ImageInput]:
        """The inputs of all images of an example, in order. Raises as `build`."""
        out: list[ImageInput] = []
        for k, ref in enumerate(example.images):
            stored = self.features.read(ref) if self.features is not None else None
            if stored is not None:
                out.append(ImageInput(features=stored))
                continue
            key = None if self.augment_seed is None else f"{self.augment_seed}/{epoch}/{example.id}/{k}"
            try:
                out.append(as_input(self.pipeline(ref, key)))
            except ImageError as e:
                raise e.needed_by(example.where) from e
            except UserError as e:
                raise UserError(f"{example.where}: {e}") from e
        return out

    def batch(self, examples: Sequence[Example], layout: Layout, epoch: int | Sequence[int] = 0) -> Batch:
        """The batch of ``examples``. ``epoch``: one for all, or one per example."""
        (batch,) = self.batches(examples, layout, max(1, len(examples)), epoch)
        return batch

    def batches(
        self, examples: Sequence[Example], layout: Layout, micro_batch_size: int, epoch: int | Sequence[int] = 0
    ) -> list[Batch]:
        """The micro-batches of ``examples`` (`collate_window`); the first one carries what was rejected."""
        began = time.perf_counter()
        epochs = [epoch] * len(examples) if isinstance(epoch, int) else list(epoch)
        samples: list[Sample] = []
        of: list[Example] = []
        rejected: list[tuple[str, str]] = []
        for example, e in zip(examples, epochs, strict=True):
            try:
                samples.append(self.build(example, e))
                of.append(example)
            except EncodeError as error:
                rejected.append((example.id, f"{error.reason}: {error}"))
            except ImageError as error:
                if self.on_bad_image == "error":
                    raise
                rejected.append((example.id, f"{error.reason}: {error}"))
        batches = [
            replace(batch, taught=self._taught([of[i] for i in chosen], [samples[i][1] for i in chosen]))
            if self.teachers else batch
            for chosen, batch in _windows(samples, layout, micro_batch_size)
        ]  # fmt: skip
        first, *rest = batches
        return [replace(first, rejected=rejected, load_s=time.perf_counter() - began), *rest]

    def _taught(self, examples: Sequence[Example], encoded: Sequence[Encoded]) -> list[Taught]:
        targets = [e.ids[e.supervise] for e in encoded]
        return [
            teacher.batch(examples, targets) if isinstance(teacher, AskedTeacher) else teacher.taught(examples, targets)
            for teacher in self.teachers
        ]


@dataclass(frozen=True)
class AskedTeacher:
    """A teacher that is asked while the student learns: it is shown the same samples, laid out as it takes them."""

    builder: SampleBuilder
    layout: Layout
    name: str
    """For messages."""
    shared: bool = False
    """It may learn other tokens of a sample: it has another tokenizer."""
    system: str | None = None
    """The student's system turn, which held-out samples begin with already: a teacher puts its own there."""

    def batch(self, examples: Sequence[Example], targets: Sequence[np.ndarray]) -> Batch:
        """The examples as the teacher takes them. Raises `UserError` for one whose supervised ids are not ``targets``,
        or that it cannot be shown."""
        samples: list[Sample] = []
        for example, wanted in zip(examples, targets, strict=True):
            try:
                sample = self.builder.build(self.as_recorded(example))
            except EncodeError as e:
                raise UserError(f"{example.where}: the teacher {self.name} cannot be shown it: {e}") from e
            samples.append((sample[0], self._cut(example, sample[1], wanted), sample[2]))
        return collate(samples, self.layout)

    def as_recorded(self, example: Example) -> Example:
        """Without what the student's own way of asking has put before it."""
        given = [t for t in example.turns[:1] if t.role == "system" and t.text == self.system]
        return replace(example, turns=example.turns[1:]) if given else example

    def _cut(self, example: Example, encoded: Encoded, wanted: np.ndarray) -> Encoded:
        """Supervised as far as the student's sample, which may be cut shorter."""
        if self.shared:
            return encoded
        where = np.flatnonzero(encoded.supervise)
        if len(where) < len(wanted) or not bool((encoded.ids[where[: len(wanted)]] == wanted).all()):
            raise UserError(self._differ(example, encoded.ids[where], wanted))
        supervise = encoded.supervise.copy()
        supervise[where[len(wanted) :]] = False
        return replace(encoded, supervise=supervise)

    def _differ(self, example: Example, own: np.ndarray, wanted: np.ndarray) -> str:
        k = next((k for k, (a, b) in enumerate(zip(own, wanted, strict=False)) if a != b), min(len(own), len(wanted)))
        teacher, student = (f"{x[k]}" if k < len(x) else "no token" for x in (own, wanted))
        return (
            f"{example.where}: the teacher {self.name} and the student learn other tokens of it (token {k} of the "
            f"answer: {teacher} for the teacher of {len(own)}, {student} for the student of {len(wanted)}). They need "
            "the same tokenizer and the same text at the end of an answer: give both the same prompting.chat_template"
        )


def eval_batches(
    examples: Sequence[Example], builder: SampleBuilder, layout: Layout, batch_size: int
) -> Iterator[Batch]:
    """Examples in the given order, ``batch_size`` at a time."""
    assert batch_size > 0, batch_size
    for start in range(0, len(examples), batch_size):
        yield builder.batch(examples[start : start + batch_size], layout)


# ---------------------------------------------------------------------------------------------------------------
# Training stream


WINDOW = 64
"""Samples of a step that share rows when they are packed. More would hardly fill rows better (97 % with 16 of them,
benchmarks/instruct_step.py), and a loader process holds the images of this many at a time."""


_LOOK_S = 1.0
"""Between looks whether the loader processes still live while one of them is waited for."""


@dataclass(eq=False)
class TrainStream:
    """Micro-batches of every optimizer step, for one rank.

    Step s covers positions [s·E, (s+1)·E) of the mixture, E = ``micro_batch_size`` x ``gradient_accum`` samples however
    many processes share them. Rank r takes the r-th of ``world_size`` nearly equal slices, and lays it out in windows:
    of one micro-batch when padded, of up to `WINDOW` samples when packed, which then become as many micro-batches as
    their rows need (`collate_window`), on one rank perhaps more than on another. What is in a step depends on neither
    the worker count nor the world size, and a resume is ``steps(start, …)``.
    """

    mixture: Mixture
    builder: SampleBuilder
    layout: Layout
    _: KW_ONLY
    micro_batch_size: int
    gradient_accum: int
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    prefetch_factor: int = 2
    pin_memory: bool = False
    persistent_workers: bool = True
    timeout_s: float = 600.0
    """Longest wait for a batch of the loader processes."""

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, (self.rank, self.world_size)
        self.samples_per_step = self.micro_batch_size * self.gradient_accum
        if self.samples_per_step < self.world_size:
            raise UserError(
                f"train.micro_batch_size x train.gradient_accum is {self.samples_per_step} samples a step, fewer than "
                f"the {self.world_size} processes that share them; raise one of the two or start fewer processes"
            )
        share = math.ceil(self.samples_per_step / self.world_size)
        window = max(self.micro_batch_size, min(share, WINDOW)) if self.layout.packing else self.micro_batch_size
        self.windows_per_step = math.ceil(share / window)

    def steps_for(self, num_epochs: float) -> int:
        """Steps in which every sample is seen ``num_epochs`` times; the last one may reach into the next epoch."""
        # The small difference keeps 0.1 * 30 samples from costing a step for the sake of 3.0000000000000004.
        return max(1, math.ceil(num_epochs * len(self.mixture) / self.samples_per_step - 1e-9))

    def positions(self, step: int, window: int) -> np.ndarray:
        """int64: mixture positions of one window of this rank."""
        start = step * self.samples_per_step
        mine = np.array_split(np.arange(start, start + self.samples_per_step), self.world_size)[self.rank]
        return np.array_split(mine, self.windows_per_step)[window]

    def load(self, step: int, window: int) -> list[Batch]:
        """The micro-batches of one window, built in this process."""
        positions = self.positions(step, window).tolist()
        examples = [self.mixture.example_at(p) for p in positions]
        epochs = [self.mixture.epoch_of(p) for p in positions]
        made = self.builder.batches(examples, self.layout, self.micro_batch_size, epochs)
        return [replace(batch, step=step) for batch in made]

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """The micro-batches of steps ``start``, …, ``stop - 1``, a list per step.

        Raises what a worker raised: a `UserError` with its own message, anything else with the worker's traceback; and
        `ProcessError` with the samples that were due when one was killed or has given nothing for ``timeout_s``.
        """
        if self.persistent_workers or not self.num_workers:
            segments = [(start, stop)]
        else:  # fresh processes at each epoch: what a library leaked in them is given back
            per_epoch = max(1, len(self.mixture) // self.samples_per_step)
            cuts = [start, *range((start // per_epoch + 1) * per_epoch, stop, per_epoch), stop]
            segments = list(itertools.pairwise(cuts))
        for first, last in segments:
            yield from self._segment(first, last)

    def _segment(self, start: int, stop: int) -> Iterator[list[Batch]]:
        leaving = multiprocessing.RawValue("b", 0)
        loader = DataLoader(
            _Windows(self, start, stop),
            batch_size=None,  # an item is a whole window
            shuffle=False,
            num_workers=self.num_workers,
            timeout=min(_LOOK_S, self.timeout_s) if self.num_workers else 0,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            pin_memory=self.pin_memory,
            collate_fn=_as_it_is,
            worker_init_fn=partial(_start_worker, leaving),
        )
        with _no_tokenizer_threads(self.num_workers > 0):
            items = iter(loader)
        try:
            step: list[Batch] = []
            for number in range(1, len(loader) + 1):
                item = self._next(items, start, number - 1)
                if isinstance(item, _Failure):
                    raise UserError(item.message)
                step += [part.unpack() if isinstance(part, _Parcel) else part for part in item]
                if number % self.windows_per_step == 0:
                    yield step
                    step = []
        finally:
            # Not left to the garbage collector: an exception's traceback keeps the iterator alive, and one that is
            # collected as part of a cycle cannot tell its workers to stop and waits 5 s for each (torch 2.11 to 2.15).
            stop_workers = getattr(items, "_shutdown_workers", None)
            if stop_workers is not None:
                leaving.value = 1
                if isinstance(sys.exc_info()[1], ProcessError):
                    for worker in getattr(items, "_workers", ()):  # torch would wait 5 s for one that hangs
                        worker.terminate()
                stop_workers()

    def _next(self, items: Iterator[Any], start: int, j: int) -> Any:
        """Item ``j`` of a segment that begins at step ``start``. torch waits for a loader process without an end, or
        until a time at which it would notice that one has died: so it is asked again and again."""
        began = time.monotonic()
        while True:
            try:
                return next(items)
            except RuntimeError as e:
                timed_out = str(e).startswith("DataLoader timed out")
                if timed_out and time.monotonic() - began < self.timeout_s:
                    continue
                died = str(e).startswith("DataLoader worker")
                if not timed_out and not died:
                    raise
                step, window = divmod(j, self.windows_per_step)
                ids = [self.mixture.example_at(p).id for p in self.positions(start + step, window).tolist()]
                due = f"step {start + step + 1} (samples {', '.join(map(repr, ids[:4]))}{', …' if ids[4:] else ''})"
                what = (
                    f"a loader process was killed while the batch of {due} was due: {e}. Perhaps memory ran out; lower "
                    "data.num_workers or data.prefetch_factor"
                    if died
                    else f"the loader processes gave no batch of {due} for {self.timeout_s:g} s: one hangs, perhaps on "
                    "a network disk. If they were only slow, raise train.timeout_s"
                )
                raise ProcessError(f"{what}. The same command goes on from the latest checkpoint.") from e


class _Windows(Dataset[Any]):
    """Item j is the micro-batches of window j % n of step start + j // n."""

    def __init__(self, stream: TrainStream, start: int, stop: int) -> None:
        self.stream = stream
        self.start = start
        self.count = max(0, stop - start) * stream.windows_per_step

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, j: int) -> Any:
        step, window = divmod(j, self.stream.windows_per_step)
        if not self.stream.num_workers:
            return self.stream.load(self.start + step, window)
        try:
            return [_Parcel.of(batch) for batch in self.stream.load(self.start + step, window)]
        except UserError as e:
            # As a value: the loader would bury the message in a traceback and rebuild the exception by guesswork.
            return _Failure(str(e))


@dataclass
class _Failure:
    message: str


@dataclass
class _Parcel:
    """A batch on its way between processes, its images stacked: each tensor sent costs an open file descriptor."""

    batch: Batch
    features: torch.Tensor | None
    pixels: torch.Tensor | None
    is_stored: list[bool]
    native: list[ImageInput]
    """Images of a native model, which differ in shape (stored ones too), as they are."""
    beside: list[Any]
    """What teachers say of it, or the same samples as they take them."""

    @classmethod
    def of(cls, batch: Batch) -> _Parcel:
        beside = [cls.of(own) if isinstance(own, Batch) else own for own in batch.taught]
        batch = replace(batch, taught=[])
        if batch.image_sizes:
            return cls(replace(batch, images=[]), None, None, [], batch.images, beside)
        features = [i.features for i in batch.images if i.features is not None]
        pixels = [i.pixels for i in batch.images if i.pixels is not None]
        return cls(
            replace(batch, images=[]),
            torch.stack(features) if features else None,
            torch.stack(pixels) if pixels else None,
            [i.features is not None for i in batch.images],
            [],
            beside,
        )

    def unpack(self) -> Batch:
        beside = [own.unpack() if isinstance(own, _Parcel) else own for own in self.beside]
        batch = replace(self.batch, taught=beside)
        if self.native:
            return replace(batch, images=self.native)
        features = iter(self.features if self.features is not None else ())
        pixels = iter(self.pixels if self.pixels is not None else ())
        images = [ImageInput(features=next(features)) if s else ImageInput(pixels=next(pixels)) for s in self.is_stored]
        return replace(batch, images=images)

    def pin_memory(self) -> _Parcel:
        """Called by ``DataLoader(pin_memory=True)``."""

        def pin(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.pin_memory()

        whole = replace(self.batch, images=self.native).pin_memory()
        beside = [
            own.pin_memory() if isinstance(own, _Parcel) else {k: pin(t) for k, t in own.items()} for own in self.beside
        ]
        return replace(
            self, batch=replace(whole, images=[]), features=pin(self.features), pixels=pin(self.pixels),
            native=whole.images, beside=beside,
        )  # fmt: skip


def _start_worker(leaving: Any, _: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of the group, but whether to stop is the trainer's decision:
    it may still need this loader's batch to finish its step. ``leaving`` says that it needs no more.

    Exit code 0, because of another one torch raises in the middle of the trainer's saving.
    """
    trainer = os.getppid()

    def terminated(*_: object) -> None:
        if leaving.value or os.getppid() != trainer:
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminated)


def _as_it_is(item: Any) -> Any:
    """torch's default would look inside dataclasses and named tuples."""
    return item


@contextmanager
def _no_tokenizer_threads(workers: bool) -> Iterator[None]:
    """While processes are started, says so to `tokenizers`, which otherwise warns in every one of them."""
    name = "TOKENIZERS_PARALLELISM"
    if not workers or name in os.environ:
        yield
        return
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
