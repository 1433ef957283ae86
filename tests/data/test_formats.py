"""Every layout that is read: the small files of `formats/`, what they are recognised as, and what bad input becomes."""

from __future__ import annotations

import base64
import gzip
import importlib.util
import io
import json
import os
import re
import shutil
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any, get_args

import fsspec
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from beholder.config import STAGES, SourceConfig
from beholder.data import containers, images, sources
from beholder.data.check import check_data
from beholder.data.formats import BadRecord, Rules
from beholder.data.images import read_bytes
from beholder.data.sources import RecordError, Records, instructs, open_sources
from beholder.types import ImageRef, ImageSlot, ShapeName, UserError

FORMATS = Path(__file__).parent / "formats"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BEHOLDER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(path: Path | str, *, chat: bool = False, max_images: int = 4, **source: Any) -> Records:
    return open_sources(
        [SourceConfig(json_path=str(path), **source)],
        image_token="<image>", max_images=max_images, on_reject="collect", chat=chat,
    )  # fmt: skip


def lines(path: Path, *records: Any) -> Path:
    path.write_bytes(b"".join(orjson.dumps(r) + b"\n" for r in records))
    return path


def colour(ref: ImageRef) -> str:
    """The name of a tile's colour, by its pixels."""
    red, green, blue = Image.open(io.BytesIO(read_bytes(ref))).convert("RGB").getpixel((0, 0))  # type: ignore[misc]
    return "white" if min(red, green, blue) > 200 else max(("red", red), ("green", green), ("blue", blue), key=_by)[0]


def _by(pair: tuple[str, int]) -> int:
    return pair[1]


# ---------------------------------------------------------------------------------------------------------------
# The table

LAYOUTS: list[tuple[str, dict[str, Any], str, list[list[str]], str]] = [
    # file or folder, settings of the source, what it is read as, colours of the good records' images, reason of the bad
    ("captions.json", {}, "JSON array of caption", [["red"], ["blue"]], "wrong_type"),
    ("captions.jsonl", {}, "JSON lines of caption", [["red"], ["blue"]], "wrong_type"),
    ("captions.jsonl.gz", {}, "JSON lines of caption", [["red"], ["blue"]], "wrong_type"),
    ("captions.csv", {}, "CSV of caption", [["red"], ["blue"]], "missing_image"),
    ("open_clip.tsv", {}, "TSV of caption", [["red"], ["blue"]], "missing_image"),
    ("data.json", {}, "JSON object with one array of caption", [["red"], ["blue"]], "wrong_type"),
    ("several.jsonl", {}, "JSON lines of caption", [["red"], ["red"], ["blue"], ["blue"]], "wrong_type"),
    ("imagefolder", {}, "JSON lines of caption", [["red"], ["blue"]], "outside_root"),
    ("imagefolder_csv", {}, "CSV of caption", [["red"], ["blue"]], "missing_image"),
    ("coco_captions.json", {}, "COCO captions of caption", [["red"], ["red"]], "no_image"),
    ("captions.parquet", {}, "parquet of caption", [["red"], ["blue"]], "no_image"),
    ("bytes.parquet", {}, "parquet of caption", [["red"], ["blue"]], "no_image"),
    ("arrow_folder", {}, "Arrow of caption", [["red"], ["blue"]], "no_image"),
    ("shards.tar", {}, "tar shards of caption", [["red"], ["blue"]], "no_image"),
    ("llava.json", {}, "JSON array of turns", [["red"], ["blue"]], "image_count"),
    ("onevision.parquet", {}, "parquet of turns", [["red"], ["blue"]], "image_count"),
    ("m4.json", {}, "JSON array of turns", [["red", "blue"], ["blue", "green"]], "image_count"),
    ("mantis.parquet", {}, "parquet of turns", [["red", "white"], ["blue", "white"]], "image_count"),
    ("sharegpt.jsonl", {}, "JSON lines of turns", [["red"], ["blue"]], "unknown_role"),
    ("openai.jsonl", {}, "JSON lines of parts", [["red"], ["blue"]], "part_without_image"),
    ("trl.jsonl", {}, "JSON lines of parts", [["red", "white"], ["blue", "white"]], "unknown_part"),
    ("trl.parquet", {}, "parquet of parts", [["red", "white"], ["blue", "white"]], "image_count"),
    ("cauldron.parquet", {}, "parquet of texts", [["red", "white"], ["blue", "white"]], "no_image"),
    ("finevision.parquet", {"min_rating": {"relevance": 3}}, "parquet of texts", [["red"], ["blue"]], "low_rating"),
    ("ms_swift.jsonl", {}, "JSON lines of query", [["red"], ["blue"]], "image_count"),
    ("alpaca.json", {}, "JSON array of instruction", [["red"], ["blue"]], "wrong_type"),
    ("unified.jsonl", {}, "JSON lines of instruction", [["red"], ["blue"]], "remote_image"),
    ("questions.jsonl", {}, "JSON lines of question", [["red"], ["blue"]], "no_target"),
    ("nlvr2.jsonl", {"image_root": "images"}, "JSON lines of statement", [["red", "green"]] * 2, "wrong_type"),
    ("vqa_questions.json", {"image_root": "images", "annotations_path": "vqa_annotations.json"},
     "VQA question file of question", [["red"], ["blue"]], "no_annotation"),
    ("gqa.json", {"image_root": "images", "image_pattern": "{image_id}.png"}, "GQA question file of question",
     [["red"], ["blue"]], "no_target"),
    ("renamed.csv", {"columns": {"image": "img_path", "caption": "alt_text"}}, "CSV of caption", [["red"], ["blue"]],
     "missing_image"),
]  # fmt: skip


