"""What can be measured: a row for each quantity with its words, unit and direction, and where people are told it.

A probe names what it measures ``<probe>.<quantity>``, and ``….<condition>`` where it shows the model its own image and
others. Whatever tells measurements to people reads their rows: report, comparison, sweep, terminal, ``metrics.json``.
A new probe is its own file, its rows here and one in `stages.panel`. What has no row is called by its name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from beholder.config import STRENGTH_LINE
from beholder.evidence.record import Evidence, Measurement
from beholder.types import CONDITIONS, Condition

Written = Literal["caption", "answer"]
"""What the model was taught to write."""

Better = Literal["lower", "higher", "none"]

ALL_CONDITIONS: tuple[Condition, ...] = get_args(Condition)

_IMAGES: dict[str, str] = {
    "correct": "its own image", "shuffled": "another image", "zero": "no image", "noise": "noise",
    "none": "no image at all", "neighbour": "a copy of its neighbour", "text": "as much text",
}  # fmt: skip
IMAGE_NAMES: Mapping[Written, Mapping[str, str]] = {
    "caption": _IMAGES,
    # A model that answers is also asked without any image, so an empty one is no longer "no image".
    "answer": _IMAGES | {"zero": "an empty image", "none": "no image"},
}
"""What the conditions are called beside what the model writes."""

GROUPINGS = {
    "length": "target length", "turn": "turn", "question": "question", "answer": "kind of answer",
    "kind": "kind of made-up question", "images": "number of images",
    "slot": "place", "strength": "strength of the adapters", "image": "kind of image",
}  # fmt: skip
"""What the groupings of samples (``by``) are called."""

Section = Literal[
    "held-out",
    "compared",
    "bands",
    "losses",
    "ablation",
    "slots",
    "written",
    "answers",
    "instructions",
    "yes/no",
    "pairs",
    "cells",
    "blind",
    "kept",
    "symptoms",
    "monitors",
    "",
]
"""A table of the report. The one of every measurement has no name."""


@dataclass(frozen=True, slots=True)
class Headline:
    """A place in the row of key numbers of a report."""

    caption: int = 0
    answer: int = 0
    """Its place by what the model writes; 0: it is not among them."""
    label: str = ""
    """If not its words."""
    condition: str = "correct"
    beside: tuple[str, str] | None = None
    """A condition whose number stands in the small print, and what that is called."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """What is measured under one name, or under one name and several conditions."""

    pattern: str
    """The name. ``<image>`` is a condition, or ``chance``: ``better`` is said of the own image, of no other.
    ``<any>``: it is said of each, as of a difference to the own image."""
    words: str
    """``<image>`` in them is what the condition is called."""
    unit: str
    better: Better
    section: Section = ""
    """The table of the report that shows it for all samples."""
    chat: str = ""
    """Its words where the model answers, if they are others."""
    read_in: str = ""
    """The unit in which people read it, if it is another."""
    column: str = ""
    """Its heading in a narrow table, if not its words."""
    flat: str = ""
    """The seed's name for it in ``metrics.json``; ``<_stratum>`` where groups by target length have one too."""
    said: tuple[str, ...] = ()
    """Under which conditions the terminal says it when a run ends."""
    headline: Headline | None = None
    asked_by: str = ""
    """The command that measures it, where a run does not."""

    @property
    def stem(self) -> str:
        """The name without its condition."""
        return self.pattern.partition(".<")[0]

    def direction(self, condition: str) -> Better:
        """Which way is better under that condition; empty: none."""
        return "none" if self.pattern.endswith(".<image>") and condition not in ("", "correct") else self.better

    def called(self, condition: str, written: Written) -> str:
        """Its name for people, in a report of a model that was taught to write that."""
        words = self.chat if self.chat and written == "answer" else self.words
        if not condition:
            return words.partition(" <image>")[0].rstrip(",")
        answered = self.section in ("answers", "instructions", "yes/no", "pairs", "cells")
        names = IMAGE_NAMES["answer" if answered else written]
        return words.replace("<image>", names.get(condition, condition))


ALONE, OWN = ("",), ("correct",)
"""Without conditions; with the own image only."""

_Q, _H = Quantity, Headline
_SHARE, _NATS, _SCORE = "share", "nats/token", "score 0-1"

