"""Rows on disk: a key -> a row of fixed length, checked, written once, shared by processes.

What a row means is the caller's business (`features` keeps what a vision tower says about an image). A `RowStore` has a
sub-folder of its own for each ``meta`` (what its rows depend on)::

    <32 hex digits>/meta.json   what the sub-folder is keyed by
                    index.sqlite   key -> shard, row, crc32
                    shard-*.bin    rows, nothing else

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
import uuid
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from beholder.runs import fsync_dir, locking
from beholder.types import UserError

SHARD_BYTES = 256 * 2**20
STEP_BYTES = 32 * 2**20
"""A writer reserves this much at a time, so that several share a small cap fairly."""
_BUSY_S = 60.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS shards (id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, reserved INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS rows (key BLOB PRIMARY KEY, shard INTEGER NOT NULL, row INTEGER NOT NULL,
                                 crc INTEGER NOT NULL, UNIQUE (shard, row)) WITHOUT ROWID;
"""


# ---------------------------------------------------------------------------------------------------------------
# A database that crosses forks and pickles


_INHERITED: list[sqlite3.Connection] = []


def _let_go(pid: int, db: sqlite3.Connection) -> None:
    """Close a connection in the process that opened it; one that crossed a fork must not be closed, so it stays."""
    if pid == os.getpid():
        db.close()
    else:
        _INHERITED.append(db)


@dataclass(frozen=True, slots=True)
class _Connection:
    pid: int
    lock: threading.RLock
    db: sqlite3.Connection
    let_go: Callable[[], object]


class Database:
    """A SQLite file that each process opens for itself; its threads share the connection under one lock.

    `close` closes it; so does the end of this object, and that of the interpreter. ``complain`` turns SQLite's error
    into what the person is told.
    """

    def __init__(self, path: Path, schema: str, complain: Callable[[sqlite3.DatabaseError], Exception]) -> None:
        self.path, self.schema, self.complain = path, schema, complain
        self._connection: _Connection | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_connection": None}

    @contextmanager
    def query(self) -> Iterator[sqlite3.Connection]:
        """The connection, for this thread alone."""
        connection = self._own()
        with connection.lock, self._explained():
            yield connection.db

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Under the write lock; committed at the end, rolled back on an exception."""
        with self.query() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close this process's connection; the next call opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.let_go()

    def _own(self) -> _Connection:
        connection = self._connection
        if connection is None or connection.pid != os.getpid():
            if connection is not None:
                connection.let_go()
            with self._explained():
                pid, db = os.getpid(), self._connect()
            closer = weakref.finalize(self, _let_go, pid, db)
            connection = self._connection = _Connection(pid, threading.RLock(), db, closer)
        return connection

    def _connect(self) -> sqlite3.Connection:
        # isolation_level None: transactions are opened where this file says BEGIN.
        db = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.executescript(self.schema)
        except BaseException:
            db.close()
            raise
        return db

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as e:
            raise self.complain(e) from e


# ---------------------------------------------------------------------------------------------------------------
# The store


def _complaint(name: str, root: Path, e: sqlite3.DatabaseError) -> UserError:
    if getattr(e, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return UserError(
            f"{name} {root}: no room on the disk for its index ({e}). Free some space and start again. What is stored "
            "already stays"
        )
    return UserError(
        f"{name} {root}: its index cannot be used ({e}). It is a cache: delete that folder and it is computed again"
    )


class _Location(NamedTuple):
    shard: int
    row: int
    crc: int


def row_key(key: bytes, number: int) -> bytes:
    """Of row ``number`` of what has several."""
    return hashlib.sha256(key + number.to_bytes(4, "little")).digest()


class RowStore:
    """Rows of ``row_bytes`` bytes by key, at most ``max_bytes`` of them.

    ``name`` and ``remedy`` are for messages: what the person knows the store as, and what can be done when its folder
    or its disk fails. Instances may be forked and pickled into loader workers. Raises `UserError` where the folder
    cannot be used (not writable, damaged index, disk full). ``with``: closed at the end.
    """

    def __init__(
        self, root: Path, meta: Mapping[str, Any], *, row_bytes: int, max_bytes: int, name: str, remedy: str
    ) -> None:
        self.root, self.row_bytes, self.max_bytes = root, row_bytes, int(max_bytes)
        self.name, self.remedy = name, remedy
        self.corrupt_rows = 0
        """Rows this process found damaged; they are forgotten, so that they are made again."""
        text = json.dumps(meta, sort_keys=True)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:32]
        self.complaint = partial(_complaint, name, root)  # no bound method: a circle would outlive the last reference
        """What is told when a database of the store cannot be used."""
        self.index = Database(self.folder / "index.sqlite", _SCHEMA, self.complaint)
        self._maps: dict[int, mmap.mmap] = {}
        with self.opening():
            if not (self.folder / "meta.json").exists():
                (self.folder / "meta.json.tmp").write_text(text)
                os.replace(self.folder / "meta.json.tmp", self.folder / "meta.json")
            with self.index.query():
                pass

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Alone among the processes that create the same store at the same moment. Raises `UserError`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with flocked(self.root / ".lock", self.remedy):
                yield
        except OSError as e:
            raise UserError(f"{self.name} {self.root}: cannot be opened: {e}. {self.remedy}") from e

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        with self.index.query() as db:
            return int(db.execute("SELECT COUNT(*) FROM rows").fetchone()[0])

    @property
    def bytes_used(self) -> int:
        """Bytes reserved for rows, by all processes together."""
        with self.index.query() as db:
            reserved = db.execute("SELECT COALESCE(SUM(reserved), 0) FROM shards").fetchone()[0]
        return int(reserved) * self.row_bytes

    def close(self) -> None:
        """Close this process's files; the next call opens them again."""
        self.index.close()
        self._maps.clear()

    # -- reading

    def __contains__(self, key: bytes) -> bool:
        return self._locate(key) is not None

    def read_into(self, key: bytes, out: memoryview) -> bool:
        """Copy a row into ``out`` (``row_bytes`` writable bytes); False when there is none that is right.

        A row whose checksum fails is forgotten and counted in `corrupt_rows`.
        """
        location = self._locate(key)
        if location is None:
            return False
        if self._read_row(key, location, out):
            return True
        self.corrupt_rows += 1
        with self.index.transaction() as db:
            db.execute("DELETE FROM rows WHERE key = ? AND shard = ? AND row = ? AND crc = ?", (key, *location))
        return False

    def forget(self, key: bytes) -> None:
        """No longer know a row, so that it is made again."""
        with self.index.transaction() as db:
            db.execute("DELETE FROM rows WHERE key = ?", (key,))

    def _read_row(self, key: bytes, at: _Location, out: memoryview) -> bool:
        start, stop = at.row * self.row_bytes, (at.row + 1) * self.row_bytes
        data = self._map(at.shard, stop)
        if data is None:
            return False
        out[:] = memoryview(data)[start:stop]
        return zlib.crc32(out, zlib.crc32(key)) == at.crc

    def _map(self, shard: int, stop: int) -> mmap.mmap | None:
        """The shard's bytes, mapped again where it has grown; None where the file does not reach ``stop``."""
        with self.index.query() as db:
            data = self._maps.get(shard)
            if data is None or len(data) < stop:
                name = db.execute("SELECT name FROM shards WHERE id = ?", (shard,)).fetchone()
                try:
                    with open(self.folder / name[0], "rb") as f:
                        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
                except (OSError, ValueError, TypeError):  # gone, empty, or forgotten
                    return None
                self._maps[shard] = data
            # size() is the file's size now: touching a page behind a truncated end would kill the process.
            return data if min(len(data), data.size()) >= stop else None

    def _locate(self, key: bytes) -> _Location | None:
        with self.index.query() as db:
            row = db.execute("SELECT shard, row, crc FROM rows WHERE key = ?", (key,)).fetchone()
        return None if row is None else _Location(*row)

    # -- writing

    @contextmanager
    def writer(self) -> Iterator[RowWriter]:
        """What adds rows; killed at any instant, what was added before stays right."""
        self._tidy()
        writer = RowWriter(self)
        try:
            yield writer
        finally:
            writer.close()

    def _tidy(self) -> None:
        """Forget rows whose bytes are gone, give back what dead writers had reserved, remove files without an entry."""
        with self.index.transaction() as db:
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
                if _try_flock(fd, self):  # nobody writes to it
                    _shrink(db, shard, fd, self.row_bytes)
                os.close(fd)
            # Shards are created inside a transaction too, so a file without an entry has lost its writer.
            for path in self.folder.glob("shard-*.bin"):
                if path.name not in shards:
                    path.unlink(missing_ok=True)


