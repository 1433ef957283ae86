"""Finds the records inside JSONL, JSON-array, tar and parquet files, without holding them, and caches where they are.

Here a record is bytes with a place; what its fields mean is `formats`' business. JSON files are left where they are and
addressed by byte offsets; from tar and parquet files the text of every record is copied into one compact blob of JSON
(images stay in the file), because neither format gives random access to a caption.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import logging
import os
import re
import stat
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import orjson

from beholder.data.images import IMAGE_SUFFIXES, parquet_cells, parquet_image_column
from beholder.runs import atomic_write, cache_dir
from beholder.types import UserError

log = logging.getLogger(__name__)

CHUNK_BYTES = 8 << 20
MAX_RECORD_BYTES = 64 << 20
"""A single record larger than this is taken for a missing bracket."""

_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"
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


def expand(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files a path, folder or glob names, sorted. Raises `UserError` when there is none."""
    if os.path.isdir(path):
        found = [os.path.join(path, n) for n in sorted(os.listdir(path)) if n.lower().endswith(suffixes)]
        if not found:
            raise UserError(f"{path}: the folder has no file that ends in {' or '.join(suffixes)}")
        return found
    if os.path.lexists(path):
        return [path]
    found = sorted(glob.glob(path))
    if not found:
        raise UserError(f"{path}: no such file, folder or glob")
    return found


def require_regular(path: str) -> os.stat_result:
    """Raises `UserError` unless the path is a non-empty regular file: opening a FIFO would wait for ever."""
    try:
        info = os.stat(path)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; expected a record file") from None
    if not stat.S_ISREG(info.st_mode):
        kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a FIFO, socket or device"
        raise UserError(f"{path}: is {kind}, expected a record file")
    if info.st_size == 0:
        raise UserError(f"{path}: is empty (0 bytes), expected records")
    return info


def first_character(path: str) -> str:
    """The first character that is not white space: ``[`` opens an array, ``{`` a line of JSONL."""
    require_regular(path)
    with open(path, "rb") as file:
        head = file.read(4096)
    return without_mark(head, path).lstrip()[:1].decode("latin-1")


def without_mark(raw: bytes, path: object) -> bytes:
    """What a file begins with, without the byte-order mark that Windows puts there. Raises `RecordError` for UTF-16."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RecordError(f"{path}: is UTF-16, expected UTF-8; convert it, for example with iconv -f UTF-16 -t UTF-8")
    return raw.removeprefix(_BOM)


# ---------------------------------------------------------------------------------------------------------------
# JSON


def json_lines(path: str) -> Iterator[Found]:
    """One record a line; blank lines are skipped."""
    if first_character(path) == "[":
        raise RecordError(f"{path}: begins with '[': this is one JSON array, not a record a line; "
                          "set dataset: llava_pretrain")  # fmt: skip
    with open(path, "rb") as file:
        start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
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


def json_members(path: str, inside: str | None = None) -> Iterator[tuple[str, Found]]:
    """(name, value) of every field of the one large JSON object a file holds, in order, holding one chunk at a time.

    Under the name ``inside`` lies an array, whose elements come one by one. Raises `RecordError` as `json_array` does.
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
        if self.raw.startswith(_BOM):
            self.at = len(_BOM)

    def elements(self) -> Iterator[Found]:
        self.what = "array"
        self._expect("[", "the opening '['")
        yield from self._elements()
        self._end()

    def members(self, inside: str | None) -> Iterator[tuple[str, Found]]:
        self.what = "object"
        self._expect("{", "the opening '{'")
        for _ in self._parted("}", "a value"):
            if (got := self._peek()) != '"':
                raise self._malformed(f"expected a field name in quotes, got {repr(got) if got else _FILE_END}")
            name = json.loads(self._value().raw.decode("utf-8", "replace"), strict=False)
            self._expect(":", "':' after a field name")
            if name == inside:
                self._expect("[", f"an array under {inside!r}")
                self.count = 0
                for found in self._elements():
                    yield name, found
            else:
                yield name, self._value()
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


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


