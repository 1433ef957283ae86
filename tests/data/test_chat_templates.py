"""Template ``chat`` against renderers written by hand, one for each family, that know nothing of Jinja or tokenizers.

Each says which characters are rendered, which of them are supervised and which spell a control token. The encoder's ids
are spelled out byte by byte, without the tokenizer's decoder, and must agree in all three.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from beholder.data import template_bounds
from beholder.data.chat import ChatEncoder, EncodeError, TooLongError
from beholder.data.template_bounds import BoundError, render
from beholder.prepare.tiny import tiny_tokenizer
from beholder.types import Encoded, Example, ImageRef, ImageSlot, Turn, UserError

N = 3
"""Visual tokens of an image."""

# ---------------------------------------------------------------------------------------------------------------
# Templates of the five shapes

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The parts of Qwen3's that concern plain text: reasoning is shown after the last question only, an empty one included.
QWEN3 = """\
{%- set ns = namespace(searching=true, last_query_index=messages|length - 1) %}
{%- for m in messages[::-1] %}
{%- set index = messages|length - 1 - loop.index0 %}
{%- if ns.searching and m.role == 'user' and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}
{%- set ns.searching = false %}
{%- set ns.last_query_index = index %}
{%- endif %}
{%- endfor %}
{%- for m in messages %}
{%- set content = m.content %}
{%- if m.role != 'assistant' %}
{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}
{%- else %}
{%- set reasoning = '' %}
{%- if '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}
{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}
{{- '<|im_start|>assistant\n' + content }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\n\n</think>\n\n' }}
{%- endif %}
{%- endif %}"""  # noqa: E501
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content|trim"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content|trim + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content|trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# ---------------------------------------------------------------------------------------------------------------
# Tokenizers of the five shapes

WORDS = ["the", "an", "what", "user", "red", "\n\n"]
"""All merges there are: these, and each with the blank before it."""


def byte_level(folder: Path, name: str) -> Any:
    """ChatML and Qwen3 (whose think marks are added tokens but not special ones); Llama 3."""
    if name in ("chatml", "qwen3"):
        tokenizer = tiny_tokenizer(folder, "smollm2" if name == "chatml" else "qwen3")
        tokenizer.add_tokens(["<think>", "</think>", "<tool_call>"], special_tokens=False)
        return tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    control = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    inner.add_special_tokens(control + [f"<|reserved_special_token_{i}|>" for i in range(240)])
    inner.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", inner.token_to_id("<|begin_of_text|>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def sentencepiece(name: str, control: Sequence[str], bos: str, eos: str) -> Any:
    """Byte fallback, words with their blank; ``mistral`` marks a text's first word, ``legacy`` every stretch's."""
    pieces = ["<unk>", bos, eos, *(f"<0x{b:02X}>" for b in range(256)), *"\nabcdefghijklmnopqrstuvwxyz"]
    merges = [(word[:k], word[k]) for word in WORDS for k in range(1, len(word))] + [("▁", word) for word in WORDS]
    vocab = {p: i for i, p in enumerate(dict.fromkeys([*pieces, "▁", *(a + b for a, b in merges)]))}
    inner = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    blank = normalizers.Replace(" ", "▁")
    if name == "mistral":
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif name == "legacy":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank])
    else:
        inner.normalizer = blank
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["<unk>", bos, eos, *control])
    inner.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos, unk_token="<unk>")


# ---------------------------------------------------------------------------------------------------------------
# The renderers

Talk = list[tuple[Literal["system", "user", "assistant"], str]]
Shown = list[tuple[str, bool, bool]]
"""Text, supervised, spells a control token."""


def control(text: str, supervised: bool = False) -> tuple[str, bool, bool]:
    return text, supervised, True


def plain(text: str, supervised: bool = False) -> tuple[str, bool, bool]:
    return text, supervised, False


def chatml(talk: Talk, prompt: bool, thinking: bool = False) -> Shown:
    out: Shown = []
    for role, text in talk:
        answer = role == "assistant"
        out += [control("<|im_start|>"), plain(f"{role}\n"), plain(text, answer), control("<|im_end|>", answer)]
        out.append(plain("\n"))
    return [*out, control("<|im_start|>"), plain("assistant\n")] if prompt else out


EMPTY_THOUGHT = [control("<think>"), plain("\n\n"), control("</think>"), plain("\n\n")]


def qwen3(talk: Talk, prompt: bool, thinking: bool = False) -> Shown:
    shown = chatml(talk, prompt)
    if prompt:
        return shown if thinking else shown + EMPTY_THOUGHT
    if talk[-1][0] == "assistant":
        shown[-3:-2] = [*EMPTY_THOUGHT, plain(talk[-1][1].lstrip("\n"), True)]
    return shown


def llama3(talk: Talk, prompt: bool, thinking: bool = False) -> Shown:
    def head(role: str) -> Shown:
        return [control("<|start_header_id|>"), plain(role), control("<|end_header_id|>"), plain("\n\n")]

    out = [control("<|begin_of_text|>")]
    for role, text in talk:
        answer = role == "assistant"
        out += [*head(role), plain(text.strip(), answer), control("<|eot_id|>", answer)]
    return out + head("assistant") if prompt else out


def mistral(talk: Talk, prompt: bool, thinking: bool = False) -> Shown:
    """The blank before an answer is the model's to write: the prompt ends before it."""
    out, system = [control("<s>")], ""
    for role, text in talk:
        if role == "system":
            system = text + "\n\n"
        elif role == "user":
            out += [control("[INST]"), plain(f" {system}{text}"), control("[/INST]")]
            system = ""
        else:
            out += [plain(f" {text.strip()}", True), control("</s>", True)]
    return out


def gemma(talk: Talk, prompt: bool, thinking: bool = False) -> Shown:
    out = [control("<bos>")]
    for role, text in talk:
        answer = role == "assistant"
        out += [control("<start_of_turn>"), plain("model\n" if answer else f"{role}\n")]
        out += [plain(text.strip(), answer), control("<end_of_turn>", answer), plain("\n")]
    return [*out, control("<start_of_turn>"), plain("model\n")] if prompt else out


@dataclass(frozen=True)
class Family:
    name: str
    tokenizer: Any = field(repr=False)  # hypothesis writes arguments down, and a tokenizer's own account is 10 kB
    template: str = field(repr=False)
    shown: Callable[[Talk, bool, bool], Shown] = field(repr=False)
    system: bool = True
    """Takes a system turn."""


FAMILIES = ("chatml", "qwen3", "llama3", "mistral", "gemma")


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    folder = tmp_path_factory.mktemp("chat_tokenizers")
    inst, turn = ["[INST]", "[/INST]"], ["<start_of_turn>", "<end_of_turn>"]
    made = [
        Family("chatml", byte_level(folder / "c", "chatml"), CHATML, chatml),
        Family("qwen3", byte_level(folder / "q", "qwen3"), QWEN3, qwen3),
        Family("llama3", byte_level(folder, "llama3"), LLAMA3, llama3),
        Family("mistral", sentencepiece("mistral", inst, "<s>", "</s>"), MISTRAL, mistral),
        Family("gemma", sentencepiece("gemma", turn, "<bos>", "<eos>"), GEMMA, gemma, system=False),
    ]
    for family in made:
        family.tokenizer.chat_template = family.template
    return {f.name: f for f in made}


_MADE: dict[tuple[int, str], ChatEncoder] = {}


def make(tokenizer: Any, **overrides: Any) -> ChatEncoder:
    """Encoders are kept: they learn their templates once."""
    key = (id(tokenizer), repr(sorted(overrides.items())))
    if key not in _MADE:
        given: dict[str, Any] = {
            "num_visual_tokens": N, "max_seq_len": 4096, "template": "chat", "instruction": "-",
            "instruction_multi": "-",
        } | overrides  # fmt: skip
        _MADE[key] = ChatEncoder(tokenizer, **given)
    return _MADE[key]


# ---------------------------------------------------------------------------------------------------------------
# Comparing

PICTURE = "\ue123"
"""Stands for an image in a talk."""


def example_of(talk: Talk) -> Example:
    turns, number = [], 0
    for role, text in talk:
        parts: list[str | ImageSlot] = []
        for k, piece in enumerate(text.split(PICTURE)):
            if k:
                parts.append(ImageSlot(number))
                number += 1
            if piece or not k:
                parts.append(piece)
        turns.append(Turn(role, tuple(parts)))
    refs = tuple(ImageRef("root", f"{k}.png") for k in range(number))
    return Example("s1", refs, tuple(turns), file="data.jsonl", row=7)


Spelled = list[tuple[int, bool, bool]]
"""Byte, supervised, part of a control token. An image is the bytes of `PICTURE`."""


def spell(encoder: ChatEncoder, encoded: Encoded) -> Spelled:
    """The ids byte by byte, told from the vocabulary's own spelling of each token."""
    tokenizer = encoder.tokenizer
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letter = {chr(b): b for b in printable}
    letter |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in printable)}
    added = set(tokenizer.get_added_vocab().values())
    by_bytes = "Ā" in tokenizer.get_vocab()
    images = {a - len(encoder.im_start_ids): b + len(encoder.im_end_ids) for a, b in encoded.image_spans}
    out: Spelled = []
    t, skip = 0, 0
    for t, (i, supervised) in enumerate(zip(encoded.ids.tolist(), encoded.supervise.tolist(), strict=True)):
        if t in images:
            skip = images[t]
            out += [(b, False, False) for b in PICTURE.encode()]
        if t < skip:
            assert not supervised
            continue
        token = tokenizer.convert_ids_to_tokens(i)
        if i in added:
            spelled = token.encode()
        elif by_bytes:
            spelled = bytes(letter[c] for c in token)
        elif token.startswith("<0x"):
            spelled = bytes([int(token[3:-1], 16)])
        else:
            spelled = token.replace("▁", " ").encode()
        out += [(b, supervised, i in added) for b in spelled]
    return out


