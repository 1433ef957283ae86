"""Where records and image bytes lie in a file: one row of `CONTAINERS` each, recognised by looking.

A record is handed on as JSON text with its place (`index.Found`); what it says is `formats`' business. Image bytes that
lie in a container are never copied into that text: tar shards give ``{"!": [member, offset, bytes]}`` in their place,
tables ``{"!": [column, k]}`` for the k-th bytes of a cell. A record that cannot be used is ``{"!": [reason, detail]}``.

What is gzip'd is unpacked once into the cache, and what has a URL (`fsspec`) is fetched once; both are then read like
any file.
"""

from __future__ import annotations

import csv
import glob
import gzip
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import orjson

from beholder.data import index, questions
from beholder.data.images import IMAGE_SUFFIXES, arrow_reader, arrow_table
from beholder.data.index import BOM, MAX_RECORD_BYTES, Found, RecordError, tar_members
from beholder.types import UserError

if TYPE_CHECKING:
    import pyarrow

    from beholder.data.formats import Rules

IMAGE_FIELDS = ("images", "image", "file_name", "filepath")
"""Where a record names its images; the first two may hold several."""
_MIN_FREE_BYTES = 1_000_000_000
"""Unpacking stops before less than this is left on the disk: a gzip of 1 MB can hold 1 GB."""


@dataclass(frozen=True, slots=True)
class Container:
    """One way to put records into a file."""

    title: str
    find: Callable[[str, Rules], Iterator[Found]]
    suffixes: tuple[str, ...] = ()
    """Of such files, gzip's own left out: which ones of a folder are read."""
    images: Literal["tar", "parquet", "arrow"] | None = None
    """How image bytes lie in the file itself; None: images are files of their own, or ``data:`` URIs."""
    copied: bool = True
    """Records do not stand in the file as JSON, so their texts are kept beside the index."""
    asked: bool = False
    """Question files: a record is put together from a question and its answer."""

    @property
    def large(self) -> bool:
        """Recognised by size and time instead of by all its bytes."""
        return self.images is not None


# ---------------------------------------------------------------------------------------------------------------
# Which files


def is_url(path: str) -> bool:
    """``s3://…``, ``filecache::https://…``: everything else is a path of this machine."""
    return _URL.match(path) is not None


_URL = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*::)*[A-Za-z][A-Za-z0-9+.-]*://")


def expand(path: str, containers: Sequence[str]) -> list[str]:
    """The files a path, folder or glob names, sorted. Raises `UserError` when there is none.

    A folder is one that `datasets.save_to_disk` wrote, an imagefolder (``metadata.jsonl``, ``.csv``, ``.parquet``), or
    holds files of one kind of container.
    """
    if is_url(path):
        return _remote_files(path)
    if not os.path.isdir(path):
        if os.path.lexists(path):
            return [path]
        if found := sorted(glob.glob(path)):
            return [file for name in found for file in (expand(name, containers) if os.path.isdir(name) else [name])]
        raise UserError(f"{path}: no such file, folder or glob")
    names = _shown_names(path)
    if "arrow" in containers and {"state.json", "dataset_dict.json"} & set(names):
        return _arrow_folder(path, names)
    suffixes = tuple(s for name in containers for s in CONTAINERS[name].suffixes)
    found = [name for name in names if _packed_suffix(name)[1].endswith(suffixes)]
    if not found and (inner := [name for name in names if _holds_records(os.path.join(path, name), suffixes)]):
        if len(inner) == 1:  # data/ of a snapshot of the Hugging Face hub
            return expand(os.path.join(path, inner[0]), containers)
        told = f"{path}: holds no record files itself, but its folders {', '.join(inner[:8])} do; name one of them"
        raise UserError(f"{told}, such as {os.path.join(path, 'train' if 'train' in inner else inner[0])}")
    if len(containers) > 1:
        if metadata := [name for name in found if Path(name).stem == "metadata"]:
            found = metadata
        kinds = sorted({Path(_packed_suffix(name)[1]).suffix for name in found})
        if len(kinds) > 1:
            told = f"{path}: holds {' and '.join(kinds)} files, expected one kind; name one file, or a glob such as"
            raise UserError(f"{told} {os.path.join(path, '*' + kinds[-1])}")
    if len(splits := {match[1]: name for name in found if (match := _SPLIT.match(name))}) > 1:
        told = (
            f"{path}: holds the splits {', '.join(splits)}, of which one must not be learned with another; name a glob"
        )
        raise UserError(
            f"{told}, such as {os.path.join(path, ('train' if 'train' in splits else next(iter(splits))) + '*')}"
        )
    if not found:
        raise UserError(f"{path}: the folder has no file that ends in {' or '.join(dict.fromkeys(suffixes))}")
    return [os.path.join(path, name) for name in found]


