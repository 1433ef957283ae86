"""``beholder prepare unified``: records of any layout as JSON lines of one, the distillation guide's (F-5).

``{"id", "image", "instruction", "response", "metadata": {"source", "difficulty"}}``: one picture, one question, one
answer a record, and what else our own reader makes of the record where it has it (``system``, ``answers``,
``question_type``, ``answer_type``). Nothing is invented: what the format cannot say is a reject with a reason, and
every line is read back before it is written.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from beholder.data.formats import BadRecord, Rules
from beholder.data.hygiene import Progress
from beholder.data.images import ImageError, check_exists, format_of, read_bytes
from beholder.data.sources import Records, Reject, guess_source, open_sources
from beholder.runs import fsync_dir, writing
from beholder.types import DatasetKind, Example, ImageRef, ImageSlot, Part, ShapeName, Turn, UserError, printable

MARKER = "<image>"
FOLDER = "images"
"""Beside the file: pictures that lay inside a table, a shard or a record."""
_ENDINGS = {"JPEG": "jpg", "TIFF": "tif"}
_ANY = 1_000_000
_MAX_MEGAPIXELS = 50.0
_BACK = Rules("auto", MARKER, _ANY, chat=True)
"""How a line is read back."""


@dataclass(frozen=True)
class Unified:
    """What was written and what was not. ``rejects`` is complete; printing shows the first of each reason."""

    file: str
    image_root: str
    """What the file's image paths are relative to: its ``image_root`` in a config."""
    more_image_roots: list[str]
    records: int
    """All records of the files, bad ones included."""
    written: int
    """Lines: more than records where dialogues were split."""
    sources: dict[str, int]
    """Source name → lines"""
    images_written: int
    """Pictures copied out of tables, shards and records, each once"""
    repeated_ids: int
    """Lines whose id an earlier one has"""
    rejects_by_reason: dict[str, int]
    rejects: list[Reject] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def print(self, console: Console) -> None:
        """Text from the data is printed literally, never as markup."""
        console.print(f"[bold]{self.written:,} lines written[/] of {self.records:,} records", highlight=False)
        table = Table(title="sources", title_justify="left")
        table.add_column("source")
        table.add_column("lines", justify="right")
        for name, n in self.sources.items():
            table.add_row(Text(printable(name, one_line=True)), f"{n:,}")
        console.print(table)
        if self.rejects:
            table = Table(title="rejects", title_justify="left")
            table.add_column("reason")
            table.add_column("records", justify="right")
            table.add_column("first")
            for reason, n in self.rejects_by_reason.items():
                first = next(r for r in self.rejects if r.reason == reason)
                shown = printable(f"{first.file}: record {first.row} (id {first.id}): {first.detail}", one_line=True)
                table.add_row(reason, f"{n:,}", Text(shown))
            console.print(table)
        if self.images_written:
            console.print(f"pictures copied out of their files: {self.images_written:,}", highlight=False)
        if self.repeated_ids:
            console.print(f"lines whose id an earlier one has: {self.repeated_ids:,}", highlight=False)
        roots = [self.image_root, *self.more_image_roots]
        read = f"read it with json_path: {self.file}, image_root: {roots[0]}"
        more = f", more_image_roots: [{', '.join(roots[1:])}]" if roots[1:] else ""
        console.print(Text(printable(read + more, one_line=True)), soft_wrap=True)


