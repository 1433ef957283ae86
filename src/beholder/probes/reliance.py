"""Which words of a reference the image explains: losses per token, told per word.

The losses come from `loss`; here tokens become words again. Nothing is measured in this file.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from beholder.data.chat import ChatEncoder
from beholder.evidence import WordReliance, WordStat
from beholder.probes import ratio_of_sums
from beholder.probes.loss import SampleLoss
from beholder.types import Example

END = "⏎"
"""Stands for the end token."""


def words(encoder: ChatEncoder, example: Example, correct: SampleLoss, without: SampleLoss) -> list[WordReliance]:
    """The targets of a sample word by word, with their nats given its own image and given none.

    A word is cut only between tokens: where a space begins, or where letters meet punctuation. Pieces join to the exact
    text, each turn followed by `END` unless it was cut. A character that the tokenizer splits belongs to one piece.
    """
    encoded = encoder.encode(example)
    ids = encoded.ids[encoded.supervise].tolist()
    for loss in (correct, without):
        assert loss.id == example.id, f"the loss is of {loss.id!r}, the example is {example.id!r}"
        assert len(ids) == loss.tokens, f"{example.id}: {len(ids)} supervised tokens, losses of {loss.tokens}"
    out: list[WordReliance] = []
    start = 0
    for length in correct.turns:
        turn = ids[start : start + length]
        ends = bool(turn) and turn[-1] == encoder.eos_ids[0]
        spans = [*word_spans(encoder.tokenizer, turn[:-1] if ends else turn), *([(END, 1)] if ends else [])]
        at = start
        for text, count in spans:
            stop = at + count
            own, none = (math.fsum(loss.token_nll[at:stop]) for loss in (correct, without))
            out.append(WordReliance(text=text, with_image=own, without=none))
            at = stop
        start += length
        assert at == start, f"{example.id}: words of {at} tokens, the turn ends at {start}"
    return out


def word_stats(
    rows: Iterable[Sequence[WordReliance]], min_n: int = 5, limit: int = 40, seed: int = 0
) -> list[WordStat]:
    """Mean nats that a word loses without the image, over all its occurrences, most first; one row per sample.

    Upper and lower case are one word; punctuation and the end token are left out, and so are words that occur fewer
    than ``min_n`` times. Of more than ``limit`` words those at both ends are kept. The interval resamples the samples
    that have the word, so that a word said twice about one picture does not count as two pictures.
    """
    sums: dict[str, list[tuple[float, int]]] = {}
    for row in rows:
        own: dict[str, list[float]] = {}
        for word in row:
            key = word.text.strip().casefold()
            if any(c.isalnum() for c in key):
                own.setdefault(key, []).append(word.without - word.with_image)
        for key, deltas in own.items():
            sums.setdefault(key, []).append((math.fsum(deltas), len(deltas)))
    mean = {
        key: math.fsum(d for d, _ in pairs) / n
        for key, pairs in sums.items()
        if (n := sum(count for _, count in pairs)) >= min_n
    }
    kept = sorted(mean, key=lambda key: (-mean[key], key))
    if len(kept) > limit:
        most = limit - limit // 2
        kept = [*kept[:most], *kept[len(kept) - limit // 2 :]]
    out: list[WordStat] = []
    for key in kept:
        delta, count = (np.array(column, dtype=np.float64) for column in zip(*sums[key], strict=True))
        value, ci = ratio_of_sums(delta, count, seed)
        out.append(WordStat(word=key, n=int(count.sum()), delta=value, ci95=ci))
    return out


def word_spans(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, int]]:
    """A text's tokens as words: (text with the space before it, tokens). The texts join to the decoded whole."""
    return _words(_pieces(tokenizer, ids))


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, int]]:
    """(text, tokens) of the shortest runs of tokens that are whole characters; the texts join to the decoded whole.

    A run is complete when what is decoded so far is the beginning of the whole and does not end in the middle of a
    character, which decoders show as U+FFFD.
    """

    def decode(stop: int) -> str:
        return str(tokenizer.decode(list(ids[:stop]), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    whole = decode(len(ids))
    out: list[tuple[str, int]] = []
    done, first = "", 0
    for stop in range(1, len(ids) + 1):
        text = whole if stop == len(ids) else decode(stop)
        broken = text.endswith("�") or not whole.startswith(text) or not text.startswith(done)
        if broken and stop < len(ids):
            continue
        out.append((whole[len(done) : len(text)], stop - first))
        done, first = text, stop
    return out


def _words(pieces: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Pieces joined to words: (text with the space before it, tokens)."""
    out: list[tuple[str, int]] = []
    for text, count in pieces:
        if out and _goes_on(out[-1][0], text):
            last, tokens = out[-1]
            out[-1] = (last + text, tokens + count)
        else:
            out.append((text, count))
    return out


def _goes_on(word: str, piece: str) -> bool:
    """Whether ``piece`` belongs to the word before it. Scripts without spaces (Chinese, Japanese) stay in tokens."""
    if not piece or not word or word.isspace():
        return True
    return not piece[0].isspace() and _inside(word[-1]) and _inside(piece[0])


def _inside(c: str) -> bool:
    spaceless = "\u2e80" <= c <= "\u9fff" or "\uf900" <= c <= "\ufaff" or c >= "\U00020000"
    return not spaceless and (c.isalnum() or c in "'’-" or unicodedata.category(c)[0] == "M")
