"""What a frozen vision tower, or the frozen part of one below the lowest block that learns, says about an image,
computed once and kept on disk: keys, fingerprints and the filling. So what the eyes of a native model say.

One image is one row; where images differ in their number of tokens, several of `TOKENS` tokens each, each with that
number before them. The first of them, under the image's own key, is written last: where it is, the image is whole.

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
from typing import Any, Literal, Self

import numpy as np
import torch

from beholder.config import FeaturesConfig
from beholder.data.images import ImageError
from beholder.runs import cache_dir
from beholder.store.hashes import ImageHashes, stamp_of
from beholder.store.rows import RowStore, RowWriter, row_key
from beholder.types import ImageRef, UserError

_VERSION = 1
TOKENS = 16
"""Of a row, where images differ in their number of tokens: the last one of an image is half empty on average."""
_COUNT = 8
"""Bytes before them: how many tokens the image has, little-endian."""


def bytes_of(num_tokens: int, shape: Sequence[int], dtype: torch.dtype) -> int:
    """That an image of so many tokens of this shape takes on the disk."""
    return -(-num_tokens // TOKENS) * _ragged_row(shape, dtype)


def _ragged_row(shape: Sequence[int], dtype: torch.dtype) -> int:
    return _COUNT + TOKENS * math.prod(shape) * dtype.itemsize


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
    pixels: Any = None
    """What the pipeline makes of it."""
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
        dtype: torch.dtype = torch.bfloat16, ragged: bool = False,
    ) -> None:  # fmt: skip
        self.shape, self.dtype, self.ragged = tuple(shape), dtype, ragged
        meta: dict[str, Any] = {
            "version": _VERSION, "tower": tower_fingerprint, "pipeline": pipeline_fingerprint,
            "dtype": str(dtype).removeprefix("torch."),
        }  # fmt: skip
        if ragged:
            meta |= {"token": list(self.shape), "tokens_a_row": TOKENS}
        else:  # in words that older stores know
            meta |= {"num_patches": shape[0], "d_vision": shape[1] if len(shape) == 2 else list(self.shape[1:])}
        self.rows = RowStore(
            Path(folder), meta, max_bytes=max_bytes,
            row_bytes=_ragged_row(shape, dtype) if ragged else math.prod(shape) * dtype.itemsize,
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
        """Rows stored for this tower and preprocessing: images, unless they are ``ragged``."""
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
        """Features of an image, of the store's shape (of images that are ``ragged``, ``[tokens, *shape]``) and type, or
        None when they are not stored.

        The tensor is the caller's own copy. A row whose checksum fails is answered with None. So is an image that
        cannot be read: its error belongs to whoever then decodes it.
        """
        try:
            key = self._hashes.of(ref)
        except ImageError:
            return None
        if self.ragged:
            return self._read_tokens(key)
        features = torch.empty(self.shape, dtype=self.dtype)
        return features if self.rows.read_into(key, features.view(torch.uint8).numpy().data.cast("B")) else None

    def _read_tokens(self, key: bytes) -> torch.Tensor | None:
        first = bytearray(self.rows.row_bytes)
        if not self.rows.read_into(key, memoryview(first)):
            return None
        count = int.from_bytes(first[:_COUNT], "little")
        whole = np.empty((-(-count // TOKENS), self.rows.row_bytes), np.uint8)
        whole[0] = np.frombuffer(first, np.uint8)
        if not all(self.rows.read_into(row_key(key, k), whole[k].data) for k in range(1, len(whole))):
            self.rows.forget(key)  # whose first row says that it is whole
            return None
        tokens = torch.from_numpy(whole[:, _COUNT:].copy()).view(self.dtype)
        return tokens.view(-1, *self.shape)[:count]

    # -- filling

    def fill(
        self,
        refs: Iterable[ImageRef],
        encode: Callable[[Any], torch.Tensor | Sequence[torch.Tensor]],
        pipeline: Callable[[ImageRef], Any],
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
        ``pipeline``: image -> uint8 ``[3, h, w]``, called on ``num_threads`` threads (default: cores, at most 8). Of
        images that are ``ragged``, ``encode`` is given a list of what ``pipeline`` makes of each, and gives
        ``[tokens, *shape]`` of each.
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
        self, refs: Sequence[ImageRef], pipeline: Callable[[ImageRef], Any], full: threading.Event,
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
        self, images: Sequence[_Loaded], encode: Callable[[Any], torch.Tensor | Sequence[torch.Tensor]],
        writer: RowWriter, report: FillReport, full: threading.Event,
    ) -> None:  # fmt: skip
        if not writer.has_room(len(images)):
            full.set()
            report.over_cap += len(images)
            return
        shown = [image.pixels for image in images]
        with torch.no_grad():  # not inference_mode: what a tower caches must stay usable outside
            features = encode(shown if self.ragged else torch.stack(shown))
        assert len(features) == len(images), f"encode gave {len(features)} of {len(images)} images"
        items: list[tuple[bytes, memoryview]] = []
        ends: list[int] = []
        for image, own in zip(images, features, strict=True):
            expected = (len(own), *self.shape) if self.ragged else self.shape
            assert own.shape == expected, f"encode gave {tuple(own.shape)}, the store is made for {expected}"
            own = own.detach().to(device="cpu", dtype=self.dtype).contiguous()
            if not bool(own.isfinite().all()):
                raise UserError(
                    f"image {image.ref}: the vision tower gave values that are not finite in "
                    f"{str(self.dtype).removeprefix('torch.')}. Its weights may be damaged, "
                    f"or model.{'native' if self.ragged else 'vision'}.precision is too narrow for it (try fp32)"
                )
            items += self._rows_of(image.key, own)
            ends.append(len(items))
        num_stored = writer.put(items)
        done = sum(end <= num_stored for end in ends)
        report.computed += done
        report.over_cap += len(images) - done

    def _rows_of(self, key: bytes, features: torch.Tensor) -> list[tuple[bytes, memoryview]]:
        """An image's rows with their keys, the one under its own key last."""
        flat = features.view(torch.uint8).numpy()
        if not self.ragged:
            return [(key, flat.data.cast("B"))]
        count = len(features)
        assert count, "an image without tokens"
        number = -(-count // TOKENS)
        padded = np.zeros((number, self.rows.row_bytes - _COUNT), np.uint8)
        padded.reshape(-1)[: flat.size] = flat.reshape(-1)
        head = np.frombuffer(count.to_bytes(_COUNT, "little"), np.uint8)
        rows = np.concatenate([np.broadcast_to(head, (number, _COUNT)), padded], 1)
        return [(row_key(key, k) if k else key, rows[k].data) for k in reversed(range(number))]


def _result(image: _Loaded | Future[_Loaded]) -> _Loaded:
    return image.result() if isinstance(image, Future) else image
