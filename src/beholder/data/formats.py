"""What a record says: one row of `SHAPES` each, recognised by its fields. Where records lie is `containers`' business.

A field that is null is absent. The k-th image place takes the k-th image: the k-th marker in user turns, or the k-th
image part. Shapes without markers have their images in front of the first user turn, which is counted; so has, in a
stage of dialogues, a conversation with one image and no marker, which is how LLaVA-Instruct and most chat data mean it.
Numbers that differ are a reject.

A stage of dialogues (``chat``) asks more of a record than an alignment does: a conversation that the user opens, about
at least one image, in which the assistant always says something.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, Literal, NamedTuple, get_args

import orjson

from beholder.config import DatasetKind
from beholder.data import index
from beholder.data.containers import CONTAINERS, IMAGE_FIELDS, Container
from beholder.data.images import data_uris
from beholder.types import ImageSlot, Part, ShapeName, Turn

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip
Record = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------
# One record


class BadRecord(Exception):
    """Why a record cannot be used: a slug that counts go by, and a sentence."""

    def __init__(self, reason: str, detail: str, id: str = "") -> None:
        super().__init__(detail)
        self.reason, self.detail, self.id = reason, detail, id


class Cell(NamedTuple):
    """Image bytes that lie in the container: where, in the container's own terms."""

    place: list[Any]


class Inline(NamedTuple):
    """An image that lies in the record itself: which of its ``data:`` URIs."""

    item: int


Image = str | Cell | Inline
"""A path, or where else the bytes are."""


class Said(NamedTuple):
    """What a shape reads in a record."""

    messages: list[tuple[Role, list[Any]]]
    """Role and parts: texts, and `Place`s of images."""
    markers: bool
    """Markers in user turns are image places; else all text is literal."""
    answers: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    """Of the image, where they are a list: a record each, of which ``messages`` has the first."""
    images: list[Any] | None = None
    """Instead of what the record's image fields name."""


class Place(NamedTuple):
    """Where an image goes, and the image where it is given there; None: the next of the record's own."""

    image: Any
    where: str


class Parsed(NamedTuple):
    id: str | None
    source: str
    shape: ShapeName
    images: list[Image]
    messages: list[tuple[Role, tuple[Part, ...]]]
    inserted: bool
    """The record has no image place of its own, so its images stand in front of the first user turn."""
    answers: tuple[str, ...] = ()
    question_type: str = ""
    answer_type: str = ""
    captions: tuple[str, ...] = ()
    """Of the image, where they are several: a record each"""

    @property
    def turns(self) -> tuple[Turn, ...]:
        return tuple(Turn(role, parts) for role, parts in self.messages)

    @property
    def target_text(self) -> str:
        """`Example.target_text`"""
        return "\n".join(t.text for t in self.turns if t.role == "assistant")

    @property
    def several(self) -> int:
        """Records that this one stands for"""
        return len(self.captions) or 1

    def item(self, k: int) -> Parsed:
        """Number ``k`` of the records that this one stands for. Raises `BadRecord` where there are fewer."""
        if k >= self.several:
            raise BadRecord("missing_field", f"has {self.several} captions, number {k} is asked for", self.id or "")
        if not k:
            return self
        return self._replace(id=self.id and f"{self.id}#{k}", messages=[("assistant", (self.captions[k],))])


