"""Question and annotation files: each question meets its own answers and its own image, and what does not is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from beholder.config import SourceConfig
from beholder.data import index
from beholder.data.containers import recognise
from beholder.data.formats import Rules
from beholder.data.questions import plain_records
from beholder.data.sources import Records, guess_source, open_sources
from beholder.types import ImageSlot, UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEHOLDER_CACHE", str(tmp_path / "cache"))


def asked(id: int, **fields: Any) -> dict[str, Any]:
    return {"question_id": id, "image_id": 42, "question": "What colour is it?", **fields}


def annotated(id: int, *said: str, **fields: Any) -> dict[str, Any]:
    answers = [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(said or ("red",), 1)]
    return {"question_id": id, "image_id": 42, "answers": answers, **fields}


def vqa(
    folder: Path, questions: list[Any], annotations: list[Any], *, pattern: str | None = None, **fields: Any
) -> Records:
    (folder / "q.json").write_text(json.dumps({"info": {"year": 2014}, **fields, "questions": questions}))
    (folder / "a.json").write_text(json.dumps({"annotations": annotations, "data_type": "mscoco"}))
    source = SourceConfig(
        dataset="vqa", json_path=str(folder / "q.json"), annotations_path=str(folder / "a.json"), image_pattern=pattern
    )
    return open_sources([source], image_token="<image>", max_images=1, on_reject="collect", chat=True)


# ---------------------------------------------------------------------------------------------------------------
# VQA


def test_a_vqa_question_is_an_image_a_question_and_the_answer_of_most_people(tmp_path: Path) -> None:
    said = ["dark red"] * 3 + ["red"] * 6 + [""]
    records = vqa(
        tmp_path, [asked(7)], [annotated(7, *said, question_type="what color", answer_type="other")],
        data_subtype="val2014",
    )  # fmt: skip

    (example,) = records

    assert example.id == "7" and example.source == "q"
    assert [(t.role, t.parts) for t in example.turns] == [
        ("user", (ImageSlot(0), "\nWhat colour is it?")), ("assistant", ("red",)),
    ]  # fmt: skip
    assert [ref.path for ref in example.images] == ["COCO_val2014_000000000042.jpg"]
    assert example.images[0].root == str(tmp_path)
    assert example.answers == tuple(said)
    assert (example.question_type, example.answer_type) == ("what color", "other")
    assert records.inserted_markers == 0, "a question file has no markers to lack"


def test_the_files_own_choice_of_answer_goes_before_the_most_frequent_one(tmp_path: Path) -> None:
    records = vqa(
        tmp_path, [asked(1), asked(2)],
        [annotated(1, "a", "b", "b", multiple_choice_answer="a"), annotated(2, "x", "b", "b", "x")],
    )  # fmt: skip

    assert records.target_texts() == ["a", "x"]  # of two equally frequent answers the one given first


def test_annotations_are_found_by_id_whatever_their_order_and_number(tmp_path: Path) -> None:
    questions = [asked(i, image_id=i) for i in range(50)]
    annotations = [annotated(i, f"answer {i}") for i in reversed(range(80))]

    records = vqa(tmp_path, questions, annotations)

    assert records.target_texts() == [f"answer {i}" for i in range(50)]
    assert [e.images[0].path for e in records] == [f"{i:012d}.jpg" for i in range(50)]


def test_a_marker_typed_in_a_question_is_text(tmp_path: Path) -> None:
    (example,) = vqa(tmp_path, [asked(1, question="What does <image> mean?")], [annotated(1)])

    assert example.turns[0].parts == (ImageSlot(0), "\nWhat does <image> mean?")


def test_ok_vqas_codes_of_question_types_are_given_their_names(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps({"questions": [asked(1), asked(2)], "data_subtype": "val2014"}))
    (tmp_path / "a.json").write_text(json.dumps({
        "annotations": [annotated(1, question_type="one", answer_type="other"), annotated(2, question_type="new")],
        "question_types": {"one": "Vehicles and Transportation"},
    }))  # fmt: skip
    source = guess_source(str(tmp_path / "q.json"), annotations=str(tmp_path / "a.json"))

    records = open_sources([source], image_token="<image>", max_images=1, on_reject="error", chat=True)

    assert [e.question_type for e in records] == ["Vehicles and Transportation", "new"]


@pytest.mark.parametrize(
    ("subtype", "name"),
    [
        ({"data_subtype": "train2014"}, "COCO_train2014_000000000042.jpg"),
        ({"data_subtype": "test-dev2015"}, "COCO_test2015_000000000042.jpg"),
        ({}, "000000000042.jpg"),
    ],
)
def test_images_go_by_coco_names_of_the_files_split(tmp_path: Path, subtype: dict[str, str], name: str) -> None:
    (example,) = vqa(tmp_path, [asked(1)], [annotated(1)], **subtype)

    assert example.images[0].path == name


def test_a_pattern_names_the_images_instead(tmp_path: Path) -> None:
    records = vqa(
        tmp_path, [asked(1), asked(2, image_id="0043")], [annotated(1), annotated(2)], pattern="v/{image_id:06d}.png"
    )

    assert [e.images[0].path for e in records] == ["v/000042.png", "v/000043.png"]


@pytest.mark.parametrize(
    "subtype", ["{image_id.__class__}", "{x}", "{image_id:9999999999d}", "../val2014", "val", 2014]
)
def test_a_split_that_is_no_name_is_an_error_unless_a_pattern_names_the_images(tmp_path: Path, subtype: Any) -> None:
    with pytest.raises(UserError, match=r"q\.json: data_subtype is .*expected the name of a part of COCO"):
        vqa(tmp_path, [asked(1)], [annotated(1)], data_subtype=subtype)

    (example,) = vqa(tmp_path, [asked(1)], [annotated(1)], data_subtype=subtype, pattern="{{{image_id}}}.jpg")
    assert example.images[0].path == "{42}.jpg"


@pytest.mark.parametrize("pattern", [
    "x.png", "{id}.png", "{image_id}{}.png", "{image_id.name}.png", "{image_id", "{image_id[0]}", "{image_id:y}",
])  # fmt: skip
def test_a_pattern_without_its_place_or_with_another_is_an_error(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=r"image_pattern .*expected a file name with \{image_id\}"):
        vqa(tmp_path, [asked(1)], [annotated(1)], pattern=pattern)


UNUSABLE: list[tuple[Any, Any, str, str]] = [
    (asked(1), annotated(9), "no_annotation", "question 1 has no annotation in"),
    (asked(1, question=" "), annotated(1), "wrong_type", "question is missing"),
    (asked(1, image_id=None), annotated(1), "wrong_type", "image_id is missing"),
    (asked(1, image_id="cat"), annotated(1), "wrong_type", "image 'cat' has no place in"),
    ({"question": "?"}, annotated(1), "wrong_type", "question_id is missing"),
    ("text", annotated(1), "wrong_type", "not a JSON object"),
    (asked(1, question="\ud800"), annotated(1), "bad_json", r"not valid Unicode at character \d+ of the question"),
    (asked(1), annotated(1, "red", "\udc00"), "bad_json", r"not valid Unicode at character \d+ of the annotation"),
    (asked(1, image_id=10**30), annotated(1), "wrong_type", r"image_id 1e\+30 is too large"),
    (asked(1, image_id="1" * 31), annotated(1), "wrong_type", "image_id has 31 digits, which is too large"),
    (asked(1), {"question_id": 1}, "wrong_type", "answers of the annotation"),
    (asked(1), {"question_id": 1, "answers": [{"answer": 3}]}, "wrong_type", "answers of the annotation"),
    (asked(1), {"question_id": 1, "answers": []}, "wrong_type", "answers of the annotation"),
    (asked(1), annotated(1, "red", answer_type=3), "wrong_type", "answer_type of the annotation"),
    (asked(1), annotated(1, "red", multiple_choice_answer=""), "empty_answer", "the answer is empty"),
]


@pytest.mark.parametrize(("question", "annotation", "reason", "detail"), UNUSABLE, ids=[d[:28] for *_, d in UNUSABLE])
def test_a_question_that_cannot_be_used_is_named_and_its_neighbours_are_kept(
    tmp_path: Path, question: Any, annotation: Any, reason: str, detail: str
) -> None:
    records = vqa(tmp_path, [asked(5), question, asked(6)], [annotated(5), annotation, annotated(6)])

    assert [(e.id, e.row) for e in records] == [("5", 0), ("6", 2)]
    (reject,) = records.rejects
    assert (reject.row, reject.reason) == (1, reason)
    # Which character of it, versions of orjson see differently.
    assert re.search(detail, reject.detail) and "line 1, byte" in reject.detail


def test_files_given_in_each_others_place_are_told_apart(tmp_path: Path) -> None:
    vqa(tmp_path, [asked(1)], [annotated(1)])

    def opened(questions: str, annotations: str | None) -> Records:
        source = SourceConfig(
            dataset="vqa", json_path=str(tmp_path / questions),
            annotations_path=None if annotations is None else str(tmp_path / annotations),
        )  # fmt: skip
        return open_sources([source], image_token="<image>", max_images=1, on_reject="collect")

    with pytest.raises(UserError, match=r"q\.json: no annotations under 'annotations'.*this is a question file"):
        opened("q.json", "q.json")
    with pytest.raises(UserError, match=r"a\.json: no questions under 'questions'.*this is the annotation file"):
        opened("a.json", "a.json")
    with pytest.raises(UserError, match="give annotations_path"):
        opened("q.json", None)


def test_an_answer_that_belongs_to_no_question_or_to_one_twice_is_an_error_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.json: line 1, byte .*question 1 is annotated a second time"):
        vqa(tmp_path, [asked(1)], [annotated(1), annotated(1)])
    with pytest.raises(UserError, match="belongs to no question"):
        vqa(tmp_path, [asked(1)], [{"answers": []}])


def test_settings_of_question_files_beside_another_kind_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")

    for setting in ("annotations_path", "image_pattern"):
        source = SourceConfig.model_validate({"json_path": str(tmp_path / "a.jsonl"), setting: "{image_id}"})
        with pytest.raises(UserError, match=f"{setting} .*JSON lines"):
            open_sources([source], image_token="<image>", max_images=1, on_reject="collect")


def test_other_answers_are_other_data_and_another_place_is_not(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()

    first = vqa(tmp_path / "a", [asked(1)], [annotated(1, "red")])
    moved = vqa(tmp_path / "b", [asked(1)], [annotated(1, "red")])
    other = vqa(tmp_path / "c", [asked(1)], [annotated(1, "blue")])

    assert first.fingerprint == moved.fingerprint != other.fingerprint
    assert other.target_texts() == ["blue"], "the cached index of the same question file with other answers"


# ---------------------------------------------------------------------------------------------------------------
# GQA


def gqa(folder: Path, questions: dict[str, Any], **source: Any) -> Records:
    (folder / "g.json").write_text(json.dumps(questions, indent=1))
    settings = SourceConfig(dataset="gqa", json_path=str(folder / "g.json"), **source)
    return open_sources([settings], image_token="<image>", max_images=1, on_reject="collect", chat=True)


def test_a_gqa_question_goes_by_its_key_its_image_and_its_types(tmp_path: Path) -> None:
    question = {
        "question": "Is the ball red?", "answer": "yes", "imageId": "2405722", "semantic": [{"operation": "select"}],
        "types": {"semantic": "attr", "structural": "verify", "detailed": "verifyAttr"},
    }  # fmt: skip

    first, second = gqa(tmp_path, {"07": question, "08": {"question": "Why?", "answer": "ball", "imageId": "n1"}})

    assert (first.id, first.question_type, first.answers) == ("07", "attr/verify", ("yes",))
    assert [t.text for t in first.turns] == ["<image>\nIs the ball red?", "yes"]
    assert [r.path for r in (*first.images, *second.images)] == ["2405722.jpg", "n1.jpg"]
    assert second.question_type == ""


def test_gqa_questions_without_an_answer_are_named(tmp_path: Path) -> None:
    good = {"question": "?", "answer": "yes", "imageId": "1"}

    records = gqa(tmp_path, {
        "1": good, "2": {"question": "?", "imageId": "1"}, "3": {**good, "answer": 3}, "4": {**good, "imageId": ""},
        "5": {**good, "answer": " "}, "6": [], "7": {**good, "question": ""}, "8": good,
    })  # fmt: skip

    assert records.ids() == ["1", "8"]
    assert [(r.id, r.reason) for r in records.rejects] == [
        ("2", "no_target"), ("3", "wrong_type"), ("4", "wrong_type"), ("5", "empty_answer"), ("6", "wrong_type"),
        ("7", "wrong_type"),
    ]  # fmt: skip


def test_half_a_surrogate_pair_in_a_gqa_file_costs_its_question_alone(tmp_path: Path) -> None:
    good = {"question": "?", "answer": "yes", "imageId": "1"}

    records = gqa(tmp_path, {"\ud800": good, "2": {**good, "answer": "\udc00"}, "3": good})

    assert records.ids() == ["3"]
    assert [(r.id, r.reason) for r in records.rejects] == [("\\ud800", "bad_json"), ("2", "bad_json")]
    assert "key is not valid Unicode" in records.rejects[0].detail
    assert "not valid Unicode at character" in records.rejects[1].detail


# ---------------------------------------------------------------------------------------------------------------
# Objects


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 8 << 20])
def test_members_of_an_object_are_found_for_any_chunk_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(index, "CHUNK_BYTES", chunk)
    data = ' \n{"a": 12, "ü\\"x" :{"b": [1, {}]},"in":[ {"q":1},\n 2.5,"]"] , "e":"}" }\n'.encode()
    (tmp_path / "o.json").write_bytes(data)

    found = list(index.json_members(str(tmp_path / "o.json"), "in"))

    assert [(name, json.loads(f.raw)) for name, f in found] == [
        ("a", 12), ('ü"x', {"b": [1, {}]}), ("in", {"q": 1}), ("in", 2.5), ("in", "]"), ("e", "}"),
    ]  # fmt: skip
    assert all(data[f.start : f.start + len(f.raw)] == f.raw for _, f in found)
    assert found[3][1].where == f"line 3, byte {data.index(b'2.5')}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1', "',' or '}' after a value, got the end of the file"),
        ('{"a" 1}', "':' after a field name, got '1'"),
        ("{a: 1}", "field name in quotes, got 'a'"),
        ('{"a": 1,}', "field name in quotes, got '}'"),
        ('{"in": {}}', "an array under 'in', got '{'"),
        ('{"in": [1 2]}', "',' or ']' after a record"),
        ('{"in": [1}', "',' or ']' after a record, got '}'"),
        ('{"a": 1} {"a": 2}', "the object is closed, but '{' follows"),
        ("[1]", "expected '{'"),
    ],
)
def test_a_malformed_object_is_an_error_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "o.json").write_text(text)

    with pytest.raises(UserError) as caught:
        list(index.json_members(str(tmp_path / "o.json"), "in"))

    assert str(tmp_path / "o.json") in str(caught.value) and message in str(caught.value)


def test_question_files_are_told_from_records_a_line(tmp_path: Path) -> None:
    record = json.dumps({"id": 1, "questions": ["?"], "caption": "x", "image": "x"})
    files = {
        "vqa": json.dumps({"info": {}, "questions": [asked(1)]}),
        "gqa": json.dumps({"1": {"question": "?", "answer": "x", "imageId": "1"}}, indent=1),
        "one": record,
        "lines": f"{record}\n{record}\n",
        "broken": '{"id": ',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    kinds = {name: recognise(str(tmp_path / name), Rules("auto", "<image>", 1).fits) for name in files}

    assert kinds == {"vqa": "vqa", "gqa": "gqa", "one": "lines", "lines": "lines", "broken": "lines"}


@pytest.mark.parametrize("text", ['[{"id": 1}]', '{"id": 1}\n{"id": 2}\n', '{"questions": [{"id": 1}]}'])
def test_a_byte_order_mark_changes_nothing_in_files_that_are_asked_or_scored(tmp_path: Path, text: str) -> None:
    (tmp_path / "plain").write_text(text)
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbf" + text.encode())

    plain, marked = (plain_records(tmp_path / name, "questions", ("questions",)) for name in ("plain", "marked"))

    assert [record for _, record in marked.records] == [record for _, record in plain.records] != []
