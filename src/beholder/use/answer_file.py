"""A file of questions in, a file of answers out: ``beholder generate RUN --from FILE --out FILE``.

Reads the common shapes of question files (a record a line, a JSON array, VQA's question file), says what is wrong with
them before a model is loaded, and goes on where an interrupted call stopped. The answers are `vlm`'s; what they
are worth is `score`'s business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeGuard

import orjson

from beholder.config import GREEDY, GenerateConfig
from beholder.data.formats import BadRecord, image_paths, turn_said
from beholder.data.images import check_exists, content_hash
from beholder.data.questions import ImageNames, coco_names, image_names, plain_records
from beholder.runs import sha256_file
from beholder.train.checkpoint import MANIFEST
from beholder.types import ImageRef, UserError
from beholder.use.vlm import Request, Vlm

_TEXTS = ("prompt", "question", "text", "messages", "conversations")


@dataclass(frozen=True)
class Question:
    """One record of a question file."""

    key: Literal["id", "question_id"]
    id: str | int
    request: Request


def read_questions(
    path: Path,
    image_root: Path | None = None,
    more_image_roots: Sequence[Path] = (),
    *,
    prompt: str | None = None,
    image_pattern: str | None = None,
) -> list[Question]:
    """Every question of a file, or a `UserError` that names ``file:line`` of the first one that cannot be asked.

    A record has an ``id`` or ``question_id``, what is said (``prompt``, ``question`` or ``text``; or ``messages`` /
    ``conversations``, of which trailing answers are left out; or nothing, when ``prompt`` is for all or the run has an
    instruction) and what it is about (``image``, ``images``, or VQA's ``image_id``, whose file goes by
    ``image_pattern``). Images lie in ``image_root``, default the file's own folder; symlinks and absolute paths may
    lead into ``more_image_roots``.
    """
    roots = (image_root or path.parent, *more_image_roots)
    for root in roots:
        if not root.is_dir():
            raise UserError(f"--image-root {root} is not a folder")
    expected = "a file of questions: a record a line, a JSON array, or VQA's or GQA's question file"
    file = plain_records(path, expected, ("questions",))
    if image_pattern is not None:
        naming = image_names(image_pattern)
    elif file.beside is not None:
        naming = coco_names(file.beside.get("data_subtype"), str(path))
    else:
        naming = image_names("{image_id}.jpg")
    questions: list[Question] = []
    seen: dict[str, str] = {}  # by the text of the id: that is how answers and references find each other
    for where, record in file.records:
        try:
            question = _question(record, roots, prompt, naming, where)
            if str(question.id) in seen:
                raise UserError(
                    f"{question.key} {question.id!r} was asked before, at {seen[str(question.id)]}; ids are compared "
                    "as text"
                )
        except (UserError, BadRecord) as error:
            raise UserError(f"{where}: {error}") from None
        seen[str(question.id)] = where
        questions.append(question)
    if not questions:
        raise UserError(f"{path}: holds no questions")
    _find_images(questions)
    return questions


def answer_file(
    vlm: Vlm,
    questions: Sequence[Question],
    out: Path,
    *,
    batch_size: int = 8,
    how: GenerateConfig = GREEDY,
    progress: Callable[[str, int, int], None] | None = None,
) -> int:
    """Answer what ``out`` does not answer yet, greedily, a line of JSON each; the number of new answers.

    A line is ``{"id" or "question_id", "answer", "by", "asked"}``; ``by`` names the checkpoint and how it was asked,
    ``asked`` digests the question: its text and the bytes of its images. An ``out`` of another run, or whose questions
    were others, is refused, so answers never mix.
    """
    assert how.temperature == 0, "answers of a file do not depend on what was answered before"
    by = (
        f"{vlm.cfg.run_name}/{vlm.checkpoint.name} {sha256_file(vlm.checkpoint / MANIFEST)[:8]}, greedy, "
        f"at most {how.max_new_tokens} tokens"
    )
    hash_image = cache(content_hash)  # question files ask about the same image again and again
    done = _answered(out, by, {str(q.id): q for q in questions}, lambda question: _digest(question, hash_image))
    left = [q for q in questions if str(q.id) not in done]
    with out.open("ab") as file:
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            answers = vlm.answers([question.request for question in batch], how)
            for question, answer in zip(batch, answers, strict=True):
                asked = _digest(question, hash_image)
                line = {question.key: question.id, "answer": answer, "by": by, "asked": asked}
                file.write(orjson.dumps(line) + b"\n")
            file.flush()
            if progress is not None:
                progress("answers", min(start + batch_size, len(left)), len(left))
    return len(left)


# ---------------------------------------------------------------------------------------------------------------
# Reading


def _question(record: Any, roots: Sequence[Path], prompt: str | None, naming: ImageNames, where: str) -> Question:
    if not isinstance(record, dict):
        raise UserError(f"the record is a {type(record).__name__}, expected an object with id, image and prompt")
    key: Literal["id", "question_id"] = "question_id" if record.get("id") is None else "id"
    id = record.get(key)
    if not _is_id(id):
        raise UserError(f"{key} is {id!r}, expected a text or a number; every answer is found again by its id")
    given = [name for name in _TEXTS if record.get(name) is not None]
    if len(given) > 1:
        raise UserError(f"has {' and '.join(given)}, expected one of them")
    root, *more = map(str, roots)
    refs = [ImageRef(root, name, more_roots=tuple(more)) for name in _images(record, naming)]
    if not given:
        return Question(key, id, Request(prompt, refs, where))
    value = record[given[0]]
    if given[0] in ("messages", "conversations"):
        messages = _messages(value, given[0])
    elif isinstance(value, str) and value.strip():
        messages = [{"role": "user", "content": value}]
    else:
        raise UserError(f"{given[0]} is {value!r}, expected a text")
    return Question(key, id, Request(messages, refs, where))


def _images(record: dict[str, Any], naming: ImageNames) -> list[str]:
    paths = image_paths(record)
    id_field = next((name for name in ("image_id", "imageId") if record.get(name) is not None), None)
    if paths or id_field is None:  # many files have the number beside the name
        return paths
    try:
        return [naming.of(record[id_field], id_field)]
    except ValueError as error:
        raise UserError(str(error)) from None


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    """The conversation up to the last thing the user says."""
    if not isinstance(value, list):
        raise UserError(f"{name} is a {type(value).__name__}, expected a list of turns")
    said = [turn_said(turn, f"{name}[{k}]") for k, turn in enumerate(value)]
    messages = [{"role": role, "content": text} for role, text in said]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise UserError(f"{name} has no user turn, so nothing is asked")
    if messages[-1]["role"] != "user":
        raise UserError(f"{name} ends with a {messages[-1]['role']} turn, expected what the user says")
    return messages


def _is_id(value: object) -> TypeGuard[str | int]:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _find_images(questions: Sequence[Question]) -> None:
    """Raises `UserError` for the first image that is not there; it would otherwise stop the work in the middle."""
    pairs = [
        (question.request.where, ref)
        for question in questions
        if isinstance(question.request.images, list)
        for ref in question.request.images
        if isinstance(ref, ImageRef)
    ]
    for (where, _), error in zip(pairs, check_exists(ref for _, ref in pairs), strict=True):
        if error is not None:
            raise UserError(f"{where}: {error}; images are looked for below --image-root")


# ---------------------------------------------------------------------------------------------------------------
# Going on


def _digest(question: Question, hash_image: Callable[[ImageRef], str]) -> str:
    """What was asked, in a few characters: the messages and the bytes of the images, whatever the files are called."""
    images = question.request.images
    assert isinstance(images, list), "questions of a file have a list of images"
    try:
        hashes = [hash_image(ref) for ref in images if isinstance(ref, ImageRef)]
    except UserError as error:
        raise UserError(f"{question.request.where}: {error}") from error
    return hashlib.sha256(orjson.dumps([question.request.messages, hashes])).hexdigest()[:16]


def _answered(out: Path, by: str, asked: Mapping[str, Question], digest: Callable[[Question], str]) -> set[str]:
    """Ids, as text, that ``out`` answers already. A line that was torn by an interruption is cut off."""
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"--out {out}: expected a file in an existing folder")
    if not out.exists():
        return set()
    raw = out.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    done: set[str] = set()
    for number, line in enumerate(whole.splitlines(), 1):
        where = f"{out}:{number}"
        id, told, told_asked = _answer_line(line, where)
        if told != by:
            raise UserError(f"{where}: answered by {told}, but this is {by}; give another --out, or remove it")
        question = asked.get(str(id))
        if question is None:
            raise UserError(f"{where}: answers {id!r}, which these questions do not ask; give another --out")
        if told_asked != digest(question):
            raise UserError(
                f"{where}: answers {id!r}, but that is another question now ({question.request.where}): its text or "
                "its image changed; give another --out, or remove it to answer everything again"
            )
        done.add(str(id))
    if len(whole) < len(raw):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return done


def _answer_line(line: bytes, where: str) -> tuple[str | int, str, str]:
    """(id, by, asked) of a line that `answer_file` wrote; `UserError` for any other line."""
    try:
        told = orjson.loads(line)
    except orjson.JSONDecodeError:
        told = None
    if isinstance(told, dict):
        id = told.get("id", told.get("question_id"))
        texts = [told.get(name) for name in ("answer", "by", "asked")]
        if _is_id(id) and all(isinstance(text, str) for text in texts):
            return id, told["by"], told["asked"]
    raise UserError(f"{where}: not an answer of this command; give another --out")