def layout(name: str, settings: dict[str, Any]) -> SourceConfig:
    paths = ("image_root", "annotations_path")
    told = {k: str(FORMATS / v) if k in paths else v for k, v in settings.items()}
    return SourceConfig(json_path=str(FORMATS / name), **told)


def test_every_layout_is_recognised_and_its_records_are_accepted_or_rejected_by_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print(f"\n{'layout':22} {'read as':40} {'in':>3} {'accepted':>8} {'rejected':>8}")
    for name, settings, read_as, colours, reason in LAYOUTS:
        source = layout(name, settings)
        stage = STAGES["instruct" if instructs(source) else "align"]

        report = check_data([source], stage=stage, max_images=4, verify_images="decode")
        records = open_sources([source], image_token="<image>", max_images=4, on_reject="collect", chat=stage.dialogues)

        print(f"{name:22} {read_as:40} {report.records:3} {report.accepted:8} {len(report.rejects):8}")
        assert read_as in report.layouts, (name, report.layouts)
        assert report.records == len(colours) + 1 == report.accepted + len(report.rejects), name
        assert list(report.rejects_by_reason) == [reason], (name, report.rejects)
        good = [records[i] for i in range(len(records)) if records[i].id not in {r.id for r in report.rejects}]
        assert [[colour(ref) for ref in e.images] for e in good] == colours, name
        for example in good:
            slots = [p.index for turn in example.turns for p in turn.parts if isinstance(p, ImageSlot)]
            assert slots == list(range(len(example.images)) if len(example.turns) > 1 else []), name
    with capsys.disabled():
        print(capsys.readouterr().out)


