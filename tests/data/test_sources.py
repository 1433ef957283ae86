"""Record files: every record is found where it is, every bad one is named, and nothing else is opened."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from beholder.config import DatasetKind, SourceConfig
from beholder.data import index, sources
from beholder.data.containers import recognise
from beholder.data.formats import Rules
from beholder.data.images import read_bytes
from beholder.data.sources import RecordError, Records, missing_files, open_sources
from beholder.types import ImageSlot, UserError


def open_one(
    path: Path, dataset: DatasetKind = "jsonl", *, on_reject: Any = "collect", image_token: str = "<image>",
    max_images: int = 2, chat: bool = False, **source: Any,
) -> Records:  # fmt: skip
    return open_sources(
        [SourceConfig(dataset=dataset, json_path=str(path), **source)],
        image_token=image_token, max_images=max_images, on_reject=on_reject, chat=chat,
    )  # fmt: skip


def write_lines(path: Path, *records: Any) -> Path:
    path.write_bytes(b"".join((r if isinstance(r, bytes) else orjson.dumps(r)) + b"\n" for r in records))
    return path


def write_array(path: Path, *records: Any) -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def caption(**fields: Any) -> dict[str, Any]:
    return {"id": "a", "images": ["a.png"], "caption": "a red square", "source": "set", **fields}


def llava(human: str = "Describe.\n<image>", gpt: str = "a red square", **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    return {"id": "a", "image": "a.png", "conversations": turns, **fields}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BEHOLDER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


# ---------------------------------------------------------------------------------------------------------------
# What records become


def test_a_caption_record_is_one_assistant_turn_with_the_caption_as_literal_text(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", caption(caption=" <image> 猫 <|im_end|> ", images=["x/1.png", "2.png"]))

    (example,) = open_one(path, image_root=str(tmp_path))

    assert [(t.role, t.parts) for t in example.turns] == [("assistant", (" <image> 猫 <|im_end|> ",))]
    assert [(r.root, r.path) for r in example.images] == [(str(tmp_path), "x/1.png"), (str(tmp_path), "2.png")]
    assert (example.id, example.source, example.file, example.row) == ("a", "set", str(path), 0)


def test_image_may_be_a_string_or_a_list_and_ids_may_be_numbers_or_missing(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl",
        {"id": 7, "image": "a.png", "caption": "x"},
        {"image": ["a.png"], "caption": "x", "images": None},
    )

    records = open_one(path)

    assert [e.id for e in records] == records.ids() == ["7", "a:1"]
    assert [len(e.images) for e in records] == [1, 1]
    assert records[0].images[0].root == str(tmp_path)  # without image_root: the record file's folder


def test_the_kth_marker_of_the_user_turns_is_image_k(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "An <image> here is text."},
        {"from": "human", "value": "<image>and<image>"},
        {"from": "gpt", "value": "I see <image>."},
        {"from": "human", "value": "\n<image>?"},
        {"from": "gpt", "value": "yes"},
    ]
    path = write_array(tmp_path / "a.json", {"id": "a", "image": ["0", "1", "2"], "conversations": turns})

    (example,) = open_one(path, "llava_instruct", max_images=3)

    assert [t.parts for t in example.turns] == [
        ("An <image> here is text.",),
        (ImageSlot(0), "and", ImageSlot(1)),
        ("I see <image>.",),
        ("\n", ImageSlot(2), "?"),
        ("yes",),
    ]
    assert [t.role for t in example.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [r.path for r in example.images] == ["0", "1", "2"]


def test_openai_style_messages_and_another_marker_are_read(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "[IMG] <image>"}, {"role": "assistant", "content": "ok"}]
    path = write_lines(tmp_path / "a.jsonl", {"id": "a", "images": ["x"], "messages": messages})

    (example,) = open_one(path, image_token="[IMG]")

    assert example.turns[0].parts == (ImageSlot(0), " <image>")


def test_target_texts_and_images_are_those_of_the_examples(tmp_path: Path) -> None:
    path = write_array(
        tmp_path / "a.json", *(llava(gpt=f"caption {i}", id=str(i), image=f"{i}.png") for i in range(20))
    )
    records = open_one(path, "llava_pretrain")

    assert records.target_texts() == [e.target_text for e in records]
    assert records.target_texts([7, 3]) == ["caption 7", "caption 3"]
    assert list(records.images_of([7, 3])) == [(i, records[i].images) for i in (7, 3)]
    assert list(records.images_of()) == [(i, e.images) for i, e in enumerate(records)]
    with pytest.raises(IndexError):
        records[20]


def test_source_names_come_from_the_config_then_the_record_then_the_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.b.jsonl", caption(), {**caption(), "source": None})
    given = SourceConfig(json_path=str(path), name="mine")
    plain = SourceConfig(json_path=str(path))

    records = open_sources([given, plain], image_token="<image>", max_images=2, on_reject="error")

    assert [records.source_of(i) for i in range(4)] == ["mine", "mine", "set", "a"]
    assert [e.source for e in records] == ["mine", "mine", "set", "a"]
    assert records.origins.tolist() == [0, 0, 1, 1]


# ---------------------------------------------------------------------------------------------------------------
# Bad records

BAD: list[tuple[Any, str, str]] = [
    (b'{"id": "a", "caption": ', "bad_json", "malformed JSON"),
    (b'{"id": "a", "caption": "\xff"}', "bad_json", "malformed JSON"),
    (b'{"id": "a", "caption": "\\ud800"}', "bad_json", "malformed JSON"),
    (b"[" * 5000 + b"]" * 5000, "bad_json", "malformed JSON"),
    ([1, 2], "wrong_type", "the record is a list, expected an object"),
    (7, "wrong_type", "the record is the number 7"),
    (caption(id=["x"]), "wrong_type", "id is a list"),
    (caption(id=True), "wrong_type", "id is the boolean true"),
    (caption(source=3), "wrong_type", "source is the number 3"),
    (caption(images="a.png", image="b.png"), "wrong_type", "both image and images"),
    (caption(images={"a": 1}), "wrong_type", "images is an object"),
    (caption(images=["a.png", 3]), "wrong_type", "images[1] is the number 3"),
    (caption(images=[""]), "wrong_type", "images[0] is the string ''"),
    (caption(images=[]), "no_image", "no image"),
    (caption(images=["a", "b", "c"]), "too_many_images", "3 images, prompting.max_images_per_sample is 2"),
    (caption(caption=None), "missing_field", "has none of the fields caption, text"),
    (caption(caption=["x", 3]), "wrong_type", "caption[1] is the number 3"),
    (caption(caption=[]), "wrong_type", "caption is an empty list"),
    ({"id": "a", "images": ["a"]}, "missing_field", "conversations, conversation, messages"),
    ({**llava(), "caption": "x"}, "two_shapes", "caption and conversations"),
    ({**llava(), "messages": []}, "wrong_type", "has conversations and messages, expected exactly one"),
    (llava(conversations="x"), "wrong_type", "conversations is the string 'x'"),
    (llava(conversations=["x"]), "wrong_type", "conversations[0] is the string 'x'"),
    (llava(conversations=[{"from": "bot", "value": "x"}]), "unknown_role", "conversations[0].from is the string 'bot'"),
    (llava(conversations=[{"from": "gpt", "value": 3}]), "wrong_type", "conversations[0].value is the number 3"),
    (llava(conversations=[{"from": "human", "value": "<image>"}]), "no_target", "no turn of the assistant"),
    (llava("no marker"), "image_count", "1 images but 0 <image> markers"),
    (llava("<image><image>"), "image_count", "1 images but 2 <image> markers"),
    (llava(image=["a", "b"]), "image_count", "2 images but 1 <image> markers"),
    (llava(image=None), "image_count", "0 images but 1 <image> markers"),
]


@pytest.mark.parametrize(("record", "reason", "detail"), BAD, ids=[f"{r}-{d[:30]}" for _, r, d in BAD])
def test_a_bad_record_is_a_named_reject_and_its_neighbours_are_kept(
    tmp_path: Path, record: Any, reason: str, detail: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", caption(id="before"), record, caption(id="after"))

    records = open_one(path)

    assert [(e.id, e.row) for e in records] == [("before", 0), ("after", 2)]
    (reject,) = records.rejects
    assert (reject.row, reject.file, reject.reason) == (1, str(path), reason)
    assert detail in reject.detail and "line 2" in reject.detail


def test_policy_error_names_file_record_line_field_and_the_number_of_others(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", caption(), caption(id="x", images=3), caption(caption=1))

    with pytest.raises(RecordError) as caught:
        open_one(path, on_reject="error")

    message = str(caught.value)
    for part in (str(path), "record 1", "line 2", "id 'x'", "images is the number 3", "expected a path", "1 more bad"):
        assert part in message


def test_in_an_array_a_bad_element_is_a_reject_too(tmp_path: Path) -> None:
    path = write_array(tmp_path / "a.json", llava(id="0"), "text", llava("none", id="2"), llava(id="3"))

    records = open_one(path, "llava_pretrain")

    assert [e.row for e in records] == [0, 3]
    assert [(r.id, r.row, r.reason) for r in records.rejects] == [("a:1", 1, "wrong_type"), ("2", 2, "image_count")]


def test_stage_1_data_needs_an_image_and_instruction_data_does_not(tmp_path: Path) -> None:
    path = write_array(tmp_path / "a.json", llava("no picture here", image=None))

    assert [r.reason for r in open_one(path, "llava_pretrain").rejects] == ["no_image"]
    assert open_one(path, "llava_instruct")[0].images == ()


# ---------------------------------------------------------------------------------------------------------------
# Stage instruct


def talk(*turns: tuple[str, str], **fields: Any) -> dict[str, Any]:
    return {"id": "a", "image": "a.png", "messages": [{"role": r, "content": t} for r, t in turns], **fields}


def test_a_conversation_without_a_marker_gets_its_image_at_the_start_of_the_first_user_turn(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl",
        talk(("system", "Be brief."), ("user", "What?"), ("assistant", "x"), ("user", "And?"), ("assistant", "y")),
        talk(("user", "Where is it?\n<image>"), ("assistant", "x")),
        talk(("user", "Hello."), ("assistant", "Hi."), ("user", "<image> This?"), ("assistant", "A <image>.")),
    )

    records = open_one(path, chat=True, max_images=1)

    assert [[t.parts for t in e.turns if t.role == "user"] for e in records] == [
        [(ImageSlot(0), "\nWhat?"), ("And?",)],
        [("Where is it?\n", ImageSlot(0))],
        [("Hello.",), (ImageSlot(0), " This?")],
    ]
    assert records[2].turns[-1].parts == ("A <image>.",), "a marker in an answer is text"
    assert records.inserted_markers == 1
    assert open_one(path, chat=True, max_images=1).inserted_markers == 1, "of the cached index"


def test_reference_answers_and_kinds_come_with_a_record(tmp_path: Path) -> None:
    kinds = {"answers": ["red", "dark red"], "question_type": "color", "answer_type": "other"}
    path = write_lines(
        tmp_path / "a.jsonl",
        talk(("user", "?"), ("assistant", "red"), **kinds),
        talk(("user", "?"), ("assistant", "x")),
    )

    first, second = open_one(path, chat=True)

    assert (first.answers, first.question_type, first.answer_type) == (("red", "dark red"), "color", "other")
    assert (second.answers, second.question_type, second.answer_type) == ((), "", "")


QA = (("user", "<image> ?"), ("assistant", "x"))
BAD_TALK: list[tuple[Any, str, str]] = [
    (talk(("assistant", "Hi."), *QA), "starts_with_assistant", "before the user has asked"),
    (talk(("system", "s"), ("assistant", "Hi."), *QA), "starts_with_assistant", "before the user has asked"),
    (caption(), "starts_with_assistant", "stage instruct needs conversations"),
    (talk(*QA, ("tool", "x")), "unknown_role", "messages[2].role is the string 'tool', expected one of"),
    (talk(*QA, ("user", "?"), ("assistant", " \n")), "empty_answer", "turn 3 is the assistant's and empty"),
    (talk(("user", "<image> ?")), "no_target", "nothing to learn"),
    (talk(("system", "s")), "no_target", "nothing to learn"),
    (talk(*QA, image=["a.png", "b.png"]), "too_many_images", "2 images, prompting.max_images_per_sample is 1"),
    (talk(("user", "<image><image>"), ("assistant", "x")), "image_count", "1 images but 2 <image> markers"),
    (talk(*QA, image=None), "image_count", "0 images but 1 <image> markers"),
    (talk(("user", "?"), ("assistant", "x"), image=None), "no_image", "no image"),
    (talk(*QA, answers="red"), "wrong_type", "answers is the string 'red', expected a list of strings"),
    (talk(*QA, answers=[{"answer": "red"}]), "wrong_type", "answers is a list, expected a list of strings"),
    (talk(*QA, question_type=3), "wrong_type", "question_type is the number 3"),
]


@pytest.mark.parametrize(("record", "reason", "detail"), BAD_TALK, ids=[f"{r}-{d[:30]}" for _, r, d in BAD_TALK])
def test_what_cannot_be_talked_about_is_a_named_reject_and_its_neighbours_are_kept(
    tmp_path: Path, record: Any, reason: str, detail: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", talk(*QA), record, talk(*QA))

    records = open_one(path, chat=True, max_images=1)

    assert [e.row for e in records] == [0, 2]
    (reject,) = records.rejects
    assert (reject.row, reject.reason) == (1, reason)
    assert detail in reject.detail


def test_an_alignment_reads_the_same_conversations_as_before(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", talk(("user", "?"), ("assistant", "x")), talk(("assistant", "x"), *QA))

    records = open_one(path)

    assert [r.reason for r in records.rejects] == ["image_count"]
    assert [e.row for e in records] == [1]
    assert records.fingerprint != open_one(path, chat=True).fingerprint


@pytest.mark.parametrize("layout", ["array", "lines"])
def test_sharegpt_is_read_as_an_array_and_as_a_record_a_line(tmp_path: Path, layout: str) -> None:
    given = [
        llava("What?", "A square.", id="1", conversations=[
            {"from": "system", "value": "Be brief."}, {"from": "human", "value": "What?"},
            {"from": "gpt", "value": "A square."}, {"from": "user", "value": "Sure?"},
            {"from": "assistant", "value": "Yes."},
        ]),
        {"id": "2", "images": ["b.png"], "messages": [
            {"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "A disc."},
        ]},
    ]  # fmt: skip
    path = (write_array if layout == "array" else write_lines)(tmp_path / "a", *given)

    first, second = open_one(path, "sharegpt", chat=True)

    assert [t.role for t in first.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert first.turns[1].parts == (ImageSlot(0), "\nWhat?") and first.target_text == "A square.\nYes."
    assert [r.path for r in (*first.images, *second.images)] == ["a.png", "b.png"]


def coco(tmp_path: Path, *files: str, asked: str) -> str:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    path = write_array(tmp_path / "a.json", llava(image=asked))
    return open_one(path, "llava_instruct", chat=True)[0].images[0].path


OLD, NEW = "COCO_train2014_000000033471.jpg", "000000033471.jpg"


def test_a_coco_image_is_found_under_the_other_of_its_two_names(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()

    assert coco(tmp_path / "old", OLD, "COCO_val2014_000000000009.jpg", asked=NEW) == OLD
    assert coco(tmp_path / "new", f"train/{NEW}", asked=f"train/{OLD}") == f"train/{NEW}"


@pytest.mark.parametrize(
    ("files", "asked"),
    [
        ((OLD, NEW), NEW),  # it is there as it is written
        ((OLD, NEW), OLD),
        ((), NEW),
        ((OLD, "COCO_val2014_000000033471.jpg"), NEW),  # two pictures could be meant
        (("COCO_val2014_000000033471.jpg",), OLD),  # another split's is not the other spelling
        ((f"other/{OLD}",), NEW),
        (("033471.jpg",), NEW),
        ((OLD,), f"../{NEW}"),
    ],
)
def test_a_coco_name_stays_as_written_when_it_is_there_or_no_single_file_is_meant(
    tmp_path: Path, files: tuple[str, ...], asked: str
) -> None:
    assert coco(tmp_path, *files, asked=asked) == asked


def test_records_with_listed_coco_names_travel_to_other_processes(tmp_path: Path) -> None:
    (tmp_path / OLD).write_bytes(b"x")
    records = open_one(write_array(tmp_path / "a.json", llava(image=NEW)), "llava_instruct", chat=True)
    assert records[0].images[0].path == OLD

    copy = pickle.loads(pickle.dumps(records))

    assert copy[0] == records[0]


# ---------------------------------------------------------------------------------------------------------------
# Bad files

MALFORMED = [
    ('[{"id": 1}, {"id": 2]', "record 1, line 1, byte 20"),
    ('[\n{"id": 1},\n{"id" 2}\n]', "record 1, line 3, byte 19"),
    ('[{"id": 1} {"id": 2}]', "record 1, line 1, byte 11: expected ',' or ']'"),
    ('[{"id": 1},]', "record 1, line 1, byte 11: expected a value"),
    ('[{"id": 1}, {"id": "unfinis', "record 1, line 1"),
    ('[{"id": 1}', "end of the file"),
    ('[{"id": 1},', "record 1"),
    ("[", "record 0"),
    ('[{"id": 1}] trailing', "closed, but 't' follows"),
    ("[" + "[" * 100_000, "nested too deeply"),
]


@pytest.mark.parametrize(("text", "where"), MALFORMED, ids=[w for _, w in MALFORMED])
@pytest.mark.parametrize("chunk", [5, 8 << 20])
def test_a_malformed_array_is_an_error_with_record_line_and_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, where: str, chunk: int
) -> None:
    monkeypatch.setattr(index, "CHUNK_BYTES", chunk)
    path = tmp_path / "a.json"
    path.write_text(text)

    with pytest.raises(RecordError) as caught:
        open_one(path, "llava_pretrain")

    assert str(path) in str(caught.value) and where in str(caught.value)


def test_the_wrong_dataset_kind_is_named(tmp_path: Path) -> None:
    lines, array = write_lines(tmp_path / "a.jsonl", caption()), write_array(tmp_path / "a.json", llava())

    with pytest.raises(RecordError, match="set dataset: jsonl"):
        open_one(lines, "llava_pretrain")
    with pytest.raises(RecordError, match="set dataset: llava_pretrain"):
        open_one(array, "jsonl")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("dataset", ["jsonl", "llava_pretrain", "webdataset", "parquet"])
def test_missing_empty_and_special_record_files_are_errors(tmp_path: Path, dataset: DatasetKind) -> None:
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")

    for name, what in (("gone", "[Nn]o such file"), ("empty", "is empty"), ("fifo", "is a FIFO")):
        with pytest.raises(UserError, match=rf"{name}.*{what}"):
            open_one(tmp_path / name, dataset)


def test_a_folder_instead_of_a_file_and_a_missing_image_root_are_errors(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", caption())

    with pytest.raises(UserError, match=r"no file that ends in \.parquet"):
        open_one(tmp_path, "parquet")
    with pytest.raises(UserError, match=r"image_root .*gone: is not a folder"):
        open_one(path, image_root=str(tmp_path / "gone"))


@pytest.mark.parametrize(("text", "dataset"), [("\n \n", "jsonl"), ("[ ]", "llava_pretrain")])
def test_a_file_without_records_is_an_error(tmp_path: Path, text: str, dataset: DatasetKind) -> None:
    (tmp_path / "a").write_text(text)

    with pytest.raises(RecordError, match="no records"):
        open_one(tmp_path / "a", dataset)


def test_byte_order_marks_blank_lines_and_windows_line_ends_are_understood(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(orjson.dumps(caption(id=i)) for i in "xyz"))
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + orjson.dumps([llava()]))
    (tmp_path / "b.json").write_bytes("[{}]".encode("utf-16"))

    assert open_one(tmp_path / "a.jsonl").ids() == ["x", "y", "z"]
    assert len(open_one(tmp_path / "a.json", "llava_pretrain")) == 1
    with pytest.raises(RecordError, match="UTF-16"):
        open_one(tmp_path / "b.json", "llava_pretrain")


# ---------------------------------------------------------------------------------------------------------------
# The index

json_values: st.SearchStrategy[Any] = st.deferred(
    lambda: st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text()
    | st.lists(json_values, max_size=3) | st.dictionaries(st.text(), json_values, max_size=3)
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(st.lists(json_values, max_size=6), st.sampled_from([None, 0, 3]), st.booleans(), st.integers(1, 40))
def test_array_elements_are_found_where_they_are_for_any_layout_and_chunk_size(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, ascii: bool, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("a") / "a.json"
    data = json.dumps(values, indent=indent, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    path.write_bytes(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "CHUNK_BYTES", chunk)
        found = list(index.json_array(str(path)))

    assert [json.loads(f.raw.decode("utf-8", "surrogatepass")) for f in found] == values
    for f in found:
        assert data[f.start : f.start + len(f.raw)] == f.raw
        line = data.count(b"\n", 0, f.start) + 1
        assert f.where == f"line {line}, byte {f.start:,}"


@pytest.mark.parametrize("chunk", range(1, 24))
def test_no_chunk_boundary_splits_a_number_or_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(index, "CHUNK_BYTES", chunk)
    (tmp_path / "a.json").write_text('[0.5, 12, -1.5e-3 , true,null, "x\\"]", 7]')

    values = [orjson.loads(f.raw) for f in index.json_array(str(tmp_path / "a.json"))]

    assert values == [0.5, 12, -0.0015, True, None, 'x"]', 7]


def test_records_far_apart_and_longer_than_a_chunk_are_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "CHUNK_BYTES", 64)
    path = write_array(tmp_path / "a.json", *(llava(id=str(i), gpt="é" * (i * 37 % 500)) for i in range(60)))

    records = open_one(path, "llava_pretrain")

    assert [len(t) for t in records.target_texts()] == [i * 37 % 500 for i in range(60)]


def test_a_second_opening_reads_the_cached_index_and_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "a.jsonl", caption(id="1"), {"id": "bad"}, caption(id="2"))
    first = open_one(path)
    monkeypatch.setattr(sources, "_scan", lambda *_: pytest.fail("scanned again"))

    second = open_one(path)

    assert list(second) == list(first)
    assert second.rejects == first.rejects and second.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:200] + b"\xff\xff" + b[202:]]
)
def test_a_damaged_cache_is_built_again(tmp_path: Path, own_cache: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write_lines(tmp_path / "a.jsonl", caption(id="1"), caption(id="2"))
    expected = list(open_one(path))
    (cached,) = own_cache.iterdir()
    cached.write_bytes(damage(cached.read_bytes()))

    assert list(open_one(path)) == expected


def test_a_changed_file_is_indexed_again_even_with_its_old_time_and_size(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", caption(caption="old"))
    stat = path.stat()
    before = open_one(path)
    write_lines(path, caption(caption="new"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    after = open_one(path)

    assert after.target_texts() == ["new"]
    assert after.fingerprint != before.fingerprint


def test_an_unwritable_cache_costs_time_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BEHOLDER_CACHE", str(tmp_path / "file"))

    assert len(open_one(write_lines(tmp_path / "a.jsonl", caption()))) == 1


def test_the_fingerprint_follows_contents_and_reading_rules_and_not_the_place(tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    base = open_one(write_lines(tmp_path / "a.jsonl", caption(), caption(id="b"))).fingerprint

    assert open_one(write_lines(tmp_path / "moved" / "a.jsonl", caption(), caption(id="b"))).fingerprint == base
    others = [
        open_one(write_lines(tmp_path / "a.jsonl", caption(id="b"), caption())),
        open_one(write_lines(tmp_path / "a.jsonl", caption(), caption(id="b"), {"id": "bad"})),
        open_one(write_lines(tmp_path / "a.jsonl", caption(), caption(id="b")), image_token="<img>"),
        open_one(write_lines(tmp_path / "a.jsonl", caption(), caption(id="b")), max_images=1),
    ]
    assert len({base, *(r.fingerprint for r in others)}) == 5


def _ids_in_child(records: Records, queue: Any) -> None:
    queue.put([records[i].id for i in range(len(records))])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12 and later
def test_records_work_in_forked_and_spawned_processes(tmp_path: Path) -> None:
    records = open_one(write_lines(tmp_path / "a.jsonl", *(caption(id=str(i)) for i in range(50))))
    assert records[49].id == "49"  # the file is open before the child starts
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    child = context.Process(target=_ids_in_child, args=(records, queue))
    child.start()

    assert queue.get(timeout=30) == [str(i) for i in range(50)]
    child.join()
    copy = pickle.loads(pickle.dumps(records))  # what spawn does, without its seconds of imports
    assert list(copy) == list(records) and copy.fingerprint == records.fingerprint


def test_a_file_that_changed_after_indexing_is_an_error_and_not_another_record(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", caption(id="1"), caption(id="2"))
    records = open_one(path)
    write_lines(path, caption(id="3"), caption(id="4"))  # the same length, so the offsets still hit a record

    with pytest.raises(RecordError, match=r"changed since it was indexed"):
        records[1]


# ---------------------------------------------------------------------------------------------------------------
# Tar shards


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (4, 4), value).save(out, "PNG")
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_shards_give_examples_whose_images_are_read_in_place(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "s-1.tar",
        [
            ("b/002.two.png", png(2)),
            ("b/002.one.png", png(1)),
            ("b/002.json", orjson.dumps(caption(id="two", image="x"))),
        ],
    )
    write_tar(tmp_path / "s-0.tar", [("001.png", png(7)), ("001.txt", "eine Katze 猫".encode()), ("001.cls", b"3")])
    before = sorted(tmp_path.iterdir())

    for place in (tmp_path, tmp_path / "s-*.tar"):
        one, two = open_one(place, "webdataset")

        assert (one.id, one.target_text, one.source) == ("001", "eine Katze 猫", "s-0")
        assert [read_bytes(r) for r in one.images] == [png(7)]
        assert (two.id, two.source, [r.path for r in two.images]) == ("two", "set", ["b/002.two.png", "b/002.one.png"])
        assert [read_bytes(r) for r in two.images] == [png(2), png(1)]
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "cache"] == before  # nothing was extracted


def test_conversations_in_shards_map_markers_to_members(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("1.json", orjson.dumps(llava("<image> what?"))), ("1.jpg", b"x")])

    (example,) = open_one(path, "webdataset")

    assert example.turns[0].parts == (ImageSlot(0), " what?")
    assert [r.path for r in example.images] == ["1.jpg"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path: Path, format: int) -> None:
    long = "d" * 90 + "/" + "f" * 70
    unicode = "ü" if format == tarfile.USTAR_FORMAT else "ü" * 120
    names = ["a.png", f"{long}.png", f"{unicode}.txt", "d/x.json", "after.png"]
    path = write_tar(tmp_path / "s.tar", [(n, n.encode() * 300) for n in names], format)
    with tarfile.open(path, "a", format=format) as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("link.png")
            info.type, info.linkname, info.size = kind, "/etc/passwd", 4096  # a link may state its target's size
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("last.png"))

    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]

    assert [tuple(m) for m in index.tar_members(str(path))] == expected
    assert len(expected) == len(names) + 1


def pax(body: bytes, size: int | None = None) -> bytes:
    """A shard that begins with an extended header."""
    info, member = tarfile.TarInfo("x"), tarfile.TarInfo("a.txt")
    info.type, info.size = tarfile.XHDTYPE, len(body) if size is None else size
    return info.tobuf(tarfile.USTAR_FORMAT) + body + b"\0" * (-len(body) % 512) + member.tobuf() + b"\0" * 1024


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("11 size=²\n".encode(), "gives the size '²', expected a number"),
        (b"5015 size=" + b"9" * 5000 + b"\n", "gives the size '9999"),
        (b"6 a=b\n" * 300_000, "the extended header at byte 0 has 1,800,000 bytes, expected at most 1,048,576"),
    ],
)
def test_an_extended_header_that_says_nonsense_or_never_ends_is_an_error(
    tmp_path: Path, body: bytes, told: str
) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(pax(body))

    with pytest.raises(RecordError, match=told):
        list(index.tar_members(str(path)))


def test_a_large_extended_header_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    body = b"6 a=b\n" * 170_000 + b"14 path=b.txt\n" + b"9" * 5000 + b" a=b\n"  # a length no one can read ends it
    path.write_bytes(pax(body))

    started = time.perf_counter()
    (member,) = index.tar_members(str(path))

    assert member.name == "b.txt" and time.perf_counter() - started < 2  # seconds more where each field copied the rest


def test_incomplete_samples_of_a_shard_are_named_rejects(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "s.tar",
        [
            ("alone.png", png(1)),
            ("text.txt", b"no image"),
            ("bad.json", b"{"), ("bad.png", png(1)),
            ("list.json", b"[]"), ("list.png", png(1)),
            ("latin.txt", b"\xff"), ("latin.png", png(1)),
            ("twice.txt", b"1"), ("twice.x.txt", b"2"), ("twice.png", png(1)),
            ("good.txt", b"fine"), ("good.png", png(1)),
        ],
    )  # fmt: skip

    records = open_one(path, "webdataset")

    assert records.ids() == ["good"]
    assert {r.id: r.reason for r in records.rejects} == {
        "alone": "missing_field", "text": "no_image", "bad": "bad_member", "list": "bad_member", "latin": "bad_member",
        "twice": "bad_member",
    }  # fmt: skip


def test_a_tar_damaged_in_the_middle_or_cut_off_is_an_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [(f"{i}.txt", b"x" * 2000) for i in range(5)])
    data = bytearray(path.read_bytes())
    second = 512 + 2048
    damaged, cut = tmp_path / "d.tar", tmp_path / "c.tar"
    damaged.write_bytes(data[: second + 10] + b"\xff" + data[second + 11 :])
    cut.write_bytes(data[: second + 700])

    with pytest.raises(RecordError, match=r"d\.tar: not a tar header at byte 2,560"):
        open_one(damaged, "webdataset")
    with pytest.raises(RecordError, match=r"c\.tar: member '1\.txt' .* cut off"):
        open_one(cut, "webdataset")


def test_an_empty_folder_or_glob_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file that ends in \.tar"):
        open_one(tmp_path, "webdataset")
    with pytest.raises(UserError, match="no such file, folder or glob"):
        open_one(tmp_path / "*.parquet", "parquet")


# ---------------------------------------------------------------------------------------------------------------
# Parquet


def test_parquet_rows_give_examples(tmp_path: Path) -> None:
    table = pa.table({"id": [5, 6], "image": [png(1), png(2)], "text": ["one", "two"], "source": ["x", None]})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=1)

    records = open_one(tmp_path, "parquet")

    assert [(e.id, e.target_text, e.source) for e in records] == [("5", "one", "x"), ("6", "two", "p")]
    assert [read_bytes(e.images[0]) for e in records] == [png(1), png(2)]


def test_parquet_lists_of_images_with_conversations(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "ok"}]
    cells = [[{"bytes": png(1), "path": "a"}, {"bytes": png(2), "path": "b"}], [{"bytes": png(3), "path": "c"}]]
    pq.write_table(pa.table({"images": cells, "conversations": [turns, turns]}), tmp_path / "p.parquet")

    records = open_one(tmp_path / "p.parquet", "parquet")

    (example,) = records
    assert [read_bytes(r) for r in example.images] == [png(1), png(2)]
    assert [(r.row, r.reason) for r in records.rejects] == [(1, "image_count")]
    assert "1 images but 2 <image> markers" in records.rejects[0].detail


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"image": [b"x"]}, "has none of the fields caption"),
        ({"image": [b"x"], "captoin": ["x"]}, "its fields are image, captoin; nearest: caption for captoin"),
    ],
)
def test_parquet_without_the_needed_columns_is_an_error(tmp_path: Path, columns: dict[str, Any], what: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")

    with pytest.raises(UserError, match=what):
        open_one(tmp_path / "p.parquet", "parquet")


def test_the_image_folder_is_missed_where_images_are_read_from_it_and_not_where_the_records_hold_them(
    tmp_path: Path,
) -> None:
    there, nowhere = tmp_path / "there", str(tmp_path / "nowhere")
    there.write_bytes(b"")

    def source(dataset: DatasetKind) -> SourceConfig:
        return SourceConfig(dataset=dataset, json_path=str(there), image_root=nowhere)

    assert missing_files([source("jsonl")]) == [f"no folder {nowhere}"]
    assert missing_files([source("webdataset")]) == []


@pytest.mark.parametrize("suffix", ["jfif", "JFIF", "avif", "jpe"])
def test_a_member_of_a_shard_is_an_image_by_every_usual_suffix(tmp_path: Path, suffix: str) -> None:
    write_tar(tmp_path / "s.tar", [(f"1.{suffix}", png(1)), ("1.txt", b"a red square")])

    (example,) = open_one(tmp_path / "s.tar", "webdataset")

    assert [read_bytes(ref) for ref in example.images] == [png(1)]


def test_a_byte_order_mark_is_no_part_of_a_shards_texts(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    members = [("1.png", png(1)), ("1.txt", mark + b"a"), ("2.png", png(2)), ("2.json", mark + b'{"caption": "b"}')]
    write_tar(tmp_path / "s.tar", members)

    assert open_one(tmp_path / "s.tar", "webdataset").target_texts() == ["a", "b"]


def test_images_behind_a_link_are_read_when_the_folder_it_leads_to_is_named(tmp_path: Path) -> None:
    store, root = tmp_path / "store", tmp_path / "root"
    for folder in (store, root):
        folder.mkdir()
    (store / "a.png").write_bytes(png(1))
    (root / "coco").symlink_to(store)
    file = write_lines(tmp_path / "a.jsonl", caption(images=["coco/a.png"]))

    (example,) = open_one(file, image_root=str(root), more_image_roots=(str(store),))

    assert read_bytes(example.images[0]) == png(1)
    with pytest.raises(UserError, match=r"more_image_roots .*nowhere: is not a folder"):
        open_one(file, image_root=str(root), more_image_roots=(str(tmp_path / "nowhere"),))


def test_a_file_that_is_not_parquet_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_bytes(b"PAR1 not really PAR1")

    with pytest.raises(RecordError, match="cannot be read as parquet"):
        open_one(tmp_path / "p.parquet", "parquet")


# ---------------------------------------------------------------------------------------------------------------


def test_the_kind_of_a_bare_path_is_guessed_from_its_shape(tmp_path: Path) -> None:
    write_lines(tmp_path / "a", caption())
    write_array(tmp_path / "b", llava())
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "s.tar", [("1.txt", b"x")])
    (tmp_path / "c").write_text("id,caption\n")

    (tmp_path / "d").write_text("a poem\n")

    fits = Rules("auto", "<image>", 1).fits
    kinds = [recognise(str(tmp_path / name), fits) for name in ("a", "b", "shards/s.tar", "c")]

    assert kinds == ["lines", "array", "tar", "csv"]
    with pytest.raises(UserError, match="its kind cannot be told"):
        recognise(str(tmp_path / "d"), fits)