@dataclass(frozen=True)
class Rules:
    """How the records of one file are read."""

    dataset: DatasetKind
    image_token: str
    max_images: int
    chat: bool = False
    image_pattern: str | None = None
    annotations: str | None = None
    container: str = "lines"
    shape: ShapeName | None = None
    columns: tuple[tuple[str, str], ...] = ()
    """(field, what it is called here)"""
    min_rating: tuple[tuple[str, float], ...] = ()

    @property
    def format(self) -> Container:
        return CONTAINERS[self.container]

    @property
    def shapes(self) -> tuple[ShapeName, ...]:
        return (self.shape,) if self.shape else DATASETS[self.dataset].shapes

    @property
    def fields(self) -> set[str]:
        """Every field that could be read."""
        renamed = dict(self.columns)
        known = FIELDS | {f"{name}{end}" for name, _ in self.min_rating for end in _RATINGS}
        return {renamed.get(name, name) for name in known}

    @property
    def identity(self) -> list[object]:
        """What makes the same bytes other examples. `image_pattern` shows in the records' own texts."""
        kind = self.dataset if self.dataset != "auto" else "jsonl" if self.container == "lines" else self.container
        more = [self.shape, self.columns, self.min_rating]
        return [kind, self.image_token, self.max_images, *(["chat"] if self.chat else []), *(more if any(more) else [])]

    def fits(self, record: Record) -> bool:
        """Whether a record has the fields of a shape."""
        return bool(_fitting(frozenset(self._renamed(record)), self.shapes))

    def parse(self, raw: bytes) -> Parsed:
        """The record, the first of those it stands for.

        Raises `BadRecord` with a reason and a sentence naming the field, what was got and what was expected.
        """
        try:
            given = index.loads(raw)
        except index.TooDeep as e:
            raise BadRecord("bad_json", f"malformed JSON: {e.msg}") from None
        except orjson.JSONDecodeError as e:
            raise BadRecord("bad_json", f"malformed JSON at character {e.pos} of the record: {e.msg}") from None
        _require(dict, given, "the record", "an object")
        record = self._renamed(given)
        id = next((record[name] for name in ("id", "question_id", "identifier") if name in record), None)
        if isinstance(id, int) and not isinstance(id, bool):
            id = str(id)
        id = _require(str | None, id, "id", "a string or an integer")
        try:
            if "!" in record and self.format.copied:
                raise BadRecord(*record["!"])
            return self._parse(record, id, given)
        except BadRecord as e:
            raise BadRecord(e.reason, e.detail, id or "") from None

    def _renamed(self, record: Record) -> Record:
        """Absent fields left out, and `columns` under the names that shapes know."""
        if not self.columns:
            return {name: value for name, value in record.items() if value is not None}
        own = {theirs: name for name, theirs in self.columns}
        hidden = own.values()
        return {own.get(k, k): v for k, v in record.items() if v is not None and (k in own or k not in hidden)}

    def _parse(self, record: Record, id: str | None, whole: Record) -> Parsed:
        name = self._shape(record)
        shape = SHAPES[name]
        source = _text_field(record, "source") or _metadata_source(record)
        said = shape.read(record)
        if name != "caption" and (system := _text_field(record, "system")):
            if said.messages[0][0] == "system":
                raise BadRecord("wrong_type", "has both system and a turn of the system, expected one of them")
            said.messages.insert(0, ("system", [system]))
        asked = self.format.asked
        given = image_values(record) if said.images is None else said.images
        if self.chat and not asked:
            _require_dialogue(said.messages)
            self._require_few(given)
        messages, places = self._placed(said)
        images = _taken(given, places)
        is_caption = said.messages[0][0] == "assistant" and len(said.messages) == 1 and name == "caption"
        asks = any(role == "user" for role, _ in messages)
        inserted = (
            asks
            and not (is_caption or places or not images)
            and (shape.in_front == "all" or (self.chat and shape.in_front == "one" and len(images) == 1))
        )
        num_places = len(images) if is_caption else len(places)
        if num_places != len(images) and not inserted:
            what = "image part" if name == "parts" else f"{self.image_token} marker"
            raise BadRecord(
                "image_count",
                f"{len(images)} images but {num_places} {what}s in the user turns; the k-th {what.split()[-1]} takes "
                "images[k], so the numbers must agree",
            )
        if not images and not (shape.conversation and not self.chat and DATASETS[self.dataset].text_only):
            raise BadRecord("no_image", "has no image")
        self._require_few(images)
        if shape.num_images not in (None, len(images)):
            raise BadRecord("image_count", f"{len(images)} images, a {name} is about {shape.num_images}")
        self._require_rating(record)
        if inserted:
            first = next(k for k, (role, _) in enumerate(messages) if role == "user")
            parts = messages[first][1]
            slots: tuple[Part, ...] = tuple(map(ImageSlot, range(len(images))))
            text = ("\n" + parts[0], *parts[1:]) if parts and isinstance(parts[0], str) else ("\n", *parts)
            messages[first] = ("user", (*slots, *text))
        return Parsed(
            id, source, name, _inlined([(self._image(*image), image[1]) for image in images], whole), messages,
            inserted and not asked, said.answers or _answers(record), _text_field(record, "question_type"),
            _text_field(record, "answer_type"), said.captions,
        )  # fmt: skip

    def _shape(self, record: Record) -> ShapeName:
        if self.shape is not None:
            if not any(fields <= record.keys() for fields in SHAPES[self.shape].needs):
                raise BadRecord("missing_field", self.told_missing(record))
            return self.shape
        fitting = _fitting(frozenset(record), self.shapes)
        if len(fitting) == 1:
            (name,) = fitting
            if name == "turns" and _has_parts(record) and "parts" in self.shapes:
                return "parts"
            return name
        if not fitting:
            raise BadRecord("missing_field", self.told_missing(record))
        which = " and ".join(f"{name} ({', '.join(min(fitting[name], key=len))})" for name in fitting)
        fields = " and ".join(chain.from_iterable(sorted(min(f, key=len)) for f in fitting.values()))
        raise BadRecord(
            "two_shapes",
            f"has {fields}, so it fits {len(fitting)} shapes: {which}; say which is meant: shape in data.sources, or "
            "beholder check --as",
        )

    def told_missing(self, record: Collection[str]) -> str:
        """That none of the fields is there which a record needs, and what is there instead."""
        return _told_missing(tuple(record)[:12], self.shapes)

    def told_columns(self, there: Collection[str]) -> str | None:
        """Which of `columns` is not among the fields that are there, and what may be meant."""
        for name, theirs in self.columns:
            if theirs not in there:
                near = difflib.get_close_matches(theirs, there, 3) or list(there)[:12]
                told = f"columns.{name} is {theirs!r}, which is no field here"
                return f"{told}; nearest: {', '.join(near) or 'none, the records have no fields'}"
        return None

    def _placed(self, said: Said) -> tuple[list[tuple[Role, tuple[Part, ...]]], list[Place]]:
        """(messages with their image slots, what goes into the slots)."""
        messages: list[tuple[Role, tuple[Part, ...]]] = []
        places: list[Place] = []
        for role, given in said.messages:
            parts: list[Part] = []
            for part in given:
                if isinstance(part, Place):
                    parts.append(ImageSlot(len(places)))
                    places.append(part)
                elif said.markers and role == "user" and self.image_token in part:
                    # Only here: a marker in an answer or in a system text is literal text.
                    parts += marked(part, self.image_token, len(places))
                    places += [Place(None, "a marker")] * part.count(self.image_token)
                else:
                    parts.append(part)
            messages.append((role, tuple(parts)))
        return messages, places

    def _require_few(self, images: Sequence[Any]) -> None:
        if len(images) > self.max_images:
            raise BadRecord(
                "too_many_images", f"{len(images)} images, prompting.max_images_per_sample is {self.max_images}"
            )

    def _require_rating(self, record: Record) -> None:
        for name, least in self.min_rating:
            field = next((f"{name}{end}" for end in _RATINGS if f"{name}{end}" in record), None)
            if field is None:
                tried = ", ".join(f"{name}{end}" for end in _RATINGS)
                raise BadRecord("no_rating", f"min_rating asks for {name}, and none of {tried} is there")
            ratings = record[field] if isinstance(record[field], list) else [record[field]]
            for k, rating in enumerate(ratings):
                _require_number(rating, f"{field}[{k}]" if isinstance(record[field], list) else field)
            if not ratings or min(map(float, ratings)) < least:
                lowest = f"{min(map(float, ratings)):g}" if ratings else "an empty list"
                raise BadRecord("low_rating", f"{field} is {lowest}, min_rating wants at least {least:g}")

    def _image(self, value: Any, where: str) -> str | Cell:
        """The path or URI of an image that a record gives as one, or as an object of one; or the cell it lies in."""
        if isinstance(value, dict):
            if "!" in value and self.format.images is not None:
                return Cell(_cell_place(value["!"], where))
            given = [name for name in ("bytes", "url", "path", "image") if value.get(name) is not None]
            if not given:
                raise BadRecord("no_image", f"{where} is an object without bytes, path or url, so there is no image")
            if given[0] == "bytes" and isinstance(value["bytes"], str):
                raise BadRecord(
                    "wrong_type", f"{where}.bytes is a string, expected bytes; JSON has none: use a data: URI"
                )
            return self._image(value[given[0]], f"{where}.{given[0]}")
        if not isinstance(value, str) or not value:
            raise BadRecord("wrong_type", f"{where} is {_kind(value)}, expected a non-empty path")
        if _URL.match(value):
            told = f"{where} is the URL {value[:60]!r}; nothing is fetched for a record"
            raise BadRecord("remote_image", f"{told}: fetch the images, and give their paths")
        return value


