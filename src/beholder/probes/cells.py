"""Four cells (E-1): own and another's image, own and another's question, and always the sample's own answer.

A wrong image alone leaves open whether the question is read: a model that names what it sees, whatever it is asked,
passes every comparison of images (arXiv:2509.23499). So the question is exchanged as well. Nothing is written, the own
answer is scored under teacher forcing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np

from beholder.evidence import Measurement
from beholder.probes import measurement, ratio_of_sums, share
from beholder.probes.loss import SampleLoss
from beholder.probes.pairs import asked
from beholder.probes.wrong_images import reassign, shuffle_images
from beholder.types import Example, ImageRef, ImageSlot, Part

Cell = tuple[Literal["own", "other"], Literal["correct", "shuffled"]]
"""Whose question, which image."""
CELLS: tuple[Cell, ...] = (("own", "correct"), ("own", "shuffled"), ("other", "correct"), ("other", "shuffled"))


def swappable(examples: Sequence[Example]) -> list[int]:
    """Indices of those that can be asked another's question: one that also has it differently, of the same number of
    images and of image places in it, is among them."""
    kinds: dict[tuple[int, int], set[str]] = defaultdict(set)
    for example in examples:
        if _last_question(example) is not None:
            kinds[_form(example)].add(_words(example))
    return [
        i for i, e in enumerate(examples) if e.images and _last_question(e) is not None and len(kinds[_form(e)]) > 1
    ]


def swap_questions(examples: Sequence[Example], seed: int) -> list[Example]:
    """The examples with another's last question, nobody with the own one; images and answers stay.

    The whole turn comes from the other sample, its places of images filled with the own images in their order. All
    must be `swappable` among each other. The same for every process.
    """
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        members[_form(example)].append(i)
    out = list(examples)
    for form, own in sorted(members.items()):
        words = [_words(examples[i]) for i in own]
        assert len(set(words)) > 1, f"{form}: all ask the same"
        for place, item in enumerate(reassign(len(own), lambda a, b, w=words: w[a] != w[b], seed)):
            out[own[place]] = _asking(examples[own[place]], examples[own[item]])
    return out


def four(examples: Sequence[Example], content_key: Callable[[ImageRef], str], seed: int) -> dict[Cell, list[Example]]:
    """The samples as each cell shows them. Raises UserError where all show the same image."""
    other = shuffle_images(examples, content_key, seed)
    swapped = swap_questions(examples, seed)
    both = [replace(asks, images=shown.images) for asks, shown in zip(swapped, other, strict=True)]
    return dict(zip(CELLS, (list(examples), other, swapped, both), strict=True))


def score(losses: Mapping[Cell, Sequence[SampleLoss]], answers: Sequence[int], seed: int = 0) -> list[Measurement]:
    """``cells.loss.<whose question>.<image>`` and ``cells.accuracy.…`` of the four cells, ``cells.delta.question`` and
    ``cells.delta.image``.

    The loss is that of the last answer, which alone was asked for by the exchanged question. Accuracy is the share of
    the samples with a single answer whose every token, end token included, was the arg-max. Deltas are the loss with
    another's question, and another's image, minus that with both its own, paired by sample.

    ``answers[k]`` is how many answers sample k has; one whose last answer was cut off is left out of all cells. Nothing
    where that is every one.
    """
    first = losses[CELLS[0]]
    whole = [
        k for k, n in enumerate(answers)
        if n == len(first[k].turns) and all(own[k].turns == first[k].turns for own in losses.values())
    ]  # fmt: skip
    single = [k for k in whole if answers[k] == 1]
    if not whole:
        return []
    nats = {cell: np.array([own[k].turn_nll[-1] for k in whole]) for cell, own in losses.items()}
    tokens = np.array([first[k].turns[-1] for k in whole], dtype=np.float64)
    add = partial(measurement, n=len(whole))
    out: list[Measurement] = []
    for cell, own in nats.items():
        out.append(add(f"cells.loss.{cell[0]}.{cell[1]}", *ratio_of_sums(own, tokens, seed)))
    for cell, own in losses.items():
        if single:
            hits = sum(own[k].exact for k in single)
            out.append(share(f"cells.accuracy.{cell[0]}.{cell[1]}", hits, len(single)))
    for name, cell in (("question", CELLS[2]), ("image", CELLS[1])):
        rise = ratio_of_sums(nats[cell] - nats[CELLS[0]], tokens, seed)
        out.append(add(f"cells.delta.{name}", *rise, caveat="paired: the same answers"))
    return out


def _last_question(example: Example) -> int | None:
    """Index of the user turn that the last answer answers; None where there is none or it says nothing."""
    last = len(example.turns) - 2
    if last < 0 or example.turns[-1].role != "assistant" or example.turns[last].role != "user":
        return None
    return last if any(isinstance(p, str) and p.strip() for p in example.turns[last].parts) else None


def _places(parts: Sequence[Part]) -> list[ImageSlot]:
    return [p for p in parts if isinstance(p, ImageSlot)]


def _form(example: Example) -> tuple[int, int]:
    last = _last_question(example)
    return len(example.images), 0 if last is None else len(_places(example.turns[last].parts))


def _words(example: Example) -> str:
    """The last question apart from case and spacing."""
    last = _last_question(example)
    assert last is not None
    return asked(replace(example, turns=example.turns[last:]))[1]


def _asking(example: Example, other: Example) -> Example:
    at, source = _last_question(example), _last_question(other)
    assert at is not None and source is not None
    own = iter(_places(example.turns[at].parts))
    parts = tuple(next(own) if isinstance(p, ImageSlot) else p for p in other.turns[source].parts)
    turns = list(example.turns)
    turns[at] = replace(turns[at], parts=parts)
    return replace(example, turns=tuple(turns))
