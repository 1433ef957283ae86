"""Question files (VQA-v2, OK-VQA, GQA) as records: one question about one image, and what people answered.

A question file is one large JSON object, and VQA's answers lie in a second one, so a record has no bytes of its own:
its text is put together here and kept by `sources`, like that of a shard. VQA's questions and answers are in memory
while they are brought together (2.1 GB for VQA-v2's 444,000). `plain_records` reads such files for commands that ask or
score every record of them.
"""

from __future__ import annotations

import json
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from beholder.data import index
from beholder.data.index import Found, RecordError
from beholder.types import UserError


class PlainFile(NamedTuple):
    """A file of records that is held whole."""

    beside: dict[str, Any] | None
    """What an object has beside its records, such as VQA's ``data_subtype``; None: the records are the file."""
    records: list[tuple[str, Any]]
    """(``file:line`` or ``file: record k``, any JSON value)"""


def plain_records(path: Path, expected: str, lists: Sequence[str]) -> PlainFile:
    """The records of a JSON array, of an object with them under the first of ``lists`` (``questions`` or
    ``annotations``: VQA, COCO), of an object of records by their id (GQA), or of a file with a record a line.

    Raises `UserError`, which ends with what was ``expected``, for a file that cannot be read or holds something else.
    """
    if "\0" in str(path):
        raise UserError(f"{str(path)!r}: is no path, it holds a NUL; expected {expected}")
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise UserError(f"{path}: is a FIFO, socket or device; expected {expected}")  # it could wait for ever
        raw = index.without_mark(path.read_bytes(), path)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e}); expected {expected}") from e
    try:
        whole: Any = orjson.loads(raw)
    except orjson.JSONDecodeError as e:
        if raw.lstrip()[:1] == b"[":
            raise UserError(f"{path}: malformed JSON at character {e.pos}: {e.msg}; expected {expected}") from None
        return PlainFile(None, list(_plain_lines(path, raw, expected)))
    beside: dict[str, Any] | None = None
    if isinstance(whole, dict):
        name = next((name for name in lists if isinstance(whole.get(name), list)), None)
        if name is not None:
            beside, whole = {k: v for k, v in whole.items() if k != name}, whole[name]
        elif not whole.keys() & {"id", "question_id", "image_id"} and any(isinstance(v, dict) for v in whole.values()):
            return PlainFile(None, [
                (f"{path}: record {key!r}", {"question_id": key, "id": key} | _given(v) if isinstance(v, dict) else v)
                for key, v in whole.items()
            ])  # fmt: skip
        else:
            return PlainFile(None, [(f"{path}:1", whole)] if whole else [])
    if not isinstance(whole, list):
        raise UserError(f"{path}: holds a {type(whole).__name__}; expected {expected}")
    return PlainFile(beside, [(f"{path}: record {k}", record) for k, record in enumerate(whole)])


def _given(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if value is not None}


