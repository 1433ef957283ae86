"""Questions made from a data set's own captions, to see whether the answers come from the image.

"What is in the image?" has an answer where the caption names a listed object, "What colour is the …?" where it has a
colour word directly before one. Which objects are listed is `probes.hallucination`'s; how the model answers is
`probes.written`' business, which gets the questions as examples (`qa_prompt`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import numpy as np

from beholder.evidence import Condition, Measurement
from beholder.probes import share
from beholder.probes.hallucination import COLOUR_WORDS, ObjectList, words
from beholder.types import Example, ImageSlot, Turn

Kind = Literal["what is in the image", "what colour"]

KINDS: tuple[Kind, ...] = ("what is in the image", "what colour")

FEW = 10
"""Candidates of a kind below which nothing is balanced: so few prove nothing either way."""

COLOURS = ObjectList(COLOUR_WORDS, "colours")


@dataclass(frozen=True)
class QaItem:
    """One question about one held-out sample."""

    index: int
    """Into the examples it was built from."""
    question: str
    kind: Kind
    answers: tuple[str, ...]
    """Names of ``vocabulary`` that are right, the first one in the caption first."""
    vocabulary: ObjectList
    """Everything that would be understood as an answer."""
    objects: ObjectList
    """The list the question was made with."""
    about: str | None = None
    """The object whose colour is asked for."""

    def is_right(self, text: str) -> bool:
        """Whether ``text`` names a right answer and no wrong one.

        A whole caption may do. Where it has a colour directly before the object that was asked about, that one is the
        answer, whatever else it colours ("a red square on white").
        """
        tokens = words(text)
        named = {name for _, _, name in self.vocabulary.mentions(tokens)}
        if self.about is not None:
            places = [start for start, _, name in self.objects.mentions(tokens) if name == self.about]
            named = {colour for start in places for colour in _colours_before(tokens, start)} or named
        return bool(named) and named <= set(self.answers)


def build_qa(examples: Sequence[Example], objects: ObjectList, size: int, seed: int) -> list[QaItem]:
    """At most ``size`` questions, half of each kind, chosen by ``seed``; in the order of the examples.

    A kind with too few candidates leaves its places to the other. Only samples with one image and one assistant turn
    are asked about: the answers of a conversation are no description. No question is made where the right answer is
    not certain: the colour of an object that the caption mentions more than once. Where ``size``
    and the candidates of a kind are `FEW` or more, no answer is right for more than half of its questions, or saying it
    every time would look like sight; that may leave none.
    """
    found: dict[Kind, list[QaItem]] = {kind: [] for kind in KINDS}
    for index, example in enumerate(examples):
        if len(example.images) != 1 or example.num_answers != 1:
            continue
        tokens = words(example.target_text)
        mentions = objects.mentions(tokens)
        counts = Counter(name for _, _, name in mentions)
        if counts:
            found["what is in the image"].append(
                QaItem(index, "What is in the image?", "what is in the image", tuple(counts), objects, objects)
            )
        for start, _, name in mentions:
            colours = _colours_before(tokens, start)
            if colours and counts[name] == 1:
                found["what colour"].append(
                    QaItem(index, f"What colour is the {name}?", "what colour", colours, COLOURS, objects, name)
                )
    rng = np.random.default_rng(seed)
    pools = {kind: [found[kind][k] for k in rng.permutation(len(found[kind]))] for kind in KINDS}

    def first(kind: Kind, places: int) -> list[QaItem]:
        few = min(size, len(pools[kind])) < FEW
        return pools[kind][:places] if few else _no_majority(pools[kind], places)

    what, colour = (len(first(kind, size)) for kind in KINDS)
    half = min(colour, max(size // 2, size - what))
    places: dict[Kind, int] = {"what is in the image": min(what, size - half), "what colour": half}
    chosen = [item for kind in KINDS for item in first(kind, places[kind])]
    return sorted(chosen, key=lambda item: item.index)  # stable: an example's "what" comes before its "colour"


def _no_majority(items: Sequence[QaItem], size: int) -> list[QaItem]:
    """The first ``size`` items, some replaced by later ones or dropped until no answer is right for more than half.

    Every accepted answer of an item counts.
    """
    taken, later = list(items[:size]), iter(items[size:])
    while True:
        counts = Counter(answer for item in taken for answer in item.answers)
        frequent = {answer for answer, count in counts.items() if 2 * count > len(taken)}
        if not frequent:
            return taken
        # The item that most of them are right for; of equals the last, so that the first ones stay.
        worst = max(range(len(taken)), key=lambda k: (len(frequent.intersection(taken[k].answers)), k))
        del taken[worst]
        taken += islice((item for item in later if frequent.isdisjoint(item.answers)), 1)


def _colours_before(tokens: Sequence[str], stop: int) -> tuple[str, ...]:
    """Colours directly before position ``stop``: ``blue``, or both of ``black and white``."""
    out: list[str] = []
    k = stop - 1
    while k >= 0 and tokens[k] in COLOUR_WORDS:
        out.append(COLOUR_WORDS[tokens[k]])
        k -= 1 + (k > 0 and tokens[k - 1] in ("and", "&"))
    return tuple(dict.fromkeys(reversed(out)))


def qa_prompt(example: Example, item: QaItem) -> Example:
    """The image and the question, as the caption templates put an image; the answer is for the model to give."""
    return replace(example, turns=(Turn("user", (ImageSlot(0), "\n", item.question)),))


def score_qa(items: Sequence[QaItem], answers: Mapping[Condition, Sequence[str]]) -> list[Measurement]:
    """``qa.accuracy.<condition>`` and ``qa.accuracy.chance``, overall and by ``kind``; Wilson intervals.

    ``answers[condition][k]`` is what the model wrote for ``items[k]``. Chance is giving the most frequent right answer
    of each kind to every question of that kind. Nothing asked gives nothing.
    """
    out: list[Measurement] = []
    if not items:
        return out
    kinds = [kind for kind in KINDS if any(item.kind == kind for item in items)]

    def add(what: str, right: Sequence[bool], caveat: str) -> None:
        for kind in (None, *(kinds if len(kinds) > 1 else ())):
            hits = [r for r, item in zip(right, items, strict=True) if kind in (None, item.kind)]
            by = None if kind is None else "kind"
            out.append(share(f"qa.accuracy.{what}", sum(hits), len(hits), stratum=kind, by=by, caveat=caveat))

    for condition, texts in answers.items():
        assert len(texts) == len(items), f"{condition}: {len(texts)} answers to {len(items)} questions"
        right = [item.is_right(text) for item, text in zip(items, texts, strict=True)]
        add(
            condition, right,
            "right: the greedy answer names what the held-out caption names, and nothing else of the list",
        )  # fmt: skip
    likely = {
        kind: Counter(a for item in items if item.kind == kind for a in item.answers).most_common(1)[0][0]
        for kind in kinds
    }
    always = ", ".join(f"{likely[kind]!r} to {kind!r}" for kind in kinds)
    add("chance", [likely[item.kind] in item.answers for item in items], f"always answering {always}")
    return out
