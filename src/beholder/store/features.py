"""What a frozen vision tower, or the frozen part of one below the lowest block that learns, says about an image,
computed once and kept on disk: keys, fingerprints and the filling.

The rows themselves are `rows`' business. Not here: the tower (`model.vision` hands over a function), decoding
(`data.images`), and the decision whether a run uses the store (`stages`). Which image it is, `hashes` knows.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import torch

from beholder.config import FeaturesConfig
from beholder.data.images import ImageError
from beholder.runs import cache_dir
from beholder.store.hashes import ImageHashes, stamp_of
from beholder.store.rows import RowStore, RowWriter
from beholder.types import ImageRef, UserError

_VERSION = 1


def store_dir(cfg: FeaturesConfig) -> Path:
    """The folder of the store: ``features.dir``, else ``$BEHOLDER_CACHE/features``, else the user's cache folder."""
    if cfg.dir:
        return Path(cfg.dir).expanduser()
    return cache_dir() / "features"


@dataclass(slots=True)
class FillReport:
    """What one call of `FeatureStore.fill` did; the counts add up to the number of references it was given."""

    computed: int = 0
    """Images that went through the tower."""
    reused: int = 0
    """Images whose features were stored already, or whose bytes equal another image's of this call."""
    over_cap: int = 0
    """Images left out because the size cap is reached; they go through the tower at every step."""
    rejects: list[tuple[str, str]] = field(default_factory=list)
    """(image, reason) of images that could not be read or decoded, policy ``skip``."""
    seconds: float = 0.0
    bytes_used: int = 0
    """Size of this tower's rows on disk after the call, all processes together."""
    max_bytes: int = 0

    @property
    def summary(self) -> str:
        """One line for the log."""
        text = (
            f"{self.computed} computed, {self.reused} reused, {len(self.rejects)} rejected in {self.seconds:.1f} s; "
            f"{self.bytes_used / 1e9:.2f} of at most {self.max_bytes / 1e9:g} GB"
        )
        if self.over_cap:
            text += f"; {self.over_cap} images do not fit (features.max_gb) and go through the tower at every step"
        return text


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An image on its way into the store; neither pixels, nor stored, nor an error: the cap left no room for it."""

    ref: ImageRef
    key: bytes
    pixels: torch.Tensor | None = None
    stored: bool = False
    error: ImageError | None = None


class FeatureStore:
    """Stored features of one tower with one preprocessing; a `types.FeatureReader`.

    Content-addressed: an image is found by the sha256 of its bytes, wherever its file lies; other tower weights or
    another preprocessing is another sub-folder, so changing any one of the three misses. Instances may be forked and
    pickled into loader workers.

    Raises `UserError` where the folder cannot be used (not writable, damaged index, disk full). ``with``: closed at the
    end.
    """

    def __init__(
        self, folder: Path, *, tower_fingerprint: str, pipeline_fingerprint: str, shape: Sequence[int], max_bytes: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        self.shape, self.dtype = tuple(shape), dtype
        meta = {
            "version": _VERSION, "tower": tower_fingerprint, "pipeline": pipeline_fingerprint,
            # in words that older stores know
            "num_patches": self.shape[0], "d_vision": self.shape[1] if len(shape) == 2 else list(self.shape[1:]),
            "dtype": str(dtype).removeprefix("torch."),
        }  # fmt: skip
        self.rows = RowStore(
            Path(folder), meta, row_bytes=math.prod(shape) * dtype.itemsize, max_bytes=max_bytes,
            name="feature store",
            remedy="Give a writable folder with room in features.dir (or BEHOLDER_CACHE), lower features.max_gb, or "
            "set features.enabled: false",
        )  # fmt: skip
        self._hashes = ImageHashes(self.rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Images stored for this tower and preprocessing."""
        return len(self.rows)

    @property
    def bytes_used(self) -> int:
        """Bytes reserved for this tower's rows, by all processes together."""
        return self.rows.bytes_used

    def close(self) -> None:
        """Close this process's files; the next call opens them again."""
        self.rows.close()
        self._hashes.close()

    # -- reading

    def read(self, ref: ImageRef) -> torch.Tensor | None:
        """Features of an image, of the store's shape and type, or None when they are not stored.

        The tensor is the caller's own copy. A row whose checksum fails is answered with None. So is an image that
        cannot be read: its error belongs to whoever then decodes it.
        """
        try:
            key = self._hashes.of(ref)
        except ImageError:
            return None
        features = torch.empty(self.shape, dtype=self.dtype)
        return features if self.rows.read_into(key, features.view(torch.uint8).numpy().data.cast("B")) else None

    # -- filling

    def fill(
        self,
        refs: Iterable[ImageRef],
        encode: Callable[[torch.Tensor], torch.Tensor],
        pipeline: Callable[[ImageRef], torch.Tensor],
        *,
        batch_size: int,
        progress: Callable[[int, int], None] | None = None,
        on_bad_image: Literal["error", "skip"] = "error",
        rank: int = 0,
        world_size: int = 1,
        num_threads: int | None = None,
    ) -> FillReport:
        """Compute and store what is missing of ``refs``; killed at any instant, the next call goes on from there.

        ``encode``: uint8 ``[m, 3, h, w]`` -> ``[m, *shape]``, any float type, stored as the store's.
        ``pipeline``: image -> uint8 ``[3, h, w]``, called on ``num_threads`` threads (default: cores, at most 8).
        ``progress(done, total)`` is called after every batch. With ``world_size`` processes each takes every
        ``world_size``-th image; the caller waits for all of them before it relies on the whole.

        Raises `UserError` on a bad image (policy ``error``), on non-finite features, and when the disk is full;
        what was stored before stays.
        """
        started = time.perf_counter()
        mine = list(refs)[rank::world_size]
        report = FillReport(max_bytes=self.rows.max_bytes)
        pending: dict[bytes, _Loaded] = {}
        seen: set[bytes] = set()  # decoding runs ahead of storing: a copy may have left before its twin was stored
        full = threading.Event()
        with self.rows.writer() as writer:
            for done, image in enumerate(self._load(mine, pipeline, full, 2 * batch_size, num_threads), start=1):
                if image.error is not None:
                    if on_bad_image == "error":
                        raise image.error
                    report.rejects.append((str(image.ref), str(image.error)))
                elif image.stored or image.key in seen:
                    report.reused += 1
                elif image.pixels is None:
                    report.over_cap += 1
                else:
                    pending[image.key] = image
                    seen.add(image.key)
                if len(pending) >= batch_size or done == len(mine):
                    if pending:
                        self._encode_and_store(list(pending.values()), encode, writer, report, full)
                    pending.clear()
                    self._hashes.save()
                if progress and (not pending or done % 1024 == 0):
                    progress(done, len(mine))
        report.seconds = time.perf_counter() - started
        report.bytes_used = self.bytes_used
        return report

    def _load(
        self, refs: Sequence[ImageRef], pipeline: Callable[[ImageRef], torch.Tensor], full: threading.Event,
        lookahead: int, num_threads: int | None,
    ) -> Iterator[_Loaded]:  # fmt: skip
        """Each reference in order with its key, and with its pixels where they are needed; decodes ahead on threads."""

        def load(ref: ImageRef) -> _Loaded:
            try:
                while True:
                    before = stamp_of(ref)
                    key = self._hashes.of(ref)
                    if key in self.rows:
                        return _Loaded(ref, key, stored=True)
                    if full.is_set():
                        return _Loaded(ref, key)
                    pixels = pipeline(ref)
                    if stamp_of(ref) == before:  # else the file changed between hashing and decoding: once more
                        return _Loaded(ref, key, pixels=pixels)
            except ImageError as e:
                return _Loaded(ref, b"", error=e)

        threads = num_threads or max(1, min(8, os.cpu_count() or 1))
        ahead: deque[_Loaded | Future[_Loaded]] = deque()
        with ThreadPoolExecutor(threads, thread_name_prefix="features") as pool:
            try:
                for ref in refs:
                    # The usual case of a second run, unchanged and stored, is cheaper than handing it to a thread.
                    key = self._hashes.known(ref)
                    stored = key is not None and key in self.rows
                    ahead.append(_Loaded(ref, key or b"", stored=True) if stored else pool.submit(load, ref))
                    if len(ahead) > lookahead:
                        yield _result(ahead.popleft())
                while ahead:
                    yield _result(ahead.popleft())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _encode_and_store(
        self, images: Sequence[_Loaded], encode: Callable[[torch.Tensor], torch.Tensor], writer: RowWriter,
        report: FillReport, full: threading.Event,
    ) -> None:  # fmt: skip
        if not writer.has_room(len(images)):
            full.set()
            report.over_cap += len(images)
            return
        with torch.no_grad():  # not inference_mode: what a tower caches must stay usable outside
            features = encode(torch.stack([image.pixels for image in images if image.pixels is not None]))
        expected = (len(images), *self.shape)
        assert features.shape == expected, f"encode gave {tuple(features.shape)}, the store is made for {expected}"
        features = features.detach().to(device="cpu", dtype=self.dtype).contiguous()
        finite = features.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            bad = images[int((~finite).nonzero()[0])].ref
            raise UserError(
                f"image {bad}: the vision tower gave values that are not finite in "
                f"{str(self.dtype).removeprefix('torch.')}. Its weights may be damaged, "
                "or model.vision.precision is too narrow for it (try fp32)"
            )
        rows = features.view(torch.uint8).flatten(1).numpy()
        num_stored = writer.put([(image.key, memoryview(row)) for image, row in zip(images, rows, strict=True)])
        report.computed += num_stored
        report.over_cap += len(images) - num_stored


def _result(image: _Loaded | Future[_Loaded]) -> _Loaded:
    return image.result() if isinstance(image, Future) else image