def test_the_files_of_the_table_are_those_that_are_made() -> None:
    spec = importlib.util.spec_from_file_location("make_formats", FORMATS / "make.py")
    assert spec is not None and spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)

    made = make.layouts()

    there = {str(p.relative_to(FORMATS)) for p in FORMATS.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert there == set(made)
    for name, data in made.items():
        if not name.endswith((".parquet", ".arrow", ".gz")):  # which name the versions of their writers
            assert (FORMATS / name).read_bytes() == data, f"{name}: make it again with {FORMATS / 'make.py'}"


def test_the_documents_table_has_an_example_of_every_layout_and_the_example_is_read(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `{")]
    shapes, titles = set(), set()
    for k, row in enumerate(rows):
        # VQA has its answers in a second file
        files = [tmp_path / f"{k}.json", tmp_path / f"{k}_answers.json"]
        found = [
            lines(file, json.loads(text)) for file, text in zip(files, re.findall("`([^`]+)`", row[1]), strict=False)
        ]
        records = opened(found[0], **({"annotations_path": str(found[1])} if len(found) > 1 else {}))
        assert not records.rejects, (row, records.rejects)
        (name,) = records.layouts
        title, _, shape = name.partition(" of ")
        assert row[2].strip() == f"`{shape}`"
        assert title == "JSON lines" or title in row[3]
        shapes.add(shape)
        titles.add(title)
    assert titles == {"JSON lines", "COCO captions", "VQA question file", "GQA question file"}
    from beholder.data.formats import SHAPES

    assert shapes == set(SHAPES)
    for container in containers.CONTAINERS.values():
        assert container.title in text


# ---------------------------------------------------------------------------------------------------------------
# What shapes say


def test_an_absent_field_and_a_null_one_are_the_same(tmp_path: Path) -> None:
    turns = [{"from": None, "value": None, "role": "user", "content": "?"},
             {"from": "gpt", "value": "x", "role": None, "content": None}]  # fmt: skip
    path = lines(
        tmp_path / "a.jsonl",
        {"image": "a.png", "caption": "x", "conversations": None, "messages": None},
        {"image": "a.png", "images": None, "caption": None, "messages": turns},
        {"image": "a.png", "messages": [{"role": "user", "content": [
            {"type": "image", "text": None, "image": None}, {"type": "text", "text": "?", "image": None}]},
            {"role": "assistant", "content": "x"}]},
    )  # fmt: skip

    records = opened(path, chat=True)

    assert [r.reason for r in records.rejects] == ["starts_with_assistant"]
    assert [e.turns[0].parts for e in records] == [(ImageSlot(0), "\n?"), (ImageSlot(0), "?")]
    assert len(opened(path)) == 2, "in an alignment a conversation needs its marker"


def test_null_columns_of_parquet_are_absent(tmp_path: Path) -> None:
    picture = {"bytes": (FORMATS / "images/red.png").read_bytes(), "path": None}
    rows = [{"image": picture, "caption": "x", "conversations": None},
            {"image": picture, "caption": None, "conversations": [{"from": "gpt", "value": "y"}]}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")

    records = opened(tmp_path / "a.parquet", max_images=1)

    assert records.target_texts() == ["x"] and [r.reason for r in records.rejects] == ["image_count"]


def test_a_marker_typed_where_a_shape_has_none_stays_text(tmp_path: Path) -> None:
    text = "What does <image> mean?"
    path = lines(
        tmp_path / "a.jsonl",
        {"images": ["a"], "texts": [{"user": text, "assistant": "a <image>"}]},
        {"image": "a", "question": text, "answer": "x"},
        {"images": ["a"], "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]},
                                       {"role": "assistant", "content": "x"}]},
        {"images": ["a", "b"], "sentence": text, "label": True},
    )  # fmt: skip

    records = opened(path, chat=True)

    assert not records.rejects and records.inserted_markers == 3
    assert [e.turns[0].parts for e in records] == [
        (ImageSlot(0), "\n" + text), (ImageSlot(0), "\n" + text), (ImageSlot(0), text),
        (ImageSlot(0), ImageSlot(1), "\n" + text),
    ]  # fmt: skip
    assert records[0].turns[1].parts == ("a <image>",)


def test_history_system_and_input_come_before_the_question(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {
        "images": ["a", "b"], "system": "S", "history": [["<image> one", "1"]], "instruction": "two <image>",
        "input": "more", "output": "2",
    })  # fmt: skip

    (example,) = opened(path, chat=True)

    assert [(t.role, t.parts) for t in example.turns] == [
        ("system", ("S",)), ("user", (ImageSlot(0), " one")), ("assistant", ("1",)),
        ("user", ("two ", ImageSlot(1), "\nmore")), ("assistant", ("2",)),
    ]  # fmt: skip


def test_each_caption_of_a_list_is_a_record_of_its_own(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl", {"id": "x", "image": "a", "caption": ["one", "two"]}, {"image": "b", "text": "z"}
    )

    records = opened(path)

    assert records.ids() == [e.id for e in records] == ["x", "x#1", "a:1"]
    assert records.target_texts() == [e.target_text for e in records] == ["one", "two", "z"]
    assert [e.row for e in records] == [0, 0, 1] and list(opened(path)) == list(records)


def test_an_inline_picture_is_read_where_it_lies_and_not_held(tmp_path: Path, own_cache: Path) -> None:
    noise = os.urandom(200_000)
    uri = "data:image/png;base64," + base64.b64encode(noise).decode()
    record = {"image": uri, "caption": "x", "note": "data:not this one"}
    path = lines(tmp_path / "a.jsonl", *({"note": "data:first", **record, "id": str(i)} for i in range(40)))
    escaped = tmp_path / "b.json"
    escaped.write_text("[" + json.dumps(record).replace("/", "\\/") + "]")
    table = tmp_path / "c.csv"
    table.write_text(f'image,caption\n"{uri}",x\n')

    tracemalloc.start()
    records = opened(path)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()

    assert len(records) == 40 and held < 4_000_000 < 40 * len(noise)
    for given in (records, opened(escaped), opened(table)):
        ref = given[len(given) - 1].images[0]
        assert ref.kind == "inline" and len(ref.path) < 40
        assert read_bytes(ref) == noise


@pytest.mark.parametrize("uri", ["data:image/png;base64,%%%", "data:image/png,raw", "data:"])
def test_an_inline_picture_that_is_not_base64_is_an_error_of_the_picture(tmp_path: Path, uri: str) -> None:
    report = check_data(
        [SourceConfig(json_path=str(lines(tmp_path / "a.jsonl", {"image": uri, "caption": "x"})))],
        verify_images="decode",
    )

    assert report.rejects_by_reason == {"undecodable": 1} and "base64" in report.rejects[0].detail


def test_pictures_of_tables_are_bytes_or_paths_below_the_root_or_missing(tmp_path: Path) -> None:
    red = (FORMATS / "images/red.png").read_bytes()
    cells = [{"bytes": red, "path": "x.png"}, {"bytes": None, "path": "images/blue.png"},
             {"bytes": None, "path": "/etc/passwd"}, {"bytes": None, "path": None}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist([{"image": c, "caption": "x"} for c in cells]), tmp_path / "a.parquet")

    report = check_data(
        [SourceConfig(json_path=str(tmp_path / "a.parquet"), image_root=str(FORMATS))], verify_images="decode"
    )

    assert report.accepted == 2
    assert report.rejects_by_reason == {"no_image": 1, "outside_root": 1}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_with_lists_slices_nulls_and_nested_bytes_give_the_right_pictures(tmp_path: Path, kind: str) -> None:
    def cell(i: int) -> dict[str, Any]:
        return {"bytes": f"{i}".encode(), "path": None}

    rows = [
        {"images": None if i % 5 == 3 else [cell(10 * i + k) for k in range(i % 3)], "text": f"{i}"} for i in range(60)
    ]
    table = pa.Table.from_pylist(rows)
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=7)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table.slice(0, 31))
            writer.write_table(table.slice(31))

    records = opened(path)

    wanted = {i: [f"{10 * i + k}".encode() for k in range(i % 3)] for i in range(60) if i % 5 != 3 and i % 3}
    assert {e.row: [read_bytes(r) for r in e.images] for e in records} == wanted
    assert {r.reason for r in records.rejects} == {"no_image"}


def test_row_groups_too_large_to_be_held_are_read_from_a_copy(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_GROUP_BYTES", 1000)
    rows = [{"image": {"bytes": f"{i}".encode() * 300, "path": None}, "caption": "x"} for i in range(200)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")

    records = opened(tmp_path / "a.parquet")

    assert [read_bytes(records[i].images[0]) for i in (150, 3)] == [b"150" * 300, b"3" * 300]
    assert len(list((own_cache / "files").rglob("*.arrow"))) == 1


def test_a_picture_column_of_another_name_is_read_from_the_table(tmp_path: Path) -> None:
    rows = [{"jpg": f"{i}".encode(), "image": "not this", "txt": f"{i}"} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")

    records = opened(tmp_path / "a.parquet", columns={"image": "jpg", "caption": "txt"})

    assert [read_bytes(e.images[0]) for e in records] == [b"0", b"1", b"2"] and records.target_texts() == [
        "0",
        "1",
        "2",
    ]


# ---------------------------------------------------------------------------------------------------------------
# Containers


@pytest.mark.parametrize("name", ["captions.json", "captions.jsonl", "captions.csv", "open_clip.tsv", "data.json"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_byte_order_mark_and_gzip_change_nothing(tmp_path: Path, name: str, packed: bool) -> None:
    data = b"\xef\xbb\xbf" + (FORMATS / name).read_bytes()
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(data) if packed else data)

    with_mark, plain = opened(path), opened(FORMATS / name)

    assert with_mark.target_texts() == plain.target_texts() and len(with_mark.rejects) == len(plain.rejects)
    assert with_mark.layouts == plain.layouts
    assert with_mark[0].file == str(path) and with_mark[0].images[0].root == str(tmp_path)


def test_a_compressed_shard_is_unpacked_once_and_its_pictures_read_from_there(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "s.tgz"
    path.write_bytes(gzip.compress((FORMATS / "shards.tar").read_bytes()))

    records = opened(path)
    again = opened(path)

    assert [colour(e.images[0]) for e in records] == ["red", "blue"] and list(again) == list(records)
    assert len(list((own_cache / "files").rglob("*.tar"))) == 1


@pytest.mark.parametrize("cut", [-1, -9, 30])
def test_a_gzip_that_ends_early_or_is_damaged_is_an_error_and_leaves_nothing(
    tmp_path: Path, own_cache: Path, cut: int
) -> None:
    data = (FORMATS / "captions.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(data[:cut])
    flipped = bytearray(data)
    flipped[-6] ^= 1
    (tmp_path / "b.jsonl.gz").write_bytes(flipped)

    with pytest.raises(RecordError, match=r"a\.jsonl\.gz: the gzip ends early"):
        opened(tmp_path / "a.jsonl.gz")
    with pytest.raises(RecordError, match=r"b\.jsonl\.gz: the gzip is damaged"):
        opened(tmp_path / "b.jsonl.gz")
    assert not [p for p in (own_cache / "files").rglob("*") if p.is_file()]


def test_a_gzip_that_would_fill_the_disk_is_stopped(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 1000))
    monkeypatch.setattr(containers, "_MIN_FREE_BYTES", 1 << 62)

    with pytest.raises(UserError, match="less than 1 GB free"):
        opened(tmp_path / "a.jsonl.gz")
    assert not [p for p in (own_cache / "files").rglob("*") if p.is_file()]


@pytest.mark.parametrize("depth", [255, 990, 5000])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tar", "coco.json"])
def test_json_nested_too_deeply_is_a_reject_that_says_so(tmp_path: Path, name: str, depth: int) -> None:
    uri = "data:image/png;base64,AAAA"
    deep = "[" * depth + "]" * depth
    record = f'{{"image": "{uri}", "caption": "x", "z": {deep}}}'
    objects = '{"image":' * depth + f'"{uri}"' + "}" * depth
    path = tmp_path / name
    if name == "a.jsonl":
        path.write_text(f'{record}\n{{"image": {objects}, "caption": "x"}}\n')
    elif name == "a.csv":
        path.write_text(f'image,caption\na.png,"{deep}"\n')
    elif name == "a.tar":
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo("a.json")
            info.size = len(record)
            tar.addfile(info, io.BytesIO(record.encode()))
    else:
        if depth > 255:
            pytest.skip("the scanner of the whole file stops first, which is an error with its byte")
        told = '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "x"}'
        path.write_text(f'{told}, {{"image_id": 1, "caption": {deep}}}]}}')

    rejects = opened(path).rejects

    assert len(rejects) == (2 if name == "a.jsonl" else 1)
    assert all("nested more than 250 deep" in reject.detail for reject in rejects)


def test_an_image_id_that_stands_for_two_files_of_coco_is_a_reject(tmp_path: Path) -> None:
    images = [
        {"id": 1, "file_name": "a.png"},
        {"id": "1", "file_name": "b.png"},
        *[{"id": 2, "file_name": "c.png"}] * 2,
    ]
    annotations = [{"image_id": k, "caption": str(k)} for k in (1, 2)]
    path = tmp_path / "coco.json"
    path.write_bytes(orjson.dumps({"images": images, "annotations": annotations}))

    records = opened(path)

    assert records.target_texts() == ["2"]
    assert [r.reason for r in records.rejects] == ["doubled_image"]


def table_file(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_rows_of_nothing_are_refused_and_not_counted(tmp_path: Path, name: str) -> None:
    path = table_file(tmp_path / name, pa.table({"image": pa.nulls(300_000), "caption": pa.nulls(300_000)}))

    with pytest.raises(RecordError, match="claims 300,000 rows in"):
        opened(path)


SAME = pa.array(["x" * 20_000] * 3000)
ONCE = {
    "a.parquet": SAME,
    "b.parquet": SAME.dictionary_encode(),
    "talk.parquet": pa.array([[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x" * 20_000}]] * 3000),
    "a.arrow": SAME.dictionary_encode(),
    "views.arrow": pa.array(["x" * 20_000] * 20).cast(pa.string_view()),
}


@pytest.mark.parametrize("name", ONCE)
def test_a_text_that_stands_once_in_a_file_and_in_every_row_is_never_held_for_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(containers, "MAX_RECORD_BYTES", 1_000_000)
    column, said = ONCE[name], "conversations" if name == "talk.parquet" else "caption"
    path = table_file(tmp_path / name, pa.table({"image": ["a.png"] * len(column), said: column}))

    tracemalloc.start()
    records = opened(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(records) == len(column) and records[len(column) - 1].target_text == "x" * 20_000
    assert peak < 8_000_000


def test_a_file_whose_rows_are_far_more_text_than_it_is_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_MOST_COPIED", 10_000_000)
    path = table_file(tmp_path / "a.parquet", pa.table({"image": ["a.png"] * 3000, "caption": SAME}))

    with pytest.raises(RecordError, match=r"over 10,\d{3},\d{3} bytes of JSON, the file has"):
        opened(path)


@pytest.mark.parametrize("dictionary", [True, False])
def test_texts_and_talks_across_row_groups_are_those_that_were_written(tmp_path: Path, dictionary: bool) -> None:
    said = [None if i % 7 == 3 else f"{i % 5}" * (i % 11 + 1) for i in range(700)]
    talks = [[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}] for text in said]
    for name, table in (("caption", {"caption": said}), ("talk", {"conversations": talks})):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"image": ["a"] * 700, **table}), path, row_group_size=90, use_dictionary=dictionary)
        records = opened(path)
        assert records.target_texts() == [text for text in said if text is not None], name
        assert len(records.rejects) == said.count(None)


def test_a_row_that_a_few_bytes_make_endless_is_a_reject(tmp_path: Path) -> None:
    offsets = pa.array([0, 1, 2**31 - 2, 2**31 - 1], pa.int32())
    talk = pa.ListArray.from_arrays(offsets, pa.nulls(2**31 - 1))
    path = table_file(tmp_path / "a.arrow", pa.table({"image": ["a.png"] * 3, "conversations": talk}))

    rejects = opened(path).rejects

    assert [r.reason for r in rejects] == ["wrong_type", "too_large", "wrong_type"]


def test_columns_that_no_record_has_are_not_unpacked(tmp_path: Path) -> None:
    damaged = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    table = pa.table({"z": damaged, "image": ["a.png"], "caption": ["x"]})

    assert opened(table_file(tmp_path / "a.arrow", table)).target_texts() == ["x"]
    read = opened(table_file(tmp_path / "b.arrow", table.rename_columns(["title", "image", "caption"])))
    assert [(r.reason, r.detail) for r in read.rejects] == [("bad_row", "row 0: title is not UTF-8")]


@pytest.mark.parametrize(
    ("kind", "value", "id"),
    [
        (pa.timestamp("us"), 0, "1970-01-01T00:00:00"),
        (pa.timestamp("ns"), 1, "1970-01-01 00:00:00.000000001"),
        (pa.timestamp("us"), 2**62, "<value out of range: 4611686018427387904>"),
        (pa.duration("s"), 2**62, "4611686018427387904"),
        (pa.date64(), 86_400_000 * 2**35, "<value out of range: 2968681394995200000>"),
    ],
)
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_time_that_python_has_not_is_read_as_text(
    tmp_path: Path, name: str, kind: pa.DataType, value: int, id: str
) -> None:
    if name == "a.parquet" and (kind == pa.date64() or pa.types.is_duration(kind)):
        pytest.skip("parquet has no such time")
    times = pa.array([value], pa.int64()).view(kind)
    path = table_file(tmp_path / name, pa.table({"id": times, "image": ["a.png"], "caption": ["x"]}))

    assert opened(path).ids() == [id]


def test_a_time_zone_that_there_is_not_and_a_time_inside_a_list_are_told(tmp_path: Path) -> None:
    there, far = pa.array([1], pa.int64()), pa.array([2**62], pa.int64()).view(pa.timestamp("us"))
    listed = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), far)
    for times in (there.view(pa.timestamp("us", "../../etc/passwd")), listed):
        table = pa.table({"id": times, "image": ["a.png"], "caption": ["x"]})
        with pytest.raises(RecordError, match="cannot be read as an Arrow file"):
            opened(table_file(tmp_path / "a.arrow", table))


@pytest.mark.parametrize("text", ["a.png," + "x" * 5000, 'a.png,"' + "x\n" * 5000, '"\n",' * 5000], ids=len)
def test_a_row_without_an_end_is_an_error_before_it_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(containers, "MAX_RECORD_BYTES", 1000)
    path = tmp_path / "a.csv"
    path.write_text("image,caption\n" + "b.png,y\n" * 1000 + text)

    with pytest.raises(RecordError, match="a row has over 1,000 characters"):
        opened(path)
    path.write_text("image,caption\n" + "b.png,y\n" * 1000)
    assert len(opened(path)) == 1000


def test_a_row_of_a_table_that_does_not_fit_its_header_is_a_reject_and_an_open_quote_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'image,caption\na.png,one\nb.png\nc.png,"two\nlines"\nd.png,three,x\ne.png,\xff\n\nf.png,\n')

    records = opened(path)

    assert records.target_texts() == ["one", "two\nlines"] and [e.row for e in records] == [0, 2]
    assert [(r.row, r.reason) for r in records.rejects] == [
        (1, "bad_row"), (3, "bad_row"), (4, "bad_row"), (5, "missing_field"),
    ]  # fmt: skip
    assert "line 3: has 1 cells, the header names 2 columns" in records.rejects[0].detail
    path.write_text('image,caption\na.png,one\nb.png,"two\nc.png,three\n')
    with pytest.raises(RecordError, match="opened in the row of line 3 never close"):
        opened(path)
    path.write_text("image,caption,image\na,b,c\n")
    with pytest.raises(RecordError, match="'image' are named twice"):
        opened(path)


def test_folders_and_globs_are_read_in_order_and_mixed_ones_refused(tmp_path: Path) -> None:
    for k in (2, 0, 1):
        lines(tmp_path / f"{k}.jsonl", {"image": "a", "caption": f"{k}"})

    assert opened(tmp_path).target_texts() == opened(tmp_path / "*.jsonl").target_texts() == ["0", "1", "2"]
    (tmp_path / "x.tar").write_bytes((FORMATS / "shards.tar").read_bytes())
    with pytest.raises(UserError, match=r"holds \.jsonl and \.tar files.*a glob such as"):
        opened(tmp_path)
    assert len(opened(tmp_path, dataset="webdataset")) == 2


def test_an_arrow_folder_is_read_by_its_list_and_only_below_itself(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(FORMATS / "arrow_folder", folder / "train")
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')

    with pytest.raises(UserError, match=r"splits train; name the folder of one, such as .*saved/train"):
        opened(folder)
    assert [colour(e.images[0]) for e in opened(folder / "train")] == ["red", "blue"]
    (folder / "train" / "state.json").write_text('{"_data_files": [{"filename": "../../x.arrow"}]}')
    with pytest.raises(RecordError, match="expected names of files in this folder"):
        opened(folder / "train")
    (folder / "train" / "state.json").write_text('{"_data_files": [{"filename": "a\\u0000.arrow"}]}')
    with pytest.raises(RecordError, match="expected names of files in this folder"):
        opened(folder / "train")
    (folder / "train" / "state.json").write_text("[]")
    with pytest.raises(RecordError, match=r"not what datasets\.save_to_disk writes"):
        opened(folder / "train")


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_a_damaged_arrow_file_is_an_error(tmp_path: Path, cut: float) -> None:
    data = (FORMATS / "arrow_folder/data-00000-of-00001.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(data[: int(len(data) * cut)])

    with pytest.raises(RecordError, match="cannot be read as an Arrow file"):
        opened(tmp_path / "a.arrow")


def test_the_copies_of_records_are_made_again_when_they_are_damaged_or_gone(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(opened(FORMATS / "captions.parquet"))
    (copies,) = (own_cache / "index").glob("*.json")

    copies.write_bytes(copies.read_bytes().replace(b"red", b"dim"))
    assert list(opened(FORMATS / "captions.parquet")) == expected
    copies.unlink()
    assert list(opened(FORMATS / "captions.parquet")) == expected
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BEHOLDER_CACHE", str(tmp_path / "file"))
    assert [e.target_text for e in opened(FORMATS / "captions.parquet")] == [e.target_text for e in expected]


# ---------------------------------------------------------------------------------------------------------------
# Bad input

TALK = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]


def parts(*content: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}, TALK[1]], **fields}


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"image": "a", "caption": "x", "messages": TALK}, "two_shapes",
     "caption (caption) and turns (messages); say which is meant: shape in data.sources, or beholder check --as"),
    ({"image": "a", "text": "x", "question": "?", "answer": "x"}, "two_shapes", "it fits 2 shapes"),
    (parts({"type": "video", "video": "x"}), "unknown_part", "messages[0].content[0].type is the string 'video'"),
    (parts({"text": "x"}), "unknown_part", "messages[0].content[0].type is null or absent"),
    (parts("x"), "wrong_type", "messages[0].content[0] is the string 'x', expected an object with a type"),
    (parts({"type": "text", "text": 3}), "wrong_type", "messages[0].content[0].text is the number 3"),
    (parts({"type": "image"}), "part_without_image", "messages[0].content[0] is an image part without an image"),
    (parts({"type": "image", "image": "a"}, {"type": "image"}), "part_without_image", "messages[0].content[1]"),
    (parts({"type": "image"}, {"type": "image"}, images=["a"]), "image_count", "1 images but 2 image parts"),
    (parts({"type": "image"}, images=["a", "b"]), "image_count", "2 images but 1 image parts"),
    (parts({"type": "image_url", "image_url": {}}), "no_image", "content[0].image_url is an object without"),
    (parts({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}), "remote_image", "nothing is fetched"),
    ({"messages": [TALK[0], {"role": "assistant", "content": [{"type": "image", "image": "a"}]}]}, "image_place",
     "messages[1].content[0] is an image in a turn of assistant"),
    ({"image": "file:///etc/passwd", "caption": "x"}, "remote_image", "is the URL"),
    ({"image": {"bytes": "aGk=", "path": None}, "caption": "x"}, "wrong_type", "image.bytes is a string"),
    ({"image": {"!": ["image", 0]}, "caption": "x"}, "no_image", "without bytes, path or url"),
    ({"image": True, "caption": "x"}, "wrong_type", "image is the boolean true"),
    ({"images": ["a", None], "caption": "x"}, "wrong_type", "images[1] is null"),
    ({"images": ["a"], "texts": [{"user": "?"}]}, "wrong_type", "texts[0].assistant is null or absent"),
    ({"images": ["a"], "query": "?", "response": "x", "history": [["a"]]}, "wrong_type", "history[0] is a list"),
    ({"image": "a", "question": "?", "answers": [3]}, "wrong_type", "answers[0] is the number 3"),
    ({"images": ["a"], "sentence": "x", "label": True}, "image_count", "1 images, a statement is about 2"),
    ({"image": "a", "caption": "x", "relevance": "high"}, "wrong_type", "relevance is the string 'high'"),
    ({"image": "a", "caption": "x", "relevance_ratings": [5, None]}, "wrong_type", "relevance_ratings[1] is null"),
    ({"image": "a", "caption": "x", "relevance_ratings": [5, True]}, "wrong_type", "relevance_ratings[1] is the bool"),
    ({"image": "a", "caption": "x", "relevance_ratings": [5, 1]}, "low_rating", "is 1, min_rating wants at least 2"),
    *(({"image": "a", "caption": "x", "relevance": n}, "wrong_type", f"relevance is the string '{n}'")
      for n in ("nan", "inf", "-inf")),
    ({"image": "a", "caption": "x", "relevance_ratings": ["nan", 1]}, "wrong_type", "relevance_ratings[0] is the str"),
    ({"image": "a", "caption": "x"}, "no_rating", "none of relevance_ratings, relevance_min, relevance is there"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "reason", "detail"), BAD, ids=[f"{r}-{d[:30]}" for _, r, d in BAD])
def test_a_bad_record_is_a_named_reject_between_its_neighbours(
    tmp_path: Path, record: dict[str, Any], reason: str, detail: str
) -> None:
    rated = "rating" in detail or any(name.startswith("relevance") for name in record)
    good = {"image": "a", "caption": "x", "relevance": "4.5"}
    path = lines(tmp_path / "a.jsonl", good, record, good)

    records = opened(path, min_rating={"relevance": 2} if rated else {})

    assert [e.row for e in records] == [0, 2]
    (reject,) = records.rejects
    assert (reject.row, reject.reason, reject.file) == (1, reason, str(path))
    assert detail in reject.detail and "line 2" in reject.detail


def test_a_record_that_fits_two_shapes_is_read_as_the_one_it_is_said_to_be(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"image": "a", "text": "x", "messages": [{"role": "user", "content": "<image>"},
                                                                                 TALK[1]]})  # fmt: skip

    assert [r.reason for r in opened(path).rejects] == ["two_shapes"]
    assert [len(opened(path, shape=shape)[0].turns) for shape in ("caption", "turns")] == [1, 2]
    assert opened(path, shape="caption").fingerprint != opened(path, shape="turns").fingerprint
    assert opened(path, shape="parts")[0].turns[0].parts == (ImageSlot(0), "\n<image>"), "there it is text"


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_column_that_is_not_there_is_an_error_with_the_nearest_names(tmp_path: Path, name: str) -> None:
    rows = [{"img_path": "a", "alt_text": "x"}] * 2
    match name:
        case "a.jsonl":
            lines(tmp_path / name, *rows)
        case "a.csv":
            (tmp_path / name).write_text("img_path,alt_text\na,x\n")
        case _:
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)

    assert opened(tmp_path / name, columns={"image": "img_path", "caption": "alt_text"}).target_texts()[0] == "x"
    with pytest.raises(UserError, match=rf"{name}.*'img_paht', which is no field here; nearest: img_path"):
        opened(tmp_path / name, columns={"image": "img_paht", "caption": "alt_text"})
    with pytest.raises(UserError, match=r"columns\.captoin: .*; nearest: caption"):
        opened(tmp_path / name, columns={"captoin": "alt_text"})