def _plain_lines(path: Path, raw: bytes, expected: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", orjson.loads(line)
        except orjson.JSONDecodeError as e:
            told = f"{path}:{number}: malformed JSON at character {e.pos}: {e.msg}; expected {expected}"
            raise UserError(told) from None


class ImageNames(NamedTuple):
    """File names of images by their ``image_id``: a format string of the person's own, or one of ours."""

    pattern: str

    def of(self, image_id: Any, field: str = "image_id") -> str:
        """The name of an image. Raises `ValueError` with what is wrong with ``image_id``, as a JSON file gives it."""
        if fault := _id_fault(image_id):
            raise ValueError(f"{field} {fault}")
        try:
            return self.pattern.format(image_id=image_id)
        except ValueError:  # a text where the pattern wants a number: GQA writes its numbers as text
            if not re.fullmatch("-?[0-9]+", image_id):
                told = f"image {image_id[:40]!r} has no place in {self.pattern!r}, which wants a number"
                raise ValueError(told) from None
            if len(image_id) > _MAX_DIGITS:
                told = f"{field} has {len(image_id)} digits, which is too large for the number of an image"
                raise ValueError(told) from None
            return self.pattern.format(image_id=int(image_id))


_MAX_DIGITS = 20
"""Of a JSON number that stays an integer: 64 bits."""


def image_names(pattern: str) -> ImageNames:
    """The names a person's pattern gives. Raises `UserError` unless it is a file name with ``{image_id}`` in it."""
    try:
        if pattern.format(image_id=1) == pattern.format(image_id=2):
            raise ValueError("gives all images one name")
    except (ValueError, LookupError, AttributeError, TypeError) as e:
        raise UserError(
            f"image_pattern {pattern!r}: {e}; expected a file name with {{image_id}} in it, as in "
            "COCO_val2014_{image_id:012d}.jpg"
        ) from None
    return ImageNames(pattern)


def coco_names(subtype: Any, path: str) -> ImageNames:
    """COCO's names for the ``data_subtype`` of the question file at ``path``, or for a file without one.

    Raises `UserError` for anything else than the name of a part of COCO: this text becomes part of file names.
    """
    if subtype is None or subtype == "":  # as COCO writes them since 2017
        return ImageNames("{image_id:012d}.jpg")
    if not isinstance(subtype, str) or _COCO_PART.fullmatch(subtype) is None:
        raise UserError(
            f"{path}: data_subtype is {_shown(str(subtype))[:60]!r}, expected the name of a part of COCO, such as "
            "val2014; give the images' file names as image_pattern, such as {image_id:012d}.jpg"
        )
    # test-dev2015 is a part of test2015, and its images are called after the whole.
    return ImageNames(f"COCO_{subtype.replace('-dev', '')}_{{image_id:012d}}.jpg")


_COCO_PART = re.compile("[A-Za-z]{1,40}(?:-dev)?[0-9]{4}(?:-[A-Za-z0-9]{1,40})?")


def vqa_records(path: str, annotations: str, pattern: str | None) -> Iterator[Found]:
    """The questions of a VQA-v2 or OK-VQA question file, each with its ten answers from the annotation file.

    ``raw`` is ``{"id", "images", "question", "answer", "answers", "question_type", "answer_type"}``, or ``{"id", "!":
    [reason, detail]}`` for a question that cannot be used. The answer is the file's own choice
    (``multiple_choice_answer``), else the most frequent of the ten, of equally frequent ones the one given first. An
    image goes by ``pattern``, else by COCO's name for the question file's ``data_subtype``
    (``COCO_val2014_000000000042.jpg``), else by its number as COCO writes it since 2017 (``000000000042.jpg``).
    """
    answers = _annotations(annotations)
    asked: list[tuple[str, bytes]] = []
    seen: dict[str, None] = {}
    subtype: Any = None
    for name, found in index.json_members(path, "questions"):
        seen[name] = None
        if name == "questions":
            asked.append((found.where, found.raw))
        elif name == "data_subtype" and pattern is None:
            subtype = _header(path, name, found)
    if "questions" not in seen:
        hint = "; this is the annotation file: json_path is the question file" if "annotations" in seen else ""
        raise RecordError(f"{path}: no questions under 'questions', its fields are {_first(seen)}{hint}")
    names = coco_names(subtype, path) if pattern is None else image_names(pattern)
    for where, raw in asked:
        yield Found(0, orjson.dumps(_vqa_record(raw, answers, annotations, names)), where)


def _vqa_record(raw: bytes, answers: dict[str, bytes], annotations: str, names: ImageNames) -> dict[str, Any]:
    try:
        question = index.loads(raw)
    except orjson.JSONDecodeError as e:
        return _unusable(_lenient_id(raw), "bad_json", _malformed("question", e))
    if not isinstance(question, dict):
        return _unusable(None, "wrong_type", "the question is not a JSON object")
    key, text = question.get("question_id"), question.get("question")
    if fault := _id_fault(key):
        return _unusable(None, "wrong_type", f"question_id {fault}")
    if not isinstance(text, str) or not text.strip():
        return _unusable(key, "wrong_type", "question is missing, empty, or not a string")
    if str(key) not in answers:
        return _unusable(key, "no_annotation", f"question {key} has no annotation in {annotations}")
    given = orjson.loads(answers[str(key)])
    if "!" in given:
        return _unusable(key, *given["!"])
    return _record(key, question.get("image_id"), "image_id", names, question=text, **given)


def _annotations(path: str) -> dict[str, bytes]:
    """Question id → the JSON of what is kept of its annotation, small and unparsed: VQA-v2 has 443,757 of 860 bytes."""
    found_answers: dict[str, bytes] = {}
    names: dict[str, str] = {}
    seen: dict[str, None] = {}
    for name, found in index.json_members(path, "annotations"):
        seen[name] = None
        if name == "question_types":  # OK-VQA: {"one": "Vehicles and Transportation", …}
            names = _type_names(_header(path, name, found))
        if name != "annotations":
            continue
        try:
            annotation: Any = index.loads(found.raw)
            spoiled = None
            key = annotation.get("question_id") if isinstance(annotation, dict) else None
        except orjson.JSONDecodeError as e:
            annotation, spoiled, key = None, _malformed("annotation", e), _lenient_id(found.raw)
        if fault := _id_fault(key):
            why = spoiled or f"its question_id {fault}"
            raise RecordError(f"{path}: {found.where}: this annotation belongs to no question: {why}")
        if str(key) in found_answers:
            raise RecordError(f"{path}: {found.where}: question {key} is annotated a second time, expected once")
        kept = {"!": ["bad_json", f"{path}: {found.where}: {spoiled}"]} if spoiled else _kept(annotation)
        found_answers[str(key)] = orjson.dumps(kept)
    if "annotations" not in seen:
        hint = "; this is a question file: annotations_path is its annotation file" if "questions" in seen else ""
        raise RecordError(f"{path}: no annotations under 'annotations', its fields are {_first(seen)}{hint}")
    if names:
        for key, raw in found_answers.items():
            kept = index.loads(raw)
            if (kind := kept.get("question_type")) in names:
                found_answers[key] = orjson.dumps({**kept, "question_type": names[kind]})
    return found_answers


def _type_names(value: Any) -> dict[str, str]:
    return {k: v for k, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else {}


def _kept(annotation: dict[str, Any]) -> dict[str, Any]:
    """answer, answers and the two kinds, or under ``!`` why the annotation cannot be used."""
    given = annotation.get("answers")
    texts = [a.get("answer") if isinstance(a, dict) else None for a in given] if isinstance(given, list) else [None]
    if not texts or not all(isinstance(text, str) for text in texts):
        return {"!": ["wrong_type", "answers of the annotation is not a list of objects with a string under answer"]}
    answer = annotation.get("multiple_choice_answer")
    if answer is None:
        answer = Counter(texts).most_common(1)[0][0]  # of equally frequent ones the first: Counter keeps their order
    kinds = {name: annotation.get(name) or "" for name in ("question_type", "answer_type")}
    for name, value in (("multiple_choice_answer", answer), *kinds.items()):
        if not isinstance(value, str):
            return {"!": ["wrong_type", f"{name} of the annotation is not a string"]}
    return {"answer": answer, "answers": texts, **kinds}


def gqa_records(path: str, pattern: str | None) -> Iterator[Found]:
    """The questions of a GQA question file, an object of questions by their ids; ``raw`` as in `vqa_records`.

    The kind of a question is GQA's semantic and structural type (``attr/verify``). Without ``pattern`` image
    ``2405722`` is ``2405722.jpg``.
    """
    names = ImageNames("{image_id}.jpg") if pattern is None else image_names(pattern)
    for key, found in index.json_members(path):
        yield Found(0, orjson.dumps(_gqa_record(key, found.raw, names)), found.where)


def _gqa_record(key: str, raw: bytes, names: ImageNames) -> dict[str, Any]:
    if _shown(key) != key:
        return _unusable(key, "bad_json", "the question's key is not valid Unicode: it has half of a surrogate pair")
    try:
        question = index.loads(raw)
    except orjson.JSONDecodeError as e:
        return _unusable(key, "bad_json", _malformed("question", e))
    if not isinstance(question, dict):
        return _unusable(key, "wrong_type", "the question is not a JSON object")
    text, image_id, answer = question.get("question"), question.get("imageId"), question.get("answer")
    if not isinstance(text, str) or not text.strip():
        return _unusable(key, "wrong_type", "question is missing, empty, or not a string")
    if answer is None:
        return _unusable(key, "no_target", "the question has no answer (a test file?), so there is nothing to learn")
    if not isinstance(answer, str):
        return _unusable(key, "wrong_type", "answer is not a string")
    return _record(
        key, image_id, "imageId", names, question=text, answer=answer, answers=[answer], answer_type="",
        question_type=gqa_kind(question.get("types")),
    )  # fmt: skip


def gqa_kind(types: Any) -> str:
    """The semantic and structural type of a question, as far as they are there: ``attr/verify``."""
    kinds = [types.get(name) for name in ("semantic", "structural")] if isinstance(types, dict) else []
    return "/".join(kind for kind in kinds if isinstance(kind, str) and kind)


def _record(key: Any, image_id: Any, field: str, names: ImageNames, **fields: Any) -> dict[str, Any]:
    try:
        return {"id": str(key), "images": [names.of(image_id, field)], **fields}
    except ValueError as e:
        return _unusable(key, "wrong_type", str(e))


def _header(path: str, name: str, found: Found) -> Any:
    """The value of a field beside the records. Raises `RecordError` where only the lenient scanner took it for JSON."""
    try:
        return index.loads(found.raw)
    except orjson.JSONDecodeError as e:
        raise RecordError(f"{path}: {found.where}: {_malformed(name, e)}") from None


def _malformed(what: str, e: orjson.JSONDecodeError) -> str:
    return f"not valid JSON or not valid Unicode at character {e.pos} of the {what}: {e.msg}"


def _lenient_id(raw: bytes) -> Any:
    """question_id of a record that is not valid: whose record it is can be told all the same. None where it cannot."""
    try:
        value = json.loads(raw.decode("utf-8", "replace"), strict=False)
    except (ValueError, RecursionError):
        return None
    key = value.get("question_id") if isinstance(value, dict) else None
    return key if _id_fault(key) is None else None


def _id_fault(value: object) -> str | None:
    """What is wrong with an id, as the end of a sentence."""
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and value):
        return None
    if isinstance(value, float) and abs(value) >= 2**63:  # what the parser makes of an integer beyond 64 bits
        return f"{value:g} is too large: an integer has at most 64 bits"
    return "is missing, or neither an integer nor a string"


def _shown(text: str) -> str:
    """With half of a surrogate pair, which a JSON escape may leave and nothing can store, as an escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def _first(names: Collection[str]) -> str:
    """A few names for a message; GQA's file has a million."""
    some = ", ".join(_shown(name)[:40] for name in list(names)[:8]) or "none"
    return some + (", …" if len(names) > 8 else "")


def _unusable(key: Any, reason: str, detail: str) -> dict[str, Any]:
    return {"id": None if key is None else _shown(str(key)), "!": [reason, detail]}
