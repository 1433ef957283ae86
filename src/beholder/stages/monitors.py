"""What a run is watched with: the rows of the panel that are made at every evaluation (S4-2).

How texts and losses are scored is `probes.monitors`' business; what becomes of a reading, `guard`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from beholder.config import GREEDY
from beholder.data.images import ImagePipeline, NativePipeline
from beholder.data.monitor_set import MonitorItem
from beholder.probes import monitors as probe
from beholder.probes import retention
from beholder.runs import atomic_write, to_json
from beholder.stages.measured import Measured
from beholder.stages.session import Session
from beholder.types import Example, ImageInput, ImageRef, Turn

NUM_CROSSED = 64
"""Held-out samples whose image and text are exchanged for unlike ones."""
POLLED = GREEDY.model_copy(update={"max_new_tokens": 12})
"""Yes or no, and a few words more."""


# ---------------------------------------------------------------------------------------------------------------
# Rows of the panel


def irrelevant(session: Session, m: Measured) -> None:
    """Share of unrelated images that the model says are so."""
    found, phrase = session.monitors.irrelevant, session.monitors.phrase
    assert found is not None and phrase is not None, "switched on"
    with session.phase("monitors"):
        said = session.together.written(
            found.examples, session.cfg.eval.greedy, "correct", _size(session), "irrelevant"
        )
    texts = [r.prediction for r in said]
    m.measurements += probe.irrelevant(texts, [x.kind for x in found.items], phrase)
    keep(session, m, "irrelevant", found.items, texts, [{"passed": phrase.said_in(t)} for t in texts])


def ood(session: Session, m: Measured) -> None:
    """What it says of images unlike the training's: invented, blind, sane."""
    found, objects, seed = session.monitors.ood, session.held_out.objects, session.held_out.seed
    assert found is not None, "switched on"
    known, phrase, own = session.monitors.trained, session.monitors.phrase, session.cfg.eval.ood
    with session.phase("monitors"):
        said = session.together.written(
            found.examples, session.cfg.eval.greedy, "correct", _size(session), "unlike images"
        )
        polled = poll(session, found.items, known) if own.question and session.cfg.template == "chat" else []
    described = probe.Described(
        ids=[x.example.id for x in found.items], shows=[x.shows for x in found.items],
        kinds=[x.kind for x in found.items], texts=[r.prediction for r in said], finished=[r.finished for r in said],
        polled=polled,
    )  # fmt: skip
    hallucinated, invented = probe.hallucination(described, known, objects, phrase, seed)
    blind, blindness = probe.blind(described, phrase, seed)
    sane, insane = probe.sanity(described, own.script, phrase)
    m.measurements += [*hallucinated, *blind, *sane]
    rows = [{"hallucinated": a, "blind": b, "insane": c} for a, b, c in zip(invented, blindness, insane, strict=True)]
    keep(session, m, "ood", found.items, described.texts, rows)


def poll(session: Session, items: Sequence[MonitorItem], known: probe.Trained) -> list[bool | None]:
    """Whether the model says yes to an object that the image does not show; None: there is none to ask about."""
    own = session.cfg.eval.ood
    assert own.question is not None
    objects = session.held_out.objects
    about = [probe.asked_about(x.example.id, x.shows, known, objects) for x in items]
    asked = [i for i, name in enumerate(about) if name is not None]
    silent = [MonitorItem(replace(items[i].example, turns=())) for i in asked]  # its own question is not this one
    questions = [own.question.replace("{object}", str(about[i])) for i in asked]
    examples = [item.asking(question).example for item, question in zip(silent, questions, strict=True)]
    if not examples:
        return [None] * len(items)
    said = session.together.written(examples, POLLED, "correct", _size(session), "what is absent")
    yes = dict(zip(asked, (probe.says(own.yes, r.prediction) for r in said), strict=True))
    return [yes.get(i) for i in range(len(items))]