_MEASURED: tuple[Quantity, ...] = (
    # Held-out samples. The same names in `Evidence.baseline` are the numbers before training.
    _Q("eval.loss", "loss", _NATS, "lower", "held-out", column="held-out loss", flat="eval_loss<_stratum>", said=ALONE),
    _Q("eval.perplexity", "perplexity", "perplexity", "lower", "held-out", said=ALONE, headline=_H(8, 8)),
    _Q("eval.token_accuracy", "token accuracy", _SHARE, "higher", "held-out", headline=_H(7, 7)),
    _Q("eval.tokens", "supervised tokens", "tokens", "none", "held-out", flat="eval_label_tokens_total"),
    _Q("eval.truncated_pct", "held-out targets cut to length", "%", "lower", "held-out", flat="eval_truncated_pct"),
    # Of a student and its teachers.
    _Q("teacher.kl", "distance from its teacher (KL)", _NATS, "lower", "held-out", said=ALONE),
    # Before minus after on the same samples; the language model without image minus after; how the training loss ended.
    _Q("learn.delta", "fall of the held-out loss", _NATS, "higher", "compared", said=ALONE),
    _Q("learn.delta_text", "held-out loss below the model's without image", _NATS, "higher", "compared",
       chat="held-out loss below the base model's without image"),
    _Q("curve.late_share", "share of the loss's fall in the last quarter", _SHARE, "lower", "compared"),
    _Q("answer.kept", "answers about one image exactly right, over the run it started from", _SHARE, "higher",
       "compared", read_in="points", said=ALONE),
    # Held-out losses to read one against.
    _Q("band.uniform", "uniform guessing", _NATS, "none", "bands"),
    _Q("band.untrained", "untrained connector", _NATS, "none", "bands", chat="before this training"),
    _Q("band.text_only", "language model, no image", _NATS, "none", "bands"),
    # The same samples with other images.
    _Q("ablation.loss.<image>", "loss, <image>", _NATS, "lower", "losses", said=CONDITIONS),
    _Q("ablation.delta.<any>", "loss difference, <image>", _NATS, "higher", "ablation", flat="delta_<image>",
       said=CONDITIONS[1:]),
    _Q("ablation.ratio.<any>", "loss ratio, <image>", "ratio", "higher", "ablation", said=("shuffled",)),
    # Samples of several images: one image replaced, all of them moved on, two swapped (`probes.slots`).
    _Q("slots.loss.<image>", "loss, one image replaced by <image>", _NATS, "lower", "slots"),
    _Q("slots.delta.<any>", "loss difference, one image replaced by <image>", _NATS, "higher", "slots",
       said=("shuffled",)),
    _Q("slots.right.<image>", "answers exactly right, one image replaced by <image>", _SHARE, "higher", "slots"),
    _Q("slots.gain.<any>", "answers exactly right, gain over one image replaced by <image>", _SHARE, "higher", "slots",
       read_in="points"),
    _Q("slots.accuracy", "answers exactly right, the deciding image in every place", _SHARE, "higher", "slots",
       said=ALONE),
    _Q("slots.rotated_loss", "loss, by place of the deciding image", _NATS, "lower", "slots"),
    _Q("slots.spread", "best place over worst place", _SHARE, "lower", "slots", read_in="points", said=ALONE),
    _Q("slots.last_bias", "deciding image last, over its other places", _SHARE, "none", "slots", read_in="points"),
    _Q("slots.swap_renamed", "two images swapped and renamed: answers right", _SHARE, "higher", "slots"),
    _Q("slots.follows", "two images swapped: answers follow", _SHARE, "higher", "slots", said=ALONE),
    _Q("slots.order", "two images swapped: loss difference of the old answer", _NATS, "higher", "slots", said=ALONE),
    _Q("slots.consistent", "two images swapped: as by the renamed words", _SHARE, "none", "slots"),
    # What it writes, be it captions or answers.
    _Q("caption.exact_match.<image>", "exact match", _SHARE, "higher", "written",
       said=("correct", "shuffled", "zero", "chance"), headline=_H(caption=1)),
    *(_Q(f"caption.bleu{k}.<image>", f"BLEU-{k}", "score 0-1", "higher", "written") for k in (1, 2, 3, 4)),
    _Q("caption.rouge_l.<image>", "ROUGE-L", "score 0-1", "higher", "written"),
    _Q("caption.cider_d.<image>", "CIDEr-D", "score 0-10", "higher", "written", said=OWN, headline=_H(caption=2)),
    _Q("caption.gain.<any>", "CIDEr-D gain over <image>", "score 0-10", "higher", "written", said=("shuffled",)),
    _Q("caption.length.<image>", "length", "words", "none", "written"),
    _Q("caption.distinct.<image>", "different captions", _SHARE, "none", "written", chat="different answers"),
    _Q("caption.empty.<any>", "empty captions", _SHARE, "lower", "written", chat="empty answers"),
    _Q("caption.unfinished.<any>", "cut-off captions", _SHARE, "lower", "written", chat="cut-off answers"),
    _Q("chair.s.<image>", "captions naming an absent object (CHAIR-s)", _SHARE, "lower", "written",
       chat="answers naming an absent object (CHAIR-s)", said=OWN,
       headline=_H(caption=4, label="absent object named")),
    _Q("chair.i.<image>", "named objects that are absent (CHAIR-i)", _SHARE, "lower", "written"),
    _Q("clipscore.<image>", "CLIPScore", "score", "higher", "written", headline=_H(5, 6)),
    _Q("refclipscore.<image>", "RefCLIPScore", "score", "higher", "written"),
    _Q("qa.accuracy.<image>", "answers right", _SHARE, "higher", "written", said=("correct", "zero", "chance"),
       headline=_H(caption=3, beside=("chance", "guessing"))),
    # Answers to the data's own questions.
    _Q("answer.accuracy.<image>", "answers right, <image>", _SHARE, "higher", "answers",
       said=("correct", "shuffled", "none"),
       headline=_H(answer=1, label="answers right", beside=("none", "no image"))),
    _Q("answer.exact.<image>", "answers exactly right, <image>", _SHARE, "higher", "answers"),
    _Q("answer.gain.<any>", "answers right, gain over <image>", _SHARE, "higher", "answers", read_in="points",
       said=("none",), headline=_H(answer=2, label="gain over no image", condition="none")),
    # How well they follow the instruction, from the texts alone (`probes.instruction`).
    _Q("instruct.score.<image>", "instruction following, <image>", _SCORE, "higher", "instructions", column="score",
       said=OWN),
    _Q("instruct.relevance.<image>", "relevance, <image>", _SCORE, "higher", "instructions", column="relevance"),
    _Q("instruct.completeness.<image>", "completeness, <image>", _SCORE, "higher", "instructions",
       column="completeness"),
    _Q("instruct.coherence.<image>", "coherence, <image>", _SCORE, "higher", "instructions", column="coherence"),
    _Q("instruct.gain.<any>", "instruction following, gain over <image>", _SCORE, "higher", "instructions",
       column="gain"),
    *(_Q(f"pope.{x}.<image>", f"yes/no questions: {x}, <image>", _SHARE, "higher", "yes/no", column=x)
      for x in ("accuracy", "precision", "recall")),
    _Q("pope.f1.<image>", "yes/no questions: F1, <image>", _SHARE, "higher", "yes/no", column="F1", said=OWN,
       headline=_H(answer=3, label="yes/no questions, F1")),
    _Q("pope.yes_rate.<image>", "yes/no questions: says yes, <image>", _SHARE, "none", "yes/no", column="says yes",
       said=OWN),
    # Contrast pairs: one question, two pictures, two right answers.
    _Q("pairs.right.<image>", "contrast pairs both right, <image>", _SHARE, "higher", "pairs",
       said=("correct", "shuffled", "none")),
    _Q("pairs.single.<image>", "answers of contrast pairs right, <image>", _SHARE, "higher", "pairs"),
    _Q("pairs.prior", "contrast pairs both right by guessing", _SHARE, "none", "pairs", said=ALONE),
    # Own and another's image and question; answers without the image, silently or told, beside the base's.
    _Q("cells.loss.own.<image>", "loss, own question, <image>", _NATS, "lower", "cells"),
    _Q("cells.loss.other.<any>", "loss, another's question, <image>", _NATS, "none", "cells"),
    _Q("cells.accuracy.own.<image>", "answer predicted, own question, <image>", _SHARE, "higher", "cells"),
    _Q("cells.accuracy.other.<any>", "answer predicted, another's question, <image>", _SHARE, "none", "cells"),
    _Q("cells.delta.question", "loss difference, another's question", _NATS, "higher", "cells", said=ALONE),
    _Q("cells.delta.image", "loss difference, another image", _NATS, "higher", "cells"),
    _Q("blind.told", "answers right, told that the image is missing", _SHARE, "none", "blind", said=ALONE),
    _Q("blind.base", "answers right, base model without image", _SHARE, "none", "blind", said=ALONE),
    _Q("blind.share", "blind share: right without image over right with it", "ratio", "lower", "blind",
       read_in="share", said=ALONE),
    _Q("blind.share_told", "blind share, told that the image is missing", "ratio", "lower", "blind", read_in="share"),
    _Q("blind.gain", "gain: right with image, over without", _SHARE, "higher", "blind", read_in="points"),
    _Q("blind.leak", "leak: right without image, over the base", _SHARE, "lower", "blind", read_in="points",
       said=ALONE),
    # What adapters cost on plain text, and what merging them into the weights changes.
    _Q("retention.loss_base", "loss on plain text, adapters off", _NATS, "none", "kept", said=ALONE),
    _Q("retention.loss", "loss on plain text, adapters on", _NATS, "lower", "kept", said=ALONE),
    _Q("retention.loss_ratio", "loss on plain text, on over off", "ratio", "lower", "kept", said=ALONE,
       headline=_H(answer=4, label="text loss over the base's")),
    _Q("retention.loss_ratio_styled", "loss on plain text after its first words, on over off", "ratio", "lower", "kept",
       said=ALONE),
    _Q("retention.over_start", "loss on plain text, over the study's start", "ratio", "lower", "kept", said=ALONE),
    _Q("retention.kl", "divergence from the base (KL)", _NATS, "lower", "kept", said=ALONE),
    _Q("cross.own.trained", "loss on over off: own images, trained texts", "ratio", "lower", "kept"),
    _Q("cross.ood.trained", "loss on over off: unlike images, trained texts", "ratio", "none", "kept"),
    _Q("cross.own.plain", "loss on over off: own images, plain texts", "ratio", "lower", "kept"),
    _Q("cross.ood.plain", "loss on over off: unlike images, plain texts", "ratio", "lower", "kept"),
    _Q("merge.max_logit_diff", "largest change of a logit by merging", "logits", "lower", "kept", said=ALONE),
    _Q("merge.changed_pct", "next tokens of plain text changed by merging", "%", "lower", "kept", said=ALONE),
    _Q("merge.tokens_changed_pct", "tokens of answers changed by merging", "%", "lower", "kept", said=ALONE),
    # What the language model reads from the text alone, and the trained model from the text and an empty image; a leak
    # is what the own earlier turns tell more than another sample's.
    _Q("audit.answerable.alone", "turns answerable without image", _SHARE, "lower", "symptoms", said=ALONE),
    _Q("audit.answerable.context", "turns answerable from earlier turns", _SHARE, "lower", "symptoms"),
    _Q("audit.leak", "leak from earlier turns", _NATS, "lower", "symptoms", said=ALONE),
    _Q("audit.trained.answerable.alone", "turns the trained model answers from an empty image", _SHARE, "lower",
       "symptoms"),
    _Q("audit.trained.answerable.context", "turns it answers from an empty image and earlier turns", _SHARE, "lower",
       "symptoms"),
    _Q("audit.trained.leak", "leak from earlier turns, trained model", _NATS, "lower", "symptoms"),
    # What a learner of the words alone makes of the data's questions.
    _Q("learner.accuracy", "right by a learner of the words alone", _SHARE, "lower", "blind", said=ALONE),
    _Q("learner.lm", "right by the language model trained without images", _SHARE, "lower",
       asked_by="beholder audit --learner lm"),
    _Q("learner.gain", "right over what a learner of the words gets", _SHARE, "higher", "blind", read_in="points",
       said=ALONE),
    _Q("learner.majority", "right by the usual answer to the question", _SHARE, "none", "blind"),
    _Q("collapse.empty", "empty outputs", _SHARE, "lower", "symptoms"),
    _Q("collapse.loop", "looping outputs", _SHARE, "lower", "symptoms"),
    _Q("collapse.template", "outputs of one template", _SHARE, "lower", "symptoms"),
    _Q("collapse.image_independent", "same output for another image", _SHARE, "lower", "symptoms"),
    _Q("collapse.worst", "worst collapse symptom", _SHARE, "lower", "symptoms", said=ALONE,
       headline=_H(6, 5, label="worst collapse")),
    # What a run is watched with while it trains (`probes.monitors`).
    _Q("irrelevant.pass", "unrelated images told to be so", _SHARE, "higher", "monitors", said=ALONE),
    _Q("ood.hallucination", "hallucination on unlike images", _SHARE, "lower", "monitors", said=ALONE),
    _Q("ood.invents", "unlike images: descriptions that invent", _SHARE, "lower", "monitors"),
    _Q("ood.says_yes", "unlike images: yes to what is absent", _SHARE, "lower", "monitors"),
    _Q("ood.blind", "unlike images: empty or image-independent", _SHARE, "lower", "monitors", said=ALONE),
    _Q("sane.captions", "unlike images: sane descriptions", _SHARE, "higher", "monitors", said=ALONE),
    _Q("jitter.consistency", "same answer for slightly cropped images", _SHARE, "higher", "monitors", said=ALONE),
    _Q("gap.generalisation", "generalisation gap", _NATS, "lower", "monitors", said=ALONE),
    _Q("gap.training_loss", "loss on training samples", _NATS, "none", "monitors"),
    # Whether looking transfers from a teacher to its student (`probes.transfer`).
    _Q("transfer.teacher.delta", "teacher: loss difference, wrong image", _NATS, "none"),
    _Q("transfer.teacher.ratio", "teacher: loss ratio, wrong image", "ratio", "none"),
    _Q("transfer.student.delta", "student: loss difference, wrong image", _NATS, "higher"),
    _Q("transfer.student.ratio", "student: loss ratio, wrong image", "ratio", "higher"),
    _Q("transfer.share", "share of the teacher's image reliance", "ratio", "higher", "ablation", read_in="share",
       said=ALONE),
    _Q("transfer.agreement", "where to look: agreement with the teacher", "correlation", "higher"),
    # What gates alone judge.
    _Q("data.truncated_pct", "targets cut to length", "%", "lower"),
    _Q("data.label_zero_pct", "samples with nothing supervised", "%", "lower"),
    _Q("frozen.changed", "frozen parts that changed", "parts", "lower"),
    _Q("text.changed", "text prompts answered differently", "prompts", "lower",
       chat="text prompts answered differently, adapters off"),
    # Plain answer files (`beholder score`), which also have captions and yes/no answers, without a condition.
    _Q("vqa.accuracy", "answers right (VQA)", _SHARE, "higher"),
    _Q("vqa.exact", "answers exactly right", _SHARE, "higher"),
)  # fmt: skip

