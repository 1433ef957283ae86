"""Samples exactly as the model will get them, for a person to look at: the first thing to open when a loss looks odd.

Prints them with supervised tokens coloured and writes the images, as the tower sees them, beside an HTML page. Uses the
encoder and the image pipeline of training; nothing is laid out a second time here.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.text import Text

from beholder.config import RunConfig
from beholder.data import build_data
from beholder.data.chat import Segment
from beholder.data.collate import SampleBuilder
from beholder.data.images import NativePipeline
from beholder.model.connector import resolve_num_tokens
from beholder.model.language import load_tokenizer
from beholder.model.native import processor_of
from beholder.model.vision import load_vision
from beholder.runs import atomic_write
from beholder.types import Example, UserError, printable

_COLOURS = {"prompt": "", "target": "bold green", "image": "black on cyan"}


@dataclass(frozen=True)
class PreviewItem:
    """One previewed sample."""

    id: str
    where: str
    """File and record."""
    images: tuple[Path, ...]
    """PNG files written, image k of the sample at place k."""
    num_tokens: int
    num_targets: int
    truncated: bool
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Preview:
    """Samples as the model gets them, and the folder with their images and ``index.html``."""

    folder: Path
    items: tuple[PreviewItem, ...]
    prompt_note: str | None = None
    """Where generation starts otherwise than the chat template says (`ChatEncoder.prompt_note`)."""

    def print(self, console: Console) -> None:
        for number, item in enumerate(self.items, 1):
            console.rule(Text(f"{number} · {item.where}"))
            console.print(Text.assemble(*((s.text, _COLOURS[s.kind]) for s in item.segments)))
            for line in (_facts(item), *(f"  {path}" for path in item.images)):
                console.print(Text(line, style="dim"))
        if self.prompt_note:
            console.print(Text(f"note: {self.prompt_note}", style="yellow"))
        console.print(Text("green: supervised, the loss counts these tokens only · ⏎ a newline token", style="dim"))
        console.print(Text(f"page: {self.folder / 'index.html'}"))

    def to_json(self) -> dict[str, Any]:
        items = [asdict(i) | {"images": [str(p) for p in i.images]} for i in self.items]
        return {"page": str(self.folder / "index.html"), "samples": items, "prompt_note": self.prompt_note}


def preview(examples: Sequence[Example], builder: SampleBuilder, folder: Path) -> Preview:
    """Lays out each example and writes ``index.html`` and its images into ``folder``.

    Images go through the pipeline of ``builder``, with the augmentation of epoch 0 where it has one, also when the
    feature store holds them. Raises what building the sample for training would raise.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make the preview folder {folder}: {e.strerror or e}; give another --out") from e
    pixels_only = SampleBuilder(
        builder.encoder, builder.pipeline, None, on_bad_image="error", augment_seed=builder.augment_seed
    )
    items: list[PreviewItem] = []
    for number, example in enumerate(examples):
        _, encoded, inputs = pixels_only.build(example)
        paths: list[Path] = []
        for k, image in enumerate(inputs):
            shown = None if image.pixels is None else image.pixels.permute(1, 2, 0).contiguous().numpy()
            # Never the record's own names: they may be paths.
            path = folder / f"sample_{number}_image_{k + 1}.png"
            if shown is None:  # a native model's processor cuts it into patches: it is shown as it was decoded
                assert isinstance(builder.pipeline, NativePipeline)
                builder.pipeline.open(example.images[k]).save(path)
            else:
                Image.fromarray(shown).save(path)
            paths.append(path)
        item = PreviewItem(
            id=example.id, where=example.where, images=tuple(paths), num_tokens=len(encoded.ids),
            num_targets=encoded.num_targets, truncated=encoded.truncated,
            segments=tuple(builder.encoder.segments(encoded)),
        )  # fmt: skip
        items.append(item)
    note = None if builder.encoder.prompt_note is None else printable(builder.encoder.prompt_note)
    atomic_write(folder / "index.html", _page(items, note))
    return Preview(folder, tuple(items), note)


def _facts(item: PreviewItem) -> str:
    cut = ", cut to max_seq_len" if item.truncated else ""
    images = f"{len(item.images)} image{'' if len(item.images) == 1 else 's'}"
    return f"{item.num_tokens} tokens, {item.num_targets} supervised, {images}{cut}"


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --target: #14803c; --tint: #14803c1c; }
@media (prefers-color-scheme: dark) { :root { --target: #5fd38a; --tint: #5fd38a22; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
article { border-top: 1px solid var(--line); padding: 1rem 0; }
h2 { font-size: 1rem; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9rem; }
.target { color: var(--target); background: var(--tint); font-weight: 600; }
.image { border: 1px solid var(--line); border-radius: .3rem; padding: 0 .3rem; }
img { image-rendering: pixelated; min-width: 8rem; margin-right: .5rem; border: 1px solid var(--line); }
.facts { opacity: .7; }
"""


def _page(items: Sequence[PreviewItem], note: str | None) -> str:
    """A page without scripts; text from the records is escaped."""
    articles = []
    for number, item in enumerate(items):
        text = "".join(f'<span class="{s.kind}">{html.escape(s.text)}</span>' for s in item.segments)
        images = "".join(
            f'<img src="{html.escape(path.name)}" alt="image {k + 1}">' for k, path in enumerate(item.images)
        )
        articles.append(
            f"<article><h2>{number + 1} · {html.escape(item.where)}</h2><p>{images}</p><pre>{text}</pre>"
            f'<p class="facts">{html.escape(_facts(item))}</p></article>'
        )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Beholder preview</title>'
        f"<style>{_STYLE}</style></head><body><h1>Samples as the model gets them</h1>"
        "<p>Images as the vision tower sees them. "
        '<span class="target">Green text</span> is supervised: only these tokens count in the loss.</p>'
        f"{f'<p>Note: {html.escape(note)}.</p>' if note else ''}{''.join(articles)}</body></html>\n"
    )


def preview_config(cfg: RunConfig, num: int, folder: Path) -> Preview:
    """Show the first ``num`` training samples of a config as the model gets them; only the tower is loaded, of a native
    model only its processor."""
    if cfg.model.native is not None:
        processor = processor_of(cfg.model.llm)
        data = build_data(cfg, processor.processor.tokenizer, processor, None)
        return preview(
            data.train.first(num),
            data.builder(None, train=True, cfg=cfg), folder,
        )  # fmt: skip
    tower = load_vision(cfg.model.vision, torch.device("cpu"))
    num_visual_tokens = resolve_num_tokens(cfg.model.connector, tower.geometry.num_patches)
    data = build_data(cfg, load_tokenizer(cfg.model.llm), tower.geometry, num_visual_tokens)
    examples = data.train.first(num)
    return preview(examples, data.builder(None, train=True, cfg=cfg), folder)
