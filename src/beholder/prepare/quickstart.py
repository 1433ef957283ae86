"""``beholder quickstart``: real parts, real pictures, a model that answers questions about them, with one command.

Two stages, each a run with its own evidence: the connector is aligned on captions, then it and adapters on the language
model learn to answer questions. The parts come from `packages`, the recipes from ``recipes/``, everything else from
`stages`: the quickstart has no training or evaluation code of its own.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image
from rich.columns import Columns
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from beholder.config import RunConfig
from beholder.config.file import parse_config, scale_overrides
from beholder.evidence import CONDITIONS, Condition, Evidence, Measurement, Sample
from beholder.evidence.gates import verdict
from beholder.prepare.packages import Assets, prepare_quickstart
from beholder.report import slots
from beholder.stages import Outcome, run_stage
from beholder.terminal import Terminal
from beholder.types import UserError

OBJECTS = "easy_vqa_objects.txt"
NUM_ASKED = 8
"""Test images that are shown with question and answer at the end."""


@dataclass(frozen=True)
class Records:
    """Record files of a part."""

    name: str
    train: Callable[[Assets], Path]
    test: Callable[[Assets], Path]
    weight: float | None = None
    """Its share of the training samples, where there are several."""
    held_out: int | None = None
    """At most so many of ``test``."""

    def sources(self, assets: Assets) -> tuple[dict[str, Any], dict[str, Any]]:
        """Its entries in ``data.sources`` and ``data.eval_sources``."""
        entries = []
        for split, path, images, more in (
            ("train", self.train(assets), assets.images_train, {"weight": self.weight}),
            ("test", self.test(assets), assets.images_test, {"cap": self.held_out}),
        ):
            known = {"json_path": str(path), "image_root": str(images), "name": f"{self.name} {split}"}
            entries.append(known | {k: v for k, v in more.items() if v is not None})
        return entries[0], entries[1]


@dataclass(frozen=True)
class Part:
    """One run of the quickstart. Another one is another record in `PARTS`, after the part that it starts from."""

    name: str
    """Its folder, and what its overrides begin with."""
    recipe: str
    records: tuple[Records, ...]
    show: Callable[[Evidence, Console], None]
    """Prints what came out."""
    starts_from: str | None = None
    """The part whose connector it goes on with; it must have passed its gates."""
    scaled: bool = False
    """Whether ``--scale`` is for it."""
    asked_for: bool = False
    """It is run when it is named (``--part``), not with the others."""

    def folder(self, out: Path, scale: str | None) -> Path:
        """``out/align``, ``out/instruct``, ``out/instruct_full``: runs of other lengths do not share a folder."""
        return out / (f"{self.name}_{scale}" if scale and self.scaled else self.name)


def recipe(
    assets: Assets, out: Path, overrides: Sequence[str] = (), *, part: str = "align", scale: str | None = None
) -> RunConfig:
    """The config of a part of the quickstart in folder ``out/<part>``, with the places of its parts filled in.

    ``overrides`` come last. One that begins with ``align.`` or ``instruct.`` is for that part alone, as in
    ``instruct.train.train_steps=100``.
    """
    own = PARTS[part]
    recipes = files("beholder") / "prepare" / "recipes"
    text = (recipes / own.recipe).read_text(encoding="utf-8")

    train, test = zip(*(r.sources(assets) for r in own.records), strict=True)
    places = [
        f"output_dir={json.dumps(str(own.folder(out, scale)))}",
        f"model.llm.name_or_path={json.dumps(str(assets.llm))}",
        f"model.vision.weights={json.dumps(str(assets.vision_weights))}",
        f"data.sources={json.dumps(train)}",
        f"data.eval_sources={json.dumps(test)}",
        f"eval.object_list={json.dumps(str(recipes / OBJECTS))}",
    ]
    if own.starts_from is not None:
        start = PARTS[own.starts_from].folder(out, scale)
        places.append(f"model.connector.load_checkpoint={json.dumps(str(start))}")
    if own.scaled and scale:
        places += scale_overrides(parse_config(text, own.recipe, places), scale)
    return parse_config(text, own.recipe, [*places, *_for(own, overrides)])


def _up_to(name: str) -> list[str]:
    """A part and those it starts from, in the order they are run."""
    before = PARTS[name].starts_from
    return [*(_up_to(before) if before else ()), name]


def _for(part: Part, overrides: Sequence[str]) -> Iterator[str]:
    for override in overrides:
        name, dot, rest = override.partition(".")
        if not dot or name not in PARTS:
            yield override
        elif name == part.name:
            yield rest


def run_quickstart(
    out: Path,
    *,
    overrides: Sequence[str] = (),
    resume: str = "auto",
    scale: str | None = None,
    part: str | None = None,
    console: Console | None = None,
) -> Outcome:
    """Prepare the parts, align them, teach them to answer, print what came out and where the reports lie.

    The outcome is that of the last part that ran: each starts only when the one before passed its gates.
    ``scale``: of the later parts, ``smoke`` or ``full``. ``part``: run up to this one; a part that finished before is
    not run again.
    """
    console = console or Terminal()
    started = time.perf_counter()
    if resume not in ("auto", "never"):
        raise UserError("--resume of the quickstart is auto or never; resume one part of it with beholder run")
    if part is not None and part not in PARTS:
        raise UserError(f"the quickstart has no part {part!r}; its parts are {', '.join(PARTS)}")
    names = _up_to(part) if part else [p.name for p in PARTS.values() if not p.asked_for]
    if lost := [o for o in overrides if o.partition(".")[0] in PARTS.keys() - set(names)]:
        raise UserError(
            f"--set {lost[0]} is for a part that is not run; the parts that are: {', '.join(names)} (--part)"
        )
    if scale is not None and not any(PARTS[name].scaled for name in names):
        raise UserError(f"--scale {scale} is for the later parts, and only {', '.join(names)} is run")
    assets = prepare_quickstart(say=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
    configs = {name: recipe(assets, out, overrides, part=name, scale=scale) for name in names}  # all, before training

    def run(name: str) -> Outcome:
        outcome = run_stage(configs[name], resume=resume)
        if outcome.evidence is not None and outcome.is_main and (name == names[-1] or not outcome.again):
            PARTS[name].show(outcome.evidence, console)
        return outcome

    *before, last = names
    for name in before:
        outcome = run(name)
        if outcome.evidence is None or not outcome.evidence.promotable:
            return outcome
    outcome = run(last)
    if outcome.evidence is not None and outcome.is_main:
        console.print(f"\nFinished in {(time.perf_counter() - started) / 60:.1f} min.", highlight=False)
        for name, cfg in configs.items():
            report = Path(cfg.run_dir) / "report.html"
            console.print(f"Report of {name}: {escape(str(report.resolve()))}", soft_wrap=True)
        talk = f"beholder chat {configs[last].run_dir} --image {assets.images_test / '0.png'}"
        console.print(f"Talk to it: {escape(talk)}", soft_wrap=True)
    return outcome


# ---------------------------------------------------------------------------------------------------------------
# What a newcomer wants to see


def print_alignment(evidence: Evidence, console: Console) -> None:
    """Captions, questions and losses of the first part, each beside what a blind model reaches."""
    table = Table(title="Does it see? Official test images, never trained on", title_justify="left")
    for heading in ("", "its own image", "another's image", "no image", "noise", "chance"):
        table.add_column(heading, justify="left" if not heading else "right")

    def value(name: str, spec: str) -> str:
        m = evidence.get(name)
        return "–" if m is None else format(m.value, spec)

    seen = ("correct", "shuffled", "zero", "noise", "chance")
    for label, name, spec, columns in (
        ("captions exactly right", "caption.exact_match", ".1%", seen),
        ("questions answered right", "qa.accuracy", ".1%", seen),
        ("loss, nats per token", "ablation.loss", ".4f", CONDITIONS),
    ):
        n = next((m.n for m in evidence.measurements if m.name == f"{name}.correct"), 0)
        table.add_row(f"{label} (n={n})", *(value(f"{name}.{c}", spec) for c in columns))
    ratios = (value(f"ablation.ratio.{c}", ".1f") for c in CONDITIONS[1:])
    table.add_row("  times the loss with its own image", "1", *ratios)
    console.print()
    console.print(table)
    _print_gates(evidence, console)


def print_answers(evidence: Evidence, console: Console) -> None:
    """Accuracy by kind of question beside the blind model's, its way over the steps, and eight pictures."""
    table = Table(title="Answers to official test questions, by kind of question", title_justify="left")
    for heading in ("", "its own image", "another's image", "no image", "gain over no image", "n"):
        table.add_column(heading, justify="left" if not heading else "right")
    strata = [
        m.stratum
        for m in evidence.measurements
        if m.name == "answer.accuracy.correct" and m.by in ("question", "images")
    ]
    for stratum in (None, *strata):
        row = [evidence.get(f"answer.accuracy.{c}", stratum) for c in ("correct", "shuffled", "none")]
        gain = evidence.get("answer.gain.none", stratum)
        n = "" if row[0] is None else str(row[0].n)
        table.add_row(Text(stratum or "all"), *("–" if m is None else f"{m.value:.1%}" for m in row), _gain(gain), n)
    console.print()
    console.print(table)
    curve = next((c for c in evidence.curves if c.name == "quick_eval.exact"), None)
    if curve is not None and curve.x:
        told = "  ".join(f"{step:.0f}: {share:.0%}" for step, share in zip(curve.x, curve.y, strict=True))
        console.print(f"Answered exactly right over the steps (a sample of the test questions): {told}", soft_wrap=True)
    ratio, kl = evidence.get("retention.loss_ratio"), evidence.get("retention.kl")
    if ratio is not None:
        far = "" if kl is None else f", {kl.value:.3g} nats/token from it"
        console.print(f"Language kept: its loss on plain text is {ratio.value:.3f} times the base model's{far}.")
    console.print()
    console.print(Columns([_card(s) for s in asked(evidence)], padding=(0, 3)))
    _print_gates(evidence, console)


