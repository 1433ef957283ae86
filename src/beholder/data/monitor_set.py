"""Images that are no training data: what a model is watched with (`probes.monitors`), from a record file or a folder.

A record says what its image shows, which the layouts of `formats` have no place for, so these are read here: a JSON
object a line, ``{"image": "a.png", "shows": ["text"], "kind": "text page", "question": "…"}``, of which only the image
is required. Images lie below one root, as those of data do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from beholder.data.images import ImageError, content_hash
from beholder.types import Example, ImageRef, ImageSlot, Turn, UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_RECORDS = 10_000
"""All of them are shown at every evaluation; more is another file."""


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
    records = given / f"{name}.jsonl" if given.is_dir() else given
    if given.is_dir() and not records.is_file():
        root = Path(image_root) if image_root else given
        rows: list[tuple[int, dict[str, Any]]] = [
            (i, {"image": p.relative_to(root).as_posix()})
            for i, p in enumerate(sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES))
        ]
        if not rows:
            raise UserError(f"{setting}: {path} has no {name}.jsonl and no image in it")
    else:
        beside = records.parent / "images"
        root = Path(image_root) if image_root else beside if beside.is_dir() else records.parent
        rows = list(_rows(setting, records))
    if len(rows) > MAX_RECORDS:
        raise UserError(f"{setting}: {path} has {len(rows):,} records; at most {MAX_RECORDS:,} are shown")
    digest = hashlib.sha256()
    items: list[MonitorItem] = []
    for i, raw in rows:
        item = _item(setting, records, i, raw, str(root))
        digest.update(orjson.dumps([item.example.id, item.shows, item.kind, [t.text for t in item.example.turns]]))
        for ref in item.example.images:
            try:
                digest.update(content_hash(ref).encode())
            except ImageError as e:
                raise UserError(f"{setting}: {records}: record {i}: {e}") from e
        items.append(item)
    return MonitorSet(items, digest.hexdigest())


def _rows(setting: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise UserError(
            f"{setting}: {path} cannot be read ({e.strerror or e}); give a file with a JSON record a line, or a folder "
            "of images. beholder prepare ood makes both"
        ) from e
    found = False
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            raw = orjson.loads(line)
        except orjson.JSONDecodeError as e:
            raise UserError(f"{setting}: {path}: line {i + 1} is not JSON ({e}); expected a JSON object a line") from e
        if not isinstance(raw, dict):
            raise UserError(f"{setting}: {path}: line {i + 1} is {type(raw).__name__}; expected a JSON object a line")
        found = True
        yield i, raw
    if not found:
        raise UserError(f"{setting}: {path} has no record; expected a JSON object a line")


def _item(setting: str, path: Path, i: int, raw: dict[str, Any], root: str) -> MonitorItem:
    def text(key: str) -> str:
        value = raw.get(key, "")
        if not isinstance(value, str):
            raise UserError(f"{setting}: {path}: record {i}: {key} is {type(value).__name__}; expected a text")
        return value

    def texts(key: str) -> list[str]:
        value = raw.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise UserError(f"{setting}: {path}: record {i}: {key} is not a list of texts")
        return value

    names = texts("images") or [n for n in [text("image")] if n]
    if not names:
        raise UserError(f'{setting}: {path}: record {i} names no image; expected "image": "a.png"')
    question = text("question")
    turns = (_asked(question, len(names)),) if question else ()
    example = Example(
        id=text("id") or f"{Path(names[0]).stem}", images=tuple(ImageRef(root, n) for n in names), turns=turns,
        source=setting.split(".")[1], file=str(path), row=i,
    )  # fmt: skip
    return MonitorItem(example, tuple(texts("shows")), text("kind"))


def _asked(question: str, num_images: int) -> Turn:
    slots = [part for k in range(num_images) for part in (ImageSlot(k), "\n")]
    return Turn("user", (*slots, question))