_ABOUT = frozenset(("dataset_info.json", "dataset_infos.json"))
"""What `datasets` and the Hugging Face hub keep beside records."""


_SPLIT = re.compile(r"(train|test|val|dev|eval)\w*-\d{5}-of-\d{5}")
"""How `datasets` and the hub call the files of a split."""


def _shown_names(folder: str) -> list[str]:
    """What lies in a folder but what is hidden, such as the ``._a.jsonl`` of macOS, and `_ABOUT`."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith(".") and name not in _ABOUT)
    except OSError as e:
        raise UserError(f"{folder}: cannot be listed ({e.strerror}); expected a folder of record files") from None


def _holds_records(folder: str, suffixes: tuple[str, ...]) -> bool:
    return os.path.isdir(folder) and any(_packed_suffix(n)[1].endswith(suffixes) for n in _shown_names(folder))


def _packed_suffix(name: str) -> tuple[bool, str]:
    """(whether the name is of a gzip, the name without that) in lower case."""
    name = name.lower()
    if name.endswith(".tgz"):
        return True, name[:-4] + ".tar"
    return name.endswith(".gz"), name.removesuffix(".gz")


def _arrow_folder(path: str, names: Sequence[str]) -> list[str]:
    """The data files that a folder of `datasets.save_to_disk` lists."""
    if "dataset_dict.json" in names:
        splits = [name for name in names if os.path.isfile(os.path.join(path, name, "state.json"))]
        told = f"{path}: is a DatasetDict with the splits {', '.join(splits) or 'none'}; name the folder of one"
        raise UserError(f"{told}, such as {os.path.join(path, (splits or ['train'])[0])}")
    state = os.path.join(path, "state.json")
    index.require_regular(state)
    try:
        told = orjson.loads(Path(state).read_bytes())
        files = [entry["filename"] for entry in told["_data_files"]]
    except (orjson.JSONDecodeError, TypeError, KeyError) as e:
        raise RecordError(f"{state}: is not what datasets.save_to_disk writes: no list _data_files ({e})") from None
    if not files or not all(
        isinstance(name, str) and name and "\0" not in name and name == os.path.basename(name) for name in files
    ):
        raise RecordError(f"{state}: _data_files names {files[:3]}, expected names of files in this folder")
    if told.get("_indices_files"):
        raise UserError(f"{path}: is a selection over its data files; save it again with a current version of datasets")
    return [os.path.join(path, name) for name in files]


def _remote(path: str) -> tuple[Any, str]:
    """(file system, path in it) of a URL. Raises `UserError` where its protocol has no driver here, or its driver,
    which may connect or open an archive already now, fails."""
    with _told(path):
        try:
            import fsspec

            return fsspec.core.url_to_fs(path)
        except ImportError as e:
            told = f"{path}: reading it needs a driver that is not installed ({e}); pip install 'beholder[remote]'"
            raise UserError(f"{told}, or fetch the file and name its path") from None


def _remote_files(url: str) -> list[str]:
    fs, path = _remote(url)
    named = [path]
    with _told(url):
        if "*" in path:  # the other marks of a glob stand in the queries of URLs
            named = sorted(name for name, told in fs.glob(path, detail=True).items() if told["type"] != "directory")
        elif fs.isdir(path):
            named = sorted(n for n in fs.ls(path, detail=False) if _is_remote_record_file(n))
    if not named:
        raise UserError(f"{url}: no such file, folder or glob")
    # The one that was written keeps its spelling: unstripped, a URL may say more than its path.
    return [url] if named == [path] else [url[: _last_protocol(url)] + _bare(fs, name) for name in named]


def _is_remote_record_file(path: str) -> bool:
    name = os.path.basename(path)
    return not name.startswith(".") and _packed_suffix(name)[1].endswith((".parquet", ".tar"))


def _last_protocol(url: str) -> int:
    match = _URL.match(url)
    assert match is not None
    return match.end()


def _bare(fs: Any, path: str) -> str:
    return _URL.sub("", path) if is_url(path) else path


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Whatever a driver or a network raises becomes a sentence that names the URL."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(
            f"{url}: cannot be fetched ({type(e).__name__}: {e}); expected the URL of a file that is there, which "
            "fsspec knows, such as s3://, hf://, gs:// or https://"
        ) from e


def local_file(path: str, expected: str = "a record file") -> str:
    """``path``, or its copy in the cache where it has a URL or is gzip'd. Both are made once for each version."""
    if is_url(path):
        path = _fetched(path)
    info = index.require_regular(path, expected)
    with open(path, "rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return path
    key = index.cache_key("unpacked", os.path.realpath(path), info.st_size, info.st_mtime_ns)
    name = _packed_suffix(os.path.basename(path))[1]
    if not name.strip("."):  # of ".gz" nothing is left
        name = "records"

    def unpack(out: BinaryIO) -> None:
        try:
            with gzip.open(path, "rb") as file:
                _copy(file, out, path)
        except EOFError:
            raise RecordError(f"{path}: the gzip ends early: it is cut off; fetch or write it again") from None
        except (gzip.BadGzipFile, zlib.error) as e:
            raise RecordError(f"{path}: the gzip is damaged: {e}") from None

    return index.made_once(key, name, unpack, path)


def _fetched(url: str) -> str:
    fs, path = _remote(url)
    with _told(url):
        told = fs.info(path)  # a driver whose keys know nothing of versions (https) has them here
        version = [str(told.get(name)) for name in ("size", "mtime", "ETag", "Last-Modified", "created")]
        key = index.cache_key("fetched", url, fs.ukey(path), version)

        def fetch(out: BinaryIO) -> None:
            with _told(url):
                file = fs.open(path, "rb")
            with file:
                _copy(file, out, url, lambda: _told(url))

        return index.made_once(key, os.path.basename(path), fetch, url)


def _copy(file: Any, out: BinaryIO, what: str, reading: Callable[[], Any] = nullcontext) -> None:
    """``reading``: around what is asked of the source, whose errors are not the cache's."""
    while True:
        with reading():
            chunk = file.read(index.CHUNK_BYTES)
        if not chunk:
            return
        if shutil.disk_usage(os.path.dirname(out.name)).free - len(chunk) < _MIN_FREE_BYTES:
            told = f"{what}: its copy in {os.path.dirname(out.name)} would leave less than 1 GB free"
            raise UserError(f"{told}; make room, or set BEHOLDER_CACHE to a folder on a larger disk")
        out.write(chunk)


# ---------------------------------------------------------------------------------------------------------------
# What kind of file


def recognise(path: str, fits: Callable[[dict[str, Any]], bool]) -> str:
    """The row of `CONTAINERS` that a local file is. ``fits``: whether an object is a record as it stands."""
    index.require_regular(path)
    for suffix, name in ((".tar", "tar"), (".parquet", "parquet"), (".arrow", "arrow")):
        if path.lower().endswith(suffix):
            return name
    with open(path, "rb") as file:
        head = file.read(512)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    if head[257:262] == b"ustar":
        return "tar"
    match index.first_character(path):
        case "[":
            return "array"
        case "{":
            return _object_kind(path, fits)
        case other:
            if kind := _table_kind(path, fits):
                return kind
            raise UserError(
                f"{path}: begins with {other!r}, so its kind cannot be told; expected a .tar, .parquet or .arrow file, "
                "a JSON array ('['), a record a line ('{'), a question file, or a table whose first line names its "
                "columns"
            )


def _table_kind(path: str, fits: Callable[[dict[str, Any]], bool]) -> str | None:
    """By what the first line names: fields of a shape, else whatever the file's own name promises, else plain names."""
    headers: dict[str, list[str]] = {}
    for kind, delimiter in (("tsv", "\t"), ("csv", ",")):
        with suppress(RecordError, StopIteration):
            header, *_ = _table(path, delimiter)
            if len(header) > 1:
                headers[kind] = header
    if found := [kind for kind, header in headers.items() if fits(dict.fromkeys(header, 0))]:
        return found[0]
    if path.lower().endswith((".csv", ".tsv")):
        return next(iter(headers), None)
    plain = re.compile(r"[\w .-]{1,60}")
    return next((kind for kind, header in headers.items() if all(map(plain.fullmatch, header))), None)


def _object_kind(path: str, fits: Callable[[dict[str, Any]], bool]) -> str:
    """What begins with '{': records a line, a question file, COCO's, or an object with the records under one name."""
    with open(path, "rb") as file:
        first = file.readline(MAX_RECORD_BYTES).removeprefix(BOM)
        more = bool(file.read(4096).strip())
    with suppress(orjson.JSONDecodeError):
        record = orjson.loads(first)
        if more or (isinstance(record, dict) and (path.lower().endswith((".jsonl", ".ndjson")) or fits(record))):
            return "lines"
    with suppress(RecordError):
        for name, found in index.json_members(path, ...):
            if fits({name: found}):
                break
            if kind := _member_kind(name, found):
                return kind
    return "lines"  # a second line follows, or it is malformed: reading it as records names what is wrong


def _member_kind(name: str, found: Found) -> str | None:
    try:
        value = index.loads(found.raw)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(value, dict):
        return None
    match name:
        case "questions" if "question_id" in value:
            return "vqa"
        case "annotations" if "question_id" in value:
            return "vqa"  # which says that this is not the question file
        case "annotations" if "image_id" in value:
            return "coco"
    if "question" in value and "imageId" in value:
        return "gqa"
    if found.where and name not in _BESIDE:
        return "object"
    return None


_BESIDE = frozenset(("info", "license", "licenses", "images", "categories", "videos"))
"""What COCO's and VQA's files have before their records."""


# ---------------------------------------------------------------------------------------------------------------
# Tables of text


def _table(path: str, delimiter: str) -> tuple[list[str], Any, _Room]:
    """(names of the columns, the reader behind them, the room that its next row has)."""
    csv.field_size_limit(MAX_RECORD_BYTES)  # an image as a data: URI has more than the default of 131,072 characters
    file = open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")  # noqa: SIM115
    room = _Room()
    rows = csv.reader(_bounded(path, file, room), delimiter=delimiter, strict=True)
    try:
        # What of a name is not UTF-8 stands as an escape, so that it can be said and be named in `columns`.
        header = [_escaped(name.strip()) for name in next(rows)]
    except csv.Error as e:
        raise RecordError(f"{path}: line 1, which names the columns, cannot be read: {e}") from None
    return header, rows, room


def _escaped(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class _Room:
    """Characters that one row, of however many lines, may still have."""

    def __init__(self) -> None:
        self.left = MAX_RECORD_BYTES


def _bounded(path: str, file: Any, room: _Room) -> Iterator[str]:
    with file:
        while line := file.readline(room.left + 1):
            room.left -= len(line)
            if room.left < 0:
                told = f"{path}: a row has over {MAX_RECORD_BYTES:,} characters: are quotes or line ends missing?"
                raise RecordError(told)
            yield line


def _table_records(delimiter: str) -> Callable[[str, Rules], Iterator[Found]]:
    """A record a row, after a header; an empty cell is an absent field, and lists are written as JSON.

    A column without a name, such as the row numbers of pandas, is none.
    """

    def find(path: str, rules: Rules) -> Iterator[Found]:
        index.first_character(path)  # UTF-16 is told by name
        header, rows, room = _table(path, delimiter)
        if doubled := _doubled(filter(None, header)):
            raise RecordError(f"{path}: the columns {doubled} are named twice in line 1")
        while True:
            start, room.left = rows.line_num + 1, MAX_RECORD_BYTES
            try:
                row = next(rows, None)
            except csv.Error as e:
                if "end of data" in str(e):
                    raise RecordError(f"{path}: the quotes opened in the row of line {start} never close") from None
                yield Found(0, _unusable("bad_row", f"cannot be read: {e}"), f"line {start}")
                continue
            if row is None:
                return
            if not row:
                continue
            yield Found(0, _table_row(header, row), f"line {start}")

    return find


def _doubled(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name, n in Counter(names).items() if n > 1)


def _table_row(header: Sequence[str], row: Sequence[str]) -> bytes:
    if len(row) != len(header):
        return _unusable("bad_row", f"has {len(row)} cells, the header names {len(header)} columns")
    try:
        cells = zip(header, row, strict=True)
        return orjson.dumps({name: _cell(text) for name, text in cells if text and name not in ("", "!")})
    except index.TooDeep as e:
        return _unusable("bad_row", f"has a cell that is {e.msg}")
    except TypeError:  # what was not UTF-8 became half a surrogate pair
        return _unusable("bad_row", "is not UTF-8")


def _cell(text: str) -> Any:
    if text[0] in "[{":
        try:
            return index.loads(text.encode("utf-8", "surrogateescape"))
        except index.TooDeep:
            raise
        except orjson.JSONDecodeError:
            pass
    return text


def _unusable(reason: str, detail: str, id: str | None = None) -> bytes:
    return orjson.dumps({"id": id, "!": [reason, detail]})


# ---------------------------------------------------------------------------------------------------------------
# JSON objects


def _object_records(path: str, rules: Rules) -> Iterator[Found]:
    """The array of objects under the one name of an object that has one, such as ``{"data": […]}``."""
    chosen = None
    before: list[Found] = []  # of an array, what comes before its first object: rejects, if it is the one
    last = None
    for name, found in index.json_members(path, ...):
        if name != chosen:
            if not found.where or name in _BESIDE:
                continue
            if not found.raw.startswith(b"{"):
                if name != last:
                    before, last = [], name
                if chosen is None:
                    before.append(found)
                continue
            if chosen is not None:
                told = f"{path}: has records under {chosen!r} and under {name!r}, expected one array of them"
                raise RecordError(f"{told}; keep one, as an array or a record a line")
            chosen = name
            yield from before if name == last else ()
        yield found


def _coco_records(path: str, rules: Rules) -> Iterator[Found]:
    """COCO captions: each annotation with its image's file name."""
    names: dict[str, str] = {}
    doubled: set[str] = set()
    annotations: list[tuple[str, bytes]] = []
    for name, found in index.json_members(path, ...):
        if name == "annotations":
            annotations.append((found.where, found.raw))
        elif name == "images":
            try:
                image = index.loads(found.raw)
                id, file_name = image["id"], image["file_name"]
            except (orjson.JSONDecodeError, TypeError, KeyError):
                continue  # an annotation that asks for it is rejected
            if id is None or file_name is None:
                continue
            id = str(id)
            if names.setdefault(id, file_name) != file_name:
                doubled.add(id)
    for where, raw in annotations:
        yield Found(0, _coco_record(raw, names, doubled), where)


def _coco_record(raw: bytes, names: dict[str, str], doubled: set[str]) -> bytes:
    try:
        given = index.loads(raw)
    except orjson.JSONDecodeError as e:
        return _unusable("bad_json", f"malformed JSON at character {e.pos} of the annotation: {e.msg}")
    id = str(given["id"]) if isinstance(given, dict) and given.get("id") is not None else None
    if not isinstance(given, dict) or given.get("caption") is None:
        return _unusable("missing_field", "the annotation has no caption (of objects or key points?)", id)
    image = str(given.get("image_id"))
    if image not in names:
        return _unusable("no_image", f"image_id {image[:40]!r} is not among the file's images with a file_name", id)
    if image in doubled:
        told = f"image_id {image[:40]!r} is there twice among the file's images, with two file_names"
        return _unusable("doubled_image", told, id)
    return orjson.dumps({"id": id, "file_name": names[image], "caption": given["caption"]})


def _vqa_records(path: str, rules: Rules) -> Iterator[Found]:
    assert rules.annotations is not None, "open_sources asks for it"
    return questions.vqa_records(path, rules.annotations, rules.image_pattern)


def _gqa_records(path: str, rules: Rules) -> Iterator[Found]:
    return questions.gqa_records(path, rules.image_pattern)


# ---------------------------------------------------------------------------------------------------------------
# Tar shards


def _tar_records(path: str, rules: Rules) -> Iterator[Found]:
    """Samples of a shard: members that share a name up to the first dot. ``.json`` and / or ``.txt``, and images."""
    samples: dict[str, list[index.Member]] = {}
    for member in tar_members(path):
        folder, name = os.path.split(member.name)
        samples.setdefault(os.path.join(folder, name.partition(".")[0]), []).append(member)
    with open(path, "rb") as file:
        for key, members in samples.items():
            yield Found(0, _tar_record(file, key, members, rules), f"sample {key!r}")


def _tar_record(file: BinaryIO, key: str, members: Sequence[index.Member], rules: Rules) -> bytes:
    images, jsons, texts = (
        [m for m in members if m.name.rpartition(".")[2].lower() in suffixes]
        for suffixes in (IMAGE_SUFFIXES, ("json",), ("txt",))
    )
    if len(jsons) > 1 or len(texts) > 1:
        told = f"{len(jsons)} .json and {len(texts)} .txt members, expected at most one of each"
        return _unusable("bad_member", told, key)
    fields: Any = {}
    if jsons:
        try:
            fields = index.loads(_read(file, jsons[0]))
        except orjson.JSONDecodeError as e:
            return _unusable("bad_member", f"member {jsons[0].name!r} is malformed JSON: {e}", key)
        if not isinstance(fields, dict):
            return _unusable("bad_member", f"member {jsons[0].name!r} is not a JSON object", key)
    if texts and not rules.fits(fields):
        try:
            fields["caption"] = _read(file, texts[0]).decode("utf-8")
        except UnicodeDecodeError:
            return _unusable("bad_member", f"member {texts[0].name!r} is not UTF-8", key)
    said = {k: v for k, v in fields.items() if v is not None and k not in (*IMAGE_FIELDS, "!")}
    return orjson.dumps({"id": key, **said, "images": [{"!": list(m)} for m in images]})


def _read(file: BinaryIO, member: index.Member) -> bytes:
    file.seek(member.offset)
    return file.read(min(member.size, MAX_RECORD_BYTES)).removeprefix(BOM)


# ---------------------------------------------------------------------------------------------------------------
# Parquet and Arrow


def _parquet_records(path: str, rules: Rules) -> Iterator[Found]:
    """Rows, of which only the columns that a shape knows are read, and of images not the bytes where all are there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            names = _wanted(path, file.schema_arrow.names, rules)
            _require_plausible(path, file.metadata.num_rows)
            leaves, bare = _without_bytes(file, names)
            schema = file.schema_arrow
            kinds = {name: kind for name in names if _is_text(kind := schema.field(name).type)}
        # A text that stands once in the file and in a million rows is held once.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, read_dictionary=list(kinds)) as file:
            # Rows whose image bytes must be read to know which are there are few at a time.
            rows = 4096 if bare >= {n for n in names if _holds_bytes(schema.field(n).type)} else 64
            if any(leaf not in names for leaf in leaves):
                rows = min(rows, 256)  # of texts in lists and structs pyarrow has no dictionaries
            yield from _rows(file.iter_batches(rows, columns=leaves, use_threads=False), bare, kinds)
    except UserError:
        raise
    except (pa.ArrowException, OSError, TypeError, ValueError, OverflowError) as e:
        raise RecordError(f"{path}: cannot be read as parquet: {e}") from None


def _arrow_records(path: str, rules: Rules) -> Iterator[Found]:
    """Rows of an Arrow stream or file, memory-mapped: images are not touched."""
    import pyarrow as pa

    try:
        table = arrow_table(path, tuple(_wanted(path, arrow_reader(path).schema.names, rules)))
        _require_plausible(path, table.num_rows)
        for name, column in zip(table.column_names, table.columns, strict=True):
            try:
                for chunk in column.chunks:
                    _as_bytes(chunk).validate(full=True)  # offsets of an untrusted file could point anywhere
            except pa.ArrowInvalid as e:
                raise ValueError(f"column {name!r}: {e}") from None
        yield from _rows(table.to_batches(max_chunksize=4096), frozenset(), {})
    except UserError:
        raise
    except (pa.ArrowException, OSError, TypeError, ValueError, OverflowError) as e:
        raise RecordError(f"{path}: cannot be read as an Arrow file: {e}") from None


def _require_plausible(path: str, rows: int) -> None:
    """Raises `RecordError` for rows of nothing, of which 300 bytes can hold any number."""
    size = os.path.getsize(path)
    if rows > max(size, 100_000):
        raise RecordError(
            f"{path}: claims {rows:,} rows in {size:,} bytes, so most are empty or the same; is it damaged?"
        )


def _wanted(path: str, there: Sequence[str], rules: Rules) -> list[str]:
    if told := rules.told_columns(there) or (
        None if rules.fits(dict.fromkeys(there, 0)) else rules.told_missing(there)
    ):
        raise UserError(f"{path}: {told}")
    wanted = [name for name in there if name in rules.fields]
    if doubled := _doubled(wanted):
        raise RecordError(f"{path}: has several columns of the name {doubled}, expected one each; rename or drop one")
    return wanted


def _without_bytes(file: Any, names: Sequence[str]) -> tuple[list[str], frozenset[str]]:
    """(leaves to read, columns whose image bytes are not read because the file's own counts say that none is null)."""
    counts: Counter[str] = Counter()
    meta = file.metadata
    for group in range(meta.num_row_groups):
        for k in range(meta.num_columns):
            leaf = meta.row_group(group).column(k)
            statistics = leaf.statistics
            counts[leaf.path_in_schema] += statistics.null_count if statistics and statistics.has_null_count else 1
    leaves, bare = [], set()
    for name in names:
        own = [leaf for leaf in counts if leaf == name or leaf.startswith(name + ".")]
        images = [leaf for leaf in own if leaf == name or leaf.endswith(".bytes")]
        if (
            len(images) == 1
            and counts[images[0]] == 0
            and (_is_bytes(file.schema_arrow.field(name).type) or (len(own) == 2 and _is_image(file, name)))
        ):
            bare.add(name)
            own.remove(images[0])
        leaves += own
    return leaves, frozenset(bare)


def _is_text(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as pt

    return pt.is_string(kind) or pt.is_large_string(kind)


def _is_image(file: Any, name: str) -> bool:
    """``{bytes, path}``, or a list of them."""
    import pyarrow.types as pt

    kind = file.schema_arrow.field(name).type
    if pt.is_list(kind) or pt.is_large_list(kind):
        kind = kind.value_type
    return pt.is_struct(kind) and {f.name for f in kind} == {"bytes", "path"} and _is_bytes(kind.field("bytes").type)


def _as_bytes(array: pyarrow.Array) -> pyarrow.Array:
    """The same memory with bytes for texts: what is not UTF-8 is a matter of its row, and told there."""
    import pyarrow as pa
    import pyarrow.types as pt

    def plain(kind: pyarrow.DataType) -> pyarrow.DataType:
        if pt.is_string(kind):
            return pa.binary()
        if pt.is_large_string(kind):
            return pa.large_binary()
        if pt.is_struct(kind):
            return pa.struct([f.with_type(plain(f.type)) for f in kind])
        if pt.is_list(kind):
            return pa.list_(kind.value_field.with_type(plain(kind.value_type)))
        if pt.is_large_list(kind):
            return pa.large_list(kind.value_field.with_type(plain(kind.value_type)))
        return kind

    kind = plain(array.type)
    return array if kind == array.type else array.view(kind)


def _is_bytes(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as pt

    return pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind) or pt.is_fixed_size_binary(kind)


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    return _is_bytes(kind) or any(_holds_bytes(kind.field(k).type) for k in range(kind.num_fields))


def _rows(
    batches: Iterable[pyarrow.RecordBatch], bare: frozenset[str], kinds: dict[str, pyarrow.DataType]
) -> Iterator[Found]:
    """``kinds``: what the texts of columns become that are read as dictionaries, which are slow in Python."""
    row = 0
    for batch in chain.from_iterable(map(_pieces, batches)):
        if batch.num_rows == 1 and (weight := _weight_of(batch)) > MAX_RECORD_BYTES:
            told = f"would take {weight:,} bytes without its images, expected at most {MAX_RECORD_BYTES:,}"
            yield Found(0, _unusable("too_large", told), f"row {row}")
            row += 1
            continue
        columns = {
            name: _values(_emptied(_plain(batch.column(k), kinds.get(name))))
            for k, name in enumerate(batch.schema.names)
        }
        for k in range(batch.num_rows):
            record = {name: values[k] for name, values in columns.items()}
            if bad := [name for name, value in record.items() if value is _NOT_UTF8]:
                yield Found(0, _unusable("bad_row", f"{', '.join(bad)} is not UTF-8"), f"row {row}")
                row += 1
                continue
            record |= {name: _filled(record.get(name)) for name in bare}
            fragments = {
                name: orjson.Fragment(orjson.dumps(value, default=_Places(name)))
                for name, value in record.items()
                if value is not None
            }
            yield Found(0, orjson.dumps(fragments), f"row {row}")
            row += 1


def _pieces(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch]:
    """The batch in parts that may become Python's objects: a cell of a few bytes can stand for any number of them."""
    half = batch.num_rows // 2
    if half == 0 or _weight_of(batch) <= MAX_RECORD_BYTES:
        yield batch
    else:
        yield from _pieces(batch.slice(0, half))
        yield from _pieces(batch.slice(half))


def _weight_of(batch: pyarrow.RecordBatch) -> int:
    return sum(map(_weight, batch.columns))


def _weight(array: pyarrow.Array) -> int:
    """About as many bytes as its cells take in Python, those of bytes left out, or more."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.types as pt

    kind, own = array.type, 64 * len(array)
    if _is_bytes(kind):
        return own
    if pt.is_struct(kind):
        return own + sum(map(_weight, array.flatten()))
    if pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind):
        return own + _weight(array.flatten())
    if pt.is_map(kind):
        return own + _weight(array.keys) + _weight(array.items)
    if isinstance(array, pa.DictionaryArray):
        values = array.dictionary
        if _is_text(values.type):
            longest = pc.max(pc.binary_length(values)).as_py()  # pyright: ignore[reportAttributeAccessIssue]
            return own + (longest or 0) * len(array)
        return own + _weight(values) * len(array)
    if pt.is_string_view(kind):  # views may lie over each other
        lengths = array.cast(pa.large_string()) if len(array) == 1 else array
        return own + lengths.nbytes * len(array)
    shared = pt.is_list_view(kind) or pt.is_large_list_view(kind) or pt.is_run_end_encoded(kind)
    return own + array.nbytes * (len(array) if shared else 1)


def _plain(array: pyarrow.Array, kind: pyarrow.DataType | None) -> pyarrow.Array:
    return array if kind is None or kind == array.type else array.cast(kind)


def _values(array: pyarrow.Array) -> list[Any]:
    """Its cells as Python has them; a time that Python has not, before the year 1 or of nanoseconds, as text."""
    try:
        return array.to_pylist()
    except (ValueError, OverflowError):
        return [_value(cell) for cell in array]


def _value(cell: pyarrow.Scalar) -> Any:
    import pyarrow as pa
    import pyarrow.types as pt

    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return _NOT_UTF8
    except (ValueError, OverflowError):
        if not pt.is_temporal(cell.type):
            raise
        return str(cell.cast(pa.string()))


_NOT_UTF8 = object()


class _Places:
    """Writes ``{"!": [column, k]}`` for the k-th bytes of a cell, and other things that JSON lacks as text."""

    def __init__(self, column: str) -> None:
        self.column, self.count = column, 0

    def __call__(self, value: object) -> object:
        if isinstance(value, Decimal):
            return float(value)  # a number, as which shapes refuse it where they want a text
        if isinstance(value, timedelta):
            return value.total_seconds()
        if not isinstance(value, bytes):
            return str(value)
        self.count += 1
        return {"!": [self.column, self.count - 1]}


def _filled(value: Any) -> Any:
    """An image cell that was read without its bytes, with empty ones in their place."""
    match value:
        case None:
            return b""
        case list():
            return [_filled(item) for item in value]
        case _:
            return {"bytes": b"", **value}


def _emptied(array: pyarrow.Array) -> pyarrow.Array:
    """The same with empty bytes wherever bytes are: which ones are null is all that a record has to say."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.types as pt

    kind = array.type
    if _is_bytes(kind):
        none = pa.scalar(None, pa.binary())
        return pc.if_else(array.is_valid(), pa.scalar(b""), none)  # pyright: ignore[reportAttributeAccessIssue]
    if not _holds_bytes(kind):
        return array
    if pt.is_struct(kind):
        fields = [_emptied(array.field(k)) for k in range(kind.num_fields)]
        return pa.StructArray.from_arrays(fields, [f.name for f in kind], mask=array.is_null())
    if pt.is_list(kind) or pt.is_large_list(kind):
        offsets = array.offsets.cast(pa.int64())
        first, last = offsets[0].as_py(), offsets[-1].as_py()
        values = _emptied(array.values.slice(first, last - first))
        offsets = pc.subtract(offsets, first)  # pyright: ignore[reportAttributeAccessIssue]
        nulls = array.is_null() if array.null_count else None
        return pa.LargeListArray.from_arrays(offsets, values, mask=nulls)
    raise TypeError(f"image bytes lie in a column of type {kind}, expected bytes, structs or lists of them")


# ---------------------------------------------------------------------------------------------------------------
# The table


CONTAINERS: dict[str, Container] = {
    "array": Container("JSON array", lambda path, _: index.json_array(path), (".json",), copied=False),
    "lines": Container(
        "JSON lines", lambda path, _: index.json_lines(path), (".jsonl", ".ndjson", ".json"), copied=False
    ),
    "object": Container("JSON object with one array", _object_records, (".json",), copied=False),
    "csv": Container("CSV", _table_records(","), (".csv",)),
    "tsv": Container("TSV", _table_records("\t"), (".tsv",)),
    "parquet": Container("parquet", _parquet_records, (".parquet",), "parquet"),
    "arrow": Container("Arrow", _arrow_records, (".arrow",), "arrow"),
    "tar": Container("tar shards", _tar_records, (".tar",), "tar"),
    "coco": Container("COCO captions", _coco_records, (".json",)),
    "vqa": Container("VQA question file", _vqa_records, (".json",), asked=True),
    "gqa": Container("GQA question file", _gqa_records, (".json",), asked=True),
}  # fmt: skip
"""Every container by its name."""