CATALOGUE = _MEASURED + tuple(
    _Q(STRENGTH_LINE[q.pattern], f"{q.column or q.words}, adapters at part of their strength", q.unit, q.better)
    for q in _MEASURED
    if q.pattern in STRENGTH_LINE
)
"""In the order in which a run that ends says them; last what is measured at part of the adapters' strength as well
(``eval.strengths``)."""

_ROWS = {row.stem: row for row in CATALOGUE}


LOGGED = (
    ("train.loss", "nats/token", "loss"),
    ("eval.loss", "nats/token", "eval_loss"),
    ("quick_eval.loss", "nats/token", "quick_eval_loss"),
    ("eval.exact", "share", "eval_exact"),
    ("quick_eval.exact", "share", "quick_eval_exact"),
    ("lr.connector", "learning rate", "lr.connector"),
    ("lr.lora", "learning rate", "lr.lora"),
    ("lr.vision", "learning rate", "lr.vision"),
    ("grad_norm", "L2 norm", "grad_norm"),
)
"""Curves over the steps: (name, unit, key in ``metrics.jsonl``)."""
LOGGED_KINDS = "quick_eval_exact/"
"""How the keys of further curves begin, one a kind of question: shares of exactly right answers."""


def logged_curves(keys: Iterable[str]) -> list[tuple[str, str, str]]:
    """`LOGGED`, and the curves by kind of question that these keys of ``metrics.jsonl`` are of."""
    kinds = sorted({key for key in keys if key.startswith(LOGGED_KINDS)})
    return [*LOGGED, *((f"quick_eval.exact/{key.removeprefix(LOGGED_KINDS)}", "share", key) for key in kinds)]


