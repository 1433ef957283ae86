"""The data layouts that are read, one row of `FORMATS` each: where records lie in a file, and what a record says.

A stage of dialogues (``chat``) asks more of a record than an alignment does: a conversation that the user opens, about
at least one image, in which the assistant always says something. There a conversation with one image and no marker gets
the marker in front of its first user turn, which is how LLaVA-Instruct and most chat data mean it; this is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import orjson

from beholder.config import DatasetKind
from beholder.data import index, questions
from beholder.data.index import Found
from beholder.types import ImageSlot, Part, Turn

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# One record


class BadRecord(Exception):
    """Why a record cannot be used: a slug that counts go by, and a sentence."""

    def __init__(self, reason: str, detail: str, id: str = "") -> None:
        super().__init__(detail)
        self.reason, self.detail, self.id = reason, detail, id


class Parsed(NamedTuple):
    id: str | None
    source: str
    images: list[Any]
    """Paths; for tar and parquet ``[label, offset or row, bytes or item]``."""
    messages: list[tuple[Role, str]]
    interpreted: bool
    """Markers in user turns are image slots (conversations); a caption has no user turn, a question is literal text."""
    in_front: bool = False
    """The image stands in front of the first user turn, which has no marker of its own."""
    answers: tuple[str, ...] = ()
    question_type: str = ""
    answer_type: str = ""


@dataclass(frozen=True, slots=True)
class Rules:
    """How the records of one file are read."""

    dataset: DatasetKind
    image_token: str
    max_images: int
    chat: bool = False
    image_pattern: str | None = None

    @property
    def format(self) -> Format:
        return FORMATS[self.dataset]

    @property
    def identity(self) -> list[object]:
        """What makes the same bytes other examples. `image_pattern` shows in the records' own texts."""
        return [self.dataset, self.image_token, self.max_images, *(["chat"] if self.chat else [])]

    def parse(self, raw: bytes) -> Parsed:
        """Raises `BadRecord` with a reason and a sentence naming the field, what was got and what was expected."""
        try:
            record = orjson.loads(raw)
        except orjson.JSONDecodeError as e:
            raise BadRecord("bad_json", f"malformed JSON at character {e.pos} of the record: {e.msg}") from None
        _require(dict, record, "the record", "an object")
        id: Any = record.get("id")
        if isinstance(id, int) and not isinstance(id, bool):
            id = str(id)
        id = _require(str | None, id, "id", "a string or an integer")
        try:
            return self._parse(record, id)
        except BadRecord as e:
            raise BadRecord(e.reason, e.detail, id or "") from None

    def _parse(self, record: dict[str, Any], id: str | None) -> Parsed:
        if self.format.images != "file" and "!" in record:
            raise BadRecord("bad_member", record["!"])
        if self.format.asked:
            return self._question(record, id)
        source = _text_field(record, "source")
        images = record["images"] if self.format.images != "file" else image_paths(record)
        messages, interpreted = _messages(record, self.format.said_in)
        if self.chat:
            _require_dialogue(messages)
            self._require_few(images)
        num_markers = sum(t.count(self.image_token) for r, t in messages if r == "user") if interpreted else len(images)
        in_front = self.chat and len(images) == 1 and num_markers == 0
        if num_markers != len(images) and not in_front:
            raise BadRecord(
                "image_count",
                f"{len(images)} images but {num_markers} {self.image_token} markers in the user turns; the k-th marker "
                "takes images[k], so the numbers must agree",
            )
        text_only = interpreted and not self.chat and self.format.text_only
        if not images and not text_only:
            raise BadRecord("no_image", "has no image")
        self._require_few(images)
        question_type, answer_type = _text_field(record, "question_type"), _text_field(record, "answer_type")
        answers = _answers(record)
        return Parsed(
            id, source, images, messages, interpreted, in_front, answers, question_type, answer_type
        )  # fmt: skip

    def _require_few(self, images: list[Any]) -> None:
        if len(images) > self.max_images:
            raise BadRecord(
                "too_many_images", f"{len(images)} images, prompting.max_images_per_sample is {self.max_images}"
            )

    def _question(self, record: dict[str, Any], id: str | None) -> Parsed:
        """A record of `questions`, which has checked the types."""
        if "!" in record:
            raise BadRecord(*record["!"])
        if not record["answer"].strip():
            raise BadRecord("empty_answer", "the answer is empty")
        messages: list[tuple[Role, str]] = [("user", record["question"]), ("assistant", record["answer"])]
        return Parsed(
            id, "", record["images"], messages, interpreted=False, in_front=True, answers=tuple(record["answers"]),
            question_type=record["question_type"], answer_type=record["answer_type"],
        )  # fmt: skip

    def turns(self, parsed: Parsed) -> tuple[Turn, ...]:
        turns, next_image = [], 0
        for role, text in parsed.messages:
            parts: list[Part] = [text]
            if role == "user" and parsed.in_front and next_image == 0:
                parts = [ImageSlot(0), "\n" + text]
                next_image = 1
            elif role == "user" and parsed.interpreted:
                # Only here: a marker in an answer or in a system text is literal text.
                parts = marked(text, self.image_token, next_image)
                next_image += text.count(self.image_token)
            turns.append(Turn(role, tuple(parts)))
        return tuple(turns)


