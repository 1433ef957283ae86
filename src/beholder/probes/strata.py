"""Which groups the held-out turns fall into, so that no average hides a group that is answered without looking.

Pure functions of examples; what is measured per group stands in `loss` and in the other probes.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from beholder.types import Example, Turn

if TYPE_CHECKING:  # telling answers apart by their words needs no model
    from beholder.probes.loss import Groups

FIRST, LATER = "first turn", "later turns"
YES_NO, NUMBER, OTHER_ANSWERS = "yes/no", "number", "other answers"
OTHER_QUESTIONS = "other questions"
MIN_SAMPLES = 20
"""Questions that begin alike in fewer samples than this are pooled: a gate does not judge smaller groups either."""

_NUMBER_WORDS = frozenset(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million
    """.split()  # noqa: SIM905
)
_YES_NO = re.compile(r"(yes|no)(?=$|\s*[.,;:!?])", re.IGNORECASE)
_DIGITS = re.compile(r"[-+]?\d[\d.,:/]*\s*%?")


def images_shown(n: int) -> str:
    """The stratum of samples with ``n`` images."""
    return f"{n} image{'s' * (n != 1)}"


def groups_of(examples: Sequence[Example], buckets: Sequence[str]) -> Groups:
    """Strata of every assistant turn, as `loss.summarize_groups` takes them; ``buckets``: length bucket per example.

    ``length``: the sample's bucket. ``turn``: first or later. ``question``: `Example.question_type` for the last answer
    of a sample that has one, else the first two words of what the user asked; `OTHER_QUESTIONS` for a kind that fewer
    than 20 of these samples have (a sample that has it in several turns counts once). ``answer``:
    `Example.answer_type` for the last answer, else VQA's types by the words: yes/no, number, other. ``images``: how
    many the sample shows. No name occurs in two groupings: easy-VQA's question type "yes/no" is told as "yes/no
    questions".
    """
    assert len(examples) == len(buckets), f"{len(examples)} examples, {len(buckets)} buckets"
    asked = [questions(example) for example in examples]
    shows = [images_shown(len(e.images)) for e in examples]
    others = {*buckets, *shows, FIRST, LATER, OTHER_QUESTIONS}
    answers = [_answer_types(example, others) for example in examples]
    taken = {*buckets, *shows, FIRST, LATER, YES_NO, NUMBER, OTHER_ANSWERS, OTHER_QUESTIONS}.union(*answers)
    heads = [[_head(q, taken) for q in own] for own in asked]
    for example, own in zip(examples, heads, strict=True):
        if own and example.question_type.strip():
            own[-1] = _apart(example.question_type.strip(), taken, "questions")
    samples_with = Counter(head for own in heads for head in set(own))
    return {
        "length": [[bucket] * len(own) for bucket, own in zip(buckets, asked, strict=True)],
        "turn": [[FIRST if k == 0 else LATER for k in range(len(own))] for own in asked],
        "question": [
            [None if h is None else h if samples_with[h] >= MIN_SAMPLES else OTHER_QUESTIONS for h in own]
            for own in heads
        ],
        "answer": answers,
        "images": [[shown] * len(own) for shown, own in zip(shows, asked, strict=True)],
    }


def parts(labels: Sequence[str | None], by: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """(``by``, name, indices) of every stratum by name; nothing where there is one alone, which says nothing new."""
    names = sorted({label for label in labels if label is not None})
    for name in names if len(names) > 1 else ():
        yield by, name, np.array([k for k, label in enumerate(labels) if label == name])


def _answer_types(example: Example, taken: set[str]) -> list[str]:
    """By assistant turn. What a data set says of the answer is about the last one."""
    types = [answer_type(t.text) for t in example.turns if t.role == "assistant"]
    given = example.answer_type.strip()
    if types and given:
        types[-1] = OTHER_ANSWERS if given == "other" else _apart(given, taken, "answers")
    return types


def _apart(name: str, taken: set[str], what: str) -> str:
    """A data set's own name of a kind, told apart from strata of other groupings."""
    while name in taken:
        name = f"{name} {what}"
    return name


def questions(example: Example) -> list[str]:
    """What the user said before each assistant turn since the one before, without images; empty when nothing was."""
    out: list[str] = []
    said: list[str] = []
    for turn in example.turns:
        if turn.role == "assistant":
            out.append(" ".join(said))
            said = []
        elif turn.role == "user":
            said.append(_words_of(turn))
    return out


def answer_type(text: str) -> str:
    """VQA's answer types. Yes/no: says so first, on its own or before a punctuation mark. Number: is nothing else."""
    text = text.strip()
    if _YES_NO.match(text):
        return YES_NO
    bare = text.rstrip(".!").lower()
    if _DIGITS.fullmatch(bare) or (bare and all(w in _NUMBER_WORDS for w in re.split(r"[\s-]+", bare))):
        return NUMBER
    return OTHER_ANSWERS


def _words_of(turn: Turn) -> str:
    return " ".join(p for p in turn.parts if isinstance(p, str))


def _head(question: str, taken: set[str]) -> str | None:
    """The first two words, lower-case, punctuation stripped; None when there is no word.

    A head that is also the name of another stratum gets an ellipsis: a question may well begin with "Number".
    """
    words = [w for w in (_bare(w) for w in question.lower().split()) if w]
    if not words:
        return None
    head = " ".join(words[:2])
    return f"{head} …" if head in taken else head


def _bare(word: str) -> str:
    """Without punctuation and symbols at either end: ``"what's?"`` is ``what's``."""
    kept = [i for i, c in enumerate(word) if unicodedata.category(c)[0] in "LNM"]
    return word[kept[0] : kept[-1] + 1] if kept else ""