def _inlined(images: Sequence[tuple[str | Cell, str]], whole: Record) -> list[Image]:
    """``data:`` URIs as their numbers among those of the whole record, which are looked for once."""
    numbers: dict[str, int] | None = None
    found: list[Image] = []
    for image, where in images:
        if isinstance(image, str) and image.startswith("data:"):
            if numbers is None:
                numbers = {}
                for number, uri in enumerate(data_uris(whole)):
                    numbers.setdefault(uri, number)
            if image not in numbers:  # put together of several fields
                told = f"{where} gives the image {image[:40]!r}, expected the path of a file"
                raise BadRecord("wrong_type", told)
            image = Inline(numbers[image])
        found.append(image)
    return found


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_RATINGS = ("_ratings", "_min", "")
"""Ends of the fields that hold a rating: FineVision's for each text, its lowest, and a single one."""


def _taken(given: list[tuple[Any, str]], places: list[Place]) -> list[tuple[Any, str]]:
    """(image, its field) for each place, then those that no place takes."""
    if all(place.image is None for place in places):
        for place in places if not given else ():
            if place.where != "a marker":
                told = "is an image part without an image, and the record has no images that it could take"
                raise BadRecord("part_without_image", f"{place.where} {told}")
        return given
    left = iter(given)
    images = [(p.image, p.where) if p.image is not None else next(left, None) for p in places]
    if None in images:
        told = "is an image part without an image, and those before it have taken all of the record's images"
        raise BadRecord("part_without_image", f"{places[images.index(None)].where} {told}")
    return [*(image for image in images if image is not None), *left]


