"""How much the images explain an answer: how likely each of its words is with the images, and with them hidden.

Hidden is what the probes call ``zero`` (`probes.wrong_images`): an empty image in the place of the real one, so that
nothing but what is seen differs. The answer is given, not written again: its words are predicted one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from beholder.data.collate import PADDED, collate
from beholder.probes.loss import sample_losses
from beholder.probes.reliance import word_spans
from beholder.probes.wrong_images import blank_image
from beholder.types import ImageInput
from beholder.use.vlm import Prompt, Vlm

CLEAR = math.log(2)
"""Nats from which a word counts: it is twice as likely with the images, or half as likely."""


class UnwantedError(Exception):
    """Nobody wants the result any more."""


@dataclass(frozen=True)
class Token:
    """A token of the answer, its log-probabilities in nats."""

    id: int
    text: str
    shown: float
    hidden: float
    """With every image hidden."""
    hidden_alone: tuple[float, ...]
    """With one image hidden, image after image."""


@dataclass(frozen=True)
class Word:
    """A word of the answer, with the space before it, so that the texts join to the whole."""

    text: str
    tokens: tuple[Token, ...]

    @property
    def explained(self) -> float:
        """Nats that the images explain: its log-probability with them minus the one with all of them hidden."""
        return math.fsum(token.shown - token.hidden for token in self.tokens)

    @property
    def explained_alone(self) -> list[float]:
        """The same with one image hidden and the others shown, image after image."""
        each = zip(*(token.hidden_alone for token in self.tokens), strict=True)
        return [math.fsum(token.shown - hidden for token, hidden in zip(self.tokens, own, strict=True)) for own in each]

    @property
    def counts(self) -> bool:
        """Whether it is one, rather than punctuation."""
        return any(c.isalnum() for c in self.text)


@dataclass(frozen=True)
class Looks:
    """An answer word by word."""

    words: tuple[Word, ...]

    def counted(self, image: int | None = None) -> tuple[int, int, int]:
        """(words, those that are at least twice as likely with the images, those that are at most half as likely); of
        all images, or of the one numbered ``image`` (from 0)."""
        nats = [w.explained if image is None else w.explained_alone[image] for w in self.words if w.counts]
        return len(nats), sum(x >= CLEAR for x in nats), sum(x <= -CLEAR for x in nats)

    @property
    def nats(self) -> float:
        """Of the whole answer, punctuation included."""
        return math.fsum(word.explained for word in self.words)


def hidden(vlm: Vlm) -> ImageInput:
    """What is shown in the place of a hidden image."""
    return blank_image(vlm.model, "zero")


def looks(
    vlm: Vlm, prompt: Prompt, spans: Sequence[tuple[str, int]], blank: ImageInput, *, rows: int = 8,
    wanted: Callable[[], bool] = lambda: True,
) -> Looks:  # fmt: skip
    """Of a request with its answer (`Vlm.prepare_answered`), its words (`spans_of`) and the hidden image (`hidden`).

    The same sample with its images, with none of them, and (of several) without each: one padded batch, or more where
    ``rows`` are fewer. Raises `UnwantedError` when the result is no longer ``wanted``, which is asked before each.
    """
    num_images = len(prompt.images)
    own, none = prompt.images, [blank] * num_images
    alone = [[*own[:k], blank, *own[k + 1 :]] for k in range(num_images)] if num_images > 1 else []
    samples = [(f"variant {k}", prompt.encoded, shown) for k, shown in enumerate([own, none, *alone])]
    found: list[tuple[float, ...]] = []
    for start in range(0, len(samples), rows):
        if not wanted():
            raise UnwantedError
        batch = collate(samples[start : start + rows], PADDED)
        found += [tuple(-nll for nll in loss.token_nll) for loss in sample_losses(vlm.model, [batch])]
    ids = prompt.encoded.ids[prompt.encoded.supervise].tolist()
    texts = [str(vlm.tokenizer.decode([i], skip_special_tokens=False, clean_up_tokenization_spaces=False)) for i in ids]
    each = list(zip(*found[2:], strict=True)) if alone else [(nats,) for nats in found[1]]
    tokens = [
        Token(i, text, shown, none, tuple(one))
        for i, text, shown, none, one in zip(ids, texts, found[0], found[1], each, strict=True)
    ]
    words, at = [], 0
    for text, count in spans:
        words.append(Word(text, tuple(tokens[at : at + count])))
        at += count
    return Looks(tuple(words))


def spans_of(vlm: Vlm, prompt: Prompt) -> list[tuple[str, int]]:
    """The words of a prompt's answer, each with the number of its tokens."""
    return word_spans(vlm.tokenizer, prompt.encoded.ids[prompt.encoded.supervise].tolist())
