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


def test_a_letter_is_not_translated_to_the_piece_that_spells_its_byte(tmp_path: Path) -> None:
    pieces = {"▁": 0, "A": 1, "<0x41>": 2, "<0xC3>": 3, "B": 4, "<end>": 5}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=pieces, merges=[], byte_fallback=True)), eos_token="<end>"
    )
    assert token_bytes(tokenizer) == {0: b" ", 1: b"A", 2: b"A", 3: b"\xc3", 4: b"B"}
    student = bpe("red")
    found = shared_ids(tokenizer, student, [], 6)
    assert found[1] == student.convert_tokens_to_ids("A") and found[2] == -1
    assert shared_ids(student, tokenizer, [], len(student))[student.convert_tokens_to_ids("A")] == 1


def test_a_space_that_one_of_them_puts_in_front_and_texts_that_differ() -> None:
    text, ids = {0: b" x", 1: b"x", 2: b"y", 3: b" "}, 9
    end = 8
    assert aligned([1, 2, end], [0, 2, end], text, text) == [0, 1, 2]
    assert aligned([1, 2, end], [3, 1, 2, end], text, text) == [0, 2, 3]
    assert aligned([1, 2, end], [2, 1, end], text, text) == [0, None, None], "both are about the empty text"
    assert aligned([1, end, 2, end], [1, ids, end, 2, end], text, text) == [0, 1, 3, 4]
    assert aligned([1, end, 2, end], [1, end], text, text) == [None] * 4