def marked(text: str, token: str, first: int) -> list[Part]:
    """The text with an image place for every ``token``, numbered from ``first``."""
    pieces: list[Part] = []
    for k, piece in enumerate(text.split(token)):
        pieces += [ImageSlot(first + k - 1), piece] if k else [piece]
    return [p for p in pieces if p != ""]


def _require_dialogue(messages: Sequence[tuple[Role, str]]) -> None:
    """Raises `BadRecord` unless the user speaks first and the assistant never says nothing."""
    first = next((role for role, _ in messages if role != "system"), None)
    if first == "assistant":
        raise BadRecord("starts_with_assistant", "the assistant (gpt) speaks before the user has asked anything; stage "
                   "instruct needs conversations, or questions with answers")  # fmt: skip
    for k, (role, text) in enumerate(messages):
        if role == "assistant" and not text.strip():
            raise BadRecord("empty_answer", f"turn {k} is the assistant's and empty, so there is nothing to learn")


def _require(kind: Any, value: object, where: str, expected: str) -> Any:
    """``value``. Raises `BadRecord` saying what it is instead of ``expected`` when it is not of that ``kind``."""
    if not isinstance(value, kind):
        raise BadRecord("wrong_type", f"{where} is {_kind(value)}, expected {expected}")
    return value


def _answers(record: dict[str, Any]) -> tuple[str, ...]:
    value = record.get("answers")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(a, str) for a in value):
        raise BadRecord("wrong_type", f"answers is {_kind(value)}, expected a list of strings")
    return tuple(value)


def _text_field(record: dict[str, Any], name: str) -> str:
    return _require(str | None, record.get(name), name, "a string") or ""


def image_paths(record: dict[str, Any]) -> list[str]:
    """Paths under ``images`` or ``image``, a text or a list of them. Raises `BadRecord`."""
    given = [(name, record[name]) for name in ("images", "image") if record.get(name) is not None]
    if not given:
        return []
    if len(given) > 1:
        raise BadRecord("wrong_type", "has both image and images, expected one of them")
    name, value = given[0]
    paths = _require(list, [value] if isinstance(value, str) else value, name, "a path or a list of paths")
    for k, path in enumerate(paths):
        if not isinstance(path, str) or not path:
            raise BadRecord("wrong_type", f"{name}[{k}] is {_kind(path)}, expected a non-empty path")
    return paths