def tar_members(path: str) -> Iterator[_Member]:
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
            offset = data + -(-length // 512) * 512
            match info.type:
                case tarfile.GNUTYPE_LONGNAME:
                    long_name = file.read(length).rstrip(b"\0").decode("utf-8", "surrogateescape")
                    continue
                case tarfile.XHDTYPE:
                    fields = _pax_fields(file.read(length))
                    long_name = fields.get("path", long_name)
                    long_size = int(fields["size"]) if fields.get("size", "").isdigit() else None
                    continue
                case tarfile.XGLTYPE | tarfile.GNUTYPE_LONGLINK:
                    continue
            name = long_name or info.name
            long_name, long_size = None, None
            if info.type in _REGULAR and not name.endswith("/"):
                yield _Member(name.encode("utf-8", "backslashreplace").decode(), data, length)


def _pax_fields(data: bytes) -> dict[str, str]:
    fields: dict[str, str] = {}
    while (match := re.match(rb"(\d+) ", data)) and int(match[1]) > 0:
        record, data = data[: int(match[1])], data[int(match[1]) :]
        key, _, value = record[match.end() : -1].partition(b"=")
        fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return fields


def tar_records(path: str) -> Iterator[Found]:
    """Samples of a shard: members that share a name up to the first dot. ``.json`` and / or ``.txt``, and images.

    ``raw`` is the member's JSON (or ``{"caption": …}`` from the ``.txt``) with ``images`` set to
    ``[[member name, data offset, bytes], …]`` in the order of the members.
    """
    samples: dict[str, list[_Member]] = {}
    for member in tar_members(path):
        folder, name = os.path.split(member.name)
        samples.setdefault(os.path.join(folder, name.partition(".")[0]), []).append(member)
    with open(path, "rb") as file:
        for key, members in samples.items():
            images = [list(m) for m in members if _suffix(m) in IMAGE_SUFFIXES]
            yield Found(0, orjson.dumps({"id": key, **_tar_text(file, members), "images": images}), f"sample {key!r}")


def _suffix(member: _Member) -> str:
    return member.name.rpartition(".")[2].lower()


def _tar_text(file: BinaryIO, members: Sequence[_Member]) -> dict[str, Any]:
    """The text fields of one sample; under ``!`` what is wrong with its members."""
    json_members = [m for m in members if _suffix(m) == "json"]
    txt_members = [m for m in members if _suffix(m) == "txt"]
    if len(json_members) > 1 or len(txt_members) > 1:
        return {"!": f"{len(json_members)} .json and {len(txt_members)} .txt members, expected at most one of each"}
    fields: dict[str, Any] = {}
    if json_members:
        try:
            fields = orjson.loads(_read(file, json_members[0]))
        except orjson.JSONDecodeError as e:
            return {"!": f"member {json_members[0].name!r} is malformed JSON: {e}"}
        if not isinstance(fields, dict):
            return {"!": f"member {json_members[0].name!r} is not a JSON object"}
        fields = {k: v for k, v in fields.items() if k in ("id", "source", "caption", "conversations", "messages")}
    if txt_members and not fields.keys() & {"caption", "conversations", "messages"}:
        try:
            fields["caption"] = _read(file, txt_members[0]).decode("utf-8")
        except UnicodeDecodeError:
            return {"!": f"member {txt_members[0].name!r} is not UTF-8"}
    return fields


def _read(file: BinaryIO, member: _Member) -> bytes:
    file.seek(member.offset)
    return file.read(min(member.size, MAX_RECORD_BYTES)).removeprefix(_BOM)


# ---------------------------------------------------------------------------------------------------------------
# Parquet


def parquet_records(path: str) -> Iterator[Found]:
    """Rows with an image column and one of ``caption``, ``text``, ``conversations``, ``messages``; optional id, source.

    ``raw`` has ``images`` set to ``[[label, row, item], …]``. A list column of images is read once to know its lengths;
    a plain column is not, so a null image shows when it is opened.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    import pyarrow.types as pt

    require_regular(path)
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            schema = file.schema_arrow
            column = parquet_image_column(schema, path)
            is_list = pt.is_list(schema.field(column).type) or pt.is_large_list(schema.field(column).type)
            texts = [n for n in ("caption", "text", "conversations", "messages") if n in schema.names][:1]
            if not texts:
                raise UserError(f"{path}: no column caption, text, conversations or messages; "
                                f"the columns are {', '.join(schema.names)}")  # fmt: skip
            columns = texts + [n for n in ("id", "source") if n in schema.names] + [column] * is_list
            row = 0
            for batch in file.iter_batches(64 if is_list else 4096, columns=columns, use_threads=False):
                for record in batch.to_pylist():
                    num = len(parquet_cells(record.pop(column))) if is_list else 1
                    if texts[0] == "text":
                        record["caption"] = record.pop("text")
                    record["images"] = [[f"row {row}" + f" image {k}" * (num > 1), row, k] for k in range(num)]
                    yield Found(0, orjson.dumps(record), f"row {row}")
                    row += 1
    except (pa.ArrowException, OSError, TypeError) as e:
        raise RecordError(f"{path}: cannot be read as parquet: {e}") from None


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


def stat_facts(path: str) -> Sequence[object]:
    """What a large shard is recognised by without reading it all: path, bytes, modification time."""
    info = require_regular(path)
    return [os.path.realpath(path), info.st_size, info.st_mtime_ns]
