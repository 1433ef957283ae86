"""The feature store: what a frozen vision tower says about an image, computed once and kept on disk.

Here live the store's files, its index, filling and reading. Not here: the tower (`model.vision` hands over a
function), decoding (`data.images`), and the decision whether a run uses the store (`stages`).

Layout of a store folder, one sub-folder per (tower weights, preprocessing, feature shape)::

    hashes.sqlite               (image file, size, times, inode) -> sha256 of its bytes, shared by all towers
    <32 hex digits>/meta.json   what the sub-folder is keyed by
                    index.sqlite   sha256 of the image bytes -> shard, row, crc32
                    shard-*.bin    rows of num_patches x d_vision bf16, nothing else

How it stays right: a row is written and fsynced first and enters the index afterwards, so a killed writer leaves
nothing a reader could reach. A shard belongs to the one process that holds its flock; the kernel releases the lock
of a dead writer, and the next one continues that shard in the slots no index row points at. Space is reserved inside a
transaction before it is allocated, so several writers together stay under the cap. Each row's crc32 (seeded with
its key) is verified on every read. SQLite's write-ahead log needs shared memory: the folder must be on a disk of
this machine, not on a network file system that several machines write to.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import sqlite3
import threading
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from beholder.config import FeaturesConfig
from beholder.data.images import ImageError, content_hash
from beholder.runs import cache_dir
from beholder.types import ImageGeometry, ImageRef, UserError

_VERSION = 1
_BYTES_PER_VALUE = 2  # bf16
_SHARD_BYTES = 256 * 2**20
_STEP_BYTES = 32 * 2**20  # a writer reserves this much at a time, so that several share a small cap fairly
_BUSY_S = 60.0
# A file changed this shortly before it was hashed may have changed again within the same clock tick.
_RACY_NS = 2_000_000_000


def store_dir(cfg: FeaturesConfig) -> Path:
    """The folder of the store: ``features.dir``, else ``$BEHOLDER_CACHE/features``, else the user's cache folder."""
    if cfg.dir:
        return Path(cfg.dir).expanduser()
    return cache_dir() / "features"


def estimate_bytes(num_images: int, geometry: ImageGeometry) -> int:
    """Bytes that the features of ``num_images`` different images take: images x patches x width x 2."""
    return num_images * geometry.num_patches * geometry.d_vision * _BYTES_PER_VALUE


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


