"""Finds the records inside JSON and the members of tar files, without holding them, and caches where they are.

Here a record is bytes with a place; what its fields mean is `formats`' business. JSON files are left where they are and
addressed by byte offsets; of records that do not stand in their file as JSON, a copy is kept beside the index (images
stay in the file), because no other container gives random access to a caption.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import json
import logging
import os
import re
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import EllipsisType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import orjson

from beholder.runs import atomic_write, cache_dir, sha256_file
from beholder.types import UserError

log = logging.getLogger(__name__)

CHUNK_BYTES = 8 << 20
MAX_RECORD_BYTES = 64 << 20
"""A single record larger than this is taken for a missing bracket."""

_SPACE = re.compile(r"[ \t\r\n]*")
BOM = b"\xef\xbb\xbf"
"""Some editors put it before a text; it is no part of it."""
_FILE_END = "the end of the file: is it cut off?"


class RecordError(UserError):
    """A record cannot be used. The message names the file, the record (0-based), the line or byte, and the field."""


class Found(NamedTuple):
    """The bytes of one record and where they are."""

    start: int
    """Byte offset in the file; 0 for tar and parquet."""
    raw: bytes
    """JSON text, not yet validated."""
    where: str
    """Line, byte, member or row, for messages."""


# ---------------------------------------------------------------------------------------------------------------
# Files


def require_regular(path: str, expected: str = "a record file") -> os.stat_result:
    """Raises `UserError` unless the path is a non-empty regular file: opening a FIFO would wait for ever."""
    try:
        info = os.stat(path)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; expected {expected}") from None
    except ValueError as e:  # a NUL
        raise UserError(f"{path!r}: is no path ({e}); expected {expected}") from None
    if not stat.S_ISREG(info.st_mode):
        kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a FIFO, socket or device"
        raise UserError(f"{path}: is {kind}, expected {expected}")
    if info.st_size == 0:
        raise UserError(f"{path}: is empty (0 bytes), expected records")
    return info


def first_character(path: str) -> str:
    """The first character that is not white space: ``[`` opens an array, ``{`` a line of JSONL."""
    require_regular(path)
    with open(path, "rb") as file:
        head = without_mark(file.read(4096), path).lstrip()
        while not head and (more := file.read(1 << 20)):
            head = more.lstrip()
    if not head:
        raise RecordError(f"{path}: holds no records, only white space")
    return head[:1].decode("latin-1")


def without_mark(raw: bytes, path: object) -> bytes:
    """What a file begins with, without the byte-order mark that Windows puts there. Raises `RecordError` for UTF-16."""
    zeros = tuple(byte == 0 for byte in raw[:8])
    for mark, ascii_zeros, kind in _WIDE:
        if raw.startswith(mark) if mark else zeros == ascii_zeros * 2:
            told = f"{path}: is {kind}, expected UTF-8; convert it, for example with iconv -f {kind} -t UTF-8"
            raise RecordError(told)
    return raw.removeprefix(BOM)


_WIDE: tuple[tuple[bytes, tuple[bool, ...], str], ...] = (
    (b"\xff\xfe\0\0", (), "UTF-32"),
    (b"\0\0\xfe\xff", (), "UTF-32"),
    (b"\xff\xfe", (), "UTF-16"),
    (b"\xfe\xff", (), "UTF-16"),
    (b"", (False, True, True, True), "UTF-32LE"),
    (b"", (True, True, True, False), "UTF-32BE"),
    (b"", (False, True, False, True), "UTF-16LE"),
    (b"", (True, False, True, False), "UTF-16BE"),
)
"""Encodings of more than a byte a character: their mark, or which of four bytes are zero in a text of ASCII."""


# ---------------------------------------------------------------------------------------------------------------
# JSON


class TooDeep(orjson.JSONDecodeError):
    """JSON that could be read but not written again, nor walked."""


def loads(raw: bytes) -> Any:
    """What untrusted JSON says. Raises `orjson.JSONDecodeError`, `TooDeep` where it is nested more than 250 deep."""
    try:
        value = orjson.loads(raw)
        if raw.count(b"[") + raw.count(b"{") > 250:
            orjson.dumps([[[[value]]]])  # reading stops at 1,024 levels, writing at 254
    except orjson.JSONDecodeError as e:
        if "depth" not in e.msg and "ecursion" not in e.msg:
            raise
        raise TooDeep("nested more than 250 deep", e.doc, e.pos) from None
    except TypeError:
        raise TooDeep("nested more than 250 deep", "", 0) from None
    return value


def json_lines(path: str) -> Iterator[Found]:
    """One record a line; blank lines are skipped."""
    if first_character(path) == "[":
        raise RecordError(f"{path}: begins with '[': this is one JSON array, not a record a line; "
                          "set dataset: llava_pretrain")  # fmt: skip
    with open(path, "rb") as file:
        start = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(start)
        line = 0
        while raw := file.readline(MAX_RECORD_BYTES):
            line += 1
            if len(raw) == MAX_RECORD_BYTES:
                raise RecordError(f"{path}: line {line} has over {MAX_RECORD_BYTES:,} bytes, expected a record a line")
            if not raw.isspace():
                yield Found(start, raw, f"line {line}")
            start += len(raw)


def json_array(path: str) -> Iterator[Found]:
    """The elements of one large JSON array, in order, holding one chunk at a time.

    The C scanner of `json` finds where an element ends. It works on text, so chunks are decoded as latin-1: one byte is
    one character, and its offsets are byte offsets. Raises `RecordError` with record number, line and byte where the
    array itself is malformed: after that point nothing can be trusted, so this is never a mere reject.
    """
    if (first := first_character(path)) != "[":
        hint = "this looks like a record a line; set dataset: jsonl" if first == "{" else "expected '['"
        raise RecordError(f"{path}: begins with {first!r}, not with a JSON array: {hint}")
    with open(path, "rb") as file:
        yield from _JsonScanner(path, file).elements()


def json_members(path: str, inside: str | EllipsisType | None = None) -> Iterator[tuple[str, Found]]:
    """(name, value) of every field of the one large JSON object a file holds, in order, holding one chunk at a time.

    Under the name ``inside`` lies an array, whose elements come one by one; ``...``: so do those of every array, and
    only they have a place (``where``). Raises `RecordError` as `json_array` does.
    """
    if (first := first_character(path)) != "{":
        raise RecordError(f"{path}: begins with {first!r}, not with a JSON object: expected '{{'")
    with open(path, "rb") as file:
        yield from _JsonScanner(path, file).members(inside)


class _JsonScanner:
    def __init__(self, path: str, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.base = 0  # byte offset of self.raw[0]
        self.raw = b""
        self.text = ""
        self.at = 0  # position in self.text
        self.line, self.line_at = 1, 0  # line number of position line_at
        self.count = 0
        self.what = "value"
        # Strictness is orjson's part, record by record.
        self.scan_once = json.JSONDecoder(strict=False).scan_once  # pyright: ignore[reportAttributeAccessIssue]
        self._grow()
        if self.raw.startswith(BOM):
            self.at = len(BOM)

    def elements(self) -> Iterator[Found]:
        self.what = "array"
        self._expect("[", "the opening '['")
        yield from self._elements()
        self._end()

    def members(self, inside: str | EllipsisType | None) -> Iterator[tuple[str, Found]]:
        self.what = "object"
        self._expect("{", "the opening '{'")
        for _ in self._parted("}", "a value"):
            if (got := self._peek()) != '"':
                raise self._malformed(f"expected a field name in quotes, got {repr(got) if got else _FILE_END}")
            name = json.loads(self._value().raw.decode("utf-8", "replace"), strict=False)
            self._expect(":", "':' after a field name")
            if name == inside or (inside is ... and self._peek() == "["):
                self._expect("[", f"an array under {inside!r}")
                self.count = 0
                for found in self._elements():
                    yield name, found
            else:
                found = self._value()
                yield name, found._replace(where="") if inside is ... else found
                self.count += 1
        self._end()

    def _elements(self) -> Iterator[Found]:
        """Of the array whose '[' was just read, to behind its ']'."""
        for _ in self._parted("]", "a record"):
            yield self._value()
            self.count += 1

    def _parted(self, close: str, what: str) -> Iterator[None]:
        """Stops at everything between commas, to behind ``close``; the one who asks reads it."""
        if self._peek() != close:
            yield
            while self._peek() != close:
                self._expect(",", f"',' or {close!r} after {what}")
                yield
        self.at += 1

    def _value(self) -> Found:
        """The next value, whatever it is."""
        self._peek()
        while True:
            try:
                _, end = self.scan_once(self.text, self.at)
            except (StopIteration, ValueError, RecursionError) as e:
                # Either malformed or merely longer than the chunk: only more text can tell.
                if len(self.raw) - self.at < MAX_RECORD_BYTES and self._grow():
                    continue
                raise self._malformed(e) from None
            # A number may go on in the next chunk: "1" and "1.5" both end well.
            ended = end < len(self.text) and self.text[end] in " \t\r\n,]}:"
            if ended or len(self.raw) - self.at >= MAX_RECORD_BYTES or not self._grow():
                break
        found = Found(self.base + self.at, self.raw[self.at : end], "")
        found = found._replace(where=f"line {self._line()}, byte {found.start:,}")
        self.at = end
        return found

    def _grow(self) -> bool:
        """Drop what is consumed, read more; False at the end of the file."""
        more = self.file.read(max(CHUNK_BYTES, len(self.raw) - self.at))
        if not more:
            return False
        self._line()
        self.raw = self.raw[self.at :] + more
        self.text = self.raw.decode("latin-1")
        self.base += self.at
        self.at = self.line_at = 0
        return True

    def _peek(self) -> str:
        """The next character that is not white space; '' at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._grow():
                return ""

    def _expect(self, character: str, what: str) -> None:
        got = self._peek()
        if got != character:
            raise self._malformed(f"expected {what}, got {repr(got) if got else _FILE_END}")
        self.at += 1

    def _end(self) -> None:
        if got := self._peek():
            raise self._malformed(f"the {self.what} is closed, but {got!r} follows")

    def _line(self) -> int:
        self.line += self.raw.count(b"\n", self.line_at, self.at)
        self.line_at = self.at
        return self.line

    def _malformed(self, cause: object) -> RecordError:
        at = self.at
        if isinstance(cause, json.JSONDecodeError):
            at, cause = cause.pos, cause.msg
        elif isinstance(cause, StopIteration):
            at, cause = cause.value, "expected a value"
            cause += " but the file ends (is it cut off?)" if at >= len(self.text) else f", got {self.text[at]!r}"
        elif isinstance(cause, RecursionError):
            cause = "nested too deeply"
        line = self._line() + self.raw.count(b"\n", self.at, at)
        where = f"record {self.count}, line {line}, byte {self.base + at:,}"
        return RecordError(f"{self.path}: malformed JSON at {where}: {cause}")


# ---------------------------------------------------------------------------------------------------------------
# Tar shards


_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_DESCRIBES_NEXT = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_TYPES_WITHOUT_DATA = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
)  # fmt: skip


_MAX_HEADER_BYTES = 1 << 20
"""What describes the next member, such as its name, is read whole."""


class Member(NamedTuple):
    name: str
    offset: int
    size: int


def tar_members(path: str) -> Iterator[Member]:
    """Regular files of an uncompressed tar: name, data offset, bytes. Only headers are read, nothing is extracted.

    Unlike `tarfile`, a damaged header in the middle is an error and not the end of the archive.
    """
    size = require_regular(path).st_size
    long_name, long_size = None, None
    offset = 0
    with open(path, "rb") as file:
        while offset < size:
            file.seek(offset)
            block = file.read(512)
            if not block.strip(b"\0"):
                return
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError as e:
                hint = "; compressed tars have no random access, unpack them to .tar" if offset == 0 else ""
                raise RecordError(f"{path}: not a tar header at byte {offset:,} ({e}){hint}") from None
            data = offset + 512
            length = info.size if info.type in _DESCRIBES_NEXT or long_size is None else long_size
            if info.type in _TYPES_WITHOUT_DATA:
                length = 0  # a link's size field may be that of its target
            if length < 0 or data + length > size:
                raise RecordError(f"{path}: member {info.name!r} at byte {offset:,} claims {length:,} bytes, "
                                  f"but the file ends at {size:,}: it is cut off; fetch it again")  # fmt: skip
            if info.type in _DESCRIBES_NEXT and length > _MAX_HEADER_BYTES:
                raise RecordError(f"{path}: the extended header at byte {offset:,} has {length:,} bytes, expected at "
                                  f"most {_MAX_HEADER_BYTES:,}: no name is that long")  # fmt: skip
            offset = data + -(-length // 512) * 512
            match info.type:
                case tarfile.GNUTYPE_LONGNAME:
                    long_name = file.read(length).rstrip(b"\0").decode("utf-8", "surrogateescape")
                    continue
                case tarfile.XHDTYPE:
                    fields = _pax_fields(file.read(length))
                    long_name = fields.get("path", long_name)
                    told = fields.get("size")
                    if told is not None and not re.fullmatch("[0-9]{1,19}", told):
                        raise RecordError(f"{path}: the extended header at byte {data - 512:,} gives the size "
                                          f"{told[:40]!r}, expected a number of bytes")  # fmt: skip
                    long_size = None if told is None else int(told)
                    continue
                case tarfile.XGLTYPE | tarfile.GNUTYPE_LONGLINK:
                    continue
            name = long_name or info.name
            long_name, long_size = None, None
            if info.type in _REGULAR and not name.endswith("/"):
                yield Member(name.encode("utf-8", "backslashreplace").decode(), data, length)


_PAX_LENGTH = re.compile(rb"([0-9]{1,10}) ")


def _pax_fields(data: bytes) -> dict[str, str]:
    fields: dict[str, str] = {}
    at = 0
    while (match := _PAX_LENGTH.match(data, at)) and int(match[1]) > 0:
        at += int(match[1])
        key, _, value = data[match.end() : at - 1].partition(b"=")
        fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return fields


# ---------------------------------------------------------------------------------------------------------------
# Cache


def cache_key(*facts: object) -> str:
    """sha256 over JSON-able facts: everything the cached value depends on."""
    return hashlib.sha256(orjson.dumps(facts, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_SORT_KEYS)).hexdigest()


def cache_load(key: str) -> tuple[dict[str, np.ndarray], Any] | None:
    """(arrays, JSON value), or None when there is none or it is damaged; then the caller computes it again."""
    try:
        with open(cache_dir() / "index" / f"{key}.npz", "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}  # zip members carry a CRC-32
        return arrays, orjson.loads(arrays.pop("meta").tobytes())
    except FileNotFoundError:
        return None
    except Exception as e:  # damage shows as any of a dozen exceptions of zipfile, numpy and json
        log.warning("the cached record index %s is damaged and built again: %s", key, e)
        return None


def cache_save(key: str, arrays: dict[str, np.ndarray], meta: Any) -> None:
    """Written atomically. A cache that cannot be written costs seconds next time and nothing else."""
    buffer = io.BytesIO()
    np.savez(buffer, meta=np.frombuffer(orjson.dumps(meta), np.uint8), **arrays)  # pyright: ignore[reportArgumentType]
    try:
        (cache_dir() / "index").mkdir(parents=True, exist_ok=True)
        atomic_write(cache_dir() / "index" / f"{key}.npz", buffer.getvalue())
    except (OSError, UserError) as e:
        log.warning("the record index is not cached: %s", e)


def cache_drop(key: str) -> None:
    """Forget what was cached."""
    with suppress(OSError):
        (cache_dir() / "index" / f"{key}.npz").unlink()


class CopiedTexts:
    """Writes the JSON of one file's records into the cache, else where temporary files go: never all in memory."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._file: Any = None
        self._size = 0
        self._kept = False

    def __enter__(self) -> CopiedTexts:
        return self

    def add(self, raw: bytes) -> int:
        """Where the copy begins."""
        if self._file is None:
            self._file = self._create()
        self._file.write(raw)
        self._size += len(raw)
        return self._size - len(raw)

    def keep(self) -> str:
        """The file, complete."""
        if self._file is None:
            self._file = self._create()
        self._file.close()
        self._kept = True
        if os.path.dirname(self._file.name) != str(cache_dir() / "index"):
            atexit.register(_forget, self._file.name, os.getpid())
            return self._file.name
        os.replace(self._file.name, path := _texts_of(self._key))
        return path

    def _create(self) -> Any:
        folder = cache_dir() / "index"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return tempfile.NamedTemporaryFile(dir=folder, prefix=".texts-", delete=False)
        except OSError as e:
            log.warning("the texts of records are not cached: %s", e)
            return tempfile.NamedTemporaryFile(prefix="beholder-", delete=False)

    def __exit__(self, *_: object) -> None:
        if self._file is not None and not self._kept:
            self._file.close()
            _forget(self._file.name, os.getpid())


def _forget(path: str, pid: int) -> None:
    if pid == os.getpid():  # children inherit what their parent does at its end
        with suppress(OSError):
            os.unlink(path)


def _texts_of(key: str) -> str:
    return str(cache_dir() / "index" / f"{key}.json")


def copied_texts(key: str, digest: str) -> str | None:
    """The file that `CopiedTexts` kept, or None when it is not there or damaged."""
    try:
        return _texts_of(key) if sha256_file(_texts_of(key)) == digest else None
    except OSError:
        return None


def made_once(key: str, name: str, fill: Callable[[BinaryIO], None], what: str) -> str:
    """The file in the cache that ``fill`` writes, by whoever comes first. ``what`` it is a copy of, for messages."""
    folder = cache_dir() / "files" / key
    made = folder / name
    if not made.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as out:
                try:
                    fill(out)  # pyright: ignore[reportArgumentType]
                    out.flush()
                    os.replace(out.name, made)
                except BaseException:
                    with suppress(OSError):
                        os.unlink(out.name)
                    raise
        except OSError as e:
            told = f"{what}: its copy in the cache {folder} cannot be written ({e.strerror or e})"
            raise UserError(f"{told}; set BEHOLDER_CACHE to a folder with room") from None
    return str(made)


def field_names(raw: bytes) -> list[str]:
    """The fields of a record's JSON; none where it has none."""
    try:
        record = loads(raw)
    except orjson.JSONDecodeError:
        return []
    return list(record) if isinstance(record, dict) else []


def stat_facts(path: str) -> Sequence[object]:
    """What a large shard is recognised by without reading it all: path, bytes, modification time."""
    info = require_regular(path)
    return [os.path.realpath(path), info.st_size, info.st_mtime_ns]
