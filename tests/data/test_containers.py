"""Files as people have them: what is odd about them is read, rejected by name, or refused, and never waited for."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beholder.config import SourceConfig
from beholder.data import formats
from beholder.data.images import data_uris
from beholder.data.sources import RecordError, Records, instructs, open_sources
from beholder.types import UserError
from beholder.use.answer_file import read_questions
from beholder.use.score import score_files

RED: dict[str, Any] = {"image": "a.png", "caption": "red"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEHOLDER_CACHE", str(tmp_path / "cache"))


def opened(path: Path, *, chat: bool = False, max_images: int = 4, **source: Any) -> Records:
    return open_sources(
        [SourceConfig(json_path=str(path), **source)],
        image_token="<image>", max_images=max_images, on_reject="collect", chat=chat,
    )  # fmt: skip


def told(path: Path, **source: Any) -> str:
    with pytest.raises(UserError) as error:
        opened(path, **source)
    return str(error.value)


def lines(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def table(path: Path, content: pa.Table) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(content, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, content.schema) as stream:
            stream.write_table(content)
    return path


def rejects(records: Records) -> list[tuple[int, str]]:
    return [(reject.row, reject.reason) for reject in records.rejects]


tables = pytest.mark.parametrize("suffix", [".parquet", ".arrow"])


# ---------------------------------------------------------------------------------------------------------------
# What would wait for ever


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    asked = [{"question_id": k, "image_id": 1, "question": "Which colour?"} for k in (1, 2)]
    return lines(tmp_path / "q.json", {"questions": asked})


ANSWERS = {"annotations": [{"question_id": 1, "answers": [{"answer": "red"}]}]}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pipe", "is a FIFO, socket or device, expected the annotation file"), ("nope", "No such file"),
        ("", "is a folder"),
        ("a\0b", "embedded null"),  # byte, or character, by the version of Python
    ],
)  # fmt: skip
def test_an_annotation_file_that_is_none_is_refused_and_not_waited_for(
    questions: Path, name: str, expected: str
) -> None:
    os.mkfifo(questions.parent / "pipe")

    assert expected in told(questions, annotations_path=f"{questions.parent}/{name}")


@pytest.mark.parametrize(("name", "expected"), [("pipe", "is a FIFO"), ("a\0b", "is no path, it holds a NUL")])
def test_files_of_answers_and_questions_are_files(tmp_path: Path, name: str, expected: str) -> None:
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(UserError, match=expected):
        score_files("vqa", tmp_path / name, tmp_path / "r.json")
    with pytest.raises(UserError, match=expected):
        read_questions(tmp_path / name, tmp_path)


def test_of_many_captions_each_is_read_without_reading_all_the_others_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = opened(lines(tmp_path / "a.jsonl", RED, RED | {"id": "b", "caption": [str(k) for k in range(300)]}))
    calls = []
    parse = formats.Rules.parse
    monkeypatch.setattr(formats.Rules, "parse", lambda self, raw: calls.append(raw) or parse(self, raw))

    assert records.target_texts() == ["red", *(str(k) for k in range(300))]
    assert records.ids()[:4] == ["a:0", "b", "b#1", "b#2"]
    assert records[7].turns[0].text == "6"
    assert len(calls) < 10


def test_images_in_a_record_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = [f"data:image/png;base64,{k:04d}" for k in (0, 1, 2, 1)]
    path = lines(tmp_path / "a.jsonl", {"images": uris, "caption": "red"})
    calls = []
    monkeypatch.setattr(formats, "data_uris", lambda record: calls.append(record) or data_uris(record))

    assert not instructs(SourceConfig(json_path=str(path)))
    assert len(calls) == 1
    assert [ref.item for ref in opened(path)[0].images] == [0, 1, 2, 1]


# ---------------------------------------------------------------------------------------------------------------
# Records that were tracebacks


@pytest.mark.parametrize(
    ("record", "shape"),
    [
        ({"messages": [{"role": "assistant", "content": [{"type": "text", "text": "A"}]}]}, None),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "parts"),
    ],
)
def test_images_before_nothing_that_the_user_says_are_a_reject(tmp_path: Path, record: Any, shape: Any) -> None:
    assert rejects(opened(lines(tmp_path / "a.jsonl", {"images": ["a.png"], **record}), shape=shape)) == [
        (0, "image_count")
    ]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"identifier": "data:x-0"}, "wrong_type"), ({"identifier": "x-0", "directory": "data:,"}, "wrong_type"),
        ({"identifier": "x-0", "directory": ["x"]}, "wrong_type"),
    ],
)  # fmt: skip
def test_a_pair_of_pictures_whose_name_is_none_is_a_reject(tmp_path: Path, fields: Any, reason: str) -> None:
    records = opened(lines(tmp_path / "a.jsonl", {"sentence": "s", "label": "False", **fields}))

    assert rejects(records) == [(0, reason)]


def test_choices_without_an_answer_are_told_as_such(tmp_path: Path) -> None:
    records = opened(lines(tmp_path / "a.jsonl", {"image": "a.png", "question": "q", "multiple_choice": ["a", "b"]}))

    assert records.rejects[0].detail.endswith("multiple_choice is a list, and neither answer nor answers is there")


# ---------------------------------------------------------------------------------------------------------------
# Tables


@tables
@pytest.mark.parametrize("name", ["image", "caption"])
def test_a_column_that_is_there_twice_is_refused_by_name(tmp_path: Path, suffix: str, name: str) -> None:
    columns = [pa.array(["a.png"]), pa.array(["red"]), pa.array(["b"])]
    path = table(tmp_path / f"a{suffix}", pa.Table.from_arrays(columns, names=["image", "caption", name]))

    assert f"several columns of the name '{name}'" in told(path)


@tables
def test_a_null_list_of_image_bytes_is_absent(tmp_path: Path, suffix: str) -> None:
    none = pa.array([None, None, [b"x"]], pa.list_(pa.binary()))
    content = pa.table({"image": ["a.png", "b.png", None], "images": none, "caption": ["x", "y", "z"]})

    records = opened(table(tmp_path / f"a{suffix}", content))

    assert records.target_texts() == ["x", "y", "z"]
    assert not records.rejects


def test_null_lists_in_the_middle_of_many_rows_stay_null(tmp_path: Path) -> None:
    cells = [None if k % 3 else [b"x"] * (k % 5) for k in range(5000)]
    content = pa.table({"images": pa.array(cells, pa.list_(pa.binary())), "caption": ["red"] * 5000})

    records = opened(table(tmp_path / "a.arrow", content))

    assert [r.row for r in records.rejects] == [k for k, cell in enumerate(cells) if not cell]
    assert {len(records[k].images) for k in range(4)} == {3, 1, 4, 2}


@tables
@pytest.mark.parametrize("nested", [False, True])
def test_a_text_that_is_not_utf_8_is_a_reject_of_its_row(tmp_path: Path, suffix: str, nested: bool) -> None:
    offsets = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0")
    text = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"\xffx")])
    name = "texts" if nested else "caption"
    if nested:
        pairs = pa.StructArray.from_arrays([pa.array(["q", "q"]), text], ["user", "assistant"])
        text = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), pairs)

    records = opened(table(tmp_path / f"a{suffix}", pa.table({"image": ["a.png"] * 2, name: text})))

    assert [r.detail for r in records.rejects] == [f"row 0: {name} is not UTF-8"]
    assert records.target_texts() == ["x"]


@tables
@pytest.mark.parametrize("value", [Decimal("1.5"), timedelta(days=3)])
def test_numbers_of_any_kind_are_no_captions(tmp_path: Path, suffix: str, value: Any) -> None:
    path = table(tmp_path / f"a{suffix}", pa.table({"image": ["a.png"], "caption": [value]}))

    assert rejects(opened(path)) == [(0, "wrong_type")]


@pytest.mark.parametrize(
    ("head", "row"),
    [
        (b",image,caption", b"0,a.png,red"), (b"image,caption,", b"a.png,red,"), (b",image,caption,", b"0,a.png,red,"),
        (b"image,caption,text/plain", b"a.png,red,b"), (b"image,caption,\xe9", b"a.png,red,b"),
        (b"image,caption (en)", b"a.png,red"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.csv", "a.txt"])
def test_a_header_may_name_columns_as_it_likes(tmp_path: Path, head: bytes, row: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(head + b"\n" + row + b"\n")
    columns = {"caption": "caption (en)"} if b"(en)" in head else {}

    assert opened(tmp_path / name, columns=columns).target_texts() == ["red"]


def test_a_column_can_be_only_one_field(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"x": "a.png"})

    assert "columns.image and columns.caption name the same column 'x'" in told(
        path, columns={"image": "x", "caption": "x"}
    )


# ---------------------------------------------------------------------------------------------------------------
# JSON


@pytest.mark.parametrize(
    ("given", "bad"),
    [({"data": [3, RED, RED]}, [0]), ({"ids": [1, 2], "data": [None, None, RED, 4], "n": [5]}, [0, 1, 3])],
)
def test_what_comes_before_the_first_object_of_an_array_is_counted(tmp_path: Path, given: Any, bad: list[int]) -> None:
    records = opened(lines(tmp_path / "a.json", given))

    assert rejects(records) == [(row, "wrong_type") for row in bad]
    assert len(records) + len(bad) == len(given["data"])


def test_one_line_of_an_unknown_shape_is_a_record_still(tmp_path: Path) -> None:
    record = {"image": "a.png", "dialog": [{"text": "one", "image": "b.png"}, {"text": "two", "image": "b.png"}]}

    assert rejects(opened(lines(tmp_path / "a.jsonl", record))) == [(0, "missing_field")]


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-16LE", "UTF-16BE", "UTF-32", "UTF-32LE", "UTF-32BE"])
def test_other_encodings_are_told_by_name(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.json").write_bytes(json.dumps([RED]).encode(encoding))

    assert f"is {encoding}, expected UTF-8; convert it" in told(tmp_path / "a.json")


def test_a_picture_is_not_called_a_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\0\0\0\x18ftypheic")

    assert "so its kind cannot be told" in told(tmp_path / "a")


def test_what_has_no_number_in_coco_captions_is_no_pair(tmp_path: Path) -> None:
    image = {"id": None, "file_name": "a.png"}
    captions = [{"id": k, "image_id": k, "caption": "red"} for k in (None, 7)]
    images = [image, image | {"id": 7, "file_name": None}, image | {"id": 7}]

    assert rejects(opened(lines(tmp_path / "a.json", {"images": images, "annotations": captions}))) == [(0, "no_image")]


def test_white_space_before_records_may_be_long_and_alone_holds_none(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(" " * 5000 + json.dumps([RED]))
    (tmp_path / "b.json").write_text(" " * 5000)

    assert opened(tmp_path / "a.json").target_texts() == ["red"]
    assert "holds no records, only white space" in told(tmp_path / "b.json")


# ---------------------------------------------------------------------------------------------------------------
# Which files


def test_a_glob_may_name_folders(tmp_path: Path) -> None:
    for k in (1, 2):
        table(tmp_path / f"set{k}" / "data-0.arrow", pa.table({"image": ["a.png"], "caption": [f"set {k}"]}))
        lines(tmp_path / f"set{k}" / "state.json", {"_data_files": [{"filename": "data-0.arrow"}]})

    assert opened(tmp_path / "set*").target_texts() == ["set 1", "set 2"]


def test_a_snapshot_of_the_hub_is_read(tmp_path: Path) -> None:
    content = pa.table({"image": ["a.png"], "caption": ["red"]})
    table(tmp_path / "data" / "train-00000-of-00001.parquet", content)
    (tmp_path / "README.md").write_text("A data set.")
    lines(tmp_path / "dataset_infos.json", {})
    lines(tmp_path / "data" / "dataset_info.json", {})
    lines(tmp_path / "data" / "._train.jsonl", {})

    assert opened(tmp_path).target_texts() == ["red"]
    table(tmp_path / "data" / "test-00000-of-00001.parquet", content)
    assert f"name a glob, such as {tmp_path}/data/train*" in told(tmp_path)


def test_splits_in_folders_are_named(tmp_path: Path) -> None:
    for split in ("test", "train"):
        lines(tmp_path / split / "metadata.jsonl", {"file_name": "a.png", "text": split})

    assert f"its folders test, train do; name one of them, such as {tmp_path}/train" in told(tmp_path)
    assert opened(tmp_path / "train").target_texts() == ["train"]


def test_annotations_may_be_packed_and_are_called_as_they_were_named(questions: Path) -> None:
    path = questions.with_name("a.json.gz")
    path.write_bytes(gzip.compress(json.dumps(ANSWERS).encode()))

    for _ in range(2):  # the second time from the cached index
        records = opened(questions, annotations_path=str(path))
        assert records.target_texts() == ["red"]
        assert records.rejects[0].detail.endswith(f"question 2 has no annotation in {path}")
    path.write_bytes(gzip.compress(b'{"annotations": [{,}]}'))
    assert told(questions, annotations_path=str(path)).startswith(f"{path}: malformed JSON")


@pytest.mark.parametrize(
    ("name", "content"), [("a.json.gz", b"[{},,]"), ("a.parquet.gz", b"PAR1"), ("a.json.gz", b"?")]
)
def test_errors_of_a_packed_file_name_the_file_and_not_its_copy(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content))

    assert told(tmp_path / name).startswith(f"{tmp_path / name}: ")


@pytest.mark.parametrize("name", [".gz", "..gz", "...gz"])
def test_of_a_packed_file_the_name_may_be_all_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(json.dumps([RED]).encode()))

    assert opened(tmp_path / name).target_texts() == ["red"]


# ---------------------------------------------------------------------------------------------------------------
# Files that change while they are in use


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda path: path.unlink(), "cannot be opened any more"),
        (lambda path: path.write_text(path.read_text().replace('["red", "blue"]', '["red"]        ')), "changed since"),
        (lambda path: path.write_text(path.read_text().replace("blue", "pink")), "changed since"),
    ],
)
@pytest.mark.parametrize("open_before", [False, True])
def test_a_file_that_changes_is_told(
    tmp_path: Path, change: Callable[[Path], None], expected: str, open_before: bool
) -> None:
    path = lines(tmp_path / "a.jsonl", RED, RED | {"caption": ["red", "blue"]})
    records = opened(path)
    if open_before:
        records[0]
    stamp = path.stat().st_mtime_ns
    change(path)
    if path.exists():
        os.utime(path, ns=(stamp, stamp + 1))
    elif open_before:  # it is still there for whoever has it open
        assert records[2].turns[0].text == "blue"
        return

    with pytest.raises(RecordError, match=expected) as error:
        records[2]
    assert str(error.value).startswith(f"{path}: ")


@tables
def test_a_file_whose_images_change_is_told(tmp_path: Path, suffix: str) -> None:
    def content(image: bytes) -> pa.Table:
        return pa.table({"image": [image], "caption": ["red"]})

    records = opened(path := table(tmp_path / f"a{suffix}", content(b"x")))
    assert records[0].images[0].kind == suffix[1:]
    table(path, content(b"y"))
    os.utime(path, ns=(1, 1))

    with pytest.raises(RecordError, match="changed since it was indexed"):
        records[0]


def test_fewer_captions_than_were_counted_are_told_even_where_no_clock_tells_it(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", RED | {"caption": ["red", "blue"]})
    records, info = opened(path), path.stat()
    path.write_text(path.read_text().replace('["red", "blue"]', '["red"]        '))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))

    with pytest.raises(RecordError, match="record 0 changed since it was indexed: has 1 captions"):
        records[1]


# ---------------------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ({"question_id": 1, "answer": "a"}, {"question_id": 1, "answers": None, "references": ["a"]}),
        ({"question_id": 1, "answer": None, "prediction": "a"}, {"question_id": 1, "answers": ["a"]}),
        ({"question_id": None, "id": 1, "answer": "a"}, {"question_id": None, "id": 1, "answers": ["a"]}),
    ],
)
def test_in_files_that_are_scored_null_is_absent(tmp_path: Path, answer: Any, reference: Any) -> None:
    score = score_files("vqa", lines(tmp_path / "p.jsonl", answer), lines(tmp_path / "r.jsonl", reference))

    assert score.n == 1