@cache
def quantity(name: str) -> tuple[Quantity, str]:
    """The row of a measurement, and its condition (empty: none).

    What the catalogue does not know has a row of its own: its name as words, in the table where the first row of the
    same probe is.
    """
    if row := _ROWS.get(name):
        return row, ""
    stem, _, condition = name.rpartition(".")
    if (row := _ROWS.get(stem)) and row.stem != row.pattern:
        return row, condition
    probe = name.partition(".")[0] + "."
    alike = next((row for row in CATALOGUE if row.pattern.startswith(probe)), None)
    return Quantity(name, name, "", "none", alike.section if alike else ""), ""


def unmeasured(name: str) -> str | None:
    """Why no run measures what is called so; None for what the catalogue has."""
    row, condition = quantity(name)
    if row.asked_by:
        return f"only {row.asked_by} measures {name}, a run does not"
    if row in CATALOGUE and (row.pattern == row.stem or condition in (*ALL_CONDITIONS, *_IMAGES, "chance")):
        return None
    names = {
        row.stem if row.stem == row.pattern else f"{row.stem}.{c}"
        for row in CATALOGUE
        for c in (row.said or ("correct",))
        if not row.asked_by
    }
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or ["the names in evidence.json of any run"]
    return f"nothing is measured as {name}; nearest: {', '.join(close)}"