# ---------------------------------------------------------------------------------------------------------------
# Remote


@pytest.fixture
def bucket() -> Any:
    fs = fsspec.filesystem("memory")
    for name in ("captions.parquet", "shards.tar"):
        fs.pipe(f"/bucket/{name}", (FORMATS / name).read_bytes())
    yield fs
    fs.rm("/bucket", recursive=True)


@pytest.mark.parametrize("protocol", ["memory://", "filecache::memory://", "simplecache::memory://"])
def test_remote_tables_and_shards_are_fetched_once_and_read_like_files(
    bucket: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    urls = [f"{protocol}bucket/{name}" for name in ("captions.parquet", "shards.tar")]

    for url, num in zip(urls, (1, 1), strict=True):
        records = opened(url)
        assert [colour(e.images[0]) for e in records] == ["red", "blue"] and len(records.rejects) == num
        assert records[0].file == url and records[0].images[0].root.startswith(str(own_cache))
    monkeypatch.setattr(containers, "_copy", lambda *_: pytest.fail("fetched again"))
    assert [len(opened(url)) for url in urls] == [2, 2]


def test_a_remote_file_that_changed_is_fetched_again_and_globs_and_folders_name_its_files(bucket: Any) -> None:
    assert len(opened("memory://bucket/*.tar")) == 2
    first = opened("memory://bucket/captions.parquet")
    bucket.pipe("/bucket/captions.parquet", (FORMATS / "bytes.parquet").read_bytes())
    second = opened("memory://bucket/captions.parquet")

    assert first.fingerprint != second.fingerprint and [colour(e.images[0]) for e in second] == ["red", "blue"]
    bucket.rm("/bucket/shards.tar")
    assert {e.file for e in opened("memory://bucket")} == {"memory:///bucket/captions.parquet"}


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("memory://bucket/gone.parquet", r"gone\.parquet: cannot be fetched \(FileNotFoundError"),
        ("memory://bucket/*.json", "no such file, folder or glob"),
        ("nosuch://bucket/a.parquet", "Protocol not known: nosuch"),
        ("ftp://localhost:1/x.parquet", r"x\.parquet: cannot be fetched \(ConnectionRefusedError"),
        ("zip://a.parquet::memory://bucket/captions.parquet", r"cannot be fetched \(BadZipFile"),
        ("zip://a.parquet::memory://bucket/gone.zip", r"cannot be fetched \(FileNotFoundError"),
        ("reference://x", r"cannot be fetched \(TypeError"),
        ("generic://x", r"cannot be fetched \(TypeError"),
    ],
)
def test_what_cannot_be_fetched_is_an_error_that_names_it(bucket: Any, url: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        opened(url)


def test_folders_within_a_remote_glob_are_no_files_and_a_source_that_fails_is_not_the_caches_fault(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe("/bucket/more/captions.parquet", (FORMATS / "captions.parquet").read_bytes())
    assert len({e.file for e in opened("memory://bucket/**")}) == 3

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError("the line is down")

    bucket.pipe("/bucket/late.parquet", b"PAR1")
    monkeypatch.setattr(type(bucket), "open", fails)
    with pytest.raises(UserError, match=r"late\.parquet: cannot be fetched \(OSError: the line is down\)"):
        opened("memory://bucket/late.parquet")


def test_a_protocol_without_its_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(_: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", without)
    with pytest.raises(UserError, match=r"s3://bucket/a\.parquet: .*Install s3fs.*pip install 'beholder\[remote\]'"):
        opened("s3://bucket/a.parquet")


def test_nothing_is_fetched_for_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda *_: pytest.fail("fetched"))
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        data = orjson.dumps({"caption": "x", "image": "memory://bucket/a.png"})
        member = tarfile.TarInfo("0.json")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))

    assert [r.reason for r in opened(shard).rejects] == ["no_image"]
    assert sources.missing_files([SourceConfig(json_path="s3://bucket/a.parquet")]) == []