def flat(shown: Shown) -> Spelled:
    return [(b, supervised, is_control) for text, supervised, is_control in shown for b in text.encode()]


def rendering(family: Family, talk: Talk, prompt: bool, thinking: bool = False) -> str:
    return family.tokenizer.apply_chat_template(
        [{"role": r, "content": t} for r, t in talk], tokenize=False, add_generation_prompt=prompt,
        enable_thinking=thinking,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Any conversation, any text

HOSTILE = (
    "<image>", "<|im_end|>", "<|im_start|>assistant\n", "<|im_<|im_end|>end|>", "</s>", "<s>", "[INST]", "[/INST]",
    "<|eot_id|>", "<|start_header_id|>", "<|reserved_special_token_17|>", "<end_of_turn>\n", "<start_of_turn>model",
    "<think>", "<tool_call>", "<|vision_start|>", "<|image_pad|>", "<bos>", "<unk>", "<0x41>", "{{ 1 }}", "{% if %}",
    "\ue0a00\ue0a1", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u3000", "\x00", "the red", " an", "what", "é", "日本",
    "\U0001f468\u200d\U0001f469", "\u202e", "[", "]", "'", '"', "\\",
)  # fmt: skip

# "▁" and a blank are the same to a SentencePiece tokenizer; PICTURE is this file's own mark.
pieces = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=8).map(lambda t: t.replace("▁", "_")))
texts = st.lists(pieces, max_size=5).map("".join).filter(lambda t: PICTURE not in t)


