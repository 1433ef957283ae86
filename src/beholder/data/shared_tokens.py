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
    """What each id stands for in a text; control tokens, which stand for none, are left out."""
    vocab: dict[str, int] = tokenizer.get_vocab()
    control = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    words = {token: i for token, i in vocab.items() if token not in control}
    letters = _byte_letters()
    if any("Ġ" in token for token in words):
        return {i: bytes(letters[c] for c in token) for token, i in words.items() if all(c in letters for c in token)}
    return {
        i: bytes([int(found[1], 16)]) if (found := _BYTE.fullmatch(token)) else token.replace("▁", " ").encode()
        for token, i in words.items()
    }


def shared_ids(teacher: Any, student: Any, ends: Sequence[tuple[int, int]], size: int) -> np.ndarray:
    """int64 [size]: for each of the teacher's ids the student's of the same text, -1 where it has none. ``ends``: ids
    of both that end an answer, which mean the same whatever they are called."""
    by_text = {text: i for i, text in token_bytes(student).items()}
    out = np.full(size, -1, np.int64)
    for i, text in token_bytes(teacher).items():
        if i < size:
            out[i] = by_text.get(text, -1)
    for theirs, own in ends:
        out[theirs] = own
    return out


def aligned(
    own: Sequence[int], theirs: Sequence[int], own_text: dict[int, bytes], their_text: dict[int, bytes]
) -> list[int | None]:
    """For each token of one splitting of a text the token of the other that begins at the same byte; None: none does.
    A control token, such as one that ends an answer, counts as one byte."""
    starts = {start: k for k, start in reversed(list(enumerate(_starts(theirs, their_text))))}
    return [starts.get(start) for start in _starts(own, own_text)]


def _starts(ids: Sequence[int], text: dict[int, bytes]) -> list[int]:
    at, out = 0, []
    for i in ids:
        out.append(at)
        at += len(text.get(i, b"\0"))
    return out
