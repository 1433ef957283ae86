"""A small set of images that are unlike what a model is trained on, to watch it with (`probes.monitors`).

Pages of text and chat screenshots in several scripts, textures of noise, and drawings of OpenMoji. Two record files
come of it: what a model describes (``ood.jsonl``, with what each image shows) and what it must call irrelevant
(``irrelevant.jsonl``, other images of the same kinds). Fetching, verifying and swapping folders in is `packages`'
business.

Texts are drawn with the fonts that come with matplotlib (DejaVu) and those that are given. No font is shipped or looked
for on the machine; a script that none of them covers is named and left out, and so is one whose letters must be joined
or turned (Arabic, Hebrew, Devanagari), which plain drawing gets wrong.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from beholder.prepare import openmoji
from beholder.types import UserError

NUM_EACH: Final = 4
"""Images of each kind (of texts: in each script) in either file."""
NUM_DRAWINGS: Final = 8
PAGE: Final = (256, 256)
SCREEN: Final = (224, 320)

NO_FONT: Final = (
    "no font at hand covers it; give one that does with --font FILE (Noto Sans CJK for Chinese, Japanese and Korean)"
)

NOTICE: Final = """\
The pages, chat screenshots and textures in images/ were drawn by Beholder; they and their texts may be used freely
(CC0 1.0). Texts are drawn with DejaVu fonts (https://dejavu-fonts.github.io, Bitstream Vera licence and public domain)
or with fonts that were given; no font file is among them.

The drawings (images/drawing-*.png) are rendered from OpenMoji 17.0.0, https://openmoji.org
All emojis designed by OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0
https://creativecommons.org/licenses/by-sa/4.0/
Changes: drawn as 128 x 128 PNG on white.
Whoever passes the drawings on must name OpenMoji and keep this license.

Their names are those of emoji-test.txt 17.0, (c) 2025 Unicode, Inc., https://www.unicode.org/terms_of_use.html
"""


@dataclass(frozen=True, slots=True)
class Script:
    """Sentences in one script, by Beholder's authors."""

    name: str
    """As ``eval.ood.script`` has it: the first word of its letters' names in Unicode."""
    lines: tuple[str, ...]
    joined: bool = False
    """Letters change with their neighbours or run from right to left."""


SCRIPTS: Final = (
    Script("latin", ("The train leaves at nine.", "Please bring the blue folder.", "Rain is expected tomorrow.",
                     "See you at the station.", "The meeting was moved.", "Thanks, I got it.")),
    Script("cyrillic", ("Поезд уходит в девять.", "Возьми синюю папку.", "Завтра будет дождь.",
                        "Встретимся на вокзале.", "Собрание перенесли.", "Спасибо, получил.")),
    Script("greek", ("Το τρένο φεύγει στις εννέα.", "Φέρε τον μπλε φάκελο.", "Αύριο θα βρέξει.",
                     "Τα λέμε στον σταθμό.", "Η συνάντηση άλλαξε.", "Ευχαριστώ, το πήρα.")),
    Script("cjk", ("火车九点出发。", "请带上蓝色文件夹。", "明天可能下雨。",
                   "车站见。", "会议改期了。", "谢谢，收到了。")),
    Script("hiragana", ("でんしゃは九じにでます。", "あおいファイルをもってきて。", "あしたはあめです。",
                    "えきであいましょう。", "かいぎはへんこうです。", "ありがとう、うけとりました。")),
    Script("hangul", ("기차는 아홉 시에 떠나요.", "파란 서류철을 가져오세요.", "내일은 비가 와요.", "역에서 만나요.",
                      "회의가 연기되었어요.", "고마워요, 받았어요.")),
    Script("arabic", ("يغادر القطار في التاسعة.", "أحضر الملف الأزرق."), joined=True),
    Script("hebrew", ("הרכבת יוצאת בתשע.", "הביאו את התיקייה הכחולה."), joined=True),
    Script("devanagari", ("ट्रेन नौ बजे जाती है।", "नीला फ़ोल्डर लाओ।"), joined=True),
)  # fmt: skip

TEXT_LABELS: Final = ("text", "page", "document", "letter", "writing", "words", "sentences", "文字", "文本", "текст")
CHAT_LABELS: Final = (
    "chat", "conversation", "screenshot", "messages", "message", "text", "phone", "cell phone", "聊天", "截图", "对话",
    "переписка", "скриншот",
)  # fmt: skip
NOISE_LABELS: Final = ("noise", "texture", "pattern", "static", "stripes", "噪声", "纹理", "шум")


# ---------------------------------------------------------------------------------------------------------------
# Fonts


def fonts_at_hand(given: Sequence[Path] = ()) -> list[Path]:
    """DejaVu Sans of matplotlib, then the fonts that were given. Raises `UserError` for a file that is no font."""
    import matplotlib

    found = [Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", *given]
    for path in found:
        try:
            ImageFont.truetype(path, 12)
        except OSError as e:
            raise UserError(f"--font {path}: cannot be read as a font ({e}); give a TrueType or OpenType file") from e
    return found


def covering(script: Script, fonts: Sequence[Path]) -> Path | None:
    """The first font that has a glyph for every character of the script's lines."""
    from matplotlib.ft2font import FT2Font

    wanted = {ord(c) for line in script.lines for c in line if not c.isspace()}
    return next((font for font in fonts if wanted <= FT2Font(str(font)).get_charmap().keys()), None)


# ---------------------------------------------------------------------------------------------------------------
# Images: functions of a generator alone


def draw_page(script: Script, font: Path, rng: random.Random) -> Image.Image:
    """Some lines of text, black on white or nearly so."""
    ground = rng.choice(((255, 255, 255), (250, 246, 235), (240, 244, 248)))
    image = Image.new("RGB", PAGE, ground)
    draw, size = ImageDraw.Draw(image), rng.choice((14, 16, 18))
    face = _face(font, size)
    y = rng.randint(10, 24)
    while y < PAGE[1] - size - 10:
        draw.text((14, y), rng.choice(script.lines), fill=(20, 20, 20), font=face)
        y += size + rng.choice((6, 8, 14))
    return image


def draw_chat(script: Script, font: Path, rng: random.Random) -> Image.Image:
    """Messages of two people in bubbles below a title bar, as messengers show them."""
    image = Image.new("RGB", SCREEN, rng.choice(((237, 237, 237), (226, 233, 240), (18, 24, 30))))
    draw, face = ImageDraw.Draw(image), _face(font, 13)
    draw.rectangle((0, 0, SCREEN[0], 30), fill=rng.choice(((60, 64, 70), (7, 94, 84), (40, 110, 190))))
    draw.ellipse((8, 5, 28, 25), fill=(210, 210, 210))
    y = 42
    while y < SCREEN[1] - 40:
        text, own = rng.choice(script.lines), rng.random() < 0.5
        left, top, right, bottom = draw.textbbox((0, 0), text, font=face)
        width, height = int(right - left) + 16, int(bottom - top) + 14
        x = SCREEN[0] - width - 8 if own else 8
        draw.rounded_rectangle((x, y, x + width, y + height), 8, fill=(149, 236, 105) if own else (255, 255, 255))
        draw.text((x + 8 - left, y + 7 - top), text, fill=(15, 15, 15), font=face)
        y += height + rng.choice((8, 12, 18))
    return image


def draw_noise(rng: random.Random) -> Image.Image:
    """A texture without a thing in it: noise, coloured noise, stripes or a rough gradient."""
    draw = np.random.default_rng(rng.getrandbits(64))
    height, width = 192, 192
    match rng.choice(("grey", "coloured", "stripes", "gradient")):
        case "grey":
            pixels = np.repeat(draw.integers(0, 256, (height, width, 1)), 3, axis=2)
        case "coloured":
            pixels = draw.integers(0, 256, (height // 8, width // 8, 3)).repeat(8, 0).repeat(8, 1)
        case "stripes":
            period = int(draw.integers(4, 20))
            wave = 255 * ((np.add.outer(np.arange(height), np.arange(width)) // period) % 2)
            pixels = np.clip(wave[..., None] + draw.integers(-40, 40, (height, width, 3)), 0, 255)
        case _:
            ramp = np.linspace(0, 255, width)[None, :, None] * draw.random((1, 1, 3))
            pixels = np.clip(ramp + draw.integers(-30, 30, (height, width, 3)), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def _face(font: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font, size, layout_engine=ImageFont.Layout.BASIC)  # the same with and without libraqm


# ---------------------------------------------------------------------------------------------------------------
# The folder


def make_ood(
    archives: Sequence[zipfile.ZipFile], out: Path, say: Callable[[str], None], fonts: Sequence[Path] = ()
) -> None:
    """Writes ``ood.jsonl``, ``irrelevant.jsonl``, ``images/*.png``, ``left_out.jsonl`` and ``NOTICE`` into ``out``.

    A record is ``{"id", "image", "kind", "shows", "script"?}``. ``archives``: OpenMoji's drawings and Unicode's names.
    The same versions of Pillow and numpy and the same fonts give the same bytes. Raises `UserError`.
    """
    (out / "images").mkdir()
    faces = fonts_at_hand(fonts)
    rows: dict[str, list[dict[str, Any]]] = {"ood": [], "irrelevant": [], "left_out": []}

    def add(file: str, id: str, image: Image.Image | bytes, kind: str, shows: Sequence[str], **more: str) -> None:
        data = image
        if isinstance(data, Image.Image):
            buffer = io.BytesIO()
            data.save(buffer, "PNG", optimize=True)
            data = buffer.getvalue()
        (out / "images" / f"{id}.png").write_bytes(data)
        rows[file].append({"id": id, "image": f"{id}.png", "kind": kind, "shows": list(dict.fromkeys(shows)), **more})

    for script in SCRIPTS:
        font = covering(script, faces)
        why = "its letters are joined or run from right to left" if script.joined else NO_FONT
        if script.joined or font is None:
            rows["left_out"].append({"script": script.name, "reason": why})
            continue
        for file in ("ood", "irrelevant"):
            for k in range(NUM_EACH):
                id = f"{file}-page-{script.name}-{k}"
                add(file, id, draw_page(script, font, _rng(id)), "text page", TEXT_LABELS, script=script.name)
                id = f"{file}-chat-{script.name}-{k}"
                add(file, id, draw_chat(script, font, _rng(id)), "chat screenshot", CHAT_LABELS, script=script.name)
    for file in ("ood", "irrelevant"):
        for k in range(NUM_EACH):
            id = f"{file}-noise-{k}"
            add(file, id, draw_noise(_rng(id)), "noise texture", NOISE_LABELS)

    for i, (code, name, png) in enumerate(_drawings(archives, 2 * NUM_DRAWINGS)):
        add(("ood", "irrelevant")[i % 2], f"drawing-{code}", png, "drawing", [*_labels(name), "drawing", "emoji"])

    for name, records in rows.items():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (out / "NOTICE").write_text(NOTICE, encoding="utf-8")
    kinds = Counter(row["kind"] for row in (*rows["ood"], *rows["irrelevant"]))
    say(f"[assets] ood: {', '.join(f'{n} × {kind}' for kind, n in kinds.items())}")
    for row in rows["left_out"]:
        say(f"[assets] ood: {row['script']} is left out: {row['reason']}")


def _rng(id: str) -> random.Random:
    return random.Random(hashlib.sha256(id.encode()).digest())


def _labels(name: str) -> list[str]:
    """``man astronaut: dark skin tone`` → itself, ``man astronaut`` and its words."""
    head = name.partition(":")[0].strip()
    return [name, head, *(word for word in head.lower().replace(",", " ").split() if len(word) > 2)]


def _drawings(archives: Sequence[zipfile.ZipFile], num: int) -> list[tuple[str, str, bytes]]:
    """(code, name, PNG) of that many emoji, no two variants of one picture, chosen by the sha256 of their codes."""
    drawings, names = archives
    svgs = openmoji.svg_members(drawings)
    emoji, _ = openmoji.read_names(names.read(openmoji.NAMES).decode("utf-8"))
    pictured = [e for e in emoji if openmoji.without_selectors(e.code) in svgs]
    groups = openmoji.group_variants(
        [(f"code {openmoji.code_key(e.code)}", f"name {openmoji.name_key(e.name)}") for e in pictured]
    )
    first = sorted(set(groups), key=lambda i: hashlib.sha256(f"ood/{pictured[i].code}".encode()).digest())[:num]
    return [
        (code := openmoji.without_selectors(pictured[i].code), pictured[i].name,
         openmoji.render(drawings.read(svgs[code]).decode("utf-8")))
        for i in first
    ]  # fmt: skip
