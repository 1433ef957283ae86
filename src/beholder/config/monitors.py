"""The monitors: what a run is watched with at every evaluation. Here one is added: a record.

A record says where its images or samples come from and what its readings hang on; how it is measured is its file in
`probes` and a row of `stages.panel` by its name, what it is called `evidence.catalogue`. Everything else that is said
of all monitors is derived: which gates and guardrails may be declared, what is logged, what a study keeps.
"""

from __future__ import annotations

import sys
import unicodedata
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, slots=True)
class Watched:
    """A measurement that is made at every evaluation; guardrails judge it."""

    name: str
    column: str
    """Its heading in the tables of a footprint study, which keeps it."""
    strength: str = ""
    """What it is called at part of the adapters' strength; empty: not measured there."""
    matters: float | None = None
    """A change of it that matters to the plan's hypotheses; None: they are not about it."""
    harm: str = ""
    """What they call it."""
    share: bool = True
    """Whether it lies in 0…1, as the catalogue has it."""


@dataclass(frozen=True, slots=True)
class Monitor:
    name: str
    """Its row of `stages.panel`."""
    called: str
    setting: str
    """What says on what it is measured; 0 or none: it is not."""
    begins: tuple[str, ...]
    """How the names of its measurements begin."""
    watched: tuple[Watched, ...]
    hangs_on: tuple[str, ...]
    """Settings that decide a reading by their value, beside what it is measured on."""
    reads: tuple[str, ...] = ()
    """Settings whose files decide it."""
    held_out: bool = False
    """Whether it is measured on held-out samples."""


MONITORS = (
    Monitor(
        "irrelevant", "Irrelevant images", "eval.irrelevant.path", ("irrelevant.",),
        (Watched("irrelevant.pass", "irrelevant told", "strength.pass", 0.05, "irrelevant images told"),),
        ("eval.irrelevant.negation", "eval.irrelevant.prompt", "eval.answer_tokens"),
    ),
    Monitor(
        "ood", "Images unlike the training's", "eval.ood.path", ("ood.", "sane.", "cross."),
        (
            Watched("ood.hallucination", "hallucination", "strength.hallucination", 0.05, "hallucination"),
            Watched("ood.blind", "blind", "strength.blind", 0.05, "blindness"),
            Watched("sane.captions", "sane"),
        ),
        ("eval.ood.prompt", "eval.ood.question", "eval.ood.yes", "eval.ood.script", "eval.answer_tokens"),
        ("eval.object_list",),
    ),
    Monitor(
        "jitter", "Slightly cropped images", "eval.jitter_samples", ("jitter.",),
        (Watched("jitter.consistency", "same when cropped"),),
        ("eval.jitter_samples", "eval.answer_tokens"), held_out=True,
    ),
    Monitor(
        "gap", "Generalisation gap", "eval.gap_samples", ("gap.",),
        (Watched("gap.generalisation", "gap", share=False),), ("eval.gap_samples",), held_out=True,
    ),
)  # fmt: skip

MONITORED = {begin: m.setting for m in MONITORS for begin in m.begins}
"""How names of measurements begin that are made where a setting says on what, and that setting."""
WATCHED = {w.name: w for m in MONITORS for w in m.watched}
"""What is measured at every evaluation, where it is switched on."""
SHARES = frozenset(name for name, w in WATCHED.items() if w.share)
RETAINED = ("retention.loss_ratio", "retention.loss_ratio_styled", "retention.kl")
"""The same under ``eval.retention_every: eval``."""
STRENGTH_LINE = {
    "eval.loss": "strength.loss", "retention.loss_ratio": "strength.text_ratio",
    **{name: w.strength for name, w in WATCHED.items() if w.strength},
}  # fmt: skip
"""What is measured at other strengths of the adapters, and what it is called there."""


def folded(text: str) -> str:
    """A text without what does not count when a phrase is looked for: width of characters, case, spacing."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def in_script(letter: str, script: str) -> bool:
    """Whether the name of a letter begins with that word: ``LATIN SMALL LETTER A`` is in script ``latin``."""
    return unicodedata.name(letter, "").partition(" ")[0] == script.upper()


@cache
def is_script(script: str) -> bool:
    """Whether any letter is in it."""
    return any(c.isalpha() and in_script(c, script) for c in map(chr, range(sys.maxunicode + 1)))