@st.composite
def talks(draw: st.DrawFn, *, think: bool = False) -> Talk:
    """One to four rounds, images anywhere in the questions, a last question without its answer sometimes."""
    talk: Talk = []
    if draw(st.booleans()):
        talk.append(("system", draw(texts)))
    rounds = draw(st.integers(1, 3))
    for _ in range(rounds):
        question = draw(texts)
        for _ in range(max(0, draw(st.integers(-2, 2)))):
            question += PICTURE + draw(texts)
        answer = draw(texts)
        if think and draw(st.booleans()):
            answer += draw(st.sampled_from(("</think>", "<think>\n\n</think>\n\n", "<think>so</think>yes")))
        assume(answer.strip())
        talk.append(("user", question))
        talk.append(("assistant", answer))
    if rounds > 1 and draw(st.booleans()):
        talk.pop()
    return talk


many = settings(
    max_examples=60, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow],
)  # fmt: skip


@pytest.mark.parametrize(("name", "thinking"), [*((n, False) for n in FAMILIES), ("qwen3", True)])
@many
@given(talk=talks())
def test_exactly_the_answers_and_their_end_tokens_are_supervised_in_the_templates_own_text(
    families: dict[str, Family], name: str, thinking: bool, talk: Talk
) -> None:
    family = families[name]
    talk = talk if family.system else [t for t in talk if t[0] != "system"]
    encoder = make(family.tokenizer, thinking=thinking)

    encoded = encoder.encode(example_of(talk))

    expected = flat(family.shown(talk, False, thinking))
    assert bytes(b for b, _, _ in expected).decode() == rendering(family, talk, False, thinking), "the oracle is right"
    assert spell(encoder, encoded) == expected
    assert len(encoded.image_spans) == sum(t.count(PICTURE) for _, t in talk) and not encoded.truncated
    for start, stop in encoded.image_spans:
        assert stop - start == N and set(encoded.ids[start:stop].tolist()) == {encoder.reserved_id}


@pytest.mark.parametrize(("name", "thinking"), [*((n, False) for n in FAMILIES), ("qwen3", True)])
@many
@given(talk=talks())
def test_the_prompt_ends_as_the_template_says_and_is_a_prefix_of_the_sample(
    families: dict[str, Family], name: str, thinking: bool, talk: Talk
) -> None:
    family = families[name]
    talk = talk if family.system else [t for t in talk if t[0] != "system"]
    encoder, example = make(family.tokenizer, thinking=thinking), example_of(talk)
    asked = talk if talk[-1][0] == "user" else talk[:-1]

    prompt = encoder.encode_prompt(example)

    expected = flat(family.shown(asked, True, thinking))
    assert bytes(b for b, _, _ in expected).decode() == rendering(family, asked, True, thinking), "the oracle is right"
    assert [(b, c) for b, _, c in spell(encoder, prompt)] == [(b, c) for b, _, c in expected]
    assert not prompt.supervise.any()
    if asked != talk:
        assert rendering(family, talk, False, thinking).startswith(rendering(family, asked, True, thinking))
        full = encoder.encode(example)
        assert full.ids[: len(prompt.ids)].tobytes() == prompt.ids.tobytes()
        assert full.image_spans == prompt.image_spans
        if not thinking:  # a thinking model's prompt ends before the thought, which a finished answer shows as empty
            learned = full.supervise[len(prompt.ids) :]
            assert learned[: int(np.flatnonzero(learned)[-1])].all(), "nothing but the answer follows the prompt"


@many
@given(talk=talks(think=True))
def test_an_answer_that_qwen3_would_take_apart_is_an_error_naming_the_record(
    families: dict[str, Family], talk: Talk
) -> None:
    assume(any("</think>" in t for r, t in talk if r == "assistant"))
    encoder = make(families["qwen3"].tokenizer)

    with pytest.raises(EncodeError, match=r"data\.jsonl: record 7 \(id 's1'\): the chat template rewrites"):
        encoder.encode(example_of(talk))


def test_a_tool_response_that_moves_qwen3s_last_question_is_an_error(families: dict[str, Family]) -> None:
    moved: Talk = [("user", "hi"), ("assistant", "a"), ("user", "<tool_response>x</tool_response>")]
    talk: Talk = [*moved, ("assistant", "<think>no</think>")]

    with pytest.raises(EncodeError, match=r"record 7.*rewrites the conversation, near turn 2 "):
        make(families["qwen3"].tokenizer).encode(example_of(talk))


# ---------------------------------------------------------------------------------------------------------------
# Ids as the tokenizer itself would give them

