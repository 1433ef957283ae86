"""Record files → `Example`s, parsed when they are asked for; structurally bad records → named rejects.

Where records lie in a file is `containers`' business, what they say `formats`', how question and annotation files go
together `questions`', what is inside an image `images`', whether a good record is wanted `hygiene`'s. A record is
checked once, when its file is indexed; after that only byte offsets are held.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
import threading
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from typing import Any, Literal, get_args

import numpy as np

from beholder.config import SourceConfig
from beholder.data import index, questions
from beholder.data.containers import CONTAINERS, expand, is_url, local_file, recognise
from beholder.data.formats import DATASETS, FIELDS, SHAPES, BadRecord, Cell, Image, Inline, Parsed, Rules
from beholder.data.index import RecordError
from beholder.data.places import absent
from beholder.runs import sha256_file
from beholder.types import DatasetKind, Example, ImageRef, ShapeName, UserError

_INDEX_VERSION = 8
"""Raised when a cached index means something else."""
_MOST_COPIED = 256 << 20
"""Bytes of records' JSON from which on it is compared with the file's."""
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
    """As it was named"""
    local: str
    """Where it lies on this machine: the same, or its copy in the cache"""
    text: str
    """The file that holds the records' JSON: ``local``, or the copies that were made of them"""
    image_root: str
    more_roots: tuple[str, ...]
    rules: Rules
    stem: str
    starts: np.ndarray
    """int64 [n]: first byte of record i in ``text``"""
    stops: np.ndarray
    """int64 [n]"""
    rows: np.ndarray
    """int64 [n]: record number in the file, bad ones counted"""
    items: np.ndarray
    """int32 [n]: number among the records that this one's JSON stands for"""
    source_ids: np.ndarray
    """int32 [n] into ``source_names``"""
    source_names: list[str]
    rejects: list[Reject]
    digest: str
    """sha256 of the records' JSON: of the file, or of the copies"""
    num_images: int
    inserted_markers: int
    """Records whose images got the place that they lacked"""
    absent_images: int
    """Records whose words name an image that they do not have"""
    shapes: dict[ShapeName, int]
    """Records of each shape"""
    stat: tuple[int, int]
    """(bytes, modification time in ns) of ``text`` at indexing"""
    local_stat: tuple[int, int]
    """The same of ``local``"""
    _fd: int | None = field(default=None, repr=False)
    _last: tuple[int, Parsed] | None = field(default=None, repr=False)
    """The last record that stands for several, by its start: their captions are read once, not once for each."""
    _coco: _CocoNames | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.starts)

    def raw(self, i: int) -> bytes:
        start, stop = int(self.starts[i]), int(self.stops[i])
        fd = self._fd if self._fd is not None else self._open()
        # pread and not mmap: a file that is cut while in use then gives an error and not a bus error.
        raw = os.pread(fd, stop - start, start)
        if _stamp(os.fstat(fd)) != self.stat:  # after it was read, and of no weight beside parsing it
            raise RecordError(f"{self.path}: changed since it was indexed; start again")
        return raw

    def _open(self) -> int:
        with _OPENING:
            if self._fd is None:
                try:
                    fd = os.open(self.text, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as e:
                    told = f"{self.path}: was indexed and cannot be opened any more ({e.strerror}: {self.text})"
                    raise RecordError(f"{told}; put it back, or start again") from None
                self._fd = fd
        return self._fd

    def parse(self, i: int) -> Parsed:
        start, last = int(self.starts[i]), self._last
        try:
            if last is not None and last[0] == start:
                return last[1].item(int(self.items[i]))
            parsed = self.rules.parse(self.raw(i))
            if parsed.several > 1:
                self._last = (start, parsed)
            return parsed.item(int(self.items[i]))
        except BadRecord as e:
            raise RecordError(f"{self.path}: record {self.rows[i]} changed since it was indexed: {e.detail}") from None

    def id(self, i: int, parsed: Parsed) -> str:
        item = int(self.items[i])
        return parsed.id or f"{self.stem}:{int(self.rows[i])}" + (f"#{item}" if item else "")

    def example(self, i: int, source: str) -> Example:
        parsed = self.parse(i)
        return Example(
            id=self.id(i, parsed),
            images=self.refs(i, parsed),
            turns=parsed.turns,
            source=source,
            file=self.path,
            row=int(self.rows[i]),
            answers=parsed.answers,
            question_type=parsed.question_type,
            answer_type=parsed.answer_type,
        )

    def refs(self, i: int, parsed: Parsed) -> tuple[ImageRef, ...]:
        return tuple(self._ref(i, image) for image in parsed.images)

    def _ref(self, i: int, image: Image) -> ImageRef:
        if isinstance(image, Cell):  # places in another file's bytes would give other images, or none
            with suppress(FileNotFoundError):  # which is told where the image is read
                if _stamp(os.stat(self.local)) != self.local_stat:
                    raise RecordError(f"{self.path}: changed since it was indexed; start again")
        match image:
            case Cell([str() as name, int() as at, int() as size]):
                return ImageRef(self.local, name, "tar", at, size)
            case Cell([column, item]):
                row, kind = int(self.rows[i]), self.rules.format.images
                assert kind is not None
                name = f"row {row}" + (f" {column}" if column not in ("image", "images") else "")
                name += f" image {item}" if item else ""
                return ImageRef(self.local, name, kind, row, 0, item, column)
            case Inline(item):
                start, stop = int(self.starts[i]), int(self.stops[i])
                name = f"record {int(self.rows[i])} image {item}"
                return ImageRef(self.text, name, "inline", start, stop - start, item)
            case str():
                if self._coco is None:
                    self._coco = _CocoNames(self.image_root)
                return ImageRef(self.image_root, self._coco.resolve(image), more_roots=self.more_roots)
        raise AssertionError(image)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fd": None, "_last": None, "_coco": None}

    def __del__(self) -> None:
        if (fd := getattr(self, "_fd", None)) is not None:  # __init__ may have failed before
            os.close(fd)


_OPENING = threading.Lock()


def _stamp(info: os.stat_result) -> tuple[int, int]:
    return info.st_size, info.st_mtime_ns


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
        except (OSError, ValueError):  # the missing folder is told where its images are asked for
            return frozenset(), ()
        return frozenset(m[0] for m in matches), tuple(sorted({m["prefix"] for m in matches if m["prefix"]}))


_COCO_NAME = re.compile(r"(?P<prefix>COCO_[a-z]+[0-9]{4}_)?(?P<number>[0-9]{12}\.jpg)")


def _index_file(path: str, local: str, source: SourceConfig, rules: Rules) -> _File:
    before = _stamp(index.require_regular(local))
    form = rules.format
    stem = os.path.basename(path).split(".")[0]
    if source.image_root is not None and form.images != "tar" and not os.path.isdir(source.image_root):
        raise UserError(f"image_root {source.image_root}: is not a folder; image paths of {path} are relative to it")
    for root in source.more_image_roots:
        if not os.path.isdir(root):
            raise UserError(f"more_image_roots {root}: is not a folder; expected one that images of {path} may lie in")
    image_root = source.image_root or os.path.dirname(os.path.abspath(local if is_url(path) else path))
    named = {local: path, rules.annotations: source.annotations_path}
    content = index.stat_facts(local) if form.large else sha256_file(local)
    answers = None if rules.annotations is None else sha256_file(rules.annotations)
    key = index.cache_key(
        "index", _INDEX_VERSION, rules.identity, rules.container, rules.image_pattern, content, answers
    )
    cached = index.cache_load(key)
    if cached is None:
        with _naming(named), index.CopiedTexts(key) as copies:
            arrays, meta = _scan(path, local, rules, copies)
            if _stamp(os.stat(local)) != before:
                raise RecordError(f"{path}: changed while it was indexed; start again")
            text = copies.keep() if form.copied else local
        meta["digest"] = content if isinstance(content, str) and not form.copied else sha256_file(text)
        index.cache_save(key, arrays, meta)
    else:
        arrays, meta = cached
        text = index.copied_texts(key, meta["digest"]) if form.copied else local
        if text is None:
            index.cache_drop(key)
            return _index_file(path, local, source, rules)
    return _File(
        path=path, local=local, text=text, image_root=image_root, more_roots=source.more_image_roots, rules=rules,
        stem=stem, starts=arrays["starts"], stops=arrays["stops"], rows=arrays["rows"], items=arrays["items"],
        source_ids=arrays["source_ids"],
        source_names=[source.name or name or stem for name in meta["source_names"]],
        rejects=[
            Reject(id or f"{stem}:{row}", row, path, why, _as_named(detail, named))
            for id, row, why, detail in meta["rejects"]
        ],
        digest=meta["digest"], num_images=meta["num_images"], inserted_markers=meta["inserted_markers"],
        absent_images=meta["absent_images"], shapes=meta["shapes"],
        stat=_stamp(os.stat(text)) if form.copied else before, local_stat=before,
    )  # fmt: skip


def _scan(
    path: str, local: str, rules: Rules, copies: index.CopiedTexts
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Parse every record once; keep places, sources and rejects."""
    form = rules.format
    starts, stops, rows, items, source_ids = (array("q") for _ in range(5))
    names: dict[str, int] = {}
    rejects: list[tuple[str, int, str, str]] = []
    shapes: Counter[ShapeName] = Counter()
    row, num_images, inserted_markers, absent_images = -1, 0, 0, 0
    there: dict[str, None] = {}
    size = os.path.getsize(local)
    for row, (start, raw, where) in enumerate(form.find(local, rules)):
        if rules.columns and rules.told_columns(there):
            there |= dict.fromkeys(index.field_names(raw))
        try:
            parsed = rules.parse(raw)
        except BadRecord as e:
            rejects.append((e.id, row, e.reason, f"{where}: {e.detail}"))
            continue
        if form.copied:
            start = copies.add(raw)
            if start > _MOST_COPIED and start > 100 * size:
                raise RecordError(
                    f"{path}: its records are over {start:,} bytes of JSON, the file has {size:,}: the same large "
                    "texts stand in every row; is it damaged?"
                )
        for item in range(parsed.several):
            starts.append(start)
            stops.append(start + len(raw))
            rows.append(row)
            items.append(item)
            source_ids.append(names.setdefault(parsed.source, len(names)))
            num_images += len(parsed.images)
            inserted_markers += parsed.inserted
            absent_images += bool(absent(parsed.turns, len(parsed.images)))
            shapes[parsed.shape] += 1
    if row < 0:
        raise RecordError(f"{path}: holds no records")
    if told := rules.told_columns(there):
        raise UserError(f"{path}: {told}")
    return {
        "starts": np.array(starts, np.int64), "stops": np.array(stops, np.int64), "rows": np.array(rows, np.int64),
        "items": np.array(items, np.int32), "source_ids": np.array(source_ids, np.int32),
    }, {
        "source_names": list(names), "rejects": rejects, "num_images": num_images,
        "inserted_markers": inserted_markers, "absent_images": absent_images, "shapes": dict(shapes),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# All files


def missing_files(sources: Sequence[SourceConfig]) -> list[str]:
    """What of ``sources`` is not there, each once: ``no file a.jsonl``, ``no folder images``. Nothing is opened."""
    found: list[str] = []
    for source in sources:
        for path in filter(None, (source.json_path, source.annotations_path)):
            if not is_url(path) and not os.path.exists(path) and not glob.glob(path):
                found.append(f"no file {path}")
        roots = filter(None, (source.image_root, *source.more_image_roots))
        found += [f"no folder {root}" for root in roots if source.dataset != "webdataset" and not os.path.isdir(root)]
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
        for path, local, rules in _opened(source, image_token, max_images, chat):
            files.append(_index_file(path, local, source, rules))
            origins.append(origin)
    records = Records(files, origins, sources, chat=chat)
    if on_reject == "error" and records.rejects:
        first, more = records.rejects[0], len(records.rejects) - 1
        also = f" ({more} more bad records)" if more else ""
        raise RecordError(f"{first.file}: record {first.row} (id {first.id!r}): {first.detail} [{first.reason}]{also}")
    return records


def _opened(source: SourceConfig, image_token: str, max_images: int, chat: bool) -> Iterator[tuple[str, str, Rules]]:
    """(file as named, where it lies here, how it is read) of every file of a source."""
    kind = DATASETS[source.dataset]
    for name in source.columns:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, 3) or sorted(FIELDS)
            raise UserError(f"columns.{name}: no record has such a field to be read; nearest: {', '.join(near)}")
    if source.image_pattern is not None:
        questions.image_names(source.image_pattern)
    rules = Rules(
        source.dataset, image_token, max_images, chat, source.image_pattern,
        shape=source.shape, columns=tuple(source.columns.items()), min_rating=tuple(source.min_rating.items()),
    )  # fmt: skip
    theirs = [name for _, name in rules.columns]
    for name, column in rules.columns:
        if theirs.count(column) > 1:
            fields = " and ".join(f"columns.{name}" for name, other in rules.columns if other == column)
            raise UserError(f"{fields} name the same column {column!r}; expected one each")
    for path in expand(source.json_path, kind.containers):
        local = local_file(path)
        with _naming({local: path}):
            container = kind.containers[0] if len(kind.containers) == 1 else recognise(local, rules.fits)
        if container not in kind.containers:
            expected = " or a ".join(CONTAINERS[name].title for name in kind.containers)
            raise RecordError(f"{path}: is a {CONTAINERS[container].title}, dataset {source.dataset} is a {expected}")
        _require_fitting(source, path, container)
        answers = source.annotations_path
        if answers is not None:
            answers = local_file(answers, "the annotation file of the questions")
        yield path, local, replace(rules, container=container, annotations=answers)


@contextmanager
def _naming(named: Mapping[str | None, str | None]) -> Iterator[None]:
    """Errors that name a copy in the cache name what it was made of: ``named`` is as `_as_named` takes it."""
    try:
        yield
    except UserError as e:
        told = _as_named(str(e), named)
        if told == str(e):
            raise
        raise type(e)(told) from None


def _as_named(text: str, named: Mapping[str | None, str | None]) -> str:
    """A message with files called as a person called them, instead of where they lie."""
    for local, path in named.items():
        if local and path and local != path:
            text = text.replace(local, path)
    return text


def _require_fitting(source: SourceConfig, path: str, container: str) -> None:
    """Raises `UserError` where question files' settings and the file do not go together."""
    if container == "vqa" and source.annotations_path is None:
        raise UserError(
            f"{path}: dataset vqa has its answers in a second file; give annotations_path in data.sources "
            "(--annotations on the command line), such as v2_mscoco_train2014_annotations.json"
        )
    title = source.dataset if source.dataset != "auto" else CONTAINERS[container].title
    if container != "vqa" and source.annotations_path is not None:
        raise UserError(f"annotations_path {source.annotations_path}: dataset {title} has none, only vqa")
    if source.image_pattern is not None and container not in ("vqa", "gqa"):
        raise UserError(
            f"image_pattern {source.image_pattern!r}: records of dataset {title} name their images themselves; only "
            "vqa and gqa have it"
        )


def instructs(source: SourceConfig) -> bool:
    """Whether a source is made for stages of dialogues: by its name, else by its first good record."""
    if source.dataset != "auto":
        return DATASETS[source.dataset].instructs
    most = 1_000_000
    for path, local, rules in _opened(source, "<image>", most, False):
        if rules.format.asked:
            return True
        with _naming({local: path}):
            for found in islice(rules.format.find(local, rules), 100):
                with suppress(BadRecord):
                    return SHAPES[rules.parse(found.raw).shape].asks
    return False


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
        """Records with images and no place for them, which got them in front of their first user turn."""
        self.absent_images = sum(f.absent_images for f in files)
        """Records whose words name an image that is not there: "image 5" of three."""
        self.layouts: dict[str, int] = {}
        """What was read, ``JSON lines of caption``, and how many records of it."""
        self.num_of: dict[str, tuple[int, int]] = {}
        """File → its good and bad records."""
        for f in files:
            for shape, num in (f.shapes or {"no known shape": 0}).items():
                name = f"{f.rules.format.title} of {shape}"
                self.layouts[name] = self.layouts.get(name, 0) + num
            good, bad = self.num_of.get(f.path, (0, 0))
            self.num_of[f.path] = good + len(f), bad + len(f.rejects)
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

    def given(self, number: int) -> dict[str, Any]:
        """The record's JSON as it stands in its file; of a table, the fields that are read."""
        file, i = self._locate(number)
        return index.loads(file.raw(i))

    def source_of(self, index: int) -> str:
        """Source name of a record: the config's ``name``, else the record's ``source`` or that of its ``metadata``,
        else the file's stem."""
        return self.source_names[int(self.source_ids[index])]

    def target_texts(self, indices: Sequence[int] | None = None) -> list[str]:
        """`Example.target_text` of many records, without building examples."""
        return [parsed.target_text for _, _, parsed in self._parsed(indices)]

    def contents(self) -> Iterator[tuple[str, str, tuple[ImageRef, ...]]]:
        """(`Example.target_text`, compared text, images) of every record, each read once.

        The compared text makes a record the repetition of another: its caption; for a conversation all turns and its
        images, because an answer alone says nothing: "yes" to two questions, or to one question about two images, is no
        repetition.
        """
        for file, i, p in self._parsed(None):
            refs, target = file.refs(i, p), p.target_text
            named = refs if p.images and not isinstance(p.images[0], str) else p.images
            yield target, "\n".join((*map(str, named), *(t.text for t in p.turns))) if self.chat else target, refs

    def ids(self) -> list[str]:
        """`Example.id` of every record."""
        return [file.id(i, parsed) for file, i, parsed in self._parsed(None)]

    def images_of(self, indices: Sequence[int] | None = None) -> Iterator[tuple[int, tuple[ImageRef, ...]]]:
        """(record, its images) of many records, without building examples."""
        chosen = range(len(self)) if indices is None else indices
        for number, (file, i, parsed) in zip(chosen, self._parsed(indices), strict=True):
            yield int(number), file.refs(i, parsed)

    def _parsed(self, indices: Sequence[int] | None) -> Iterator[tuple[_File, int, Parsed]]:
        for chosen in range(len(self)) if indices is None else indices:
            file, i = self._locate(chosen)
            yield file, i, file.parse(i)


def guess_source(
    path: str,
    *,
    dataset: DatasetKind | None = None,
    shape: ShapeName | None = None,
    columns: Mapping[str, str] | None = None,
    image_root: str | None = None,
    more_image_roots: Sequence[str] = (),
    annotations: str | None = None,
) -> SourceConfig:
    """The source a bare path stands for: recognised by looking unless ``dataset`` or ``shape`` is given."""
    if shape not in (None, *get_args(ShapeName)):
        raise UserError(f"--as {shape}: no such shape; expected one of {', '.join(get_args(ShapeName))}")
    return SourceConfig(
        dataset=dataset or "auto", json_path=path, shape=shape, columns=dict(columns or {}), image_root=image_root,
        more_image_roots=tuple(more_image_roots), annotations_path=annotations,
    )  # fmt: skip