def _cell_place(place: Any, where: str) -> list[Any]:
    kinds = [type(x) for x in place] if isinstance(place, list) else []
    if kinds not in ([str, int], [str, int, int]) or min(place[1:]) < 0:
        raise BadRecord("wrong_type", f"{where} is an object, expected an image")
    return place


def marked(text: str, token: str, first: int) -> list[Part]:
    """The text with an image place for every ``token``, numbered from ``first``."""
    pieces: list[Part] = []
    for k, piece in enumerate(text.split(token)):
        pieces += [ImageSlot(first + k - 1), piece] if k else [piece]
    return [p for p in pieces if p != ""]


def _require_dialogue(messages: Sequence[tuple[Role, list[Any]]]) -> None:
    """Raises `BadRecord` unless the user speaks first and the assistant never says nothing."""
    first = next((role for role, _ in messages if role != "system"), None)
    if first == "assistant":
        raise BadRecord("starts_with_assistant", "the assistant (gpt) speaks before the user has asked anything; stage "
                   "instruct needs conversations, or questions with answers")  # fmt: skip
    for k, (role, parts) in enumerate(messages):
        if role == "assistant" and not any(isinstance(text, str) and text.strip() for text in parts):
            raise BadRecord("empty_answer", f"turn {k} is the assistant's and empty, so there is nothing to learn")