def print_places(evidence: Evidence, console: Console) -> None:
    """Answers by kind and number of images, then whether every place of an image counts."""
    rows = slots.grid(evidence.measurements)
    if rows:
        table = Table(title="Right when the image that decides stands there", title_justify="left")
        table.add_column("")
        for place in range(1, max(map(len, rows)) + 1):
            table.add_column(f"image {place}", justify="right")
        for row in rows:
            cells = (f"{s.right.value:.1%} (n={s.right.n})" if s.right else "–" for s in row)
            table.add_row(f"of {len(row)}", *cells)
        console.print()
        console.print(table)
    for name, told in (("slots.spread", "From the best place to the worst"), ("slots.follows", "Follows a swap")):
        if (m := evidence.get(name)) is not None:
            console.print(f"{told}: {m.told.partition(' = ')[2]}.", markup=False, soft_wrap=True)
    print_answers(evidence, console)


def asked(evidence: Evidence) -> list[Sample]:
    """`NUM_ASKED` test images with a question, kinds of answers in turn."""
    by_answer: dict[str, list[Sample]] = {}
    for sample in evidence.samples:
        if sample.question and sample.images:
            by_answer.setdefault(sample.reference, []).append(sample)
    rounds = max(map(len, by_answer.values()), default=0)
    return [own[k] for k in range(rounds) for own in by_answer.values() if k < len(own)][:NUM_ASKED]


