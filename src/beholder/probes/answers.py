"""Whether the answers are right, and whether they are right because of the image.

The same questions under different images (`probes.written` writes the answers): a high accuracy that stays without the
image is no sight, so every accuracy stands beside its gain. What "right" means is `probes.vqa`'s, which kinds of
questions there are is `probes.strata`'s.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from beholder.evidence import Condition, Measurement
from beholder.probes import bootstrap, joined, mean, measurement, share, wilson
from beholder.probes.caption_metrics import EXACT, exact_match
from beholder.probes.strata import MIN_SAMPLES, YES_NO, answer_type, parts
from beholder.probes.vqa import normalize_answer, vqa_accuracy
from beholder.types import Example

if TYPE_CHECKING:
    from beholder.probes.loss import SampleLoss
    from beholder.probes.written import Written

GROUPINGS = ("question", "answer", "images")
"""Of the strata those that answers are told by."""

SHORT_WORDS = 5
"""99 of 100 answers of VQA have one to three (Antol et al. 2015); a paragraph is never equal to its reference."""

_FIRST_WORD = re.compile(r"\W*(\w+)")


def score(
    examples: Sequence[Example],
    by: Mapping[Condition, Sequence[Written]],
    groups: Mapping[str, Sequence[str | None]],
    *,
    seed: int = 0,
) -> list[Measurement]:
    """``answer.accuracy.<condition>``, ``answer.exact.<condition>``, ``answer.gain.<condition>`` and ``pope.…``.

    Accuracy is VQA accuracy over `Example.answers`; where there are none, over the last turn alone. Exact is the last
    turn's text up to case, spacing and closing punctuation. Gain is the accuracy with the own image minus the one under
    another condition, paired by question: what the image is worth. All three overall and for every stratum of the
    groupings `GROUPINGS` in ``groups`` (stratum of each example's last answer, or None); a grouping with a single
    stratum says nothing new. Then `pope` over the questions whose reference is yes or no.

    ``by[condition][k]`` is what was written for ``examples[k]``.
    """
    assert examples and "correct" in by, "answers are scored against those with the own image"
    for condition, records in by.items():
        assert [r.id for r in records] == [e.id for e in examples], f"{condition}: answers to other questions"
    texts = {condition: [r.prediction for r in records] for condition, records in by.items()}
    references = [references_of(e) for e in examples]
    accuracy = {
        c: np.array([vqa_accuracy(text, given) for text, given in zip(said, references, strict=True)])
        for c, said in texts.items()
    }
    exact = {
        c: np.array([exact_match(text, e.answer_text) for text, e in zip(said, examples, strict=True)], dtype=float)
        for c, said in texts.items()
    }
    rule = accuracy_rule(references)
    out: list[Measurement] = []
    for by_kind, stratum, k in _parts(len(examples), groups):
        add = partial(measurement, n=len(k), by=by_kind, stratum=stratum)
        few = f"only {len(k)} questions" if len(k) < MIN_SAMPLES else None
        for name, values, what in (("accuracy", accuracy, rule), ("exact", exact, EXACT)):
            for condition, own in values.items():
                out.append(add(f"answer.{name}.{condition}", *mean_share(own[k], seed), caveat=joined(what, few)))
        for condition, own in accuracy.items():
            if condition != "correct":
                told = "with and without their image" if condition == "none" else "with the right and the wrong image"
                gain = mean((accuracy["correct"] - own)[k], seed)
                told = joined(f"paired: the same questions {told}", few)
                out.append(add(f"answer.gain.{condition}", *gain, caveat=told))
    asked = [k for k, e in enumerate(examples) if answer_type(e.answer_text) == YES_NO]
    if asked:
        wanted = [says_yes(examples[k].answer_text) is True for k in asked]
        for condition, said in texts.items():
            out += pope([said[k] for k in asked], wanted, condition, seed=seed)
    return out


def kept(before: Sequence[SampleLoss], now: Sequence[SampleLoss], seed: int = 0) -> Measurement:
    """``answer.kept``: share of single answers predicted exactly now minus before, paired by sample."""
    assert [x.id for x in before] == [x.id for x in now], "answers to other questions"
    gain = np.array([float(b.exact) - float(a.exact) for a, b in zip(before, now, strict=True)])
    told = "paired: the same questions about one image; right where every token, end token included, is the arg-max"
    return measurement("answer.kept", *mean(gain, seed), n=len(now), caveat=told)


def is_short(example: Example) -> bool:
    """Whether the answer is right or wrong as a whole: people gave several, or it has at most `SHORT_WORDS` words."""
    return bool(example.answers) or len(example.answer_text.split()) <= SHORT_WORDS


def references_of(example: Example) -> tuple[str, ...]:
    """The answers people gave; the last turn where the record names none."""
    return example.answers or (example.answer_text,)


def usual_answer(references: Sequence[str]) -> str:
    """The most frequent of them as they are compared, the first of equally frequent ones."""
    return Counter(map(normalize_answer, references)).most_common(1)[0][0]


def accuracy_rule(references: Sequence[Sequence[str]]) -> str:
    """What "right" means for these references, for a caveat."""
    counts = sorted({len(given) for given in references})
    if counts == [1]:
        return "one reference a question: equal after the official VQA normalisation"
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"official VQA accuracy over {many} answers a question"


def mean_share(values: np.ndarray, seed: int = 0) -> tuple[float, tuple[float, float] | None]:
    """Mean of shares and its 95 % interval: Wilson's where every one is right or wrong, else a bootstrap."""
    if np.isin(values, (0.0, 1.0)).all():
        return float(values.mean()), wilson(int(values.sum()), len(values))
    return mean(values, seed)


# ---------------------------------------------------------------------------------------------------------------
# Yes and no (POPE)


def says_yes(text: str) -> bool | None:
    """Whether the first word is yes (True) or no (False); None where it is neither.

    Stricter than POPE's own script (Li et al. 2023), which takes whatever does not say no or not in its first sentence
    for a yes: an empty or evasive answer is wrong here.
    """
    found = _FIRST_WORD.match(text)
    return {"yes": True, "no": False}.get(found[1].lower()) if found else None


def pope(
    predictions: Sequence[str], wanted: Sequence[bool], condition: str | None = None, *, seed: int = 0
) -> list[Measurement]:
    """``pope.<accuracy|precision|recall|f1|yes_rate>[.<condition>]``; yes is the positive class.

    An answer that begins with neither word (`says_yes`) is wrong, and no yes. Precision is absent when the model never
    says yes, recall when no reference does: there is nothing to divide by.
    """
    assert predictions and len(predictions) == len(wanted)
    said = [says_yes(p) for p in predictions]
    yes, right = np.array([s is True for s in said]), np.array([s == w for s, w in zip(said, wanted, strict=True)])
    want, n = np.array(wanted, dtype=bool), len(said)
    hit, called, there = int((yes & want).sum()), int(yes.sum()), int(want.sum())
    neither = sum(s is None for s in said)
    about = f"{there} of {n} references are yes"
    if neither:
        about += f"; {neither} answers begin with neither yes nor no and are wrong"
    if n < MIN_SAMPLES:
        about += f"; only {n} questions"
    ending = f".{condition}" if condition else ""
    shares = (("accuracy", int(right.sum()), n), ("precision", hit, called), ("recall", hit, there))
    out = [share(f"pope.{what}{ending}", hits, size, caveat=about) for what, hits, size in shares if size]
    if called + there:
        f1, ci = 2 * hit / (called + there), bootstrap(_f1(yes, want), n, seed)
        out.append(measurement(f"pope.f1{ending}", f1, ci, n=n, caveat=about))
    return [*out, share(f"pope.yes_rate{ending}", called, n, caveat=about)]


def _f1(yes: np.ndarray, want: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """F1 of resampled rows: 2 hits / (said yes + are yes)."""
    both = (yes & want).astype(np.float64)
    total = yes.astype(np.float64) + want
    return lambda k: 2 * both[k].sum(1) / total[k].sum(1)


# ---------------------------------------------------------------------------------------------------------------


def _parts(n: int, groups: Mapping[str, Sequence[str | None]]) -> Iterator[tuple[str | None, str | None, np.ndarray]]:
    """(grouping, stratum, indices): all, then every stratum by name."""
    yield None, None, np.arange(n)
    for grouping in GROUPINGS:
        strata = groups.get(grouping, ())
        assert not strata or len(strata) == n, f"{grouping}: {len(strata)} strata for {n} answers"
        yield from parts(strata, grouping)
