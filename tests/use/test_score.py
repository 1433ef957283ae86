from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from beholder.runs import to_json
from beholder.types import UserError
from beholder.use.score import Score, score_files

PEOPLE = {
    1: (["yes"] * 10, "is the", "yes/no", "yes"),
    2: (["2"] * 8 + ["two"] * 2, "how many", "number", "Two."),
    3: (["red"] * 2 + ["blue"] * 8, "what color", "other", "red"),
    4: (["no"] * 10, "is the", "yes/no", "No"),  # all agree, so the official code compares letter by letter
}
"""Id -> what ten people said, question type, answer type, prediction."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def write(path: Path, content: Any) -> Path:
    text = "".join(json.dumps(r) + "\n" for r in content) if path.suffix == ".jsonl" else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def vqa_files(folder: Path) -> tuple[Path, Path]:
    annotations = [
        {
            "question_id": id, "image_id": 7, "question_type": kind, "answer_type": answer_type,
            "multiple_choice_answer": answers[0],
            "answers": [{"answer": a, "answer_id": k, "answer_confidence": "yes"} for k, a in enumerate(answers, 1)],
        }
        for id, (answers, kind, answer_type, _) in PEOPLE.items()
    ]  # fmt: skip
    results = [{"question_id": id, "answer": p} for id, (*_, p) in PEOPLE.items()][::-1]
    return write(folder / "results.json", results), write(folder / "annotations.json", {"annotations": annotations})


def value(score: Score, name: str, stratum: str | None = None) -> float:
    m = score.get(name, stratum)
    assert m is not None, (name, stratum)
    return m.value


# ---------------------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("kind", ["vqa", "pope", "caption"])
@pytest.mark.parametrize("name", ["references", "reference"])
def test_what_is_right_may_be_called_as_public_scorers_call_it(folder: Path, kind: Any, name: str):
    right = ["yes", "yes it is"] if name == "references" else "yes"
    given = [{"id": k, "prediction": "yes", "question": "Is it?"} for k in range(3)]
    known = [{"id": k, name: right} for k in range(3)]

    score = score_files(kind, write(folder / "a.jsonl", given), write(folder / "r.jsonl", known))

    exact = {"vqa": "vqa.exact", "pope": "pope.accuracy", "caption": "caption.exact_match"}[kind]
    assert (score.n, value(score, exact)) == (3, 1.0)


@pytest.mark.parametrize("lines", [True, False])
def test_a_byte_order_mark_is_no_part_of_a_file(folder: Path, lines: bool):
    records = [{"id": k, "answer": "yes"} for k in range(3)]
    plain = write(folder / ("a.jsonl" if lines else "a.json"), records)
    marked = folder / f"marked{plain.suffix}"
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n"))

    assert score_files("vqa", marked, plain).n == score_files("vqa", plain, marked).n == 3
    marked.write_bytes(plain.read_text().encode("utf-16"))
    with pytest.raises(UserError, match=r"is UTF-16, expected UTF-8; convert it"):
        score_files("vqa", marked, plain)


def test_vqa_files_are_scored_officially_by_question_and_by_answer_type(folder: Path):
    score = score_files("vqa", *vqa_files(folder))

    third = (2 * (1 / 3) + 8 * (2 / 3)) / 10  # for two of ten, one other says it; for the other eight, two do
    assert score.n == 4
    assert value(score, "vqa.accuracy") == pytest.approx((1 + 1 + third + 0) / 4)
    assert value(score, "vqa.accuracy", "yes/no") == 0.5
    assert value(score, "vqa.accuracy", "what color") == pytest.approx(third)
    assert {m.stratum for m in score.measurements if m.by == "question"} == {"is the", "how many", "what color"}
    assert {m.stratum for m in score.measurements if m.by == "answer"} == {"yes/no", "number", "other"}
    assert value(score, "vqa.exact") == 2 / 4  # "yes" and "No"; the most frequent answers are "2" and "blue"


def test_pope_files_are_scored_with_precision_recall_and_yes_rate(folder: Path):
    labels = [{"question_id": k, "image": "a.jpg", "text": "Is there a dog?", "label": x}
              for k, x in enumerate(["yes", "yes", "no", "no"])]  # fmt: skip
    answers = [{"question_id": k, "answer": x} for k, x in enumerate(["Yes, there is.", "no", "yes", "No."])]

    score = score_files("pope", write(folder / "a.jsonl", answers), write(folder / "l.jsonl", labels))

    names = ("accuracy", "precision", "recall", "f1", "yes_rate")
    assert [value(score, f"pope.{name}") for name in names] == [0.5, 0.5, 0.5, 0.5, 0.5]


def test_captions_are_scored_against_several_references_of_coco(folder: Path):
    coco = {"images": [{"id": 1}, {"id": 2}], "annotations": [
        {"id": 10, "image_id": 1, "caption": "A dog runs on the beach."}, {"id": 11, "image_id": 1, "caption": "a dog"},
        {"id": 12, "image_id": 2, "caption": "Two men at a table."},
    ]}  # fmt: skip
    said = [{"image_id": 2, "caption": "Two men at a table"}, {"image_id": 1, "caption": "A cat sleeps on the sofa"}]

    score = score_files("caption", write(folder / "r.json", said), write(folder / "c.json", coco))

    assert score.n == 2
    assert value(score, "caption.exact_match") == 0.5
    assert 0.3 < value(score, "caption.bleu1") < 1
    assert {m.name for m in score.measurements} == {
        "caption.exact_match", "caption.bleu1", "caption.bleu2", "caption.bleu3", "caption.bleu4", "caption.rouge_l",
        "caption.cider_d",
    }  # fmt: skip


def test_record_files_are_references_and_generated_answers_predictions(folder: Path):
    records = [
        {
            "id": f"q{k}", "images": ["a.png"], "question_type": "shape",
            "messages": [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "circle"}],
        }
        for k in range(3)
    ]  # fmt: skip
    answers = [{"id": f"q{k}", "answer": a, "by": "run"} for k, a in enumerate(["circle", "Circle.", "square"])]

    score = score_files("vqa", write(folder / "a.jsonl", answers), write(folder / "r.jsonl", records))

    assert value(score, "vqa.accuracy") == value(score, "vqa.accuracy", "shape") == pytest.approx(2 / 3)


def test_gqa_question_files_are_references(folder: Path):
    verify, query = {"semantic": "attr", "structural": "verify"}, {"semantic": "obj", "structural": "query"}
    gqa = {
        "07": {"question": "Is it red?", "answer": "yes", "imageId": "1", "types": verify},
        "08": {"question": "What is it?", "answer": "dog", "imageId": "1", "types": query},
    }
    answers = [{"question_id": "07", "answer": "yes"}, {"question_id": "08", "answer": "cat"}]

    score = score_files("vqa", write(folder / "a.json", answers), write(folder / "g.json", gqa))

    assert value(score, "vqa.accuracy") == 0.5 and value(score, "vqa.accuracy", "attr/verify") == 1


def test_one_line_is_a_file_too(folder: Path):
    score = score_files(
        "vqa", write(folder / "a.jsonl", [{"id": 1, "prediction": "a dog"}]),
        write(folder / "r.jsonl", [{"id": 1, "answers": ["dog"]}]),
    )  # fmt: skip

    assert value(score, "vqa.accuracy") == 1 and value(score, "vqa.exact") == 0


def test_the_score_is_printed_and_is_plain_data(folder: Path):
    score = score_files("vqa", *vqa_files(folder))
    stream = io.StringIO()

    score.print(Console(file=stream, width=200))

    told = json.loads(to_json(score.to_json()))
    assert (told["kind"], told["n"]) == ("vqa", 4)
    assert {m["name"] for m in told["measurements"]} == {"vqa.accuracy", "vqa.exact"}
    assert "question: what color" in stream.getvalue() and "official VQA accuracy over 10 answers" in stream.getvalue()
    assert "65.00 %" in stream.getvalue()


# ---------------------------------------------------------------------------------------------------------------
# Wrong files


def answers_of(folder: Path, ids: list[Any]) -> Path:
    return write(folder / "a.jsonl", [{"id": k, "answer": "x"} for k in ids])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2], r"1 of 3 references have no answer \(3\)"),
        ([1, 2, 3, 9, "x"], r"2 of 5 answers have no reference \(9, x\)"),
        ([1, 2, 2, 3], r"1 ids are answered more than once \(2\)"),
        ([], "no answers in it"),
    ],
)
def test_missing_unknown_and_repeated_ids_are_named(folder: Path, ids: list[Any], message: str):
    references = write(folder / "r.jsonl", [{"id": str(k), "answer": "x"} for k in (1, 2, 3)])

    with pytest.raises(UserError, match=message):
        score_files("vqa", answers_of(folder, ids), references)


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("vqa", {"id": 1}, r"r\.jsonl:1: expected what is right under one of answers, answer"),
        ("vqa", {"id": 1, "answers": []}, "got list"),
        ("vqa", {"id": 1, "answers": ["a", 3]}, "got list"),
        ("vqa", {"answer": "a"}, r"under id or question_id, got nothing in the fields answer"),
        ("vqa", {"id": True, "answer": "a"}, "got bool"),
        ("pope", {"id": 1, "label": "red"}, "the reference is 'red', expected yes or no"),
        ("vqa", "a", r"r\.jsonl:1: expected an object with an id and a text, got str"),
        ("vqa", {"id": 1, "messages": [{"role": "user", "content": "?"}]}, "got nothing"),
    ],
)
def test_a_reference_that_cannot_be_used_is_named_with_file_and_line(
    folder: Path, kind: Any, record: Any, message: str
):
    references = write(folder / "r.jsonl", [record, {"id": 2, "answer": "yes"}])

    with pytest.raises(UserError, match=message):
        score_files(kind, answers_of(folder, [1, 2]), references)


def test_repeated_references_are_an_error(folder: Path):
    references = write(folder / "r.jsonl", [{"id": 1, "answer": "a"}, {"id": 1, "answer": "b"}])

    with pytest.raises(UserError, match=r"1 ids are there more than once \(1\)"):
        score_files("vqa", answers_of(folder, [1]), references)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1, "answer": "a"}\nnonsense\n', r"a\.jsonl:2: malformed JSON at character 0"),
        ('[{"id": 1,', r"a\.jsonl: malformed JSON at character 10"),
        ("3", "holds a int; expected a JSON array"),
        (
            '{"id": 1, "said": "a"}\n',
            "expected a string under one of answer, prediction, text, caption, response, got nothing",
        ),
        ('{"id": 1, "answer": 4}\n', "got int"),
    ],
)
def test_a_file_of_answers_that_cannot_be_read_is_named(folder: Path, text: str, message: str):
    (folder / "a.jsonl").write_text(text)
    references = write(folder / "r.jsonl", [{"id": 1, "answer": "a"}])

    with pytest.raises(UserError, match=message):
        score_files("vqa", folder / "a.jsonl", references)


def test_captions_by_id_are_references_too(folder: Path):
    (folder / "r.json").write_text(json.dumps({"img1": {"captions": ["a b c d"]}}))
    write(folder / "p.jsonl", [{"id": "img1", "caption": "a b c d"}])

    exact = score_files("caption", folder / "p.jsonl", folder / "r.json").get("caption.exact_match")

    assert exact is not None and exact.value == 1


def test_an_absent_file_is_an_error(folder: Path):
    with pytest.raises(UserError, match=r"absent\.json: cannot be read"):
        score_files("vqa", folder / "absent.json", folder / "absent.json")


def test_a_text_too_long_to_be_scored_is_named(folder: Path):
    long, short = [{"image_id": 7, "caption": "a " * 20_000}], [{"image_id": 7, "caption": "a cat"}]
    for said, right, told in ((long, short, "p.jsonl"), (short, long, "r.jsonl")):
        with pytest.raises(UserError, match=f"{told}: the text of id 7 has 40,000 characters, expected at most 20,000"):
            score_files("caption", write(folder / "p.jsonl", said), write(folder / "r.jsonl", right))


def test_instructions_are_scored_with_what_was_asked(folder: Path):
    said = [{"id": k, "response": t} for k, t in enumerate(["The car is red.", "It is blue.", "Is the car red?"])]
    asked = "<image>\nIs the car red?"
    right = [
        {"id": 0, "instruction": "What color is the car?", "response": "red", "question_type": "color"},
        {"id": 1, "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "It is blue."}]},
        {"id": 2, "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": "It is red."}]},
    ]

    score = score_files("instructions", write(folder / "a.jsonl", said), write(folder / "r.jsonl", right))

    parts = {name: value(score, f"instruct.{name}") for name in ("relevance", "completeness", "coherence")}
    assert parts == {"relevance": pytest.approx(2 / 3), "completeness": pytest.approx(2 / 3), "coherence": 1}
    assert value(score, "instruct.score") == pytest.approx(2.3 / 3)  # the question repeated is a readable sentence
    assert value(score, "instruct.score", "color") == 1
    with pytest.raises(UserError, match=r"r\.jsonl.*expected what was asked under one of instruction, .*without it"):
        score_files("instructions", folder / "a.jsonl", write(folder / "r.jsonl", [{"id": 0, "answer": "red"}]))
