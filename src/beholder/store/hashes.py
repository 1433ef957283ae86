"""Which image it is, by the bytes of its file: sha256, remembered as long as the file has not changed.

``hashes.sqlite`` in a store's folder: (image file, size, times, inode) -> sha256 of its bytes, shared by all that is
kept there.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from beholder.data.images import content_hash
from beholder.store.rows import Database, RowStore
from beholder.types import ImageRef

# A file changed this shortly before it was hashed may have changed again within the same clock tick.
_RACY_NS = 2_000_000_000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (name TEXT PRIMARY KEY, stamp TEXT NOT NULL, hashed_ns INTEGER NOT NULL,
                                  sha BLOB NOT NULL) WITHOUT ROWID;
"""


class ImageHashes:
    """May be forked and pickled into loader workers, as the `RowStore` whose folder it lies beside."""

    def __init__(self, rows: RowStore) -> None:
        self._db = Database(rows.root / "hashes.sqlite", _SCHEMA, rows.complaint)
        with rows.opening(), self._db.query():
            pass  # made now: several processes may do so at the same moment
        self._recent: dict[str, tuple[str, int, bytes]] = {}
        """Hashes this process computed and has not saved."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_recent": {}}

    def close(self) -> None:
        """Close this process's file; the next call opens it again."""
        self._db.close()

    def of(self, ref: ImageRef) -> bytes:
        """sha256 of the image's bytes; a file that has not changed since it was hashed is not read again. Raises
        `ImageError` for one that cannot be read."""
        key = self.known(ref)
        if key is None:
            stamp, now = stamp_of(ref), time.time_ns()
            key = bytes.fromhex(content_hash(ref))
            self._recent[_name(ref)] = (stamp.text, now, key)
        return key

    def known(self, ref: ImageRef) -> bytes | None:
        """The remembered hash, unless the file has changed or was hashed so soon after a change that it may have."""
        name, stamp = _name(ref), stamp_of(ref)
        row = self._recent.get(name)
        if row is None:
            with self._db.query() as db:
                row = db.execute("SELECT stamp, hashed_ns, sha FROM files WHERE name = ?", (name,)).fetchone()
        if row is None or not stamp.text or row[0] != stamp.text or row[1] - stamp.changed_ns < _RACY_NS:
            return None
        return row[2]

    def save(self) -> None:
        """Remember what was hashed since the last time."""
        with self._db.transaction() as db:
            rows = [(name, *value) for name, value in list(self._recent.items())]
            db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)
        for name, *value in rows:
            if self._recent.get(name) == tuple(value):  # a thread may have hashed it anew meanwhile
                del self._recent[name]


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells that a file has changed."""

    text: str
    changed_ns: int


def stamp_of(ref: ImageRef) -> Stamp:
    """Of the file that holds the image; without a text where there is none."""
    try:
        s = os.stat(os.path.join(ref.root, ref.path) if ref.kind == "file" else ref.root)
    except (OSError, ValueError):  # `content_hash` will say what is wrong with it
        return Stamp("", 0)
    # The change time moves when someone sets an old modification time; the inode when a symlink is turned elsewhere.
    text = f"{s.st_size}:{s.st_mtime_ns}:{s.st_ctime_ns}:{s.st_ino}"
    return Stamp(text, max(s.st_mtime_ns, s.st_ctime_ns))


def _name(ref: ImageRef) -> str:
    """Name in the cache: as the record spells it, so that a path that leaves its root is never known."""
    return "\n".join((os.path.abspath(ref.root), ref.path, ref.kind, str(ref.offset), str(ref.item)))
