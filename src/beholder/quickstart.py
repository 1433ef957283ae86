"""``beholder quickstart``: real parts, real pictures, a trained connector and its evidence, with one command.

The parts come from `assets`, the recipe from ``recipes/quickstart_align.yaml``, everything else from `stages`: the
quickstart has no training or evaluation code of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from beholder.assets import Assets, prepare_quickstart
from beholder.config import RunConfig
from beholder.configfile import parse_config
from beholder.evidence import CONDITIONS, Evidence
from beholder.gates import verdict
from beholder.stages import Outcome, run_stage

RECIPE = "quickstart_align.yaml"
OBJECTS = "easy_vqa_objects.txt"


def recipe(assets: Assets, out: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The quickstart's config with the places of its parts filled in; ``overrides`` come last."""
    recipes = files("beholder") / "recipes"
    text = (recipes / RECIPE).read_text(encoding="utf-8")

    def source(captions: Path, images: Path, name: str) -> str:
        return json.dumps([{"dataset": "jsonl", "json_path": str(captions), "image_root": str(images), "name": name}])

    places = [
        f"output_dir={json.dumps(str(out))}",
        f"model.llm.name_or_path={json.dumps(str(assets.llm))}",
        f"model.vision.weights={json.dumps(str(assets.vision_weights))}",
        f"data.sources={source(assets.captions_train, assets.images_train, 'easy_vqa train')}",
        f"data.eval_sources={source(assets.captions_test, assets.images_test, 'easy_vqa test')}",
        f"eval.object_list={json.dumps(str(recipes / OBJECTS))}",
    ]
    return parse_config(text, RECIPE, [*places, *overrides])


def run_quickstart(
    out: Path,
    *,
    overrides: Sequence[str] = (),
    resume: str = "auto",
    console: Console | None = None,
) -> Outcome:
    """Prepare the parts, align them, print what came out and where the report lies."""
    console = console or Console(highlight=False)
    started = time.perf_counter()
    assets = prepare_quickstart(say=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
    outcome = run_stage(recipe(assets, out, overrides), resume=resume)
    if outcome.evidence is not None and outcome.is_main:
        print_numbers(outcome.evidence, console)
        console.print(f"\nFinished in {(time.perf_counter() - started) / 60:.1f} min.", highlight=False)
        console.print(f"Report: {escape(str((outcome.folder / 'report.html').resolve()))}", soft_wrap=True)
        image = assets.images_test / "0.png"
        console.print(f"Ask it yourself: beholder generate {escape(f'{out} --image {image}')}", soft_wrap=True)
    return outcome


def print_numbers(evidence: Evidence, console: Console) -> None:
    """The figures a newcomer wants, as a table."""
    table = Table(title="Does it see? Official test images, never trained on", title_justify="left")
    for heading in ("", "its own image", "another's image", "no image", "noise", "chance"):
        table.add_column(heading, justify="left" if not heading else "right")

    def value(name: str, spec: str) -> str:
        m = evidence.get(name)
        return "–" if m is None else format(m.value, spec)

    n = next((m.n for m in evidence.measurements if m.name == "caption.exact_match.correct"), 0)
    table.add_row(
        f"captions exactly right (n={n})",
        *(value(f"caption.exact_match.{c}", ".1%") for c in ("correct", "shuffled", "zero", "noise", "chance")),
    )
    n = next((m.n for m in evidence.measurements if m.name == "qa.accuracy.correct"), 0)
    table.add_row(
        f"questions answered right (n={n})",
        *(value(f"qa.accuracy.{c}", ".1%") for c in ("correct", "shuffled", "zero", "noise", "chance")),
    )
    n = next((m.n for m in evidence.measurements if m.name == "ablation.loss.correct"), 0)
    table.add_row(
        f"loss, nats per token (n={n})",
        *(value(f"ablation.loss.{c}", ".4f") for c in CONDITIONS),
        "",
    )
    table.add_row(
        "  times the loss with its own image",
        "1",
        *(value(f"ablation.ratio.{c}", ".1f") for c in CONDITIONS[1:]),
        "",
    )
    console.print()
    console.print(table)
    if evidence.text_only is not None:
        same = "bit-equal" if evidence.text_only.equal else "CHANGED"
        console.print(f"Text-only logits of the language model before and after: {same}.")
    console.print(f"Gates: {verdict(evidence)}.", markup=False, soft_wrap=True)