def _require(kind: Any, value: object, where: str, expected: str) -> Any:
    """``value``. Raises `BadRecord` saying what it is instead of ``expected`` when it is not of that ``kind``."""
    if not isinstance(value, kind):
        raise BadRecord("wrong_type", f"{where} is {_kind(value)}, expected {expected}")
    return value


def _require_number(value: Any, where: str) -> None:
    try:
        finite = math.isfinite(float(value if not isinstance(value, bool) else ""))
    except (TypeError, ValueError):
        finite = False
    if not finite:  # NaN is below no limit
        raise BadRecord("wrong_type", f"{where} is {_kind(value)}, expected a number")


def _answers(record: Record) -> tuple[str, ...]:
    value = record.get("answers")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(a, str) for a in value):
        raise BadRecord("wrong_type", f"answers is {_kind(value)}, expected a list of strings")
    return tuple(value)


def _text_field(record: Record, name: str) -> str:
    return _require(str | None, record.get(name), name, "a string") or ""


def _metadata_source(record: Record) -> str:
    """Where the distillation guide's format says its source."""
    metadata = record.get("metadata")
    source = metadata.get("source") if isinstance(metadata, dict) else None
    return source if isinstance(source, str) else ""


def image_values(record: Record) -> list[tuple[Any, str]]:
    """(what a record gives as an image, the field): under ``images`` or ``image``, else ``file_name``, ``filepath``."""
    given = [name for name in IMAGE_FIELDS if record.get(name) is not None]
    if not given:
        return []
    if given[:2] == ["images", "image"]:
        raise BadRecord("wrong_type", "has both image and images, expected one of them")
    name = given[0]
    value = record[name]
    if isinstance(value, list) and name in IMAGE_FIELDS[:2]:
        return [(item, f"{name}[{k}]") for k, item in enumerate(value)]
    if not isinstance(value, str) and not (isinstance(value, dict) and value.keys() & {"!", "bytes", "path", "url"}):
        raise BadRecord("wrong_type", f"{name} is {_kind(value)}, expected a path or a list of paths")
    return [(value, f"{name}[0]" if name == "images" else name)]


def image_paths(record: Record) -> list[str]:
    """Paths under ``images`` or ``image``, a text or a list of them. Raises `BadRecord`."""
    values = image_values({name: record.get(name) for name in IMAGE_FIELDS[:2]})
    for path, where in values:
        if not isinstance(path, str) or not path:
            raise BadRecord("wrong_type", f"{where} is {_kind(path)}, expected a non-empty path")
    return [path for path, _ in values]


def _kind(value: object) -> str:
    """A JSON value as a message shows it."""
    match value:
        case None:
            return "null or absent"
        case bool():
            return f"the boolean {str(value).lower()}"
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the string {value[:40]!r}"
        case list():
            return "a list"
        case _:
            return "an object"


# ---------------------------------------------------------------------------------------------------------------
# Shapes


def _caption(record: Record) -> Said:
    name = next(name for name in ("caption", "text", "title") if name in record)
    value = record[name]
    if isinstance(value, list):
        texts = [_require(str, text, f"{name}[{k}]", "a string") for k, text in enumerate(value)]
        if not texts:
            raise BadRecord("wrong_type", f"{name} is an empty list, expected a string or a list of strings")
        return Said([("assistant", texts[:1])], False, captions=tuple(texts))
    return Said([("assistant", [_require(str, value, name, "a string")])], False)


_TALKS = ("conversations", "conversation", "messages")


