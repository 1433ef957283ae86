"""Images that are no training data: what a model is watched with (`probes.monitors`), from a record file or a folder.

A record says what its image shows, which the layouts of `formats` have no place for, so these are read here: a JSON
object a line, ``{"image": "a.png", "shows": ["text"], "kind": "text page", "question": "…"}``, of which only the image
is required. Images lie below one root, as those of data do.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import orjson

from beholder.data import index
from beholder.data.images import IMAGE_SUFFIXES, ImageError, content_hash
from beholder.types import Example, ImageRef, ImageSlot, Turn, UserError, printable

MAX_RECORDS = 10_000
"""All of them are shown at every evaluation; more is another file."""
MAX_LINE = 1_000_000
"""Bytes of a record."""


@dataclass(frozen=True, slots=True)
class MonitorItem:
    """An image, what is asked about it, and what it shows."""

    example: Example
    """Without an answer; without any turn where the record asks nothing."""
    shows: tuple[str, ...] = ()
    """What may be said of it; empty: not known."""
    kind: str = ""

    def asking(self, question: str) -> MonitorItem:
        """The same with a question, where the record has none of its own."""
        if self.example.turns:
            return self
        return replace(self, example=replace(self.example, turns=(_asked(question, len(self.example.images)),)))


@dataclass(frozen=True)
class MonitorSet:
    items: Sequence[MonitorItem]
    sha256: str
    """Over the records and the bytes of their images: equal means that two measurements are about the same."""

    @property
    def examples(self) -> list[Example]:
        return [item.example for item in self.items]


def load_monitor_set(setting: str, path: str, image_root: str | None = None) -> MonitorSet:
    """The images of a record file (JSON lines), or of a folder: its ``<name>.jsonl`` where there is one, with ``name``
    the setting's last word, else every image in it, of which nothing is known.

    Raises `UserError` naming the setting, the file and the line: no such file, no image, a record that is none, an
    image that is not there or lies outside its root.
    """
    given = Path(path)
    name = setting.split(".")[1]
    source = given / f"{name}.jsonl" if given.is_dir() else given
    if given.is_dir() and not source.is_file():
        if image_root is not None and Path(image_root).resolve() != given.resolve():
            raise UserError(
                f"{setting}: {path} has no {name}.jsonl, so there are no records whose images eval.{name}.image_root "
                f"({image_root}) could be the folder of; give the record file as path, or leave image_root out"
            )
        source, root = given, given
        rows = _listed(setting, given)
    else:
        beside = source.parent / "images"
        root = Path(image_root) if image_root else beside if beside.is_dir() else source.parent
        rows = _rows(setting, source)
    digest = hashlib.sha256()
    items: list[MonitorItem] = []
    own: dict[str, str] = {}
    for i, (line, raw) in enumerate(rows):
        if i == MAX_RECORDS:
            raise UserError(f"{setting}: {path} has more than {MAX_RECORDS:,} records; so many are shown at most")
        place = f"{setting}: {source}: {line}"
        item = _item(place, setting, source, i, raw, str(root))
        if (id := item.example.id) in own:
            if raw.get("id"):
                raise UserError(f"{place} has the id {id!r}, which {own[id]} has; give each record its own, or none")
            id = f"{id}#{i}"  # the same image once more
            item = replace(item, example=replace(item.example, id=id))
        own[id] = line
        digest.update(orjson.dumps([id, item.shows, item.kind, [t.text for t in item.example.turns]]))
        for ref in item.example.images:
            try:
                digest.update(content_hash(ref).encode())
            except ImageError as e:
                if e.reason != "outside_root":
                    raise UserError(f"{place}: {e}") from e
                raise UserError(
                    f"{place}: image {printable(ref.path[:200], one_line=True)} leads out of {root}, the folder its "
                    f"images must lie in, also behind a link; put a copy there, or set eval.{name}.image_root to a "
                    "folder that holds them all"
                ) from e
        items.append(item)
    if not items:
        raise UserError(f"{setting}: {path} has no record; expected a JSON object a line")
    return MonitorSet(items, digest.hexdigest())


def _listed(setting: str, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The images in a folder, as records."""
    found = (p for p in folder.rglob("*") if p.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES)
    names = sorted(p.relative_to(folder).as_posix() for p in islice(found, MAX_RECORDS + 1))
    if not names:
        raise UserError(f"{setting}: {folder} has no {setting.split('.')[1]}.jsonl and no image in it")
    for image in names:
        try:
            image.encode()
        except UnicodeEncodeError as e:
            raise UserError(
                f"{setting}: {folder}: the file name {os.fsencode(image)!r} is not UTF-8; expected one that is, rename "
                "the file"
            ) from e
        yield f"image {image}", {"image": image}


def _rows(setting: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file and which line each is, read one at a time."""
    try:
        index.require_regular(str(path))
        with path.open("rb") as file:
            for number in count(1):
                raw = file.readline(MAX_LINE)
                line = f"line {number}"
                if not raw:
                    return
                if len(raw) == MAX_LINE:
                    raise UserError(f"{path}: {line} has over {MAX_LINE:,} bytes; expected a JSON record a line")
                if number == 1:
                    raw = index.without_mark(raw, path)
                if raw.strip():
                    yield line, _record(path, line, raw)
    except UserError as e:
        raise UserError(f"{setting}: {e}; {_EXPECTED}") from e
    except (OSError, ValueError) as e:  # the latter for a name with a NUL
        why = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise UserError(f"{setting}: {path} cannot be read ({why}); {_EXPECTED}") from e


_EXPECTED = "give a file with a JSON record a line, or a folder of images. beholder prepare ood makes both"


def _record(path: Path, line: str, raw: bytes) -> dict[str, Any]:
    """A field that is null is absent."""
    try:
        record = index.loads(raw)
    except orjson.JSONDecodeError as e:
        raise UserError(f"{path}: {line} is not JSON ({e})") from e
    if not isinstance(record, dict):
        raise UserError(f"{path}: {line} is {type(record).__name__}, not an object")
    return {key: value for key, value in record.items() if value is not None}


def _item(place: str, setting: str, path: Path, i: int, raw: dict[str, Any], root: str) -> MonitorItem:
    def text(key: str) -> str:
        value = raw.get(key, "")
        if not isinstance(value, str):
            raise UserError(f"{place}: {key} is {type(value).__name__}; expected a text")
        return value

    def texts(key: str) -> list[str]:
        value = raw.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise UserError(f"{place}: {key} is not a list of texts")
        return value

    one, several = text("image"), texts("images")
    if one and several:
        raise UserError(f"{place} has both image and images; expected one of them")
    names = several or [n for n in [one] if n]
    if not names:
        raise UserError(f'{place} names no image; expected "image": "a.png"')
    question = text("question")
    turns = (_asked(question, len(names)),) if question else ()
    example = Example(
        id=text("id") or names[0], images=tuple(ImageRef(root, n) for n in names), turns=turns,
        source=setting.split(".")[1], file=str(path), row=i,
    )  # fmt: skip
    return MonitorItem(example, tuple(texts("shows")), text("kind"))


def _asked(question: str, num_images: int) -> Turn:
    slots = [part for k in range(num_images) for part in (ImageSlot(k), "\n")]
    return Turn("user", (*slots, question))
