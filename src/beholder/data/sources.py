"""Record files → `Example`s, parsed when they are asked for; structurally bad records → named rejects.

Which layouts there are is `formats`' business, where records lie in a file `index`', how question and annotation files
go together `questions`', what is inside an image `images`', whether a good record is wanted `hygiene`'s. A record is
checked once, when its file is indexed; after that only byte offsets are held.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from beholder.config import DatasetKind, SourceConfig
from beholder.data import index, questions
from beholder.data.formats import FORMATS, BadRecord, Parsed, Rules
from beholder.data.index import RecordError
from beholder.runs import sha256_file
from beholder.types import Example, ImageRef, UserError

_INDEX_VERSION = 4
"""Raised when a cached index means something else."""
_FINGERPRINT_VERSION = 1
"""Raised when the same bytes give other examples: saved splits and checkpoints hold fingerprints."""


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that is not used, and why. ``reason`` is a short stable slug that counts go by."""

    id: str
    row: int
    """0-based record number in ``file``."""
    file: str
    reason: str
    detail: str


# ---------------------------------------------------------------------------------------------------------------
# One file


@dataclass
class _File:
    """Offsets of the good records of one file."""

    path: str
    image_root: str
    more_roots: tuple[str, ...]
    rules: Rules
    stem: str
    starts: np.ndarray
    """int64 [n]: first byte of record i, in the file or in ``blob``"""
    stops: np.ndarray
    """int64 [n]"""
    rows: np.ndarray
    """int64 [n]: record number in the file, bad ones counted"""
    source_ids: np.ndarray
    """int32 [n] into ``source_names``"""
    source_names: list[str]
    rejects: list[Reject]
    digest: str
    """sha256 of the file (JSON), of all record texts and image places (tar, parquet)"""
    num_images: int
    inserted_markers: int
    """Conversations that got the marker they lacked"""
    blob: bytes | None
    """Record texts of tar, parquet and question files; None: they are read from the file."""
    stat: tuple[int, int]
    """(bytes, modification time in ns) at indexing"""
    _fd: int | None = field(default=None, repr=False)
    _coco: _CocoNames | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.starts)

    def raw(self, i: int) -> bytes:
        start, stop = int(self.starts[i]), int(self.stops[i])
        if self.blob is not None:
            return self.blob[start:stop]
        # pread and not mmap: a file that is cut while in use then gives an error and not a bus error.
        return os.pread(self._fd if self._fd is not None else self._open(), stop - start, start)

    def _open(self) -> int:
        with _OPENING:
            if self._fd is None:
                fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                info = os.fstat(fd)
                if (info.st_size, info.st_mtime_ns) != self.stat:
                    os.close(fd)
                    raise RecordError(f"{self.path}: changed since it was indexed; start again")
                self._fd = fd
        return self._fd

    def parse(self, i: int) -> Parsed:
        try:
            return self.rules.parse(self.raw(i))
        except BadRecord as e:
            raise RecordError(f"{self.path}: record {self.rows[i]} changed since it was indexed: {e.detail}") from None

    def example(self, i: int, source: str) -> Example:
        parsed, row = self.parse(i), int(self.rows[i])
        return Example(
            id=parsed.id or f"{self.stem}:{row}",
            images=self.refs(parsed),
            turns=self.rules.turns(parsed),
            source=source,
            file=self.path,
            row=row,
            answers=parsed.answers,
            question_type=parsed.question_type,
            answer_type=parsed.answer_type,
        )

    def refs(self, parsed: Parsed) -> tuple[ImageRef, ...]:
        match self.rules.format.images:
            case "tar":
                return tuple(ImageRef(self.path, name, "tar", at, size) for name, at, size in parsed.images)
            case "parquet":
                return tuple(ImageRef(self.path, name, "parquet", row, 0, item) for name, row, item in parsed.images)
            case "file":
                if self._coco is None:
                    self._coco = _CocoNames(self.image_root)
                return tuple(
                    ImageRef(self.image_root, self._coco.resolve(path), more_roots=self.more_roots)
                    for path in parsed.images
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fd": None, "_coco": None}

    def __del__(self) -> None:
        if (fd := getattr(self, "_fd", None)) is not None:  # __init__ may have failed before
            os.close(fd)


_OPENING = threading.Lock()


class _CocoNames:
    """Finds a COCO image that lies under the other of its two names.

    COCO called an image ``COCO_train2014_000000033471.jpg`` until 2014 and ``000000033471.jpg`` since; LLaVA-Instruct,
    VQA and their users mix the two. A name that is not there stands for the other spelling of its number, in the same
    folder, when exactly one such file exists. Otherwise the name stays as it is written, and the image is missing.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._listed: dict[str, tuple[frozenset[str], tuple[str, ...]]] = {}

    def resolve(self, path: str) -> str:
        """``path``, or the other spelling of it. A folder is listed once and never asked file by file."""
        folder, name = os.path.split(path)
        match = _COCO_NAME.fullmatch(name)
        if match is None or os.path.isabs(path) or ".." in path.split("/"):
            return path
        if folder not in self._listed:
            self._listed[folder] = self._list(folder)
        names, prefixes = self._listed[folder]
        if name in names:
            return path
        others = [match["number"]] if match["prefix"] else [prefix + match["number"] for prefix in prefixes]
        found = [other for other in others if other in names]
        return os.path.join(folder, found[0]) if len(found) == 1 else path

    def _list(self, folder: str) -> tuple[frozenset[str], tuple[str, ...]]:
        """COCO's names in a folder, and the prefixes that occur."""
        try:
            matches = [m for n in os.listdir(os.path.join(self.root, folder)) if (m := _COCO_NAME.fullmatch(n))]
        except OSError:  # the missing folder is told where its images are asked for
            return frozenset(), ()
        return frozenset(m[0] for m in matches), tuple(sorted({m["prefix"] for m in matches if m["prefix"]}))


_COCO_NAME = re.compile(r"(?P<prefix>COCO_[a-z]+[0-9]{4}_)?(?P<number>[0-9]{12}\.jpg)")


def _index_file(path: str, source: SourceConfig, rules: Rules) -> _File:
    info = index.require_regular(path)
    stem = Path(path).name.split(".")[0]
    if source.image_root is not None and rules.format.images == "file" and not os.path.isdir(source.image_root):
        raise UserError(f"image_root {source.image_root}: is not a folder; image paths of {path} are relative to it")
    for root in source.more_image_roots:
        if not os.path.isdir(root):
            raise UserError(f"more_image_roots {root}: is not a folder; expected one that images of {path} may lie in")
    image_root = source.image_root or os.path.dirname(os.path.abspath(path))
    content = index.stat_facts(path) if rules.format.images != "file" else sha256_file(path)
    answers = None if source.annotations_path is None else sha256_file(source.annotations_path)
    key = index.cache_key("index", _INDEX_VERSION, rules.identity, rules.image_pattern, content, answers)
    cached = index.cache_load(key)
    if cached is None:
        cached = _scan(path, source.annotations_path, rules, content if isinstance(content, str) else None)
        index.cache_save(key, *cached)
    arrays, meta = cached
    return _File(
        path=path, image_root=image_root, more_roots=source.more_image_roots, rules=rules, stem=stem,
        starts=arrays["starts"], stops=arrays["stops"], rows=arrays["rows"], source_ids=arrays["source_ids"],
        source_names=[source.name or name or stem for name in meta["source_names"]],
        rejects=[Reject(id or f"{stem}:{row}", row, path, why, detail) for id, row, why, detail in meta["rejects"]],
        digest=meta["digest"], num_images=meta["num_images"], inserted_markers=meta["inserted_markers"],
        blob=arrays["blob"].tobytes() if rules.format.copied else None,
        stat=(info.st_size, info.st_mtime_ns),
    )  # fmt: skip


def _scan(
    path: str, annotations: str | None, rules: Rules, digest: str | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Parse every record once; keep places, sources and rejects."""
    form = rules.format
    found = form.find(path, rules, annotations)
    starts, stops, rows, source_ids = [], [], [], []
    names: dict[str, int] = {}
    rejects: list[tuple[str, int, str, str]] = []
    blob = bytearray()
    row, num_images, inserted_markers = -1, 0, 0
    for row, (start, raw, where) in enumerate(found):
        try:
            parsed = rules.parse(raw)
        except BadRecord as e:
            rejects.append((e.id, row, e.reason, f"{where}: {e.detail}"))
            continue
        if form.copied:
            start = len(blob)
            blob += raw
        starts.append(start)
        stops.append(start + len(raw))
        rows.append(row)
        source_ids.append(names.setdefault(parsed.source, len(names)))
        num_images += len(parsed.images)
        inserted_markers += parsed.in_front and not form.asked
    if row < 0:
        raise RecordError(f"{path}: holds no records")
    arrays = {
        "starts": np.array(starts, np.int64), "stops": np.array(stops, np.int64), "rows": np.array(rows, np.int64),
        "source_ids": np.array(source_ids, np.int32), "blob": np.frombuffer(blob, np.uint8),
    }  # fmt: skip
    return arrays, {
        "source_names": list(names), "rejects": rejects, "num_images": num_images,
        "inserted_markers": inserted_markers,
        "digest": digest if digest and not form.copied else hashlib.sha256(blob).hexdigest(),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# All files


def missing_files(sources: Sequence[SourceConfig]) -> list[str]:
    """What of ``sources`` is not there, each once: ``no file a.jsonl``, ``no folder images``. Nothing is opened."""
    found: list[str] = []
    for source in sources:
        for path in filter(None, (source.json_path, source.annotations_path)):
            if not os.path.exists(path) and not glob.glob(path):
                found.append(f"no file {path}")
        own_files = FORMATS[source.dataset].images == "file"
        roots = filter(None, (source.image_root, *source.more_image_roots))
        found += [f"no folder {root}" for root in roots if own_files and not os.path.isdir(root)]
    return list(dict.fromkeys(found))


def open_sources(
    sources: Sequence[SourceConfig],
    *,
    image_token: str,
    max_images: int,
    on_reject: Literal["error", "collect"],
    chat: bool = False,
) -> Records:
    """Index every file of ``sources`` in order. No image is opened. ``chat``: hold records to stage instruct's rules.

    ``on_reject`` error: raise `RecordError` for the first bad record and say how many there are; collect: they are in
    ``Records.rejects``. A JSON array that is malformed, a damaged tar and a file without records always raise.
    """
    files, origins = [], []
    for origin, source in enumerate(sources):
        _require_fitting(source)
        rules = Rules(source.dataset, image_token, max_images, chat, source.image_pattern)
        suffixes = rules.format.suffixes
        paths = index.expand(source.json_path, suffixes) if suffixes else [source.json_path]
        for path in paths:
            files.append(_index_file(path, source, rules))
            origins.append(origin)
    records = Records(files, origins, sources, chat=chat)
    if on_reject == "error" and records.rejects:
        first, more = records.rejects[0], len(records.rejects) - 1
        also = f" ({more} more bad records)" if more else ""
        raise RecordError(f"{first.file}: record {first.row} (id {first.id!r}): {first.detail} [{first.reason}]{also}")
    return records


def _require_fitting(source: SourceConfig) -> None:
    """Raises `UserError` where question files' settings and the kind do not go together."""
    if source.dataset == "vqa" and source.annotations_path is None:
        raise UserError(
            f"{source.json_path}: dataset vqa has its answers in a second file; give annotations_path in data.sources "
            "(--annotations on the command line), such as v2_mscoco_train2014_annotations.json"
        )
    if source.dataset != "vqa" and source.annotations_path is not None:
        raise UserError(f"annotations_path {source.annotations_path}: dataset {source.dataset} has none, only vqa")
    if source.image_pattern is not None:
        if source.dataset not in ("vqa", "gqa"):
            raise UserError(
                f"image_pattern {source.image_pattern!r}: records of dataset {source.dataset} name their images "
                "themselves; only vqa and gqa have it"
            )
        questions.image_names(source.image_pattern)


class Records:
    """Random access to the structurally good records of several files. Picklable."""

    def __init__(
        self, files: Sequence[_File], origins: Sequence[int], sources: Sequence[SourceConfig], *, chat: bool = False
    ) -> None:
        self._files = list(files)
        self._ends = list(accumulate(len(f) for f in files))
        self.files: list[str] = [f.path for f in files]
        self.sources = tuple(sources)
        self.rejects: list[Reject] = [r for f in files for r in f.rejects]
        """Structurally bad records, in file order."""
        self.source_names: list[str] = list(dict.fromkeys(n for f in files for n in f.source_names))
        self.num_images = sum(f.num_images for f in files)
        """Image references of all records, repeated ones counted again."""
        self.inserted_markers = sum(f.inserted_markers for f in files)
        """Conversations with one image and no marker, which got it in front of their first user turn."""
        self.chat = chat
        """Held to stage instruct's rules."""
        number = {name: i for i, name in enumerate(self.source_names)}
        empty = np.zeros(0, np.int32)
        local = [np.array([number[n] for n in f.source_names], np.int32) for f in files]
        ids = [numbers[f.source_ids] for numbers, f in zip(local, files, strict=True)]
        self.source_ids: np.ndarray = np.concatenate(ids or [empty])
        """int32 [len]: index into ``source_names``"""
        self.origins: np.ndarray = np.repeat(np.array(origins, np.int32), [len(f) for f in files])
        """int32 [len]: index into ``sources``, the config entry the record came from"""
        self.fingerprint: str = index.cache_key(
            "records", _FINGERPRINT_VERSION,
            [[*f.rules.identity, f.digest, f.stem, f.source_names] for f in files],
        )  # fmt: skip
        """sha256 over record contents and how they are read, not over paths: a data set may move."""

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _locate(self, i: int) -> tuple[_File, int]:
        i = int(i)
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        k = bisect_right(self._ends, i)
        return self._files[k], i - (self._ends[k - 1] if k else 0)

    def __getitem__(self, index: int) -> Example:
        file, i = self._locate(index)
        return file.example(i, self.source_of(index))

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def source_of(self, index: int) -> str:
        """Source name of a record: the config's ``name``, else the record's ``source``, else the file's stem."""
        return self.source_names[int(self.source_ids[index])]

    def target_texts(self, indices: Sequence[int] | None = None) -> list[str]:
        """`Example.target_text` of many records, without building examples."""
        return ["\n".join(t for role, t in p.messages if role == "assistant") for _, p in self._parsed(indices)]

    def compared_texts(self) -> list[str]:
        """What makes a record the repetition of another: its caption; for a conversation all turns and its images.

        An answer alone says nothing: "yes" to two questions, or to one question about two images, is no repetition.
        """
        if not self.chat:
            return self.target_texts()
        return ["\n".join((*map(str, p.images), *(t for _, t in p.messages))) for _, p in self._parsed(None)]

    def ids(self) -> list[str]:
        """`Example.id` of every record."""
        return [
            file.parse(i).id or f"{file.stem}:{int(file.rows[i])}" for file in self._files for i in range(len(file))
        ]

    def images_of(self, indices: Sequence[int] | None = None) -> Iterator[tuple[int, tuple[ImageRef, ...]]]:
        """(record, its images) of many records, without building examples."""
        chosen = range(len(self)) if indices is None else indices
        for i, (file, parsed) in zip(chosen, self._parsed(indices), strict=True):
            yield int(i), file.refs(parsed)

    def _parsed(self, indices: Sequence[int] | None) -> Iterator[tuple[_File, Parsed]]:
        for chosen in range(len(self)) if indices is None else indices:
            file, i = self._locate(chosen)
            yield file, file.parse(i)


def guess_source(
    path: str,
    *,
    dataset: DatasetKind | None = None,
    image_root: str | None = None,
    more_image_roots: Sequence[str] = (),
    annotations: str | None = None,
) -> SourceConfig:
    """The source a bare path stands for: the kind is told by suffix and first bytes unless ``dataset`` is given."""
    if dataset is None:
        first = index.expand(path, (".tar", ".parquet"))[0]
        if first.endswith(".tar"):
            dataset = "webdataset"
        elif first.endswith(".parquet"):
            dataset = "parquet"
        else:
            match index.first_character(first):
                case "[":
                    dataset = "llava_pretrain"
                case "{":
                    dataset = _object_kind(first)
                case other:
                    raise UserError(
                        f"{path}: begins with {other!r}, so its kind cannot be told; expected a .tar or .parquet file, "
                        "a JSON array ('['), a record a line ('{') or a question file, or say --dataset"
                    )
    return SourceConfig(
        dataset=dataset, json_path=path, image_root=image_root, more_image_roots=tuple(more_image_roots),
        annotations_path=annotations,
    )  # fmt: skip


def _object_kind(path: str) -> DatasetKind:
    """What begins with '{': a question file, or records a line. Reads the first question at most, or the first line."""
    try:
        for name, found in index.json_members(path, "questions"):
            value = orjson.loads(found.raw)
            if isinstance(value, dict):
                if name == "questions" and "question_id" in value:
                    return "vqa"
                if "question" in value and "imageId" in value:
                    return "gqa"
    except (RecordError, orjson.JSONDecodeError):
        pass  # a second line follows, or it is malformed: reading it as records names what is wrong, line by line
    return "jsonl"