def _turns(record: Record) -> Said:
    name, value = _talk(record)
    messages: list[tuple[Role, list[Any]]] = []
    for k, turn in enumerate(value):
        role, text = turn_said(turn, f"{name}[{k}]")
        messages.append((role, [text]))
    return Said(_with_target(messages, name), True)


def _talk(record: Record) -> tuple[str, list[Any]]:
    given = [name for name in _TALKS if name in record]
    if len(given) != 1:
        got = f"has {' and '.join(given)}" if given else f"has none of the fields {', '.join(_TALKS)}"
        raise BadRecord("wrong_type" if given else "missing_field", f"{got}, expected exactly one")
    return given[0], _require(list, record[given[0]], given[0], "a list of turns")


def _with_target(messages: list[tuple[Role, list[Any]]], name: str) -> list[tuple[Role, list[Any]]]:
    if not any(role == "assistant" for role, _ in messages):
        raise BadRecord("no_target", f"{name} has no turn of the assistant (gpt), so there is nothing to learn")
    return messages


def _has_parts(record: Record) -> bool:
    turns = next((record[name] for name in _TALKS if name in record), None)
    return isinstance(turns, list) and any(isinstance(t, dict) and isinstance(t.get("content"), list) for t in turns)


def _parts(record: Record) -> Said:
    """The layout of OpenAI and TRL: text is literal, and an image part is an image place."""
    name, value = _talk(record)
    messages: list[tuple[Role, list[Any]]] = []
    taken = 0
    for k, turn in enumerate(value):
        where = f"{name}[{k}]"
        role, content, key = _turn(turn, where)
        if isinstance(content, str):
            messages.append((role, [content]))
            continue
        _require(list, content, f"{where}.{key}", "a string or a list of parts")
        said = [_part(part, role, f"{where}.{key}[{i}]") for i, part in enumerate(content)]
        for part, read in zip(content, said, strict=True):
            if isinstance(read, Place) and read.image is None:
                if part.get("index") not in (None, taken):
                    told = f"{read.where} says index {part['index']}, but image parts take the images in order"
                    raise BadRecord("image_place", told)
                taken += 1
        messages.append((role, said))
    return Said(_with_target(messages, name), False)


def _part(part: Any, role: Role, where: str) -> str | Place:
    _require(dict, part, where, "an object with a type")
    match part.get("type"):
        case "text":
            return _require(str, part.get("text"), f"{where}.text", "a string")
        case "image" | "image_url" as kind:
            if role != "user":
                raise BadRecord("image_place", f"{where} is an image in a turn of {role}, expected them in user turns")
            key = next((key for key in (kind, "image", "url", "path") if part.get(key) is not None), None)
            return Place(None if key is None else part[key], where if key is None else f"{where}.{key}")
        case other:
            told = f"{where}.type is {_kind(other)}, expected one of text, image, image_url"
            raise BadRecord("unknown_part", told)


def turn_said(turn: Any, where: str) -> tuple[Role, str]:
    """(role, text) of a turn, in either of its spellings: ``from`` and ``value``, or ``role`` and ``content``.

    Raises `BadRecord` naming the field below ``where``.
    """
    role, text, key = _turn(turn, where)
    return role, _require(str, text, f"{where}.{key}", "a string")


def _turn(turn: Any, where: str) -> tuple[Role, Any, str]:
    """(role, what is said, the field it is said in)."""
    _require(dict, turn, where, "an object with from and value")
    role_key, text_key = ("from", "value") if turn.get("from") is not None else ("role", "content")
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in _ROLES:
        reason = "unknown_role" if isinstance(role, str) else "wrong_type"
        raise BadRecord(reason, f"{where}.{role_key} is {_kind(role)}, expected one of {', '.join(_ROLES)}")
    return _ROLES[role], turn.get(text_key), text_key


