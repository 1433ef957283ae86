"""Two tokenizers that know some of the same tokens: which ids mean the same text, and where two splittings of one text
begin a token together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes with (GPT-2, Radford et al. 2019)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + k): b for k, b in enumerate(others)}


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """What each id stands for in a text; control tokens, which stand for none, are left out. Ascending, but for pieces
    that spell a byte (SentencePiece's ``<0x41>``), which come last: a letter is written with its own piece."""
    vocab: dict[str, int] = tokenizer.get_vocab()
    control = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    words = sorted((i, token) for token, i in vocab.items() if token not in control)
    letters = _byte_letters()
    if any("Ġ" in token for _, token in words):
        return {i: bytes(letters[c] for c in token) for i, token in words if all(c in letters for c in token)}
    plain = {i: token.replace("▁", " ").encode() for i, token in words if not _BYTE.fullmatch(token)}
    return plain | {i: bytes([int(found[1], 16)]) for i, token in words if (found := _BYTE.fullmatch(token))}


def shared_ids(teacher: Any, student: Any, ends: Sequence[tuple[int, int]], size: int) -> np.ndarray:
    """int64 [size]: for each of the teacher's ids the student's of the same text, -1 where it has none or another of
    the teacher's ids has it already. ``ends``: ids of both that end an answer, which mean the same whatever they are
    called."""
    by_text: dict[bytes, int] = {}
    for i, text in token_bytes(student).items():
        by_text.setdefault(text, i)
    out = np.full(size, -1, np.int64)
    for i, text in token_bytes(teacher).items():
        if i < size:
            out[i] = by_text.pop(text, -1)
    for theirs, own in ends:
        out[theirs] = own
    return out


def aligned(
    own: Sequence[int], theirs: Sequence[int], own_text: dict[int, bytes], their_text: dict[int, bytes]
) -> list[int | None]:
    """For each token of one splitting of some answers the token of the other that follows the same bytes of the same
    answer; None: none does. A control token that ends an answer corresponds to the other's where the answers' bytes
    are the same. A space that only one of them puts before an answer (SentencePiece) is none of its text."""
    out: list[int | None] = [None] * len(own)
    mine, others = _answers(own, own_text), _answers(theirs, their_text)
    if len(mine) != len(others):
        return out
    for (words, end), (other_words, other_end) in zip(mine, others, strict=True):
        texts = [own_text[own[k]] for k in words], [their_text[theirs[k]] for k in other_words]
        whole, other_whole = (b"".join(own) for own in texts)
        spare = int(whole[:1] == b" ") - int(other_whole[:1] == b" ")
        whole, other_whole = whole[max(spare, 0) :], other_whole[max(-spare, 0) :]
        starts, other_starts = _starts(texts[0], max(spare, 0)), _starts(texts[1], max(-spare, 0))
        found = {start: k for start, k in reversed(list(zip(other_starts, other_words, strict=True)))}
        for k, start in zip(words, starts, strict=True):
            if whole[:start] == other_whole[:start]:
                out[k] = found.get(start)
        if whole == other_whole and end and other_end:
            out[end[0]] = other_end[0]
    return out


def _answers(ids: Sequence[int], text: dict[int, bytes]) -> list[tuple[list[int], list[int]]]:
    """Which tokens are an answer's text, and which control tokens stand behind it, one answer after another."""
    out: list[tuple[list[int], list[int]]] = [([], [])]
    for k, i in enumerate(ids):
        if i not in text:
            out[-1][1].append(k)
            continue
        if out[-1][1]:
            out.append(([], []))
        out[-1][0].append(k)
    return out


def _starts(texts: Sequence[bytes], spare: int) -> list[int]:
    """At which byte each begins, ``spare`` bytes in front left out."""
    at, out = -spare, []
    for text in texts:
        out.append(max(at, 0))
        at += len(text)
    return out