# ---------------------------------------------------------------------------------------------------------------
# What must not be lost or be taken for something else


@pytest.mark.parametrize("shape", [name for name in get_args(ShapeName)])
def test_a_shape_that_is_said_outright_rejects_records_without_its_fields_by_name(shape: ShapeName) -> None:
    rules = Rules("auto", "<image>", 6, shape=shape)

    with pytest.raises(BadRecord) as caught:
        rules.parse(orjson.dumps({"image": "a.png", "txt": "a tile"}))

    assert caught.value.reason == "missing_field"


@pytest.mark.parametrize("said", [
    {"conversations": [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "A tile."}]},
    {"texts": [{"user": "What?", "assistant": "A tile."}]},
    {"question": "What?", "answer": "a tile"},
    {"query": "What?", "response": "A tile."},
])  # fmt: skip
def test_a_system_text_beside_the_turns_is_the_first_turn(said: dict[str, Any]) -> None:
    parsed = Rules("auto", "<image>", 6).parse(orjson.dumps({"image": "a.png", "system": "Be brief.", **said}))

    assert parsed.messages[0] == ("system", ("Be brief.",))
    assert [role for role, _ in parsed.messages].count("system") == 1


def test_a_system_text_and_a_system_turn_are_one_too_many() -> None:
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "<image>"},
             {"role": "assistant", "content": "b"}]  # fmt: skip

    with pytest.raises(BadRecord, match="both system and a turn"):
        Rules("auto", "<image>", 6).parse(orjson.dumps({"image": "a.png", "system": "c", "messages": turns}))


def test_an_image_part_whose_index_is_not_its_place_is_rejected() -> None:
    def record(*indices: int) -> bytes:
        parts = [{"type": "image", "index": i} for i in indices]
        turns = [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]},
                 {"role": "assistant", "content": "b"}]  # fmt: skip
        return orjson.dumps({"images": ["a.png", "b.png"], "messages": turns})

    assert len(Rules("auto", "<image>", 6).parse(record(0, 1)).images) == 2
    with pytest.raises(BadRecord, match="says index 1"):
        Rules("auto", "<image>", 6).parse(record(1, 0))