def jitter(session: Session, m: Measured) -> None:
    """Whether answers stay when a little is cut off the edges of the image."""
    indices = session.monitors.jitter_sample
    if not indices:
        m.gaps.append("Slightly cropped images: not measured, no held-out sample can be answered.")
        return
    examples = session.held_out.at(indices)

    def answers(view: Cropped | None) -> list[str]:
        found = session.together.written(
            examples, session.cfg.eval.greedy, "correct", _size(session), "cropped images", pipeline=view
        )
        return [r.prediction for r in found]

    with session.phase("monitors"):
        own = answers(None)
        cropped = [answers(Cropped(session.data.pipeline, where)) for where in probe.CROPS]
    m.measurements += probe.consistency(own, cropped, session.held_out.seed)


@dataclass(frozen=True)
class Cropped:
    """The images with a little cut off their edges, as the tower gets them."""

    pipeline: ImagePipeline | NativePipeline
    keep: tuple[float, float]

    def __call__(self, ref: ImageRef, key: str | None = None) -> torch.Tensor | ImageInput:
        image = self.pipeline.open(ref)
        return self.pipeline.from_pil(image.crop(probe.crop_box(image.width, image.height, self.keep)))


def gap(session: Session, m: Measured) -> None:
    """Held-out minus training loss, of as many samples, measured the same way."""
    held, training = session.monitors.gap_samples
    with session.phase("monitors"):
        measured = probe.gap(session.together.losses(held), session.together.losses(training), session.held_out.seed)
    m.measurements += measured
    if len(training) < len(held):
        m.gaps.append(f"Generalisation gap: there are only {len(training)} training samples to compare with.")


def crossed(session: Session, m: Measured) -> None:
    """What the adapters change on own and unlike images, trained and plain texts: a 2 x 2 (S4-6)."""
    found, held = session.monitors.ood, session.held_out
    assert found is not None, "switched on"
    own = held.at(held.among([i for i in held.describable if len(held.examples[i].images) == 1], NUM_CROSSED))
    passages = retention.load_texts(session.cfg.eval.retention_path)
    refs = [x.example.images[0] for x in found.items]

    def plain(k: int, example: Example) -> Example:
        """A passage as the answer to the request for a description."""
        asked = MonitorItem(replace(example, turns=())).asking(session.cfg.eval.ood.prompt).example
        return replace(asked, turns=(*asked.turns, Turn("assistant", (passages[k % len(passages)],))))

    def unlike(k: int, example: Example) -> Example:
        return replace(example, images=(refs[k % len(refs)],))

    cells = {
        "own.trained": own, "ood.trained": [unlike(k, e) for k, e in enumerate(own)],
        "own.plain": [plain(k, e) for k, e in enumerate(own)],
        "ood.plain": [unlike(k, plain(k, e)) for k, e in enumerate(own)],
    }  # fmt: skip
    cells = {name: list(filter(session.monitors.fits, examples)) for name, examples in cells.items()}
    with session.phase("monitors"):
        on = {name: session.together.losses(examples) for name, examples in cells.items()}
        with session.model.adapters_off():
            off = {name: session.together.losses(examples) for name, examples in cells.items()}
    m.measurements += probe.crossed(on, off, held.seed)
    if not own:
        m.gaps.append("Own and unlike images with trained and plain texts: no held-out sample of one image fits.")


def _size(session: Session) -> int:
    return session.cfg.eval.batch_size


def keep(
    session: Session, m: Measured, name: str, items: Sequence[MonitorItem], texts: Sequence[str],
    judged: Sequence[dict[str, Any]],
) -> None:  # fmt: skip
    """What was said of each image and how it was judged, as ``qual/step_N_<name>.jsonl``, to look at."""
    if not session.dist.is_main:
        return
    rows = [
        {"id": x.example.id, "kind": x.kind, "shows": x.shows, "said": text, **how}
        for x, text, how in zip(items, texts, judged, strict=True)
    ]
    session.run.qual.mkdir(parents=True, exist_ok=True)
    atomic_write(session.run.qual / f"step_{m.step}_{name}.jsonl", "".join(to_json(row) + "\n" for row in rows))