@dataclass
class RowWriter:
    """Writes rows into the shard this process owns; goes on to another when it is full."""

    store: RowStore
    fd: int = -1
    shard: int = 0
    reserved: int = 0
    slots: list[int] = field(default_factory=list)
    """Free rows of the shard, next one last."""

    @property
    def rows_per_shard(self) -> int:
        return max(1, SHARD_BYTES // self.store.row_bytes)

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
            with self.store.index.transaction() as db:
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
            with store.index.transaction() as db:
                total = db.execute("SELECT COALESCE(SUM(reserved), 0) FROM shards").fetchone()[0]
                room = max(0, store.max_bytes // store.row_bytes - total)
                if self.fd < 0 or self.reserved >= self.rows_per_shard:
                    self._release()
                    if not self._adopt(db) and room:
                        self._create(db)
                if self.fd < 0:
                    return False
                if not self.slots:  # else: left free by a writer that died, and reserved already
                    step = min(room, self.rows_per_shard - self.reserved, max(wanted, STEP_BYTES // store.row_bytes))
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
                f"{self.store.name} {self.store.root}: no room on the disk for another {size / 1e6:.0f} MB shard "
                f"({e.strerror}). Free some space. {self.store.remedy}. What is stored already stays"
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
            if not _try_flock(fd, self.store):
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
        assert _try_flock(self.fd, self.store), "a file that was just created is locked"
        fsync_dir(self.store.folder)
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
            with self.store.index.transaction() as db:
                _shrink(db, self.shard, self.fd, self.store.row_bytes)
        finally:
            self._release()


def _shrink(db: sqlite3.Connection, shard: int, fd: int, row_bytes: int) -> None:
    """Give back the space behind the last row in use; the caller holds the shard's lock and a transaction."""
    last = db.execute("SELECT MAX(row) FROM rows WHERE shard = ?", (shard,)).fetchone()[0]
    keep = 0 if last is None else last + 1
    db.execute("UPDATE shards SET reserved = ? WHERE id = ?", (keep, shard))
    if os.fstat(fd).st_size > keep * row_bytes:
        os.ftruncate(fd, keep * row_bytes)


@contextmanager
def flocked(path: Path, way_out: str) -> Iterator[None]:
    """Alone among processes with the lock file ``path``; waits for it. ``way_out``: see `runs.locking`."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with locking(path.parent, way_out):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _try_flock(fd: int, store: RowStore) -> bool:
    try:
        with locking(store.folder, store.remedy):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
