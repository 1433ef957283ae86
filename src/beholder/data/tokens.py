"""What a tokenizer hides: control tokens and their spellings, what it puts before a text, and what tells two apart."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

from beholder.types import UserError

END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "</s>", "<eos>")
"""Special tokens that end a text in the common families; generation stops at any the tokenizer has as a special one."""


def control_tokens(tokenizer: Any) -> tuple[re.Pattern[str] | None, frozenset[int]]:
    """Spellings (every start position matches, overlaps included) and ids of tokens that literal text must not become.

    Left out: runs of whitespace, which several families register as added tokens and which are ordinary text, and an
    unknown token that is nothing else, which is where text outside the vocabulary honestly goes.
    """
    controls = spellings(tokenizer)
    ids = set(controls.values())
    if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        ids.discard(tokenizer.unk_token_id)
    # First characters are looked at first: else the hundreds of reserved tokens of some are tried at every character.
    first = "".join(sorted({re.escape(t[0]) for t in controls}))
    pattern = re.compile(f"(?=[{first}])(?={any_of(controls)})") if controls else None
    return pattern, frozenset(ids)


def spellings(tokenizer: Any) -> dict[str, int]:
    """Control tokens as they are spelled, with their ids."""
    spelled: dict[str, int] = dict(tokenizer.get_added_vocab())
    spelled |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {t: i for t, i in spelled.items() if len(t) > 1 and t.replace("▁", "").strip()}


def any_of(spellings: Iterable[str]) -> str:
    """A pattern that prefers the longest spelling, as tokenizers do."""
    return "|".join(re.escape(t) for t in sorted(spellings, key=lambda t: (-len(t), t)))


def without_word_mark(tokenizer: Any) -> Any:
    """The tokenizer's inside, without the mark (``▁`` or a space) that it puts before a text of its own accord.

    None when it does no such thing.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
        if first.startswith("▁"):
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} marks the first word of every text and cannot be told not "
                "to, so turns of a chat cannot be tokenised one by one; use its fast version (tokenizer.json)"
            )
        return None
    facts = json.loads(backend.to_str())

    def unmarked(part: dict[str, Any] | None) -> dict[str, Any] | None:
        match part:
            case {"type": "Prepend"}:
                return None
            case {"type": "Metaspace"}:
                return part | {"prepend_scheme": "never"}
            case {"type": "ByteLevel"}:
                return part | {"add_prefix_space": False}
            case {"type": "Sequence"}:
                return {k: [u for p in v if (u := unmarked(p))] if isinstance(v, list) else v for k, v in part.items()}
            case _:
                return part

    before = [facts["normalizer"], facts["pre_tokenizer"]]
    after = [unmarked(part) for part in before]
    if after == before:
        return None
    facts["normalizer"], facts["pre_tokenizer"] = after
    from tokenizers import Tokenizer

    facts["truncation"] = facts["padding"] = None  # state of the last call
    return Tokenizer.from_str(json.dumps(facts))


def leading_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text of its own accord: its beginning-of-text token, or nothing."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over what decides how text becomes ids: two tokenizers with equal fingerprints encode alike."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        facts = json.loads(backend.to_str())
        # State of the last call, not of the tokenizer.
        facts.pop("truncation", None)
        facts.pop("padding", None)
    else:
        facts = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    facts["special"] = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
