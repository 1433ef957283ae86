"""``beholder prepare unified``: what is written is read back as what it was, and what cannot be is counted by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tests.data.formats.make import lines, parquet, png, said, uri
from tests.data.test_formats import LAYOUTS
from typer.testing import CliRunner

from beholder.cli import app
from beholder.data.images import read_bytes
from beholder.data.sources import Records, guess_source, open_sources
from beholder.prepare.unified import unify
from beholder.types import Example, ImageSlot, UserError

FORMATS = Path(__file__).parents[1] / "data" / "formats"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEHOLDER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for colour in ("red", "green", "blue"):
        (folder / f"{colour}.png").write_bytes(png(colour))
    return folder


def opened(*files: Path | str, max_images: int = 1, **source: Any) -> Records:
    sources = [guess_source(str(file), **source) for file in files]
    return open_sources(sources, image_token="<image>", max_images=max_images, on_reject="collect", chat=True)


def content(e: Example) -> tuple[Any, ...]:
    """Everything about an example but where its record lies. Neighbouring texts of a turn are one text."""
    turns: list[tuple[str, list[str]]] = []
    for turn in e.turns:
        pieces = "".join("\0" if isinstance(part, ImageSlot) else part for part in turn.parts)
        turns.append((turn.role, pieces.split("\0")))
    answers = () if e.answers == (e.answer_text,) else e.answers
    return e.id, turns, [read_bytes(ref) for ref in e.images], e.source, answers, e.question_type, e.answer_type


@pytest.mark.parametrize("layout", [(name, sets) for name, sets, *_ in LAYOUTS], ids=lambda x: x[0])
def test_every_layout_is_read_back_as_it_was_or_counted(layout: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    name, settings = layout
    if settings.keys() - {"image_root", "annotations_path"}:
        pytest.skip("what is said of it in a config has no option here")
    told: dict[str, Any] = {k.removesuffix("_path"): str(FORMATS / v) for k, v in settings.items()}
    before = [e for e in opened(FORMATS / name, max_images=4, **told) if len(e.images) == 1]

    try:
        result = unify([FORMATS / name], tmp_path / "out" / "unified.jsonl", **told)
    except UserError as error:
        assert all(e.num_answers > 1 for e in before) and "nothing could be written" in str(error)
        return

    after = opened(result.file, image_root=result.image_root)
    assert not after.rejects and len(after) == result.written
    assert [content(e) for e in after] == [content(e) for e in before if e.id in set(after.ids())]
    assert result.written + len(result.rejects) == result.records
    lost = {e.id for e in before} - set(after.ids())
    assert lost <= {r.id for r in result.rejects}


def test_the_line_is_that_of_the_guide(tmp_path: Path, images: Path) -> None:
    source = tmp_path / "talks.json"
    source.write_text(json.dumps([{"id": "a", "image": "red.png", "conversations": said("<image>\nWhat?", "A tile.")}]))

    result = unify([source], tmp_path / "u.jsonl", image_root=images)

    line = json.loads(Path(result.file).read_text())
    assert line == {
        "id": "a", "image": "red.png", "instruction": "What?", "response": "A tile.", "metadata": {"source": "talks"},
    }  # fmt: skip
    assert result.image_root == str(images), "pictures stay where they are"
    (example,) = opened(result.file, image_root=str(images))
    assert example.source == "talks", "the source is read from the metadata"


def test_a_place_of_its_own_a_system_text_and_many_answers_are_kept(tmp_path: Path, images: Path) -> None:
    source = tmp_path / "r.jsonl"
    source.write_bytes(lines([
        {"id": "1", "image": "red.png", "conversations": said("Look: <image> What is it?", "x")},
        {"id": "2", "image": "red.png", "system": "Be brief.", "conversations": said("<image>What is it?", "x")},
        {"id": "3", "image": "red.png", "question": "Which <image> colour?", "answer": "red"},
    ]))  # fmt: skip
    votes = tmp_path / "v.jsonl"
    votes.write_bytes(lines([{"id": "4", "image": "blue.png", "question": "Which?", "answers": ["navy", "blue", "blue"],
                              "question_type": "which", "answer_type": "other"}]))  # fmt: skip

    result = unify([source, votes], tmp_path / "u.jsonl", image_root=images)

    before = {e.id: content(e) for e in opened(source, votes, image_root=str(images))}
    assert {e.id: content(e) for e in opened(result.file, image_root=str(images))} == {
        id: what for id, what in before.items() if id != "3"
    }
    (reject,) = result.rejects
    assert (reject.id, reject.reason) == ("3", "not_kept") and "<image>" in reject.detail


@pytest.mark.parametrize(("fields", "difficulty"), [
    ({"difficulty": "hard"}, "hard"),
    ({"metadata": {"difficulty": 3, "source": "ours"}}, 3),
    ({}, None),
    ({"metadata": "none"}, None),
])  # fmt: skip
def test_difficulty_is_the_records_own_or_absent(
    fields: dict[str, Any], difficulty: object, tmp_path: Path, images: Path
) -> None:
    source = tmp_path / "q.jsonl"
    source.write_bytes(lines([{"image": "red.png", "question": "Which?", "answer": "red", **fields}]))

    result = unify([source], tmp_path / "u.jsonl", image_root=images)

    metadata = json.loads(Path(result.file).read_text())["metadata"]
    assert metadata.get("difficulty") == difficulty and ("difficulty" in metadata) == (difficulty is not None)
    assert metadata["source"] == ("ours" if "ours" in str(fields) else "q")


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    turns = [*said("<image>\nWhat is it?", "A tile."), *said("Which colour?", "Red.")]
    late = [*said("Hello.", "Hi."), *said("<image>\nWhat is it?", "A cup.")]
    path = tmp_path / "talk.jsonl"
    path.write_bytes(lines([
        {"id": "t", "image": "red.png", "conversations": turns},
        {"id": "late", "image": "green.png", "conversations": late},
        {"id": "two", "images": ["red.png", "blue.png"], "conversations": said("<image><image> Same?", "No.")},
        {"id": "one", "image": "blue.png", "conversations": said("<image>\nWhat?", "A pen.")},
        {"id": "gone", "image": "black.png", "conversations": said("<image>\nWhat?", "A pen.")},
        {"id": "out", "image": "../talk.jsonl", "conversations": said("<image>\nWhat?", "A pen.")},
    ]))  # fmt: skip
    return path


def test_several_turns_and_images_and_missing_pictures_are_rejects_with_a_name(
    talk: Path, tmp_path: Path, images: Path
) -> None:
    result = unify([talk], tmp_path / "u.jsonl", image_root=images, rejects=tmp_path / "rejects.jsonl")

    reasons = {
        "t": "several_turns", "late": "several_turns", "two": "several_images", "gone": "missing_image",
        "out": "outside_root",
    }  # fmt: skip
    assert {r.id: r.reason for r in result.rejects} == reasons
    assert result.written == 1 and result.records == 6 and result.rejects_by_reason["several_turns"] == 2
    written = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert {r["id"]: r["reason"] for r in written} == reasons
    assert "--split-turns" in next(r.detail for r in result.rejects if r.id == "t")


def test_split_turns_writes_an_answer_a_line_with_what_was_said_before(
    talk: Path, tmp_path: Path, images: Path
) -> None:
    result = unify([talk], tmp_path / "u.jsonl", image_root=images, split_turns=True)

    rows = {r["id"]: r for r in map(json.loads, Path(result.file).read_text().splitlines())}
    assert {id: (r["instruction"], r["response"]) for id, r in rows.items()} == {
        "t#1": ("What is it?", "A tile."),
        "t#2": ("User: What is it?\nAssistant: A tile.\nUser: Which colour?", "Red."),
        "late#2": ("User: Hello.\nAssistant: Hi.\nUser: What is it?", "A cup."),
        "one": ("What?", "A pen."),
    }
    assert {r.id: r.reason for r in result.rejects} == {
        "late#1": "no_image", "two": "several_images", "gone": "missing_image", "out": "outside_root",
    }  # fmt: skip
    read = opened(result.file, image_root=str(images))
    assert not read.rejects and len(read) == 4


def test_pictures_inside_records_and_tables_are_copied_out_once_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    inline, table = tmp_path / "in" / "inline.jsonl", tmp_path / "in" / "table.parquet"
    inline.write_bytes(lines([{"id": f"i{k}", "image": uri("red"), "question": "Which?", "answer": "red"}
                              for k in range(2)]))  # fmt: skip
    table.write_bytes(parquet([{"id": "p", "image": {"bytes": png("blue"), "path": None}, "question": "Which?",
                                "answer": "blue"}]))  # fmt: skip

    result = unify([inline, table], tmp_path / "out" / "u.jsonl")

    assert result.images_written == 2 and result.image_root == str(tmp_path / "out")
    files = sorted((tmp_path / "out" / "images").iterdir())
    assert {f.read_bytes() for f in files} == {png("red"), png("blue")} and {f.suffix for f in files} == {".png"}
    after = opened(result.file)
    assert [content(e) for e in after] == [content(e) for e in opened(inline, table)]
    assert unify([inline, table], tmp_path / "out" / "u.jsonl", force=True).images_written == 0, "they are there"


def test_files_with_roots_of_their_own_get_the_folder_they_share(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(png("red" if name == "a" else "blue"))
        record = {"id": name, "image": "x.png", "question": "Which?", "answer": "red"}
        (tmp_path / name / "q.jsonl").write_bytes(lines([record]))
    files = [tmp_path / "a" / "q.jsonl", tmp_path / "b" / "q.jsonl"]

    result = unify(files, tmp_path / "u.jsonl")

    assert result.image_root == str(tmp_path.resolve())
    assert [json.loads(x)["image"] for x in Path(result.file).read_text().splitlines()] == ["a/x.png", "b/x.png"]
    after = opened(result.file, image_root=result.image_root)
    assert [content(e) for e in after] == [content(e) for e in opened(*files)]


def test_images_without_a_folder_in_common_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(png("red"))
        (tmp_path / name / "q.jsonl").write_bytes(lines([{"image": "x.png", "question": "Which?", "answer": "red"}]))
    monkeypatch.setattr("os.path.commonpath", lambda paths: os.sep)

    with pytest.raises(UserError, match="no folder in common"):
        unify([tmp_path / "a" / "q.jsonl", tmp_path / "b" / "q.jsonl"], tmp_path / "u.jsonl")


def test_the_file_appears_whole_or_not_at_all(
    talk: Path, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "u.jsonl"

    def stop(what: str, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unify([talk], out, image_root=images, progress=stop)
    assert list(out.parent.iterdir()) == []

    unify([talk], out, image_root=images)
    first = out.read_bytes()
    with pytest.raises(UserError, match="is there already; give another, or --force"):
        unify([talk], out, image_root=images)
    with pytest.raises(KeyboardInterrupt):
        unify([talk], out, image_root=images, force=True, split_turns=True, progress=stop)
    assert out.read_bytes() == first


def test_nothing_to_write_is_an_error_that_says_why(tmp_path: Path, images: Path) -> None:
    source = tmp_path / "c.jsonl"
    source.write_bytes(lines([{"image": "red.png", "caption": "a red tile"}]))

    with pytest.raises(UserError, match=r"nothing could be written .*1 starts_with_assistant"):
        unify([source], tmp_path / "u.jsonl", image_root=images)
    assert not (tmp_path / "u.jsonl").exists()
    with pytest.raises(UserError, match="no files"):
        unify([], tmp_path / "u.jsonl")
    with pytest.raises(UserError, match="is one of the files that are read"):
        unify([source], source, force=True)
    with pytest.raises(UserError, match="is a folder"):
        unify([source], tmp_path)


def test_the_command(talk: Path, tmp_path: Path, images: Path) -> None:
    def beholder(*args: object) -> Any:
        return CliRunner().invoke(app, ["prepare", *map(str, args)])

    done = beholder("unified", talk, "--out", tmp_path / "u.jsonl", "--image-root", images, "--split-turns", "--json")

    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["written"] == 4 and told["rejects_by_reason"]["several_images"] == 1
    shown = beholder("unified", talk, "--out", tmp_path / "v.jsonl", "--image-root", images)
    assert "1 lines written of 6 records" in shown.stdout and "several_turns" in shown.stdout
    assert f"image_root: {images}" in shown.stdout
    assert isinstance(beholder("unified", talk).exception, UserError)
    assert isinstance(beholder("ood", talk).exception, UserError)
