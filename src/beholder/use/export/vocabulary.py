"""A tokenizer as llama.cpp reads it: its tokens, merges and what cuts a text before them (``tokenizer.ggml.*``)."""

from __future__ import annotations

import json
from typing import Any

import gguf

from beholder.types import UserError, printable

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WRITTEN = "; written for llama.cpp are those of GPT-2, SmolLM2, Qwen2 and 3, and Llama 3"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_PRE: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_BYTES | {"use_regex": True}], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}], False),
    "qwen2": (
        [{"type": "Split", "pattern": {"Regex": _WORDS % ""}, "behavior": "Isolated", "invert": False},
         _BYTES | {"use_regex": False}], False,
    ),
    "llama-bpe": (
        [{"type": "Split", "pattern": {"Regex": _WORDS % "{1,3}"}, "behavior": "Isolated", "invert": False},
         _BYTES | {"use_regex": False}], True,
    ),
}  # fmt: skip
"""llama.cpp's names by (what cuts a text, whether a word that is a token is taken whole whatever the merges say), as
tokenizer.json has them. Only those that a test has compared with llama.cpp."""


def pre_tokenizer(tokenizer: Any) -> str:
    """llama.cpp's name for what cuts a text into words (``tokenizer.ggml.pre``). Raises `UserError` for a tokenizer
    that it has no name for here: read with another one, a text would silently be other ids."""
    why = tokenizer_prevents(tokenizer)
    if why:
        raise UserError(f"the run cannot be exported to GGUF: {why}. beholder export --to hf takes it")
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    return _name_of(told) or "gpt-2"  # where every token is a byte, the same whatever words are


def tokenizer_prevents(tokenizer: Any) -> str:
    """Why llama.cpp would not read a text as this tokenizer does; empty where it does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return f"the tokenizer is a {type(tokenizer).__name__}, not one of the tokenizers library{_WRITTEN}"
    told = json.loads(backend.to_str())
    model = told["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece's BPE" if model["type"] == "BPE" else model["type"]
        return f"the tokenizer is {kind}, not byte-level BPE{_WRITTEN}"
    normalizer = told.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":
        return f"the tokenizer normalises text ({normalizer['type']}), which llama.cpp does not{_WRITTEN}"
    if _name_of(told) is None and (model["merges"] or _steps(told) != [_BYTES | {"use_regex": False}]):
        return f"the tokenizer cuts text into words by {printable(json.dumps(_steps(told)))[:300]}{_WRITTEN}"
    return ""


def _steps(told: dict[str, Any]) -> list[dict[str, Any]]:
    told = told.get("pre_tokenizer") or {"type": "none"}
    steps: list[dict[str, Any]] = told["pretokenizers"] if told["type"] == "Sequence" else [told]
    return [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]


def _name_of(told: dict[str, Any]) -> str | None:
    whole = bool(told["model"].get("ignore_merges"))
    return next((name for name, (steps, own) in _PRE.items() if _steps(told) == steps and own == whole), None)


def write_vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, rows: int, eos_ids: list[int]) -> None:
    """The keys of ``tokenizer``, for an embedding table of ``rows`` rows; those without a token are named unused.

    ``eos_ids``: what ends an answer, the end of a turn first. Control tokens are ones to llama.cpp where the tokenizer
    calls them special.
    """
    pre = pre_tokenizer(tokenizer)
    spelled = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for i in range(rows):
        token = spelled.get(i)
        kind = gguf.TokenType.NORMAL
        if token is None:
            token, kind = f"[PAD{i}]", gguf.TokenType.UNUSED
        elif i in added:
            kind = gguf.TokenType.CONTROL if added[i].special else gguf.TokenType.USER_DEFINED
        tokens.append(token)
        kinds.append(kind)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # llama.cpp asks for merges; a tokenizer without any has no pair that this one could join
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges] or [" ".join(tokens[:2]) + " "])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(eos_ids[0])
    for add, i in zip((writer.add_eot_token_id, writer.add_eom_token_id), eos_ids[1:], strict=False):
        add(i)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)  # the chat template writes it where the run had it
    writer.add_add_space_prefix(False)
