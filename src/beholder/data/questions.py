"""Question files (VQA-v2, OK-VQA, GQA) as records: one question about one image, and what people answered.

A question file is one large JSON object, and VQA's answers lie in a second one, so a record has no bytes of its own:
its text is put together here and kept by `sources`, like that of a shard. Nothing is read twice or held whole.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator
from typing import Any

import orjson

from beholder.data import index
from beholder.data.index import Found, RecordError
from beholder.types import UserError


def check_pattern(pattern: str) -> None:
    """Raises `UserError` unless ``pattern`` is a file name with ``{image_id}`` and no other place in it."""
    expected = "expected a file name with {image_id} in it, as in COCO_val2014_{image_id:012d}.jpg"
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None}
        if fields == {"image_id"}:
            _fill(pattern, 1)
            return
    except ValueError as e:
        raise UserError(f"image_pattern {pattern!r}: {e}; {expected}") from None
    raise UserError(f"image_pattern {pattern!r}: {expected}")


def _fill(pattern: str, image_id: int | str) -> str:
    if isinstance(image_id, str):
        try:
            return pattern.format(image_id=image_id)
        except ValueError:  # {image_id:012d} wants a number, and GQA writes its numbers as text
            image_id = int(image_id)
    return pattern.format(image_id=image_id)


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
    seen: list[str] = []
    subtype = None
    for name, found in index.json_members(path, "questions"):
        seen += [name] if name not in seen else []
        if name == "questions":
            asked.append((found.where, found.raw))
        elif name == "data_subtype":
            subtype = _load(found.raw)
    if "questions" not in seen:
        hint = "; this is the annotation file: json_path is the question file" if "annotations" in seen else ""
        raise RecordError(f"{path}: no questions under 'questions', its fields are {', '.join(seen) or 'none'}{hint}")
    if pattern is None:
        plain = not isinstance(subtype, str) or not subtype
        # test-dev2015 is a part of test2015, and its images are called after the whole.
        pattern = "{image_id:012d}.jpg" if plain else f"COCO_{str(subtype).replace('-dev', '')}_{{image_id:012d}}.jpg"
    for where, raw in asked:
        yield Found(0, orjson.dumps(_vqa_record(raw, answers, annotations, pattern)), where)


def _vqa_record(raw: bytes, answers: dict[str, bytes], annotations: str, pattern: str) -> dict[str, Any]:
    question = _load(raw)
    if not isinstance(question, dict):
        return _unusable(None, "wrong_type", "the question is not a JSON object")
    key, text, image_id = question.get("question_id"), question.get("question"), question.get("image_id")
    if not _is_id(key):
        return _unusable(None, "wrong_type", "question_id is missing, or neither an integer nor a string")
    if not isinstance(text, str) or not text.strip():
        return _unusable(key, "wrong_type", "question is missing, empty, or not a string")
    if not _is_id(image_id):
        return _unusable(key, "wrong_type", "image_id is missing, or neither an integer nor a string")
    if str(key) not in answers:
        return _unusable(key, "no_annotation", f"question {key} has no annotation in {annotations}")
    given = orjson.loads(answers[str(key)])
    if "!" in given:
        return _unusable(key, *given["!"])
    return _record(key, image_id, pattern, question=text, **given)


def _annotations(path: str) -> dict[str, bytes]:
    """Question id → the JSON of what is kept of its annotation, small and unparsed: VQA-v2 has 443,757 of 860 bytes."""
    found_answers: dict[str, bytes] = {}
    names: dict[str, str] = {}
    seen: list[str] = []
    for name, found in index.json_members(path, "annotations"):
        seen += [name] if name not in seen else []
        if name == "question_types":  # OK-VQA: {"one": "Vehicles and Transportation", …}
            names = _type_names(_load(found.raw))
        if name != "annotations":
            continue
        annotation = _load(found.raw)
        key = annotation.get("question_id") if isinstance(annotation, dict) else None
        if not isinstance(annotation, dict) or not _is_id(key):
            raise RecordError(
                f"{path}: {found.where}: this annotation has no question_id, so it belongs to no question"
            )
        if str(key) in found_answers:
            raise RecordError(f"{path}: {found.where}: question {key} is annotated a second time, expected once")
        found_answers[str(key)] = orjson.dumps(_kept(annotation))
    if "annotations" not in seen:
        hint = "; this is a question file: annotations_path is its annotation file" if "questions" in seen else ""
        raise RecordError(
            f"{path}: no annotations under 'annotations', its fields are {', '.join(seen) or 'none'}{hint}"
        )
    if names:
        for key, raw in found_answers.items():
            kept = orjson.loads(raw)
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
    for key, found in index.json_members(path):
        record = _gqa_record(key, _load(found.raw), pattern or "{image_id}.jpg")
        yield Found(0, orjson.dumps(record), found.where)


def _gqa_record(key: str, question: Any, pattern: str) -> dict[str, Any]:
    if not isinstance(question, dict):
        return _unusable(key, "wrong_type", "the question is not a JSON object")
    text, image_id, answer = question.get("question"), question.get("imageId"), question.get("answer")
    if not isinstance(text, str) or not text.strip():
        return _unusable(key, "wrong_type", "question is missing, empty, or not a string")
    if not _is_id(image_id):
        return _unusable(key, "wrong_type", "imageId is missing, or neither an integer nor a string")
    if answer is None:
        return _unusable(key, "no_target", "the question has no answer (a test file?), so there is nothing to learn")
    if not isinstance(answer, str):
        return _unusable(key, "wrong_type", "answer is not a string")
    types = question.get("types")
    kinds = [types.get(name) for name in ("semantic", "structural")] if isinstance(types, dict) else []
    return _record(
        key, image_id, pattern, question=text, answer=answer, answers=[answer], answer_type="",
        question_type="/".join(kind for kind in kinds if isinstance(kind, str) and kind),
    )  # fmt: skip


def _record(key: Any, image_id: Any, pattern: str, **fields: Any) -> dict[str, Any]:
    try:
        return {"id": str(key), "images": [_fill(pattern, image_id)], **fields}
    except ValueError:
        return _unusable(key, "wrong_type", f"image {image_id!r} has no place in {pattern!r}, which wants a number")


def _load(raw: bytes) -> Any:
    """The JSON value; None where only the lenient scanner took it for JSON, so that the record is told as unusable."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None


def _is_id(value: object) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and value != "")


def _unusable(key: Any, reason: str, detail: str) -> dict[str, Any]:
    return {"id": None if key is None else str(key), "!": [reason, detail]}