class _Location(NamedTuple):
    shard: int
    row: int
    crc: int


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
    pickled into loader workers: each process opens files and databases of its own.

    Raises `UserError` where the folder cannot be used (not writable, damaged index, disk full).
    """

    def __init__(
        self, folder: Path, *, tower_fingerprint: str, pipeline_fingerprint: str, num_patches: int, d_vision: int,
        max_bytes: int,
    ) -> None:  # fmt: skip
        self.root = Path(folder)
        self.num_patches, self.d_vision, self.max_bytes = num_patches, d_vision, int(max_bytes)
        self.row_bytes = num_patches * d_vision * _BYTES_PER_VALUE
        self.corrupt_rows = 0
        """Rows this process found damaged; they are forgotten, so that the next `fill` computes them again."""
        meta = {
            "version": _VERSION, "tower": tower_fingerprint, "pipeline": pipeline_fingerprint,
            "num_patches": num_patches, "d_vision": d_vision, "dtype": "bfloat16",
        }  # fmt: skip
        text = json.dumps(meta, sort_keys=True)
        self.folder = self.root / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._state: _ProcessState | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _flocked(self.root / ".lock"):  # several processes may create the same store at the same moment
                if not (self.folder / "meta.json").exists():
                    (self.folder / "meta.json.tmp").write_text(text)
                    os.replace(self.folder / "meta.json.tmp", self.folder / "meta.json")
                self._local()
        except OSError as e:
            raise UserError(
                f"feature store {self.root}: cannot be opened: {e}. Give a writable folder in features.dir "
                "(or BEHOLDER_CACHE), or set features.enabled: false"
            ) from e

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_state": None}

    def __len__(self) -> int:
        """Images stored for this tower and preprocessing."""
        with self._query() as state:
            return int(state.index.execute("SELECT COUNT(*) FROM rows").fetchone()[0])

    @property
    def bytes_used(self) -> int:
        """Bytes reserved for this tower's rows, by all processes together."""
        with self._query() as state:
            reserved = state.index.execute("SELECT COALESCE(SUM(reserved), 0) FROM shards").fetchone()[0]
        return int(reserved) * self.row_bytes

    def close(self) -> None:
        """Close this process's files; the next call opens them again."""
        state, self._state = self._state, None
        if state is not None and state.pid == os.getpid():
            state.index.close()
            state.hashes.close()

    # -- reading

    def read(self, ref: ImageRef) -> torch.Tensor | None:
        """Features of an image: bf16 ``[num_patches, d_vision]``, or None when they are not stored.

        The tensor is the caller's own copy. A row whose checksum fails is forgotten, counted in `corrupt_rows`, and
        answered with None. So is an image that cannot be read: its error belongs to whoever then decodes it.
        """
        try:
            key = self._key(ref)
        except ImageError:
            return None
        location = self._locate(key)
        if location is None:
            return None
        features = self._read_row(key, location)
        if features is None:
            self.corrupt_rows += 1
            self._forget(key, location)
        return features

    def _read_row(self, key: bytes, at: _Location) -> torch.Tensor | None:
        start, stop = at.row * self.row_bytes, (at.row + 1) * self.row_bytes
        data = self._map(at.shard, stop)
        if data is None:
            return None
        features = torch.empty((self.num_patches, self.d_vision), dtype=torch.bfloat16)
        raw = features.view(torch.uint8).numpy().data.cast("B")
        raw[:] = memoryview(data)[start:stop]
        return features if zlib.crc32(raw, zlib.crc32(key)) == at.crc else None

    def _map(self, shard: int, stop: int) -> mmap.mmap | None:
        """The shard's bytes, mapped again where it has grown; None where the file does not reach ``stop``."""
        with self._query() as state:
            data = state.maps.get(shard)
            if data is None or len(data) < stop:
                name = state.index.execute("SELECT name FROM shards WHERE id = ?", (shard,)).fetchone()
                try:
                    with open(self.folder / name[0], "rb") as f:
                        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
                except (OSError, ValueError, TypeError):  # gone, empty, or forgotten
                    return None
                state.maps[shard] = data
            # size() is the file's size now: touching a page behind a truncated end would kill the process.
            return data if min(len(data), data.size()) >= stop else None

    def _forget(self, key: bytes, at: _Location) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM rows WHERE key = ? AND shard = ? AND row = ? AND crc = ?", (key, *at))

    def _locate(self, key: bytes) -> _Location | None:
        with self._query() as state:
            row = state.index.execute("SELECT shard, row, crc FROM rows WHERE key = ?", (key,)).fetchone()
        return None if row is None else _Location(*row)

    # -- from an image to its key

    def _key(self, ref: ImageRef) -> bytes:
        """sha256 of the image's bytes; a file that has not changed since it was hashed is not read again."""
        name, stamp = _name(ref), _stamp(ref)
        key = self._known_key(name, stamp)
        if key is None:
            now = time.time_ns()
            key = bytes.fromhex(content_hash(ref))
            self._local().recent[name] = (stamp.text, now, key)
        return key

    def _known_key(self, name: str, stamp: _Stamp) -> bytes | None:
        """The remembered hash, unless the file has changed or was hashed so soon after a change that it may have."""
        with self._query() as state:
            row = state.recent.get(name)
            if row is None:
                row = state.hashes.execute("SELECT stamp, hashed_ns, sha FROM files WHERE name = ?", (name,)).fetchone()
        if row is None or not stamp.text or row[0] != stamp.text or row[1] - stamp.changed_ns < _RACY_NS:
            return None
        return row[2]

    def _save_hashes(self) -> None:
        with self._query() as state:
            rows = [(name, *value) for name, value in state.recent.items()]
            state.hashes.execute("BEGIN IMMEDIATE")
            state.hashes.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)
            state.hashes.execute("COMMIT")
            state.recent.clear()

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

        ``encode``: uint8 ``[m, 3, h, w]`` -> ``[m, num_patches, d_vision]``, any float type, stored as bf16.
        ``pipeline``: image -> uint8 ``[3, h, w]``, called on ``num_threads`` threads (default: cores, at most 8).
        ``progress(done, total)`` is called after every batch. With ``world_size`` processes each takes every
        ``world_size``-th image; the caller waits for all of them before it relies on the whole.

        Raises `UserError` on a bad image (policy ``error``), on non-finite features, and when the disk is full;
        what was stored before stays.
        """
        started = time.perf_counter()
        mine = list(refs)[rank::world_size]
        report = FillReport(max_bytes=self.max_bytes)
        self._tidy()
        writer = _Writer(self)
        pending: dict[bytes, _Loaded] = {}
        seen: set[bytes] = set()  # decoding runs ahead of storing: a copy may have left before its twin was stored
        full = threading.Event()
        try:
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
                    self._save_hashes()
                if progress and (not pending or done % 1024 == 0):
                    progress(done, len(mine))
        finally:
            writer.close()
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
                    before = _stamp(ref)
                    key = self._key(ref)
                    if self._locate(key):
                        return _Loaded(ref, key, stored=True)
                    if full.is_set():
                        return _Loaded(ref, key)
                    pixels = pipeline(ref)
                    if _stamp(ref) == before:  # else the file changed between hashing and decoding: once more
                        return _Loaded(ref, key, pixels=pixels)
            except ImageError as e:
                return _Loaded(ref, b"", error=e)

        threads = num_threads or max(1, min(8, os.cpu_count() or 1))
        ahead: deque[_Loaded | Future[_Loaded]] = deque()
        with ThreadPoolExecutor(threads, thread_name_prefix="features") as pool:
            try:
                for ref in refs:
                    # The usual case of a second run, unchanged and stored, is cheaper than handing it to a thread.
                    key = self._known_key(_name(ref), _stamp(ref))
                    stored = key is not None and self._locate(key) is not None
                    ahead.append(_Loaded(ref, key or b"", stored=True) if stored else pool.submit(load, ref))
                    if len(ahead) > lookahead:
                        yield _result(ahead.popleft())
                while ahead:
                    yield _result(ahead.popleft())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _encode_and_store(
        self, images: Sequence[_Loaded], encode: Callable[[torch.Tensor], torch.Tensor], writer: _Writer,
        report: FillReport, full: threading.Event,
    ) -> None:  # fmt: skip
        if not writer.has_room(len(images)):
            full.set()
            report.over_cap += len(images)
            return
        with torch.no_grad():  # not inference_mode: what a tower caches must stay usable outside
            features = encode(torch.stack([image.pixels for image in images if image.pixels is not None]))
        expected = (len(images), self.num_patches, self.d_vision)
        assert features.shape == expected, f"encode gave {tuple(features.shape)}, the store is made for {expected}"
        features = features.detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
        finite = features.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            bad = images[int((~finite).nonzero()[0])].ref
            raise UserError(
                f"image {bad}: the vision tower gave values that are not finite in bf16. Its weights may be damaged, "
                "or model.vision.precision is too narrow for it (try fp32)"
            )
        rows = features.view(torch.uint8).flatten(1).numpy()
        num_stored = writer.put([(image.key, memoryview(row)) for image, row in zip(images, rows, strict=True)])
        report.computed += num_stored
        report.over_cap += len(images) - num_stored

    def _tidy(self) -> None:
        """Forget rows whose bytes are gone, give back what dead writers had reserved, remove files without an entry."""
        with self._transaction() as db:
            shards = {name: (shard, reserved) for shard, name, reserved in db.execute("SELECT * FROM shards")}
            for name, (shard, reserved) in shards.items():
                try:
                    fd = os.open(self.folder / name, os.O_RDWR | os.O_CLOEXEC)
                except FileNotFoundError:
                    db.execute("DELETE FROM rows WHERE shard = ?", (shard,))
                    db.execute("DELETE FROM shards WHERE id = ?", (shard,))
                    continue
                size = os.fstat(fd).st_size
                if size < reserved * self.row_bytes:
                    db.execute("DELETE FROM rows WHERE shard = ? AND row >= ?", (shard, size // self.row_bytes))
                if _try_flock(fd):  # nobody writes to it
                    _shrink(db, shard, fd, self.row_bytes)
                os.close(fd)
            # Shards are created inside a transaction too, so a file without an entry has lost its writer.
            for path in self.folder.glob("shard-*.bin"):
                if path.name not in shards:
                    path.unlink(missing_ok=True)

    # -- databases, one connection per process

    def _local(self) -> _ProcessState:
        state = self._state
        if state is None or state.pid != os.getpid():
            if state is not None:
                _INHERITED.append(state)  # closing a connection that crossed a fork is not allowed
            with self._explained():
                state = self._state = _ProcessState(
                    pid=os.getpid(), lock=threading.RLock(), maps={}, recent={},
                    index=_connect(self.folder / "index.sqlite", _INDEX_SCHEMA),
                    hashes=_connect(self.root / "hashes.sqlite", _HASHES_SCHEMA),
                )  # fmt: skip
        return state

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as e:
            raise UserError(
                f"feature store {self.root}: its index cannot be used ({e}). It is a cache: delete that folder "
                "and it is computed again"
            ) from e

    @contextmanager
    def _query(self) -> Iterator[_ProcessState]:
        state = self._local()
        with state.lock, self._explained():
            yield state

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """The index under its write lock; committed at the end, rolled back on an exception."""
        with self._query() as state:
            state.index.execute("BEGIN IMMEDIATE")
            try:
                yield state.index
                state.index.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    state.index.execute("ROLLBACK")
                raise


@dataclass(slots=True)
class _ProcessState:
    pid: int
    lock: threading.RLock
    index: sqlite3.Connection
    hashes: sqlite3.Connection
    maps: dict[int, mmap.mmap]
    recent: dict[str, tuple[str, int, bytes]]
    """Hashes this process computed and has not saved."""


_INHERITED: list[_ProcessState] = []

_INDEX_SCHEMA = """
CREATE TABLE IF NOT EXISTS shards (id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, reserved INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS rows (key BLOB PRIMARY KEY, shard INTEGER NOT NULL, row INTEGER NOT NULL,
                                 crc INTEGER NOT NULL, UNIQUE (shard, row)) WITHOUT ROWID;
"""
_HASHES_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (name TEXT PRIMARY KEY, stamp TEXT NOT NULL, hashed_ns INTEGER NOT NULL,
                                  sha BLOB NOT NULL) WITHOUT ROWID;
"""


class _Writer:
    """Writes rows into the shard this process owns; goes on to another when it is full."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self.fd = -1
        self.shard = 0
        self.reserved = 0
        self.slots: list[int] = []
        """Free rows of the shard, next one last."""

    @property
    def rows_per_shard(self) -> int:
        return max(1, _SHARD_BYTES // self.store.row_bytes)

    def has_room(self, wanted: int) -> bool:
        """Whether at least one row can be stored; tries to get ``wanted``."""
        return bool(self.slots) or self._grow(wanted)

    def put(self, items: Sequence[tuple[bytes, memoryview]]) -> int:
        """Store (key, row) pairs, data before index; returns how many found room under the cap."""
        done = 0
        while done < len(items):
            if not self.has_room(len(items) - done):
                break
            part = items[done : done + len(self.slots)]
            slots = [self.slots.pop() for _ in part]
            for slot, (_, row) in zip(slots, part, strict=True):
                written = os.pwrite(self.fd, row, slot * self.store.row_bytes)
                assert written == self.store.row_bytes, "short write into allocated space"
            os.fsync(self.fd)
            with self.store._transaction() as db:
                for slot, (key, row) in zip(slots, part, strict=True):
                    crc = zlib.crc32(row, zlib.crc32(key))
                    new = db.execute("INSERT OR IGNORE INTO rows VALUES (?, ?, ?, ?)", (key, self.shard, slot, crc))
                    if new.rowcount == 0:  # another process was first; the slot stays free
                        self.slots.append(slot)
            done += len(part)
        return done

    def _grow(self, wanted: int) -> bool:
        """Reserve and allocate free slots; False when the cap is reached."""
        store = self.store
        try:
            with store._transaction() as db:
                total = db.execute("SELECT COALESCE(SUM(reserved), 0) FROM shards").fetchone()[0]
                room = max(0, store.max_bytes // store.row_bytes - total)
                if self.fd < 0 or self.reserved >= self.rows_per_shard:
                    self._release()
                    if not self._adopt(db) and room:
                        self._create(db)
                if self.fd < 0:
                    return False
                if not self.slots:  # else: left free by a writer that died, and reserved already
                    step = min(room, self.rows_per_shard - self.reserved, max(wanted, _STEP_BYTES // store.row_bytes))
                    self.slots = list(range(self.reserved + step - 1, self.reserved - 1, -1))
                    self.reserved += step
                    db.execute("UPDATE shards SET reserved = ? WHERE id = ?", (self.reserved, self.shard))
                if self.slots:
                    self._allocate()
        except BaseException:
            self._release()  # the entry may have been rolled back with the transaction: it is no longer ours
            raise
        return bool(self.slots)

    def _allocate(self) -> None:
        size = self.reserved * self.store.row_bytes
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.fd, 0, size)
            elif os.fstat(self.fd).st_size < size:  # macOS; a full disk then shows at the write
                os.ftruncate(self.fd, size)
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise UserError(
                f"feature store {self.store.root}: no room on the disk for another {size / 1e6:.0f} MB shard "
                f"({e.strerror}). Free some space, lower features.max_gb, or set features.enabled: false. What is "
                "stored already stays"
            ) from e

    def _adopt(self, db: sqlite3.Connection) -> bool:
        """Take over a shard that nobody writes to and that has free slots or may still grow."""
        query = (
            "SELECT id, name, reserved FROM shards WHERE reserved < ? OR "
            "reserved > (SELECT COUNT(*) FROM rows WHERE shard = shards.id)"
        )
        for shard, name, reserved in db.execute(query, (self.rows_per_shard,)).fetchall():
            try:
                fd = os.open(self.store.folder / name, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # the next fill forgets it
            if not _try_flock(fd):
                os.close(fd)
                continue
            used = {row for (row,) in db.execute("SELECT row FROM rows WHERE shard = ?", (shard,))}
            self.fd, self.shard, self.reserved = fd, shard, reserved
            self.slots = [row for row in range(reserved - 1, -1, -1) if row not in used]
            return True
        return False

    def _create(self, db: sqlite3.Connection) -> None:
        name = f"shard-{uuid.uuid4().hex[:16]}.bin"
        self.fd = os.open(self.store.folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        assert _try_flock(self.fd), "a file that was just created is locked"
        _fsync_dir(self.store.folder)
        self.shard = int(db.execute("INSERT INTO shards (name, reserved) VALUES (?, 0)", (name,)).lastrowid or 0)
        self.reserved, self.slots = 0, []

    def _release(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)  # releases the lock
        self.fd, self.slots, self.reserved = -1, [], 0

    def close(self) -> None:
        """Give back space that was reserved but not used, and the shard's lock."""
        if self.fd < 0:
            return
        try:
            with self.store._transaction() as db:
                _shrink(db, self.shard, self.fd, self.store.row_bytes)
        finally:
            self._release()


# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What tells that a file has changed."""

    text: str
    changed_ns: int


def _stamp(ref: ImageRef) -> _Stamp:
    try:
        s = os.stat(os.path.join(ref.root, ref.path) if ref.kind == "file" else ref.root)
    except (OSError, ValueError):  # `content_hash` will say what is wrong with it
        return _Stamp("", 0)
    # The change time moves when someone sets an old modification time; the inode when a symlink is turned elsewhere.
    text = f"{s.st_size}:{s.st_mtime_ns}:{s.st_ctime_ns}:{s.st_ino}"
    return _Stamp(text, max(s.st_mtime_ns, s.st_ctime_ns))


def _name(ref: ImageRef) -> str:
    """Name in the hash cache: as the record spells it, so that a path that leaves its root is never known."""
    return "\n".join((os.path.abspath(ref.root), ref.path, ref.kind, str(ref.offset), str(ref.item)))


def _result(image: _Loaded | Future[_Loaded]) -> _Loaded:
    return image.result() if isinstance(image, Future) else image


def _shrink(db: sqlite3.Connection, shard: int, fd: int, row_bytes: int) -> None:
    """Give back the space behind the last row in use; the caller holds the shard's lock and a transaction."""
    last = db.execute("SELECT MAX(row) FROM rows WHERE shard = ?", (shard,)).fetchone()[0]
    keep = 0 if last is None else last + 1
    db.execute("UPDATE shards SET reserved = ? WHERE id = ?", (keep, shard))
    if os.fstat(fd).st_size > keep * row_bytes:
        os.ftruncate(fd, keep * row_bytes)


def _connect(path: Path, schema: str) -> sqlite3.Connection:
    # isolation_level None: transactions are opened where this file says BEGIN. One lock per process guards the
    # connection, so threads may share it.
    db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.executescript(schema)
    return db


@contextmanager
def _flocked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _try_flock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