def _gain(m: Measurement | None) -> str:
    if m is None:
        return "–"
    return f"{100 * m.value:+.1f} points" + (f" ({100 * m.ci95[0]:+.1f} to {100 * m.ci95[1]:+.1f})" if m.ci95 else "")


def _card(sample: Sample) -> Group:
    def said(condition: Condition) -> str:
        found = [p for p in sample.predictions if p.condition == condition]
        return max(found, key=lambda p: p.step).text if found else "–"

    own, blind = said("correct"), said("none")
    style = "green" if own.strip().lower() == sample.reference.strip().lower() else "red"
    return Group(
        picture(sample.images[0]),
        Text(sample.question),
        Text.assemble((own, f"bold {style}"), f"   (right: {sample.reference}; without the image: {blind})"),
        Text(""),
    )


def picture(uri: str, columns: int = 16) -> Text:
    """A data URI's picture as half-block characters, ``columns`` wide: two pixels a character, one above the other."""
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as opened:
        small = opened.convert("RGB").resize((columns, columns))
    text = Text()
    for y in range(0, columns, 2):
        for x in range(columns):
            upper, lower = (small.getpixel((x, y + k)) for k in (0, 1))
            assert isinstance(upper, tuple) and isinstance(lower, tuple)
            text.append("▀", f"rgb({upper[0]},{upper[1]},{upper[2]}) on rgb({lower[0]},{lower[1]},{lower[2]})")
        text.append("\n")
    return text


def _print_gates(evidence: Evidence, console: Console) -> None:
    if evidence.text_only is not None:
        same = "bit-equal" if evidence.text_only.equal else "CHANGED"
        which = " (adapters off)" if evidence.adapters else ""
        console.print(f"Text-only logits of the language model{which} before and after: {same}.")
    console.print(f"Gates: {verdict(evidence)}.", markup=False, soft_wrap=True)


QUESTIONS = Records("easy_vqa", lambda a: a.questions_train, lambda a: a.questions_test)
PARTS = {
    part.name: part
    for part in (
        Part(
            "align", "quickstart_align.yaml",
            (Records("easy_vqa", lambda a: a.captions_train, lambda a: a.captions_test),), print_alignment,
        ),
        Part(
            "instruct", "quickstart_instruct.yaml", (QUESTIONS,), print_answers, starts_from="align", scaled=True,
        ),
        Part(
            "multi", "quickstart_multi.yaml",
            (
                Records("several", lambda a: a.multi_train, lambda a: a.multi_test, weight=3, held_out=720),
                replace(QUESTIONS, weight=1, held_out=160),  # what the part before has taught is not to be forgotten
            ),
            print_places, starts_from="instruct", scaled=True, asked_for=True,
        ),
    )
}  # fmt: skip
"""What is run, in this order."""
