"""Question files: every common shape, errors by file and line, and going on after an interruption."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import TinyParts
from tests.use.talking import briefly, untrained_run

from beholder.types import UserError
from beholder.use.answer_file import answer_file, read_questions
from beholder.use.score import read_predictions
from beholder.use.vlm import Vlm, load


@pytest.fixture(scope="module")
def run(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_run(tiny_parts, tmp_path_factory.mktemp("asked"))


@pytest.fixture(scope="module")
def names(tiny_parts: TinyParts) -> list[str]:
    return sorted(p.name for p in tiny_parts.images.glob("*.png"))[:5]


WriteLines = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> WriteLines:
    def lines(*records: Any) -> Path:
        file = tmp_path / "questions.jsonl"
        file.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))
        return file

    return lines


def answers(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_byte_order_mark_is_no_part_of_a_file_of_questions(
    write: WriteLines, names: list[str], tiny_parts: TinyParts
) -> None:
    file = write({"id": "a", "image": names[0], "prompt": "What is it?"}, {"id": "b", "image": names[1]})
    plain = read_questions(file, tiny_parts.images, prompt="What?")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())

    assert read_questions(file, tiny_parts.images, prompt="What?") == plain


def test_images_behind_a_link_are_found_when_the_folder_it_leads_to_is_named(
    write: WriteLines, names: list[str], tiny_parts: TinyParts, tmp_path: Path
) -> None:
    (tmp_path / "linked").symlink_to(tiny_parts.images)
    file = write({"id": "a", "image": f"linked/{names[0]}", "prompt": "What is it?"})

    with pytest.raises(UserError, match=r"outside_root.*--image-root"):
        read_questions(file)
    assert len(read_questions(file, None, [tiny_parts.images])) == 1


def test_every_shape_of_a_record_asks_the_same(
    vlm: Vlm, write: WriteLines, names: list[str], tiny_parts: TinyParts, tmp_path: Path
) -> None:
    name, ask = names[0], "What colour?"
    stem = int(name.split("-")[1])
    file = write(
        {"id": "prompt", "image": name, "prompt": ask, "question": None, "messages": None},
        {"question_id": 7, "id": None, "image": name, "text": ask, "category": "colour"},
        {"id": "list", "images": [name], "question": ask},
        {"id": "messages", "image": name, "messages": [{"role": "user", "content": f"<image>\n{ask}"}]},
        {"id": "reference", "image": name, "conversations": [
            {"from": "human", "value": ask}, {"from": "gpt", "value": "Red."}]},
        {"id": "number", "image_id": stem, "question": ask},
        {"id": "default", "image": name},
    )  # fmt: skip
    out = tmp_path / "answers.jsonl"

    questions = read_questions(file, tiny_parts.images, prompt=ask, image_pattern="0-{image_id:05d}-0.png")
    answer_file(vlm, questions, out, batch_size=3, how=briefly(8))

    told = answers(out)
    assert [a.get("id", a.get("question_id")) for a in told] == [
        "prompt", 7, "list", "messages", "reference", "number", "default"
    ]  # fmt: skip
    assert {a["answer"] for a in told} == {vlm.generate(tiny_parts.images / name, ask, max_new_tokens=8)}
    assert "question_id" in told[1] and "id" not in told[1]


def test_a_vqa_question_file_finds_its_images_by_cocos_names(
    tiny_parts: TinyParts, names: list[str], tmp_path: Path
) -> None:
    (tmp_path / "COCO_val2014_000000000042.jpg").write_bytes((tiny_parts.images / names[0]).read_bytes())
    file = tmp_path / "questions.json"
    file.write_text(json.dumps({
        "data_subtype": "val2014", "questions": [{"image_id": 42, "question": "Why?", "question_id": 42000}]
    }))  # fmt: skip

    (question,) = read_questions(file)

    assert (question.key, question.id) == ("question_id", 42000)
    assert isinstance(question.request.images, list) and "COCO_val2014_000000000042" in str(question.request.images[0])


def test_an_interrupted_call_goes_on_to_the_same_file(
    vlm: Vlm, write: WriteLines, names: list[str], tiny_parts: TinyParts, tmp_path: Path
) -> None:
    file = write(*({"id": i, "image": name, "prompt": f"What is this, number {i}?"} for i, name in enumerate(names)))
    questions = read_questions(file, tiny_parts.images)
    straight, stopped = tmp_path / "straight.jsonl", tmp_path / "stopped.jsonl"
    answer_file(vlm, questions, straight, batch_size=2, how=briefly(8))
    whole = straight.read_bytes()
    stopped.write_bytes(whole[: len(whole) // 2])  # in the middle of a line
    ticks: list[tuple[int, int]] = []

    num = answer_file(
        vlm,
        questions,
        stopped,
        batch_size=2,
        how=briefly(8),
        progress=lambda _, done, total: ticks.append((done, total)),
    )

    assert stopped.read_bytes() == whole
    assert 0 < num < len(questions) and ticks[-1] == (num, num)
    assert answer_file(vlm, questions, stopped, batch_size=2, how=briefly(8)) == 0


def test_answers_of_another_checkpoint_or_other_settings_never_mix(
    run: Path, vlm: Vlm, write: WriteLines, names: list[str], tiny_parts: TinyParts, tmp_path: Path
) -> None:
    questions = read_questions(write({"id": 1, "image": names[0], "prompt": "What?"}), tiny_parts.images)
    out = tmp_path / "answers.jsonl"
    answer_file(vlm, questions, out, how=briefly(8))
    before = out.read_bytes()

    earlier = load(run / "checkpoints" / "step_1", device="cpu")
    for other, tokens in ((earlier, 8), (vlm, 9)):
        with pytest.raises(UserError, match=r"answers\.jsonl:1: answered by tiny/step_2 .*give another --out"):
            answer_file(other, questions, out, how=briefly(tokens))
    others = read_questions(write({"id": 2, "image": names[0], "prompt": "What?"}), tiny_parts.images)
    with pytest.raises(UserError, match="answers 1, which these questions do not ask"):
        answer_file(vlm, others, out, how=briefly(8))

    assert out.read_bytes() == before


def test_answers_to_other_questions_with_the_same_ids_are_refused(
    vlm: Vlm, write: WriteLines, names: list[str], tiny_parts: TinyParts, tmp_path: Path
) -> None:
    asked = {"id": 1, "image": names[0], "prompt": "What?"}
    out, other_root = tmp_path / "answers.jsonl", tmp_path / "other"
    other_root.mkdir()
    (other_root / names[0]).write_bytes((tiny_parts.images / names[1]).read_bytes())
    answer_file(vlm, read_questions(write(asked), tiny_parts.images), out, how=briefly(8))
    before = out.read_bytes()

    for record, root in (
        (asked | {"prompt": "Why?"}, tiny_parts.images),
        (asked | {"image": names[1]}, tiny_parts.images),
        (asked, other_root),
    ):
        with pytest.raises(UserError, match=r"answers\.jsonl:1: answers 1, but .*another question.*give another --out"):
            answer_file(vlm, read_questions(write(record), root), out, how=briefly(8))

    assert out.read_bytes() == before
    assert read_predictions(out, "vqa")[0] == {"1": json.loads(before)["answer"]}


@pytest.mark.parametrize(
    "wrong", [{"answer": None}, {"answer": 3}, {"id": True}, {"id": 1.0}, {"id": [1]}, {"by": 1}, {"asked": None}]
)
def test_a_line_that_is_no_answer_does_not_count_as_one(
    vlm: Vlm, write: WriteLines, names: list[str], tiny_parts: TinyParts, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    questions = read_questions(write({"id": 1, "image": names[0], "prompt": "What?"}), tiny_parts.images)
    out = tmp_path / "answers.jsonl"
    answer_file(vlm, questions, out, how=briefly(8))
    (line,) = answers(out)
    out.write_text(json.dumps({k: v for k, v in (line | wrong).items() if v is not None}) + "\n")

    with pytest.raises(UserError, match=r"answers\.jsonl:1: not an answer of this command"):
        answer_file(vlm, questions, out, how=briefly(8))


def test_a_pattern_without_a_place_is_refused(write: WriteLines, tiny_parts: TinyParts, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"image_pattern 'a\.png': .*expected a file name with \{image_id\}"):
        read_questions(write({"id": 1, "image_id": 1}), tiny_parts.images, image_pattern="a.png")
    file = tmp_path / "vqa.json"
    file.write_text(json.dumps({"data_subtype": "{x}", "questions": [{"question_id": 1, "image_id": 1}]}))
    with pytest.raises(UserError, match=r"vqa\.json: data_subtype is '\{x\}', expected the name of a part of COCO"):
        read_questions(file)


def test_a_file_of_something_else_is_not_written_to(
    vlm: Vlm, write: WriteLines, names: list[str], tiny_parts: TinyParts
) -> None:
    file = write({"id": 1, "image": names[0], "prompt": "What?"})
    questions, before = read_questions(file, tiny_parts.images), file.read_bytes()

    with pytest.raises(UserError, match=r"questions\.jsonl:1: not an answer of this command"):
        answer_file(vlm, questions, file)

    assert file.read_bytes() == before


def test_questions_with_their_answers_in_one_file_are_asked_and_an_annotation_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "COCO_val2014_000000000042.jpg").write_bytes(b"x")
    question = {"image_id": 42, "question": "Why?", "question_id": 42000}
    annotation = {"question_id": 42000, "image_id": 42, "answers": [{"answer": "so"}]}
    file = tmp_path / "q.json"

    for beside in ([annotation], []):
        file.write_text(json.dumps({"data_subtype": "val2014", "questions": [question], "annotations": beside}))
        (asked,) = read_questions(file)
        assert asked.request.messages == [{"role": "user", "content": "Why?"}]
    file.write_text(json.dumps({"data_subtype": "val2014", "annotations": [annotation]}))
    with pytest.raises(UserError, match="question_id is None"):
        read_questions(file)


def test_gqa_questions_are_asked_by_their_ids_and_an_odd_member_is_named(tmp_path: Path) -> None:
    (tmp_path / "9.jpg").write_bytes(b"x")
    file = tmp_path / "gqa.json"
    file.write_text(json.dumps({"q1": {"imageId": "9", "question": "Red?"}}))

    (asked,) = read_questions(file)

    assert asked.id == "q1" and asked.request.messages == [{"role": "user", "content": "Red?"}]
    file.write_text(json.dumps({"q1": {"imageId": "9", "question": "Red?"}, "n": 3}))
    with pytest.raises(UserError, match="record 'n': the record is a int"):
        read_questions(file)
    file.write_text("{}")
    with pytest.raises(UserError, match="holds no questions"):
        read_questions(file)


GOOD = {"id": "good", "prompt": "What?"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{broken", "malformed JSON at character"),
        (["a"], "the record is a list, expected an object"),
        ({"prompt": "What?"}, "question_id is None, expected a text or a number"),
        ({"id": True, "prompt": "What?"}, "id is True, expected"),
        (GOOD, "id 'good' was asked before, at .*questions.jsonl:1"),
        ({"id": 1, "prompt": "a", "question": "b"}, "has prompt and question, expected one of them"),
        ({"id": 1, "prompt": " "}, "prompt is ' ', expected a text"),
        ({"id": 1, "prompt": "a", "image": "nowhere.png"}, "nowhere.png.*--image-root"),
        ({"id": 1, "prompt": "a", "image": "../questions.jsonl"}, "outside|leaves|not in"),
        ({"id": 1, "prompt": "a", "image": 3}, "image is the number 3, expected a path"),
        ({"id": 1, "prompt": "a", "image": "a.png", "images": ["a.png"]}, "has both image and images"),
        ({"id": 1, "messages": "hi"}, "messages is a str, expected a list of turns"),
        (
            {"id": 1, "messages": [{"role": "tool", "content": "a"}]},
            r"messages\[0\].role is the string 'tool', expected one of human",
        ),
        (
            {"id": 1, "messages": [{"role": "user", "content": 1}]},
            r"messages\[0\].content is the number 1, expected a string",
        ),
        (
            {"id": 1, "messages": [{"role": ["user"], "content": "a"}]},
            r"messages\[0\].role is a list, expected one of human",
        ),
        ({"id": 1, "messages": []}, "messages has no user turn"),
        ({"id": 1, "conversations": [{"from": "gpt", "value": "a"}]}, "conversations has no user turn"),
        (
            {"id": 1, "messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
            "ends with a system turn",
        ),
        ({"id": 1, "prompt": "a", "image_id": [1]}, "image_id is"),
    ],
)
def test_a_record_that_cannot_be_asked_is_named_by_file_and_line(
    write: WriteLines, tiny_parts: TinyParts, record: Any, message: str
) -> None:
    file = write(GOOD, "", record)

    with pytest.raises(UserError, match=rf"{re.escape(str(file))}:3: .*({message})"):
        read_questions(file, tiny_parts.images)


def test_ids_that_are_one_text_are_one_id(write: WriteLines) -> None:
    with pytest.raises(UserError, match=r"id '1' was asked before, at .*:1"):
        read_questions(write({"id": 1, "prompt": "a"}, {"id": "1", "prompt": "b"}))


def test_an_empty_file_and_a_missing_folder_are_told(write: WriteLines, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no questions"):
        read_questions(write())
    with pytest.raises(UserError, match="not a folder"):
        read_questions(write(GOOD), tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot be read"):
        read_questions(tmp_path / "nowhere.jsonl")