FRIENDLY: Talk = [
    ("user", "what an apple\nis the red?"), ("assistant", "the red, an user"), ("user", "and the an?"),
    ("assistant", "what\n\n red"),
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_of_harmless_text_are_those_of_tokenising_the_whole_rendering(
    families: dict[str, Family], name: str
) -> None:
    """Also the beginning-of-text token, which the rendering has and the tokenizer would add again."""
    family = families[name]

    ids = make(family.tokenizer).encode(example_of(FRIENDLY)).ids.tolist()

    whole = rendering(family, FRIENDLY, False)
    assert ids == family.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert ids.count(family.tokenizer.bos_token_id) == (family.tokenizer.bos_token is not None)


def test_words_of_a_sentencepiece_answer_keep_their_blank(families: dict[str, Family]) -> None:
    """The first word of an answer is the token that starts a word, as in pretraining, not a bare one after a blank."""
    encoder = make(families["mistral"].tokenizer)

    encoded = encoder.encode(example_of([("user", "what"), ("assistant", "the red")]))

    learned = encoder.tokenizer.convert_ids_to_tokens(encoded.ids[encoded.supervise].tolist())
    assert learned == ["▁the", "▁red", "</s>"]
    prompt = encoder.encode_prompt(example_of([("user", "what")]))
    assert encoder.tokenizer.convert_ids_to_tokens(prompt.ids.tolist()) == ["<s>", "[INST]", "▁what", "[/INST]"]


LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)


def test_a_tokenizer_that_marks_every_stretch_of_text_does_so_where_it_would_in_the_whole() -> None:
    """Llama 2: plain-text brackets, a mark after each control token, and a blank before the end token."""
    tokenizer = sentencepiece("legacy", [], "<s>", "</s>")
    tokenizer.chat_template = LLAMA2
    encoder = make(tokenizer)

    encoded = encoder.encode(example_of(FRIENDLY))

    whole = tokenizer.apply_chat_template([{"role": r, "content": t} for r, t in FRIENDLY], tokenize=False)
    assert encoded.ids.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]
    text = "".join(tokenizer.convert_ids_to_tokens(encoded.ids[encoded.supervise].tolist())).replace("▁", " ")
    assert text.replace("<0x2C>", ",").replace("\n", "\n") == " the red, an user </s> what\n\n red </s>"


def test_spelled_control_tokens_and_images_put_no_mark_inside_a_text(families: dict[str, Family]) -> None:
    encoder = make(families["mistral"].tokenizer)

    encoded = encoder.encode(example_of([("user", f"a</s>b{PICTURE}c"), ("assistant", "an</s>an")]))

    marks = [t for t in encoder.tokenizer.convert_ids_to_tokens(encoded.ids.tolist()) if t.startswith("▁")]
    assert marks == ["▁", "▁an"], "the blank after [INST] and the one before the answer"


def test_control_tokens_that_swallow_blanks_do_so_in_the_scaffold_alone(tmp_path: Path) -> None:
    """Phi-3's <|user|> and <|end|> take the newline after them along, as the tokenizer would."""
    tokenizer = tiny_tokenizer(tmp_path, "smollm2")
    marks = ["<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.add_tokens([AddedToken(m, special=True, rstrip=True) for m in marks], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )

    encoded = make(tokenizer).encode(example_of([("user", "hi"), ("assistant", "ho\n")]))

    tokens = tokenizer.convert_ids_to_tokens(encoded.ids.tolist())
    assert tokens == ["<|user|>", *"hi", "<|end|>", "<|assistant|>", *"ho", "Ċ", "<|end|>"]
    assert encoded.supervise.tolist() == [False] * 5 + [True] * 4


# ---------------------------------------------------------------------------------------------------------------
# System, templates given, dates


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "gemma"])
def test_the_system_text_goes_first_where_a_conversation_has_none(families: dict[str, Family], name: str) -> None:
    family = families[name]
    encoder = make(family.tokenizer, system="Be brief.")
    own: Talk = [("system", "Rhyme!"), ("user", "hi"), ("assistant", "ho")]

    with_default = encoder.encode(example_of(own[1:]))
    with_own = encoder.encode(example_of(own))

    assert spell(encoder, with_default) == flat(family.shown([("system", "Be brief."), *own[1:]], False, False))
    assert spell(encoder, with_own) == flat(family.shown(own, False, False))
    once = encoder.apply_template(example_of(own[1:]))
    assert encoder.apply_template(once) == once and once.turns[0] == Turn("system", ("Be brief.",))


def test_a_template_without_a_system_turn_is_told_by_setting_or_by_record(families: dict[str, Family]) -> None:
    tokenizer = families["gemma"].tokenizer

    with pytest.raises(UserError, match=r"prompting\.system is given, but .*System role not supported"):
        make(tokenizer, system="Be brief.")
    with pytest.raises(EncodeError, match=r"data\.jsonl: record 7 .*System role not supported.*chat_template"):
        make(tokenizer).encode(example_of([("system", "s"), ("user", "hi"), ("assistant", "ho")]))


