"""Two kinds of blindness (E-2): the image left out silently, and a prompt that says so and asks to guess.

What is right without the image is either in the data's words, which the training taught to use, or was known to the
language model before: the *leak* is what the model answers blind beyond its base. A prompt that admits the missing
image scores lower than one that is silent (arXiv:2603.21687), so each number says which it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from beholder.evidence import Measurement
from beholder.probes import bootstrap, joined, mean, measurement
from beholder.probes.answers import mean_share, references_of, says_yes
from beholder.probes.strata import YES_NO, answer_type
from beholder.probes.vqa import normalize_answer, vqa_accuracy
from beholder.probes.written import Written
from beholder.probes.wrong_images import without_images
from beholder.types import Example

MISSING = "The image is missing. Guess the answer as well as you can."
"""Said before the last question in place of the image. Only for measuring: nothing is ever trained on it."""


def told_missing(example: Example) -> Example:
    """The example without its images, and with `MISSING` on a line of its own before its last question."""
    plain = without_images(example)
    last = max(k for k, t in enumerate(plain.turns) if t.role == "user")
    turns = list(plain.turns)
    turns[last] = replace(turns[last], parts=(f"{MISSING}\n", *turns[last].parts))
    return replace(plain, turns=tuple(turns))


def names_answer(text: str, references: Sequence[str]) -> float:
    """Share of right of a reply in sentences, which a base model gives: 1 when it says yes or no first as the reference
    does, or names any reference as whole words; else VQA accuracy."""
    reply = _spaced(text)
    for reference in set(references):
        if answer_type(reference) == YES_NO:
            named = says_yes(text) is not None and says_yes(text) == says_yes(reference)
        else:
            wanted = _spaced(reference)
            named = bool(wanted.strip()) and wanted in reply
        if named:
            return 1.0
    return vqa_accuracy(text, references)


def score(
    examples: Sequence[Example],
    seen: Sequence[Written],
    silent: Sequence[Written],
    told: Sequence[Written],
    base: Sequence[Written] | None,
    seed: int = 0,
) -> list[Measurement]:
    """``blind.told``, ``blind.base``, ``blind.share``, ``blind.share_told``, ``blind.gain`` and ``blind.leak``.

    The answers to the same questions: with the image (``seen``), by the same prompt without it (``silent``), told that
    it is missing, and by the base language model alone, silently without it; None where that is the same model, which
    has no leak. Shares are accuracy without over accuracy
    with; *gain* is with minus without, *leak* without minus base, paired by sample. The base was never taught to answer
    in a word, so it is right where its reply names the answer (`names_answer`): the leak is if anything larger.
    """
    given = (seen, silent, told, *([] if base is None else [base]))
    assert all([r.id for r in own] == [e.id for e in examples] for own in given), "answers to other questions"
    references = [references_of(e) for e in examples]
    own, without, guessed = (
        np.array([vqa_accuracy(r.prediction, refs) for r, refs in zip(records, references, strict=True)])
        for records in (seen, silent, told)
    )
    add = partial(measurement, n=len(examples))
    rule = "right where its reply names the answer"
    paired = "paired: the same questions"
    out = [add("blind.told", *mean_share(guessed, seed))]
    if own.sum():
        for name, blind in (("share", without), ("share_told", guessed)):
            ci = bootstrap(lambda k, b=blind: b[k].sum(1) / own[k].sum(1), len(own), seed)
            out.append(add(f"blind.{name}", float(blind.sum() / own.sum()), ci, caveat=paired))
    out.append(add("blind.gain", *mean(own - without, seed), caveat=paired))
    if base is not None:
        alone = np.array([names_answer(r.prediction, refs) for r, refs in zip(base, references, strict=True)])
        out.insert(1, add("blind.base", *mean_share(alone, seed), caveat=rule))
        out.append(add("blind.leak", *mean(without - alone, seed), caveat=joined(paired, f"the base is {rule}")))
    return out


def _spaced(text: str) -> str:
    """Normalised, nothing but words, a space before and after each."""
    words = re.findall(r"\w+", normalize_answer(text))
    return f" {' '.join(words)} "
