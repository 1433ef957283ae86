"""Two tokenizers with some of the same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from beholder.data.shared_tokens import aligned, shared_ids, token_bytes
from beholder.prepare.tiny import tiny_tokenizer


def bpe(*merged: str) -> PreTrainedTokenizerFast:
    """Byte-level, with these words of several letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: k for k, token in enumerate([*alphabet, "<end>"])}
    merges: list[tuple[str, str]] = []
    for word in merged:
        for k in range(2, len(word) + 1):
            if word[:k] not in vocab:
                vocab[word[:k]] = len(vocab)
                merges.append((word[: k - 1], word[k - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.mark.parametrize("text", ["a red square", "naïve 图片 x", " two  spaces\n"])
def test_the_bytes_of_the_tokens_are_the_text(text: str, tmp_path: Path) -> None:
    for tokenizer in (bpe("red", "square"), tiny_tokenizer("qwen3"), tiny_tokenizer("llama")):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        known = token_bytes(tokenizer)
        assert b"".join(known[i] for i in ids).decode().strip() == text.strip()


def test_ids_of_one_text_are_translated_and_ends_mean_the_same() -> None:
    teacher, student = bpe("red", "squ"), bpe("square", "re")
    found = shared_ids(teacher, student, [(teacher.eos_token_id, student.eos_token_id)], len(teacher) + 3)
    assert found.dtype == np.int64 and len(found) == len(teacher) + 3 and (found[-3:] == -1).all()
    text, own = token_bytes(teacher), token_bytes(student)
    for theirs, mine in enumerate(found.tolist()):
        if mine >= 0 and theirs != teacher.eos_token_id:
            assert text[theirs] == own[mine]
    assert found[teacher.convert_tokens_to_ids("red")] == -1
    assert found[teacher.convert_tokens_to_ids("squ")] == student.convert_tokens_to_ids("squ")
    assert found[teacher.eos_token_id] == student.eos_token_id


def test_tokens_that_begin_together_are_found_and_others_have_no_teacher() -> None:
    teacher, student = bpe("red"), bpe("re")
    text = "red red"
    theirs, own = ([*t(text)["input_ids"], t.eos_token_id] for t in (teacher, student))
    assert [teacher.decode([i]) for i in theirs] == ["red", " ", "red", "<end>"]
    assert [student.decode([i]) for i in own] == ["re", "d", " ", "re", "d", "<end>"]
    where = aligned(own, theirs, token_bytes(student), token_bytes(teacher))
    assert where == [0, None, 1, 2, None, 3]
    turns = aligned(own + own, theirs + theirs, token_bytes(student), token_bytes(teacher))
    assert turns == [0, None, 1, 2, None, 3, 4, None, 5, 6, None, 7]
