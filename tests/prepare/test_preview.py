"""The preview shows what training gets, and text from the records cannot break out of it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from beholder.data.chat import ChatEncoder
from beholder.data.collate import SampleBuilder
from beholder.data.images import ImageError, ImagePipeline
from beholder.prepare.preview import preview
from beholder.prepare.tiny import tiny_tokenizer
from beholder.types import Example, ImageGeometry, ImageRef, ImageSlot, Turn

GEOMETRY = ImageGeometry(8, 8, 9, 5, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
HOSTILE = '<script>alert("x")</script>[red]</pre>'


@pytest.fixture
def builder(tmp_path: Path) -> SampleBuilder:
    encoder = ChatEncoder(
        tiny_tokenizer(tmp_path / "tok", "smollm2"), num_visual_tokens=4, max_seq_len=90, template="caption",
        instruction="Describe.", instruction_multi="Describe each.",
    )  # fmt: skip
    return SampleBuilder(encoder, ImagePipeline(GEOMETRY, 10.0), None, on_bad_image="skip", augment_seed=None)


@pytest.fixture
def samples(tmp_path: Path) -> list[Example]:
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(2):
        noise = np.random.default_rng(k).integers(0, 256, (20, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{k}.png")
    refs = tuple(ImageRef(str(folder), f"{k}.png") for k in range(2))
    return [
        Example("../../up", refs[:1], (Turn("assistant", (HOSTILE,)),), file="data.jsonl", row=0),
        Example("pair", refs, (Turn("assistant", ("long " * 40,)),), file="data.jsonl", row=1),
    ]


def test_images_are_written_as_the_tower_gets_them(
    builder: SampleBuilder, samples: list[Example], tmp_path: Path
) -> None:
    items = preview(samples, builder, tmp_path / "out").items

    assert [len(item.images) for item in items] == [1, 2]
    for item, example in zip(items, samples, strict=True):
        for path, ref in zip(item.images, example.images, strict=True):
            assert path.parent == tmp_path / "out"
            assert np.array_equal(np.asarray(Image.open(path)).transpose(2, 0, 1), builder.pipeline(ref, None).numpy())
    written = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert written == ["index.html", "sample_0_image_1.png", "sample_1_image_1.png", "sample_1_image_2.png"]


def test_the_console_shows_what_is_supervised_and_counts_it(
    builder: SampleBuilder, samples: list[Example], tmp_path: Path
) -> None:
    out = io.StringIO()

    shown = preview(samples, builder, tmp_path / "out")
    shown.print(Console(file=out, width=300, force_terminal=True))

    printed = out.getvalue()
    first, second = shown.items
    assert first.num_targets == len(HOSTILE) + 1 and not first.truncated
    assert second.truncated and second.num_tokens == 90
    assert f"{first.num_tokens} tokens, {first.num_targets} supervised, 1 image\x1b" in printed
    assert "90 tokens" in printed and "cut to max_seq_len" in printed
    assert f"\x1b[1;32m{HOSTILE}<|im_end|>" in printed, "green, and markup in a caption stays text"
    assert "[image 2 ×4]" in printed


def test_the_page_escapes_what_records_say(builder: SampleBuilder, samples: list[Example], tmp_path: Path) -> None:
    preview(samples, builder, tmp_path / "out")

    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")

    assert "<script" not in page and "&lt;script&gt;alert" in page
    assert page.count("</pre>") == 2 and page.count('<span class="image">') == 3
    assert "id &#x27;../../up&#x27;" in page


def test_a_bad_image_stops_the_preview(builder: SampleBuilder, samples: list[Example], tmp_path: Path) -> None:
    (tmp_path / "images" / "1.png").write_bytes(b"")

    with pytest.raises(ImageError, match=r"1\.png.*record 1"):
        preview(samples, builder, tmp_path / "out")


def test_where_generation_starts_is_said_when_it_is_not_the_templates_own_prompt(
    builder: SampleBuilder, samples: list[Example], tmp_path: Path
) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:<think>{{ '\\n' }}{% endif %}"
    )
    encoder = ChatEncoder(
        builder.encoder.tokenizer, num_visual_tokens=4, max_seq_len=900, template="chat", instruction="-",
        instruction_multi="-", chat_template=template,
    )  # fmt: skip
    asked = Example("a", samples[0].images, (Turn("user", (ImageSlot(0),)), Turn("assistant", ("red",))))
    chat = SampleBuilder(encoder, builder.pipeline, None, on_bad_image="skip", augment_seed=None)
    out = io.StringIO()

    shown = preview([asked], chat, tmp_path / "out")
    shown.print(Console(file=out, width=400))

    end = "<|im_end|><|im_start|>assistant:"
    note = f"ends in '{end}<think>\\n', but before a finished answer it writes '{end}'"
    assert shown.prompt_note is not None and note in shown.prompt_note and shown.to_json()["prompt_note"]
    assert f"note: the chat template's generation prompt {note}" in out.getvalue()
    assert "assistant:&lt;think&gt;" in (tmp_path / "out" / "index.html").read_text()
    assert preview(samples[:1], builder, tmp_path / "plain").prompt_note is None
