"""``beholder check``: the report holds what the files hold, and hostile text in it stays text."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from PIL import Image
from rich.console import Console

from beholder.config import STAGES, HygieneLimits, SourceConfig
from beholder.data.check import CheckReport, check_data
from beholder.data.sources import guess_source
from beholder.prepare.tiny import colour_source
from beholder.types import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEHOLDER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> SourceConfig:
    """Seven good records, a broken line, a record with the wrong type and one whose image is missing."""
    root = tmp_path / "images"
    root.mkdir()
    for i in range(7):
        Image.new("RGB", (10 + i, 20), (i // 2, 0, 0)).save(root / f"{i}.png")
    (root / "6.png").write_bytes((root / "5.png").read_bytes())
    lines: list[Any] = [
        {"id": str(i // 2), "images": [f"{i}.png"], "caption": f"a caption with number {i // 3}", "source": "ab"[i % 2]}
        for i in range(7)
    ]
    lines += [
        b'{"id": ',
        {"id": "w", "images": 3, "caption": "x"},
        {"id": "m", "image": "gone.png", "caption": "a b c d"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else orjson.dumps(x) for x in lines))
    return SourceConfig(json_path=str(path), image_root=str(root))


def printed(report: CheckReport) -> str:
    out = io.StringIO()
    report.print(Console(file=out, width=200, color_system=None))
    return out.getvalue()


def test_the_report_counts_records_sources_rejects_and_duplicates(data: SourceConfig) -> None:
    report = check_data([data], verify_images="decode")

    assert (report.records, report.accepted, report.images) == (10, 7, 8)
    # the record without a source of its own takes the file's stem, which is "a" too
    assert report.sources == {"a": {"records": 5, "accepted": 4}, "b": {"records": 3, "accepted": 3}}
    assert report.rejects_by_reason == {"bad_json": 1, "wrong_type": 1, "missing_image": 1}
    assert report.records == report.accepted + len(report.rejects)
    assert report.duplicate_captions == {"exact": 4, "near": 0}
    assert report.duplicate_ids == 3
    assert report.duplicate_images == 1
    assert report.image_sizes is not None
    assert report.image_sizes["width"]["min"] == 10 and report.image_sizes["width"]["max"] == 15
    assert report.image_sizes["formats"] == {"PNG": 7}
    assert sum(n for _, _, n in report.length_histogram) == 8


def test_without_decoding_or_tokenizer_the_report_says_what_was_not_done(data: SourceConfig) -> None:
    report = check_data([data], hygiene=HygieneLimits(max_tokens=10))

    assert report.duplicate_images is None and report.image_sizes is None
    assert report.unit == "words" and report.length["max"] == 5
    assert any("no tokenizer" in n and "5 to 10 tokens" in n for n in report.notes)
    assert any("not decoded" in n for n in report.notes)


def test_which_stages_rules_hold_is_said_and_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "said.jsonl"
    turns = [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Hi."}]
    path.write_text(json.dumps({"id": "1", "messages": [*turns, *turns]}) + "\n", encoding="utf-8")
    source = SourceConfig(dataset="jsonl", json_path=str(path))

    guessed, asked = check_data([source]), check_data([source], stage=STAGES["instruct"])

    assert any("stage align" in note and "--stage instruct" in note for note in guessed.notes)
    assert not guessed.rejects and [r.reason for r in asked.rejects] == ["starts_with_assistant"]
    assert not any("--stage" in note for note in asked.notes)


def test_json_reject_log_and_print_agree(data: SourceConfig, tmp_path: Path) -> None:
    report = check_data([data])
    report.write_rejects(tmp_path / "rejects.jsonl")

    logged = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert logged == json.loads(json.dumps(report.to_json()))["rejects"]
    text = printed(report)
    assert "7 of 10 records accepted" in text
    for reject in report.rejects:
        assert reject.reason in text and f"record {reject.row}" in text


def test_hostile_text_is_printed_literally(tmp_path: Path) -> None:
    hostile = "[red]\x1b[2J\u202e[/red][link=x]"
    (tmp_path / "a.jsonl").write_bytes(
        orjson.dumps({"id": hostile, "images": ["x"], "caption": hostile, "source": hostile})
    )

    text = printed(check_data([SourceConfig(json_path=str(tmp_path / "a.jsonl"))]))

    assert "\x1b" not in text and "\u202e" not in text
    assert "[red]\\u001b[2J\\u202e[/red][link=x]" in text.replace("\n", "")


def test_a_file_with_only_bad_records_is_reported_and_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n[\n")

    report = check_data([SourceConfig(json_path=str(tmp_path / "a.jsonl"))])

    assert (report.records, report.accepted) == (2, 0)
    assert "0 of 2 records accepted" in printed(report)


def test_instruction_data_is_checked_by_the_rules_of_its_stage(tmp_path: Path) -> None:
    def record(image: Any, *turns: str) -> dict[str, Any]:
        said = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(turns)]
        return {"id": "x", "image": image, "conversations": said}

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (5, 4)).save(tmp_path / "b.png")
    (tmp_path / "a.json").write_bytes(orjson.dumps([
        record("a.png", "What?", "no"), record("b.png", "What?", "no"), record("a.png", "What?", "no"),
        record("a.png", "<image> Who?", ""), record(["a.png", "b.png"], "<image><image>", "two"),
        record(None, "?", "x"),
    ]))  # fmt: skip

    report = check_data([guess_source(str(tmp_path / "a.json"), dataset="llava_instruct")])

    assert report.chat and (report.records, report.accepted, report.inserted_markers) == (6, 3, 3)
    assert report.rejects_by_reason == {"empty_answer": 1, "too_many_images": 1, "no_image": 1}
    assert report.duplicate_captions == {"exact": 1, "near": 0}, (
        "one answer to one question about another image is none"
    )
    text = printed(report)
    assert "records without a marker, which get their images at their start: 3" in text
    assert "conversations that repeat an earlier one: 1 exactly" in text
    assert "limits of at least 1 tokens" in text


def test_a_question_file_is_checked_with_its_annotations(tmp_path: Path) -> None:
    source = colour_source(tmp_path, "vqa", 12)

    told = guess_source(source.json_path, image_root=source.image_root, annotations=source.annotations_path)
    report = check_data([told.model_copy(update={"image_pattern": source.image_pattern})], verify_images="decode")

    assert report.layouts == {"VQA question file of question": 12}
    assert (report.records, report.accepted, report.images, report.duplicate_images) == (12, 12, 12, 0)
    with pytest.raises(UserError, match="--annotations"):
        check_data([guess_source(source.json_path)])


def test_records_that_name_an_image_they_do_not_have_are_counted_and_kept(tmp_path: Path) -> None:
    for k in range(3):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / f"{k}.png")
    asked = ["what is in image 5?", "what is in image 3?", "which is larger, the fourth image or image 1?"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(
        json.dumps({"id": str(k), "images": ["0.png", "1.png", "2.png"], "messages": [
            {"role": "user", "content": f"<image><image><image>{question}"}, {"role": "assistant", "content": "a dog"},
        ]}) + "\n"
        for k, question in enumerate(asked)
    ))  # fmt: skip

    for _ in range(2):  # the second time from the index
        report = check_data(
            [SourceConfig(json_path=str(path), image_root=str(tmp_path))], stage=STAGES["multi"], verify_images="none"
        )
        assert (report.accepted, report.absent_images) == (3, 2)
    assert "warning: 2 records name an image that they do not have" in printed(report)
    assert report.to_json()["absent_images"] == 2