def _messages(record: dict[str, Any], allowed: Sequence[str]) -> tuple[list[tuple[Role, str]], bool]:
    """(turns as role and text, whether markers in user turns are image slots)."""
    given = [name for name in allowed if name in record]
    if len(given) != 1:
        got = f"has {' and '.join(given)}" if given else f"has none of the fields {', '.join(allowed)}"
        raise BadRecord("wrong_type" if given else "missing_field", f"{got}, expected exactly one")
    name = given[0]
    value = record[name]
    if name == "caption":
        return [("assistant", _require(str, value, "caption", "a string"))], False
    _require(list, value, name, "a list of turns")
    messages = [turn_said(turn, f"{name}[{k}]") for k, turn in enumerate(value)]
    if not any(role == "assistant" for role, _ in messages):
        raise BadRecord("no_target", f"{name} has no turn of the assistant (gpt), so there is nothing to learn")
    return messages, True


def turn_said(turn: Any, where: str) -> tuple[Role, str]:
    """(role, text) of a turn, in either of its spellings: ``from`` and ``value``, or ``role`` and ``content``.

    Raises `BadRecord` naming the field below ``where``.
    """
    _require(dict, turn, where, "an object with from and value")
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    role, text = turn.get(role_key), turn.get(text_key)
    if not isinstance(role, str) or role not in _ROLES:
        reason = "unknown_role" if isinstance(role, str) else "wrong_type"
        raise BadRecord(reason, f"{where}.{role_key} is {_kind(role)}, expected one of {', '.join(_ROLES)}")
    return _ROLES[role], _require(str, text, f"{where}.{text_key}", "a string")


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
# The table


@dataclass(frozen=True, slots=True)
class Format:
    """One data layout."""

    find: Callable[[str, Rules, str | None], Iterator[Found]]
    """(file, rules, annotation file) -> its records as JSON text with their places."""
    said_in: tuple[str, ...] = ("caption", "conversations", "messages")
    """Fields of which exactly one holds what is said."""
    suffixes: tuple[str, ...] = ()
    """Files of a folder that belong to it; none: the path is one file."""
    images: Literal["file", "tar", "parquet"] = "file"
    """Where the images lie: in files of their own, or in the record file itself (``image_root`` is not used)."""
    asked: bool = False
    """Question files: a record's text is put together from two places."""
    instructs: bool = False
    """Made for stage instruct; the others are for alignment as well."""
    text_only: bool = False
    """A conversation may do without images where the stage allows it."""

    @property
    def copied(self) -> bool:
        """Whether record texts are kept beside the index, because they do not stand in the file as they are."""
        return self.asked or self.images != "file"


def _array_or_lines(path: str) -> Iterator[Found]:
    return index.json_array(path) if index.first_character(path) == "[" else index.json_lines(path)


def _vqa(path: str, rules: Rules, annotations: str | None) -> Iterator[Found]:
    assert annotations is not None, "open_sources asks for it"
    return questions.vqa_records(path, annotations, rules.image_pattern)


FORMATS: dict[DatasetKind, Format] = {
    "jsonl": Format(lambda path, *_: index.json_lines(path), text_only=True),
    "llava_pretrain": Format(lambda path, *_: index.json_array(path), ("conversations",)),
    "llava_instruct": Format(
        lambda path, *_: index.json_array(path), ("conversations",), instructs=True, text_only=True
    ),
    "sharegpt": Format(
        lambda path, *_: _array_or_lines(path), ("conversations", "messages"), instructs=True, text_only=True
    ),
    "vqa": Format(_vqa, (), asked=True, instructs=True),
    "gqa": Format(
        lambda path, rules, _: questions.gqa_records(path, rules.image_pattern), (), asked=True, instructs=True
    ),
    "webdataset": Format(lambda path, *_: index.tar_records(path), suffixes=(".tar",), images="tar"),
    "parquet": Format(lambda path, *_: index.parquet_records(path), suffixes=(".parquet",), images="parquet"),
}  # fmt: skip
"""Every layout by the name it has in a config (`types.DatasetKind`)."""
INSTRUCTION_KINDS: frozenset[DatasetKind] = frozenset(name for name, form in FORMATS.items() if form.instructs)
"""Layouts that hold conversations and questions, for stage instruct."""
