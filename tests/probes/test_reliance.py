from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from beholder.data.chat import ChatEncoder
from beholder.data.images import content_hash
from beholder.evidence import WordReliance
from beholder.model.vlm import VisionLanguageModel
from beholder.probes import reliance, wrong_images
from beholder.probes.loss import SampleLoss
from beholder.types import Example, ImageRef, ImageSlot, Turn

TEXTS = [
    "A blue rectangle.", "don't  stop: well-known", "naïve café — 12.5 %", "日本 🏴‍☠️ 👩🏽‍🚀!", "e\u0301\u0301 x",
    "中国的首都是北京", "  two  spaces ", "a\nb\n\nc", "�", "end �", "مرحبا بالعالم", "one",
]  # fmt: skip


def byte_tokenizer(vocab_size: int) -> Any:
    """Byte-level BPE with merges, so that tokens are words, parts of words, and parts of characters."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|im_end|>"],
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator([*TEXTS, "A blue rectangle. A red circle. The triangle is red."] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", clean_up_tokenization_spaces=False)


def encoder_of(tokenizer: Any, max_seq_len: int = 512) -> ChatEncoder:
    return ChatEncoder(
        tokenizer, num_visual_tokens=2, max_seq_len=max_seq_len, template="conversation", instruction="Say it:",
        instruction_multi="Say each:",
    )  # fmt: skip


MERGED = encoder_of(byte_tokenizer(400))
BYTES = encoder_of(byte_tokenizer(257))


def said(*answers: str) -> Example:
    turns: list[Turn] = []
    for k, answer in enumerate(answers):
        turns += [Turn("user", (ImageSlot(0), "Q") if k == 0 else ("Q",)), Turn("assistant", (answer,))]
    return Example("x", (ImageRef("root", "x"),), tuple(turns))


def losses_of(encoder: ChatEncoder, example: Example, offset: float = 0.0) -> SampleLoss:
    """Token k costs k + 1 nats, and ``offset`` more: which token went where can be read off the sums."""
    encoded = encoder.encode(example)
    starts = np.flatnonzero(encoded.supervise & ~np.roll(encoded.supervise, 1))
    turns = [int(encoded.supervise[a:].argmin()) or len(encoded.ids) - int(a) for a in starts]
    nll = [float(k + 1) + offset for k in range(encoded.num_targets)]
    return SampleLoss(example.id, sum(nll), len(nll), 0, tuple(nll), tuple(turns))


def told(encoder: ChatEncoder, example: Example) -> list[WordReliance]:
    return reliance.words(encoder, example, losses_of(encoder, example), losses_of(encoder, example, 0.5))


@pytest.mark.parametrize("encoder", [MERGED, BYTES], ids=["merges", "bytes"])
@pytest.mark.parametrize("text", TEXTS)
def test_words_join_to_the_text_and_their_nats_to_the_loss(encoder: ChatEncoder, text: str):
    example = said(text, "yes")
    own = losses_of(encoder, example)

    words = told(encoder, example)

    assert "".join(w.text for w in words) == f"{text}⏎yes⏎"
    assert sum(w.with_image for w in words) == pytest.approx(own.nll)
    assert sum(w.without for w in words) == pytest.approx(own.nll + 0.5 * own.tokens)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
@settings(deadline=None)  # a busy machine is no failure
def test_words_join_to_any_text(text: str):
    for encoder in (MERGED, BYTES):
        words = told(encoder, said(text))

        assert "".join(w.text for w in words) == text + "⏎"


@pytest.mark.parametrize("encoder", [MERGED, BYTES], ids=["merges", "bytes"])
def test_words_are_cut_at_spaces_and_punctuation_and_characters_stay_whole(encoder: ChatEncoder):
    def words(text: str) -> list[str]:
        return [w.text for w in told(encoder, said(text))]

    assert words("A blue rectangle.") == ["A", " blue", " rectangle", ".", "⏎"]
    assert words("don't  stop: well-known")[:3] == ["don't", "  stop", ":"]
    assert words("naïve café")[:2] == ["naïve", " café"]
    assert all("�" not in w for w in words("日本 👩🏽‍🚀!"))


def test_a_word_has_the_nats_of_its_own_tokens():
    example = said("ab c.", "d")

    words = told(BYTES, example)

    # one byte a token: a b _ c . end, then d end; token k costs k nats
    assert [(w.text, w.with_image) for w in words] == [
        ("ab", 1 + 2), (" c", 3 + 4), (".", 5), ("⏎", 6), ("d", 7), ("⏎", 8)
    ]  # fmt: skip
    assert [w.without - w.with_image for w in words] == [1.0, 1.0, 0.5, 0.5, 0.5, 0.5]


def test_a_cut_target_has_no_end():
    whole = len(BYTES.encode(said("a long answer")).ids)
    short = encoder_of(BYTES.tokenizer, whole - 4)
    example = said("a long answer")

    words = told(short, example)

    assert short.encode(example).truncated
    assert "".join(w.text for w in words) == "a long ans"


def test_losses_of_another_sample_are_refused():
    example, other = said("ab"), said("abc")

    with pytest.raises(AssertionError, match="losses of 4"):
        reliance.words(BYTES, example, losses_of(BYTES, example), losses_of(BYTES, other))
    with pytest.raises(AssertionError, match="the loss is of 'y'"):
        reliance.words(BYTES, example, replace(losses_of(BYTES, example), id="y"), losses_of(BYTES, example))


def test_a_model_that_looks_needs_the_image_for_colour_and_shape_but_not_for_the_frame(
    bench: Any, sighted: VisionLanguageModel
):
    losses = wrong_images.ablation_losses(
        sighted, bench.held_out, bench.batches(), ("correct", "zero"), content_key=content_hash
    )
    rows = [
        reliance.words(bench.encoder, example, right, wrong)
        for example, right, wrong in zip(bench.held_out, losses["correct"], losses["zero"], strict=True)
    ]

    stats = {s.word: s for s in reliance.word_stats(rows, min_n=5)}

    assert "".join(w.text for w in rows[0]) == bench.held_out[0].target_text + "⏎"
    colours = [s.delta for word, s in stats.items() if word in ("red", "green", "blue", "yellow", "pink", "brown")]
    frame = [s.delta for word, s in stats.items() if word in ("a", "the", "on", "of", "with")]
    assert colours and frame
    assert min(colours) > max(frame)
    assert list(stats) == sorted(stats, key=lambda word: -stats[word].delta)


def row(*words: tuple[str, float]) -> list[WordReliance]:
    return [WordReliance(text=text, with_image=1.0, without=1.0 + delta) for text, delta in words]


def test_word_statistics_are_means_over_occurrences_whatever_the_case():
    rows = [
        row(("Red", 2.0), (" red", 4.0), (".", 9.0), ("⏎", 9.0)),
        row((" red", 6.0), (" dog", 1.0)),
        row((" dog", 3.0)),
    ]

    stats = reliance.word_stats(rows, min_n=2)

    assert [(s.word, s.n, s.delta) for s in stats] == [("red", 3, 4.0), ("dog", 2, 2.0)]
    assert all(s.ci95 is not None and s.ci95[0] <= s.delta <= s.ci95[1] for s in stats)
    assert reliance.word_stats(rows, min_n=4) == []
    assert reliance.word_stats([], min_n=1) == []


def test_a_word_of_one_sample_has_no_interval():
    [stat] = reliance.word_stats([row(*[(" red", float(k)) for k in range(9)])])

    assert (stat.n, stat.ci95) == (9, None)


@given(st.integers(0, 12), st.integers(1, 12))
@settings(deadline=None)  # a busy machine is no failure
def test_of_too_many_words_both_ends_are_kept(limit: int, num_words: int):
    rows = [row(*[(f" w{k}", float(k)) for k in range(num_words)]) for _ in range(5)]

    kept = [s.word for s in reliance.word_stats(rows, limit=limit)]

    ordered = [f"w{k}" for k in reversed(range(num_words))]
    half = limit // 2
    expected = ordered if num_words <= limit else ordered[: limit - half] + (ordered[-half:] if half else [])
    assert kept == expected