class _Unfit(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail


def unify(
    files: Sequence[str | Path],
    out: Path,
    *,
    dataset: DatasetKind | None = None,
    shape: ShapeName | None = None,
    columns: Mapping[str, str] | None = None,
    annotations: str | Path | None = None,
    image_root: str | Path | None = None,
    more_image_roots: Sequence[str | Path] = (),
    split_turns: bool = False,
    force: bool = False,
    rejects: Path | None = None,
    progress: Progress | None = None,
) -> Unified:
    """Write the records of ``files`` to ``out``; the file appears whole or not at all.

    ``dataset``, ``shape``, ``columns``, ``annotations`` and the image roots say what looking at the files does not, as
    for `beholder check`. ``split_turns``: a dialogue of several turns becomes a record an answer, what was said before
    it as text in its instruction; else it is a reject. ``force``: replace ``out``. ``rejects``: file for every reject,
    a line of JSON each. Raises `UserError` for files that cannot be read, and when nothing is left to write.
    """
    _require_room(files, out, annotations, rejects, force)
    root, answers = (None if path is None else str(path) for path in (image_root, annotations))
    more = [str(path) for path in more_image_roots]
    sources = [
        guess_source(
            str(file), dataset=dataset, shape=shape, columns=columns, image_root=root, annotations=answers,
            more_image_roots=more,
        )
        for file in files
    ]  # fmt: skip
    records = open_sources(sources, image_token=MARKER, max_images=_ANY, on_reject="collect", chat=True)
    places = _Places(records, out)
    found = _Written(list(records.rejects))
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with writing(out):
            file = temporary.open("wb")
        with file:
            for number in range(len(records)):
                for line in _lines(number, records, places, split_turns, found):
                    with writing(out):
                        file.write(line + b"\n")
                if progress is not None:
                    progress("unified", number + 1, len(records))
            with writing(out):
                file.flush()
                os.fsync(file.fileno())
        reasons = dict(Counter(r.reason for r in found.rejects).most_common())
        if rejects is not None:
            with writing(rejects):
                rejects.write_bytes(b"".join(orjson.dumps(asdict(r)) + b"\n" for r in found.rejects))
        if not found.ids:
            told = ", ".join(f"{n:,} {reason}" for reason, n in reasons.items())
            first = found.rejects[0]
            raise UserError(
                f"nothing could be written to {out}: {told}; the first is {first.file}: record {first.row} (id "
                f"{first.id!r}): {first.detail}"
            )
        with writing(out):
            os.replace(temporary, out)
        fsync_dir(out.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return Unified(
        file=str(out), image_root=places.root, more_image_roots=more, records=len(records) + len(records.rejects),
        written=sum(found.sources.values()), sources=dict(found.sources), images_written=places.copied,
        repeated_ids=sum(found.ids.values()) - len(found.ids), rejects_by_reason=reasons, rejects=found.rejects,
    )  # fmt: skip


def _require_room(
    files: Sequence[str | Path], out: Path, annotations: str | Path | None, rejects: Path | None, force: bool
) -> None:
    if not files:
        raise UserError("no files; give the record files to convert: beholder prepare unified FILES… --out FILE")
    if annotations is not None and len(files) > 1:
        raise UserError("--annotations belongs to one question file; convert the others apart")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; expected a file, such as {out / 'unified.jsonl'}")
    if any(out.exists() and Path(file).exists() and out.samefile(file) for file in files):
        raise UserError(f"--out {out}: is one of the files that are read; give another")
    if out.exists() and not force:
        raise UserError(f"--out {out}: is there already; give another, or --force to replace it")
    if rejects is not None and rejects.resolve() in {Path(p).resolve() for p in (*files, out)}:
        raise UserError(f"--rejects {rejects}: is a file that is read or written; give another")
    if rejects is not None and (rejects.is_dir() or not rejects.parent.is_dir()):
        raise UserError(f"--rejects {rejects}: expected a file in an existing folder")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)


# ---------------------------------------------------------------------------------------------------------------
# Pictures


class _Places:
    """What image paths are written as, and the one folder they are all relative to.

    Files stay where they are: their paths stay, too, where all have one root, which is what `--image-root` says; else
    the root is the folder that everything lies in.
    """

    def __init__(self, records: Records, out: Path) -> None:
        self.out = out
        self.copied = 0
        self.broken: dict[int, ImageError] = {}
        """Record number → why one of its pictures cannot be read"""
        self._known: dict[ImageRef, str] = {}
        roots: dict[str, None] = {}
        inside = False
        owners: list[int] = []

        def every() -> Iterator[ImageRef]:
            nonlocal inside
            for number, refs in records.images_of():
                for ref in refs:
                    owners.append(number)
                    if ref.kind == "file":
                        roots[ref.root] = None
                    inside = inside or ref.kind != "file"
                    yield ref

        for k, error in enumerate(check_exists(every())):
            if error is not None:
                self.broken.setdefault(owners[k], error)
        beside = str(out.parent)
        self._before: dict[str, str] = {}
        """Root → what comes before the paths below it"""
        if not roots or (len(roots) == 1 and not inside):
            self.root = next(iter(roots), beside)
            self._before = {self.root: ""}
            return
        real = {root: os.path.realpath(root) for root in (*roots, *([beside] if inside else []))}
        self.root = os.path.commonpath(list(real.values()))
        if self.root == os.path.dirname(self.root):
            raise UserError(
                f"the images lie in {' and '.join(real)}, which have no folder in common that could be their image_root"
                "; convert the files apart, or put --out near the images"
            )
        below = {root: os.path.relpath(path, self.root) for root, path in real.items()}
        self._before = {root: "" if path == "." else f"{path}/" for root, path in below.items()}

    def path(self, ref: ImageRef) -> str:
        """Raises `ImageError` for a picture inside a file that is none."""
        if ref.kind == "file":
            return ref.path if os.path.isabs(ref.path) else self._before[ref.root] + ref.path
        if ref not in self._known:
            self._known[ref] = self._before[str(self.out.parent)] + self._copy(ref)
        return self._known[ref]

    def _copy(self, ref: ImageRef) -> str:
        """Its bytes as they are, under a name made from them."""
        data = read_bytes(ref)
        kind = format_of(data, ref, _MAX_MEGAPIXELS)
        name = f"{FOLDER}/{hashlib.sha256(data).hexdigest()[:32]}.{_ENDINGS.get(kind, kind.lower())}"
        target = self.out.parent / name
        if not target.exists():
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            with writing(target):
                target.parent.mkdir(exist_ok=True)
                temporary.write_bytes(data)
                os.replace(temporary, target)
            self.copied += 1
        return name


# ---------------------------------------------------------------------------------------------------------------
# Records


@dataclass
class _Written:
    rejects: list[Reject]
    sources: Counter[str] = field(default_factory=Counter)
    ids: Counter[str] = field(default_factory=Counter)


class _Pair(NamedTuple):
    """One question and its answer, as the format says it."""

    id: str
    system: str
    question: tuple[Part, ...]
    response: str


def _lines(number: int, records: Records, places: _Places, split_turns: bool, found: _Written) -> Iterator[bytes]:
    example, given = records[number], records.given(number)
    id = example.id
    try:
        if (broken := places.broken.get(number)) is not None:
            raise broken
        pairs = _pairs(example, split_turns)
    except (_Unfit, ImageError) as e:
        found.rejects.append(Reject(id, example.row, example.file, e.reason, e.detail))
        return
    for pair in pairs:
        try:
            line = _line(pair, example, given, places)
        except (_Unfit, ImageError) as e:
            found.rejects.append(Reject(pair.id, example.row, example.file, e.reason, e.detail))
            continue
        found.sources[example.source] += 1
        found.ids[pair.id] += 1
        yield line


def _pairs(example: Example, split_turns: bool) -> list[_Pair]:
    """The record as questions and answers about its one picture. Raises `_Unfit`."""
    if len(example.images) > 1:
        raise _Unfit("several_images", f"has {len(example.images)} images, and a line has one")
    system = example.turns[0].text if example.turns[0].role == "system" else ""
    turns = example.turns[1:] if system else example.turns
    roles = [turn.role for turn in turns]
    if roles == ["user", "assistant"]:
        return [_Pair(example.id, system, turns[0].parts, turns[1].text)]
    answers = [k for k, role in enumerate(roles) if role == "assistant"]
    if not split_turns:
        told = f"has {len(turns)} turns, and a line has a question and its answer"
        raise _Unfit("several_turns", f"{told}; --split-turns makes a line of every answer")
    if "system" in roles or any(roles[k - 1] != "user" for k in answers):
        raise _Unfit("several_turns", f"its turns are of {', '.join(roles)}; expected user and assistant in turn")
    return [_Pair(f"{example.id}#{n}", system, _so_far(turns[:k]), turns[k].text) for n, k in enumerate(answers, 1)]


def _so_far(turns: Sequence[Turn]) -> tuple[Part, ...]:
    """Everything that was said up to a question, the picture in front; who speaks is written where more than one
    does."""
    slots = [part for turn in turns for part in turn.parts if isinstance(part, ImageSlot)]
    said = ["".join(part for part in turn.parts if isinstance(part, str)).strip("\n") for turn in turns]
    if len(turns) > 1:
        said = [f"{turn.role.capitalize()}: {text}" for turn, text in zip(turns, said, strict=True)]
    return (*slots, "\n" + "\n".join(said))


def _line(pair: _Pair, example: Example, given: Mapping[str, Any], places: _Places) -> bytes:
    """The pair as JSON, proven to be read back as what it was made from. Raises `_Unfit` and `ImageError`."""
    if not any(isinstance(part, ImageSlot) for part in pair.question):
        raise _Unfit("no_image", "its picture comes only with a later question")
    question = _merged(pair.question)
    match question:
        case (ImageSlot(), str(text)) if text.startswith("\n"):  # where a picture stands that has no place of its own
            instruction = text[1:]
        case _:
            instruction = "".join(part if isinstance(part, str) else MARKER for part in question)
    metadata: dict[str, Any] = {"source": example.source}
    if (difficulty := _difficulty(given)) is not None:
        metadata["difficulty"] = difficulty
    answers = () if example.answers == (pair.response,) else example.answers
    record = {
        "id": pair.id, "image": places.path(example.images[0]), **({"system": pair.system} if pair.system else {}),
        "instruction": instruction, "response": pair.response, **({"answers": answers} if answers else {}),
        **({"question_type": example.question_type} if example.question_type else {}),
        **({"answer_type": example.answer_type} if example.answer_type else {}), "metadata": metadata,
    }  # fmt: skip
    line = orjson.dumps(record)
    try:
        back = _BACK.parse(line)
    except BadRecord as e:
        raise _Unfit("not_kept", _why_not(pair, e.detail)) from None
    meant = [("system", (pair.system,))] if pair.system else []
    meant += [("user", question), ("assistant", (pair.response,))]
    if [(role, _merged(parts)) for role, parts in back.messages] != meant or back.images != [record["image"]]:
        raise _Unfit("not_kept", _why_not(pair, "it would be read back as something else"))
    return line


def _why_not(pair: _Pair, otherwise: str) -> str:
    if any(isinstance(part, str) and MARKER in part for part in pair.question):
        return f"its question has the word {MARKER}, which stands for a picture in an instruction"
    return otherwise


def _merged(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The same with neighbouring texts as one, and none that is empty."""
    out: list[Part] = []
    for part in parts:
        if isinstance(part, str) and out and isinstance(out[-1], str):
            out[-1] += part
        elif part != "":
            out.append(part)
    return tuple(out)


def _difficulty(given: Mapping[str, Any]) -> str | int | float | None:
    """As the record has it, by itself or in its metadata; nothing is made up."""
    metadata = given.get("metadata")
    for holder in (given, metadata if isinstance(metadata, dict) else {}):
        value = holder.get("difficulty")
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return value
    return None