def test_a_template_that_drops_the_system_turn_is_an_error_not_a_loss(families: dict[str, Family]) -> None:
    """Mistral 0.3 shows it in the last question, and nowhere once that is answered."""
    late = (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
        "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content|trim + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = families["mistral"].tokenizer

    with pytest.raises(UserError, match=r"prompting\.system is given, but the chat template leaves out turn 0"):
        make(tokenizer, chat_template=late, system="Be brief.")
    with pytest.raises(EncodeError, match=r"record 7 .*leaves out turn 0 .*system, user, assistant"):
        make(tokenizer, chat_template=late).encode(example_of([("system", "s"), ("user", "hi"), ("assistant", "ho")]))


def test_a_given_template_replaces_the_tokenizers_own(families: dict[str, Family]) -> None:
    encoder = make(families["chatml"].tokenizer, chat_template=CHATML.replace("<|im_start|>", "<|im_start|>the "))

    encoded = encoder.encode(example_of([("user", "hi"), ("assistant", "ho")]))

    assert "the user\nhi" in encoder.tokenizer.decode(encoded.ids.tolist())
    assert encoder.fingerprint != make(families["chatml"].tokenizer).fingerprint


@pytest.mark.parametrize("call", ['strftime_now("%d %b %Y")', "strftime_now( '%d %b %Y' )", "date_string"])
def test_a_template_that_dates_its_text_gets_the_same_date_every_day(families: dict[str, Family], call: str) -> None:
    dated = "<|im_start|>system\nToday: {{ " + call + " }}<|im_end|>\n" + CHATML
    encoder = make(families["chatml"].tokenizer, chat_template=dated)

    encoded = encoder.encode(example_of([("user", "hi"), ("assistant", "ho")]))

    assert "Today: 26 Jul 2024<|im_end|>" in encoder.tokenizer.decode(encoded.ids.tolist())


# ---------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(("talk", "message"), [
    ([("assistant", "ho"), ("user", "hi"), ("assistant", "a")], "starts with the assistant"),
    ([("system", "s"), ("assistant", "ho"), ("user", "hi")], "starts with the assistant"),
    ([("assistant", "ho")], "no user turn"), ([("system", "s")], "no user turn"), ([], "no user turn"),
    ([("user", "hi")], "no assistant turn"), ([("user", "hi"), ("assistant", "")], "assistant turn 1 is empty"),
    ([("user", "hi"), ("assistant", "\ud800")], "not valid Unicode"),
    ([("user", "hi"), ("assistant", PICTURE)], "image inside an assistant turn"),
])  # fmt: skip
def test_conversations_that_cannot_be_learned_are_errors_naming_the_record(
    families: dict[str, Family], talk: Talk, message: str
) -> None:
    with pytest.raises(EncodeError, match=rf"data\.jsonl: record 7 \(id 's1'\): .*{message}"):
        make(families["chatml"].tokenizer).encode(example_of(talk))


def test_an_answer_that_the_template_strips_to_nothing_is_an_error(families: dict[str, Family]) -> None:
    with pytest.raises(EncodeError, match=r"record 7 .*assistant turn 1 is empty: ' \\n'.*strips"):
        make(families["llama3"].tokenizer).encode(example_of([("user", "hi"), ("assistant", " \n")]))


@pytest.mark.parametrize("name", FAMILIES)
def test_two_turns_of_one_role_are_refused_where_the_template_refuses_them(
    families: dict[str, Family], name: str
) -> None:
    talk: Talk = [("user", "hi"), ("user", "ho"), ("assistant", "a")]
    encoder = make(families[name].tokenizer)

    if name in ("mistral", "gemma"):
        with pytest.raises(
            EncodeError, match=r"record 7 .*refuses a conversation of user, user, assistant: roles must"
        ):
            encoder.encode(example_of(talk))
    else:
        assert spell(encoder, encoder.encode(example_of(talk))) == flat(families[name].shown(talk, False, False))