def called(name: str, written: Written = "caption") -> str:
    """A measurement's name for people: ``caption.exact_match.correct`` → ``exact match``."""
    row, condition = quantity(name)
    return row.called(condition, written)


def heading(name: str) -> str:
    """What a measurement is called over a narrow column."""
    return quantity(name)[0].column or called(name)


def grouping_name(by: str) -> str:
    """``length`` → ``target length``."""
    return GROUPINGS.get(by, by or "group")


def unit_of(name: str, unit: str) -> str:
    """The unit a measurement is read in: a difference of two shares is ``points``, never ``%``."""
    row, _ = quantity(name)
    return row.read_in if row.read_in and unit == row.unit else unit


def shown(e: Evidence, *sections: Section) -> list[Measurement]:
    """What these tables of the report show: measurements over all samples, in the order of the record."""
    return [m for m in e.measurements if m.stratum is None and quantity(m.name)[0].section in sections]


def headlines(e: Evidence, written: Written) -> list[tuple[Headline, Quantity, Measurement]]:
    """The key numbers that were measured, in their order."""
    rows = [(row.headline, row) for row in CATALOGUE if row.headline and getattr(row.headline, written)]
    rows.sort(key=lambda pair: getattr(pair[0], written))
    return [(h, row, m) for h, row in rows if (m := measured(e, row, h.condition)) is not None]


def measured(e: Evidence, row: Quantity, condition: str) -> Measurement | None:
    """Its measurement over all samples under a condition it has; None when there is none."""
    return e.get(row.stem if row.stem == row.pattern else f"{row.stem}.{condition}")


def said(e: Evidence) -> list[Measurement]:
    """What the terminal says when a run ends."""
    return [m for row in CATALOGUE for c in row.said if (m := measured(e, row, c)) is not None]


def flat_names(e: Evidence) -> dict[str, float]:
    """The seed's names for ``metrics.json``: ``eval_loss``, ``eval_loss_short``, ``delta_shuffle``, …"""
    out: dict[str, float] = {}
    for row in (row for row in CATALOGUE if row.flat):
        for m in e.measurements:
            found, condition = quantity(m.name)
            if found is row and (m.stratum is None or ("<_stratum>" in row.flat and m.by in (None, "length"))):
                name = row.flat.replace("<image>", {"shuffled": "shuffle"}.get(condition, condition))
                out[name.replace("<_stratum>", f"_{m.stratum}" if m.stratum else "")] = m.value
    return out | {"eval_examples_total": e.data.eval}