def _texts(record: Record) -> Said:
    messages: list[tuple[Role, list[Any]]] = []
    for k, text in enumerate(_require(list, record["texts"], "texts", "a list of objects with user and assistant")):
        _require(dict, text, f"texts[{k}]", "an object with user and assistant")
        for role in ("user", "assistant"):
            messages.append((role, [_require(str, text.get(role), f"texts[{k}].{role}", "a string")]))
    return Said(_with_target(messages, "texts"), False)


def _query(record: Record) -> Said:
    return _asked(record, _require(str, record["query"], "query", "a string"), "response")


def _instruction(record: Record) -> Said:
    text = _require(str, record["instruction"], "instruction", "a string")
    if more := _text_field(record, "input"):
        text += "\n" + more
    return _asked(record, text, "output" if "output" in record else "response")


def _asked(record: Record, text: str, answer: str) -> Said:
    """One question and its answer, after what was said before."""
    messages: list[tuple[Role, list[Any]]] = []
    for k, pair in enumerate(_require(list, record.get("history", []), "history", "a list of pairs")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRecord("wrong_type", f"history[{k}] is {_kind(pair)}, expected a question and its answer")
        for role, said in zip(("user", "assistant"), pair, strict=True):
            messages.append((role, [_require(str, said, f"history[{k}]", "a list of two strings")]))
    messages += [("user", [text]), ("assistant", [_require(str, record[answer], answer, "a string")])]
    return Said(messages, True)


def _question(record: Record) -> Said:
    """The answer is the record's own choice, else of several the most frequent, the first of equally frequent ones."""
    question = _require(str, record["question"], "question", "a string")
    given = record.get("answers", [])
    given = [given] if isinstance(given, str) else _require(list, given, "answers", "a list of strings")
    answers: list[str] = [
        _require(str, a.get("answer") if isinstance(a, dict) else a, f"answers[{k}]", "a string, or one under answer")
        for k, a in enumerate(given)
    ]
    chosen = [name for name in ("answer", "multiple_choice_answer", "multiple_choice") if name in record]
    chosen = [name for name in chosen if name != "multiple_choice" or isinstance(record[name], str)]
    if chosen:
        answer = _require(str, record[chosen[0]], chosen[0], "a string")
    elif answers:
        answer = Counter(answers).most_common(1)[0][0]
    else:
        told = "answers is an empty list, so there is nothing to learn"
        if "answers" not in record:
            told = f"multiple_choice is {_kind(record['multiple_choice'])}, and neither answer nor answers is there"
        raise BadRecord("no_target", told)
    if not answer.strip():
        raise BadRecord("empty_answer", "the answer is empty")
    return Said([("user", [question]), ("assistant", [answer])], False, tuple(answers) or (answer,))


def _statement(record: Record) -> Said:
    """NLVR2: whether a sentence is true of two pictures, which go by the record's identifier."""
    sentence, label = _require(str, record["sentence"], "sentence", "a string"), str(record["label"]).capitalize()
    if label not in ("True", "False"):
        raise BadRecord("wrong_type", f"label is {_kind(record['label'])}, expected true or false")
    images = image_values(record)
    if not images and isinstance(record.get("identifier"), str):
        folder = _require(str | int | None, record.get("directory"), "directory", "the name of a folder, or its number")
        folder = "" if folder is None else f"{folder}/"
        pair = folder + record["identifier"].rpartition("-")[0]
        images = [(f"{pair}-img{k}.png", "identifier") for k in (0, 1)]
    return Said([("user", [sentence]), ("assistant", [label])], False, (label,), images=images)


@dataclass(frozen=True, slots=True)
class Shape:
    """One way to say something about images."""

    needs: tuple[frozenset[str], ...]
    """Sets of fields, one of which a record has."""
    read: Callable[[Record], Said]
    in_front: Literal["never", "one", "all"] = "all"
    """Which images stand in front of the first user turn where the record has no image place; one: in dialogues."""
    asks: bool = True
    """Made for stages of dialogues; the others are for alignment as well."""
    conversation: bool = True
    """May do without images where the stage allows it."""
    num_images: int | None = None


def _any_of(*fields: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(field.split("+")) for field in fields)


SHAPES: dict[ShapeName, Shape] = {
    "caption": Shape(_any_of("caption", "text", "filepath+title"), _caption, "never", asks=False, conversation=False),
    "turns": Shape(_any_of(*_TALKS), _turns, "one", asks=False),
    "parts": Shape(_any_of(*_TALKS), _parts),
    "texts": Shape(_any_of("texts"), _texts),
    "query": Shape(_any_of("query+response"), _query),
    "instruction": Shape(_any_of("instruction+output", "instruction+response"), _instruction),
    "question": Shape(
        _any_of(*(f"question+{a}" for a in ("answer", "answers", "multiple_choice_answer", "multiple_choice"))),
        _question, conversation=False,
    ),
    "statement": Shape(_any_of("sentence+label"), _statement, conversation=False, num_images=2),
}  # fmt: skip
"""Every shape by its name."""
FIELDS: frozenset[str] = frozenset((
    *IMAGE_FIELDS, *chain.from_iterable(fields for shape in SHAPES.values() for fields in shape.needs), "id", "source",
    "question_id", "identifier", "directory", "input", "history", "system", "question_type", "answer_type", "answers",
))  # fmt: skip
"""Every field that some shape reads: what `columns` may name."""


@lru_cache(maxsize=4096)
def _fitting(fields: frozenset[str], shapes: tuple[ShapeName, ...]) -> dict[ShapeName, list[frozenset[str]]]:
    """The shapes that a record of these fields has, each with the sets of fields that make it so.

    ``turns`` stands for ``parts`` too: only the turns themselves tell them apart.
    """
    found: dict[ShapeName, list[frozenset[str]]] = {}
    for name in shapes:
        needs = [need for need in SHAPES[name].needs if need <= fields]
        if needs and not (name == "parts" and "turns" in shapes):
            found[name] = needs
    return found


@lru_cache(maxsize=1024)
def _told_missing(there: tuple[str, ...], shapes: tuple[ShapeName, ...]) -> str:
    wanted = dict.fromkeys("+".join(sorted(fields)) for name in shapes for fields in SHAPES[name].needs)
    close = {own: difflib.get_close_matches(own, FIELDS, 1) for own in there if own not in FIELDS}
    near = ", ".join(f"{match[0]} for {own}" for own, match in close.items() if match)
    return (
        f"has none of the fields {', '.join(wanted)}; its fields are {', '.join(there) or 'none'}; "
        + (f"nearest: {near}; " if near else "")
        + "name them as columns in data.sources, such as columns: {caption: NAME}"
    )


@dataclass(frozen=True, slots=True)
class Dataset:
    """What a name in a config holds a file to."""

    containers: tuple[str, ...] = tuple(CONTAINERS)
    shapes: tuple[ShapeName, ...] = get_args(ShapeName)
    instructs: bool = False
    """Made for stages of dialogues."""
    text_only: bool = True
    """Conversations may do without images where the stage allows it."""


DATASETS: dict[DatasetKind, Dataset] = {
    "auto": Dataset(),
    "jsonl": Dataset(("lines",)),
    "llava_pretrain": Dataset(("array",), ("turns", "parts"), text_only=False),
    "llava_instruct": Dataset(("array",), ("turns", "parts"), instructs=True),
    "sharegpt": Dataset(("array", "lines"), ("turns", "parts"), instructs=True),
    "vqa": Dataset(("vqa",), ("question",), instructs=True),
    "gqa": Dataset(("gqa",), ("question",), instructs=True),
    "webdataset": Dataset(("tar",), text_only=False),
    "parquet": Dataset(("parquet",), text_only=False),
}
"""Every name of `types.DatasetKind`."""
INSTRUCTION_KINDS: frozenset[DatasetKind] = frozenset(name for name, kind in DATASETS.items() if kind.instructs)
"""Names of files that hold conversations and questions, for stage instruct."""