def test_a_tokenizer_without_a_chat_template_is_told_the_ways_out(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.chat_template = None

    with pytest.raises(UserError, match=r"no chat template; .*prompting\.chat_template.*template: conversation"):
        make(tokenizer)


@pytest.mark.parametrize(("template", "message"), [
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", r"ends an assistant turn with '\\nuser: '"),
    (CHATML.replace("<|im_end|>", "<|fin|>"), r"ends an assistant turn with '<\|fin\|>"),
    ("{% for m in messages %}{{ m.content", "not valid Jinja"),
    ("{% for m in messages %}{{ m.content[0].text }}<|im_end|>{% endfor %}", "leaves out turn 0|refuses"),
    (CHATML.replace("m.content", "m.content|upper ~ m.content"), "shows 2 times turn 0"),
    ("{{ raise_exception('tools only') }}", "refuses a conversation of .*: tools only"),
    ("{{ 1 // 0 }}", "refuses a conversation of .*: ZeroDivisionError"),
    ("{{ 'x' * 10 ** 18 }}", "refuses a conversation of .*: it loops, or writes, more than"),
    ("{{ 'x' * 10 ** 30 }}", "refuses a conversation of .*: it loops, or writes, more than"),
    ("{{ messages.pop }}{{ messages[0].x.y }}", "refuses a conversation of"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses a conversation of .*: RecursionError"),
    ("{% set f = '%Y' %}{{ strftime_now(f) }}" + CHATML, "cannot be frozen"),
])  # fmt: skip
def test_templates_that_are_of_no_use_are_refused_at_once(
    families: dict[str, Family], template: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make(families["chatml"].tokenizer, chat_template=template)
    assert "prompting.chat_template" in str(caught.value)


DOUBLED = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}"


def doubled(start: str, step: str, end: str = "") -> str:
    return DOUBLED.replace("START", start).replace("STEP", step) + end


@pytest.mark.parametrize("template", [
    "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in [[1] * 1000] * 9000 recursive %}{{ loop(x) if x is not number }}{% endfor %}",
    "{{ lipsum(n=100000) }}", "{% set x = 'a' * 900000000 %}", "{{ 'a'|center(900000000) }}",
    "{{ 'a'.ljust(900000000) }}", "{{ '%900000000d' % 1 }}", "{{ '{:{}}'.format(1, 900000000) }}",
    "{{ '%*d'|format(900000000, 1) }}", "{{ [1]|batch(900000000, 'x')|list }}", "{{ 10 ** (10 ** 9) }}",
    "{{ (1).to_bytes(900000000, 'big') }}", "{{ ''.join((['a' * 1000000] * 90000)|select) }}",
    "{{ 'aé'.encode('latin-1') and '%900000000d'.encode() % 1 }}", "{{ ('é' * 1000000).encode('punycode') }}",
    "{{ ('a' * 500000).rfind('b' + 'a' * 250000) }}", "{{ ('a' * 500000).strip('b' * 250000 + 'a') }}",
    "{{ [1, 2, 3]|tojson(indent='a' * 99000000) }}",
    "{% set b = range(99999)|list %}{% for i in range(99999) %}{{ b.count('x') }}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if 'x' in range(9999)|list %}{% endfor %}{% endfor %}",
    doubled("'a'", "ns.x ~ ns.x"), doubled("'a'", "ns.x + ns.x"), doubled("'aa'", "ns.x.replace('a', ns.x)"),
    doubled("'aa'", "ns.x|replace('a', ns.x)"), doubled("[1]", "[ns.x, ns.x]", "{{ ns.x }}"),
    doubled("[1]", "[ns.x, ns.x]", "{{ ns.x|tojson }}"), doubled("(1,)", "(ns.x, ns.x)", "{{ {ns.x: 1} }}"),
    "{% set b = 'a' * 1000000 %}{% for i in range(90000) %}{% if 'ab' in b %}{% endif %}{% endfor %}",
    "{% set b = 'a' * 1000000 %}{% for i in range(90000) %}{% if b[::-1] %}{% endif %}{% endfor %}",
    "{% for i in range(99999)|map('metered _rounds', -10**9) %}{% endfor %}{% for i in range(99999) %}BIG{% endfor %}"
    .replace("BIG", "x" * 50_000),
])  # fmt: skip
def test_a_template_that_loops_or_writes_without_end_is_refused_in_seconds(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_bounds, "MAX_WORK", template_bounds.MAX_WORK // 10)  # a tenth of the seconds
    began = time.process_time()
    with pytest.raises(
        BoundError, match=r"more than a conversation needs|which no conversation|it formats|it asks|power"
    ):
        render(template, [{"role": "user", "content": "Hi"}])
    assert time.process_time() - began < 5


def test_within_bounds_a_template_writes_what_transformers_writes(families: dict[str, Family]) -> None:
    template = (
        "{%- for m in messages %}{% if loop.first and not loop.last %}{{ loop.length }}{% endif %}\n"
        "{{ m.content[:4] ~ m['role'] ~ loop.index }}{{ '%s, %03d of 2024' % (m.role, loop.index0) }}"
        "{{ '{{}} 12345 {:>6}'.format(m.role) }}{{ m|tojson(indent=2) }}"
        "{{ messages[::-1]|map(attribute='role')|join('+') }}"
        "{% if m.role in ['user', 'system'] and m is mapping %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content|trim|replace('a', 'bc') }}{% endgeneration %}{% endfor %}"
        "{% for x in nowhere %}never{% else %}{{ nowhere }}{{ bos_token }}{{ dict(a=1).items()|list }}{% endfor %}"
    )
    talk = [{"role": r, "content": f"{r} says a and ä"} for r in ("system", "user", "assistant")] * 100
    for family in families.values():
        theirs = family.tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False)
        assert render(template, talk, **family.tokenizer.special_tokens_map, add_generation_prompt=False) == theirs


def test_thinking_without_a_template_that_knows_it_is_an_error(families: dict[str, Family]) -> None:
    with pytest.raises(UserError, match=r"prompting\.thinking is true, but the chat template has no enable_thinking"):
        make(families["llama3"].tokenizer, thinking=True)


# ---------------------------------------------------------------------------------------------------------------
# Length


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_end_of_the_last_answer_that_fits_is_cut(families: dict[str, Family], name: str) -> None:
    tokenizer = families[name].tokenizer
    talk: Talk = [("user", f"{PICTURE}hi"), ("assistant", "first xyz"), ("user", "more"), ("assistant", "second xyz")]
    whole = make(tokenizer).encode(example_of(talk))
    learned = np.flatnonzero(whole.supervise)
    ends = [int(t) + 1 for t in learned if t + 1 == len(whole.ids) or not whole.supervise[t + 1]]

    for limit in range(int(learned[0]) + 1, len(whole.ids) + 2):
        cut = make(tokenizer, max_seq_len=limit).encode(example_of(talk))

        kept = len(whole.ids) if limit >= len(whole.ids) else max(int(t) + 1 for t in learned if t < limit)
        assert (
            cut.ids.tolist() == whole.ids[:kept].tolist() and cut.supervise.tolist() == whole.supervise[:kept].tolist()
        )
        assert cut.truncated == (limit < ends[-1]), "a newline after the last end token is no loss"
    with pytest.raises(TooLongError, match=r"record 7 .*the prompt alone takes"):
        make(tokenizer, max_seq_len=int(learned[0])).encode(example_of(talk))


@pytest.mark.parametrize("template", ["caption", "conversation", "chat"])
def test_reject_turns_long_samples_into_errors_of_their_own_kind(families: dict[str, Family], template: str) -> None:
    tokenizer = families["chatml"].tokenizer
    talk = example_of([("user", f"{PICTURE}hi"), ("assistant", "a long answer")])
    whole = make(tokenizer, template=template).encode(talk)
    learned = int(np.flatnonzero(whole.supervise)[-1]) + 1

    def limited(limit: int) -> ChatEncoder:
        return make(tokenizer, template=template, too_long="reject", max_seq_len=limit)

    assert limited(learned).encode(talk).ids.tolist() == whole.ids[:learned].tolist()
    with pytest.raises(TooLongError, match=rf"record 7 .*has {learned} tokens.*too_long is reject"):
        limited(learned - 1).encode(talk)
    prompt = len(limited(learned).encode_prompt(talk).ids)
    with pytest.raises(TooLongError, match="the prompt alone takes"):
        limited(prompt - 1).encode_prompt(talk)
    assert limited(99).fingerprint != make(tokenizer, template=template, max_seq_len=99).fingerprint


# ---------------------------------------------------------------------------------------------------------------
# Ends, decoding, travelling


@pytest.mark.parametrize(("name", "end"), [
    ("chatml", "<|im_end|>"), ("qwen3", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("mistral", "</s>"),
    ("gemma", "<end_of_turn>"),
])  # fmt: skip
def test_generation_stops_at_the_templates_end_of_turn_and_at_the_tokenizers(
    families: dict[str, Family], name: str, end: str
) -> None:
    tokenizer = families[name].tokenizer
    encoder = make(tokenizer)

    assert encoder.eos_ids[0] == tokenizer.convert_tokens_to_ids(end)
    assert tokenizer.eos_token_id in encoder.eos_ids and len(set(encoder.eos_ids)) == len(encoder.eos_ids)
    encoded = encoder.encode(example_of([("user", "what"), ("assistant", "the red")]))
    assert encoder.decode(encoded.ids[encoded.supervise]) == "the red"


def test_a_chat_encoder_travels_to_a_loader_process(families: dict[str, Family]) -> None:
    for family in families.values():
        encoder = make(family.tokenizer)

        copy = pickle.loads(pickle.dumps(encoder))

        example = example_of([("user", f"a</s>b{PICTURE}"), ("assistant", "an <|im_end|> the")])
        assert copy.encode(example).ids.tolist() == encoder.encode(example).ids.tolist()
        assert copy.fingerprint == encoder.fingerprint


def test_the_fingerprint_follows_what_decides_ids(families: dict[str, Family]) -> None:
    tokenizer = families["qwen3"].tokenizer
    variants: list[dict[str, Any]] = [
        {}, {"template": "conversation"}, {"system": "s"}, {"thinking": True}, {"too_long": "reject"},
        {"chat_template": CHATML},
    ]  # fmt: skip

    prints = {make(tokenizer, **v).fingerprint for v in variants}

    assert len(prints) == len(variants)
    assert make(tokenizer, instruction="other").fingerprint != make(tokenizer).fingerprint


def test_a_preview_shows_answers_and_ends_as_targets(families: dict[str, Family]) -> None:
    encoder = make(families["qwen3"].tokenizer)

    segments = encoder.segments(encoder.encode(example_of([("user", f"{PICTURE}hi"), ("assistant", "ho")])))

    assert [s.text for s in segments if s.kind == "target"] == ["ho<|im_end|>"]
    assert [s.text for s in segments if s.kind == "image"] == [f"[image 1 ×{N}]"]


# ---------------------------------------------------------------------------------------------------------------
# The real SmolLM2 tokenizer

DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.fixture(scope="session")
def smollm2() -> Any:
    folder = Path(__file__).parents[2] / "data" / "quickstart" / "llm" / "SmolLM2-135M-Instruct"
    if assets := os.environ.get("BEHOLDER_ASSETS"):
        folder = Path(assets) / "llm"
    if not (folder / "tokenizer.json").exists():
        pytest.skip("the real SmolLM2 tokenizer is not here: run beholder quickstart, or set BEHOLDER_ASSETS")
    return AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="session")
def sayable(smollm2: Any) -> set[str]:
    """Its vocabulary lacks 21 of the 256 bytes and drops them without a word: what is left is what can be compared."""
    return {chr(b) for b in range(128) if smollm2(chr(b), add_special_tokens=False)["input_ids"]} | {PICTURE}


def test_real_smollm2_ids_are_those_of_its_own_rendering_default_system_included(smollm2: Any) -> None:
    talk: Talk = [
        ("user", "What is the capital of France?"), ("assistant", "The capital of France is Paris."),
        ("user", "And of Italy?\nSay why."), ("assistant", "Rome, since 1871."),
    ]  # fmt: skip
    encoder = make(smollm2)

    encoded = encoder.encode(example_of(talk))

    whole = smollm2.apply_chat_template([{"role": r, "content": t} for r, t in talk], tokenize=False)
    assert DEFAULT_SYSTEM in whole and whole == smollm2.decode(encoded.ids.tolist())
    assert encoded.ids.tolist() == smollm2(whole, add_special_tokens=False)["input_ids"]
    learned = smollm2.decode(encoded.ids[encoded.supervise].tolist())
    assert learned == "The capital of France is Paris.<|im_end|>Rome, since 1871.<|im_end|>"
    with_system = encoder.encode(example_of([("system", "Be brief."), *talk]))
    assert DEFAULT_SYSTEM not in smollm2.decode(with_system.ids.tolist())


@many
@given(talk=talks())
def test_real_smollm2_mask_and_text_for_hostile_talks(smollm2: Any, sayable: set[str], talk: Talk) -> None:
    talk = [(r, "".join(c for c in t if c in sayable)) for r, t in talk]
    assume(all(t for r, t in talk if r == "assistant"))
    encoder = make(smollm2)

    encoded, prompt = encoder.encode(example_of(talk)), encoder.encode_prompt(example_of(talk))

    if talk[0][0] != "system":
        talk.insert(0, ("system", DEFAULT_SYSTEM))
    assert spell(encoder, encoded) == flat(chatml(talk, False))
    if talk[-1][0] == "assistant":
        assert encoded.ids[: len(prompt.ids)].tobytes() == prompt.ids.tobytes()


def test_audited_copies_in_another_template_still_encode(families: dict[str, Family]) -> None:
    """`probes.audit` lays samples out as conversations with a copy of the encoder."""
    plain_copy = pickle.loads(pickle.dumps(make(families["chatml"].tokenizer)))
    plain_copy.template = "conversation"

    encoded = plain_copy.encode(replace(example_of([("user", "hi"), ("assistant", "ho")]), images=()))

    assert plain_copy.tokenizer.decode(encoded.ids.tolist()) == "hi\nho<|im_end|>"


# ---------------------------------------------------------------------------------------------------------------
# What generation starts from, and what training shows before an answer

R1_DISTILL = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<|im_start|>User:' + m.content }}"
    "{% elif m.role == 'assistant' %}{% set text = m.content %}"
    "{% if '</think>' in text %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>Assistant:' + text + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>Assistant:<think>\n' }}{% endif %}"
)
DEAF = CHATML.partition("{% if add_generation_prompt %}")[0]
"""Writes the assistant's header before an answer only, whatever ``add_generation_prompt`` says."""
THINKING_ONLY = QWEN3.partition("{%- if enable_thinking")[0].replace(
    "{{- '<|im_start|>assistant\n' }}", "{{- '<|im_start|>assistant\n<think>\n' }}"
) + "{%- endif %}"  # fmt: skip
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant<think>final' + m.content + '<|im_end|>' }}"
    "{% else %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
LATECOMER = CHATML.replace("<|im_start|>{{ m.role }}", "<|im_start|>{% if loop.last %}last {% endif %}{{ m.role }}")


@pytest.mark.parametrize(("template", "own", "trained"), [
    (R1_DISTILL, "<|im_start|>Assistant:<think>\\n", "<|im_start|>Assistant:"),
    (DEAF, "<|im_end|>\\n", "<|im_start|>assistant\\n"),
    (THINKING_ONLY, "<think>\\n", "<think>\\n\\n</think>\\n\\n"),
    (CHANNELS, "<|im_start|>assistant", "<|im_start|>assistant<think>final"),
], ids=["R1-Distill", "add_generation_prompt ignored", "Qwen3-Thinking", "channels"])  # fmt: skip
@pytest.mark.parametrize("rounds", [1, 2])
def test_generation_starts_from_what_training_shows_where_the_templates_prompt_is_something_else(
    families: dict[str, Family], template: str, own: str, trained: str, rounds: int
) -> None:
    tokenizer = families["chatml"].tokenizer
    encoder = ChatEncoder(
        tokenizer, num_visual_tokens=N, max_seq_len=4096, template="chat", instruction="-", instruction_multi="-",
        chat_template=template,
    )  # fmt: skip
    talk: Talk = [("user", f"what {PICTURE}"), ("assistant", "a dog"), ("user", "an?"), ("assistant", "yes")]
    talk = talk[: 2 * rounds]

    full, prompt = encoder.encode(example_of(talk)), encoder.encode_prompt(example_of(talk))

    assert full.ids[: len(prompt.ids)].tolist() == prompt.ids.tolist()
    answer = tokenizer(talk[-1][1] + "<|im_end|>", add_special_tokens=False)["input_ids"]
    after = full.ids[len(prompt.ids) :].tolist()
    assert after[: len(answer)] == answer and full.supervise[len(prompt.ids) :][: len(answer)].all()
    whole = tokenizer.apply_chat_template(
        [{"role": r, "content": t} for r, t in talk], chat_template=template, tokenize=False, enable_thinking=False
    )
    assert bytes(b for b, _, _ in spell(encoder, full)).decode() == whole, "the sample is the template's own text"
    assert encoder.prompt_note is not None and own in encoder.prompt_note and trained in encoder.prompt_note


def test_only_templates_that_need_it_are_told_about_and_fingerprinted_anew(families: dict[str, Family]) -> None:
    for name in FAMILIES:
        assert make(families[name].tokenizer).prompt_note is None, name
    thinking = make(families["qwen3"].tokenizer, thinking=True)
    assert thinking.prompt_note is not None and "not trained" in thinking.prompt_note


def test_a_template_that_shows_the_question_otherwise_once_it_is_answered_is_refused(
    families: dict[str, Family],
) -> None:
    with pytest.raises(UserError, match="shows a conversation of user otherwise once it is answered"):
        make(families["chatml"].tokenizer, chat_template=LATECOMER)


# ---------------------------------------------------------------------------------------------------------------
# The table of embeddings


def test_ids_that_can_occur_must_have_a_row_and_others_need_none(families: dict[str, Family], tmp_path: Path) -> None:
    """Gemma 3's text-only models have a tokenizer with the image token of the others, one past the table."""
    tokenizer = tiny_tokenizer(tmp_path, "smollm2")
    rows = len(tokenizer)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    encoder = make(tokenizer)

    encoder.check_table(rows)

    spelled = encoder.encode(example_of([("user", "<image_soft_token>"), ("assistant", "a <image_soft_token>")]))
    assert spelled.ids.max() < rows, "its spelling in a text is text"
    with pytest.raises(UserError, match=rf"table of {rows - 1} rows does not have: '<\|im_end\|>' \({rows - 1}\)"):
        encoder.check_table(rows - 1)
    with pytest.raises(UserError, match=r"table of 200 rows does not have: .*, …; they do not belong together"):
        encoder.check_table(200)
    with pytest.raises(UserError, match="image_soft_token"):
        make(tokenizer, im_start="<image_soft_token>").check_table(rows)
    with pytest.raises(UserError, match="image_soft_token"):
        make(tokenizer, chat_template=CHATML.replace("{{ m.role }}", "{{ m.role }}<image_soft_token>")).check_table(
            rows
        )
