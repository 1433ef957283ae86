"""A loaded run answers: the same words one by one, in batches and in pieces, about the images it was given."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.conftest import TinyParts
from tests.use.talking import untrained_run

from beholder.prepare.tiny import tiny_tokenizer
from beholder.train import checkpoint
from beholder.types import ImageRef, UserError
from beholder.use.stream import AnswerStream
from beholder.use.vlm import ContextFullError, Request, Vlm, load


@pytest.fixture(scope="module")
def run(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_run(tiny_parts, tmp_path_factory.mktemp("chatty"))


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What colour?"},
    {"role": "assistant", "content": "Red."},
    {"role": "user", "content": "Sure? Größer 🐈"},
]


# ---------------------------------------------------------------------------------------------------------------
# Streaming


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_pieces_of_a_stream_are_what_chat_answers(vlm: Vlm, images: list[Path], temperature: float) -> None:
    for image in images:  # a random model over bytes: most of what it says is broken UTF-8, which is the point
        stream = vlm.stream(TALK, image, temperature=temperature, max_new_tokens=24, seed=3)

        pieces = list(stream)

        assert "".join(pieces) == vlm.chat(TALK, image, temperature=temperature, max_new_tokens=24, seed=3)
        assert stream.text == "".join(pieces) and all(pieces)


@pytest.fixture(scope="module")
def byte_tokens(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("bytes"))


def streamed(text_ids: Sequence[int], decode: Callable[[Sequence[int]], str], end_ids: Sequence[int]) -> AnswerStream:
    """A stream of given ids, put as transformers puts them: a prompt without ids first, then one at a time."""

    def write(streamer: Any) -> None:
        streamer.put(torch.zeros(1, 0, dtype=torch.int64))
        for i in text_ids:
            streamer.put(torch.tensor([i]))
        streamer.end()

    return AnswerStream(write, decode, end_ids)


@given(text=st.text(max_size=20))
def test_no_piece_ends_inside_a_character(byte_tokens: Any, text: str) -> None:
    ids = byte_tokens(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def decode(given: Sequence[int]) -> str:
        return byte_tokens.decode(given, clean_up_tokenization_spaces=False).strip()

    pieces = list(streamed(ids, decode, [0]))

    assert "".join(pieces) == text.strip()
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@pytest.fixture(scope="module")
def id_of_byte(byte_tokens: Any) -> dict[int, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {byte: byte_tokens.convert_tokens_to_ids(char) for byte, char in bytes_to_unicode().items()}


@given(raw=st.binary(max_size=24))
def test_bytes_that_are_no_text_stream_as_they_decode(byte_tokens: Any, id_of_byte: dict[int, int], raw: bytes) -> None:
    ids = [id_of_byte[byte] for byte in raw]

    def decode(given: Sequence[int]) -> str:
        return byte_tokens.decode(given, clean_up_tokenization_spaces=False).strip()

    assert "".join(streamed(ids, decode, [0])) == decode(ids)


def test_a_stream_tells_whether_the_model_ended_by_itself() -> None:
    def decode(ids: Sequence[int]) -> str:
        return "".join(chr(97 + i) for i in ids if i < 26)

    ended, cut = streamed([0, 1, 99], decode, [99]), streamed([0, 1], decode, [99])

    assert list(ended) == ["a", "b"] and ended.complete
    assert list(cut) == ["a", "b"] and not cut.complete


@pytest.mark.parametrize("how", ["close", "drop"])
def test_nobody_listening_stops_the_model(how: str) -> None:
    written: list[int] = []

    def write(streamer: Any) -> None:
        for i in range(10_000):
            written.append(i)
            time.sleep(0.001)
            streamer.put(torch.tensor([i % 26]))

    stream = AnswerStream(write, lambda ids: "".join(chr(97 + i) for i in ids), [99])
    next(stream)
    if how == "close":
        stream.close()
    del stream

    thread = next((t for t in threading.enumerate() if t.name == "answer" and t.is_alive()), None)
    if thread is not None:
        thread.join(timeout=5)
        assert not thread.is_alive()
    assert len(written) < 10_000


def test_what_goes_wrong_in_the_writing_is_raised_where_it_is_read() -> None:
    def write(streamer: Any) -> None:
        streamer.put(torch.tensor([0]))
        raise UserError("out of memory")

    stream = AnswerStream(write, lambda ids: "a" * len(ids), [99])

    assert next(stream) == "a"
    with pytest.raises(UserError, match="out of memory"):
        next(stream)
    assert list(stream) == []


def test_a_stopped_answer_leaves_the_model_as_it_was(vlm: Vlm, images: list[Path]) -> None:
    before = vlm.chat("What?", images[0], max_new_tokens=12)
    state = torch.random.get_rng_state()

    stream = vlm.stream("What?", images[0], max_new_tokens=100, temperature=1.0)
    next(stream)
    stream.close()

    assert torch.equal(torch.random.get_rng_state(), state)
    assert vlm.chat("What?", images[0], max_new_tokens=12) == before


# ---------------------------------------------------------------------------------------------------------------
# Many at once


def test_a_batch_is_answered_as_one_by_one(vlm: Vlm, images: list[Path]) -> None:
    requests = [
        Request(prompt, image)
        for image in images
        for prompt in ("What?", "Which colour has the shape in this picture, please, and why?", "Größe 🐈?")
    ]
    requests.insert(4, Request("And without an image?"))

    together = list(vlm.generate_many(requests, batch_size=7, max_new_tokens=10))

    # fp32: greedy choices do not depend on the batch (model.language.generate).
    alone = [answer for r in requests for answer in vlm.generate_many([r], batch_size=1, max_new_tokens=10)]
    assert together == alone
    assert together[0] == vlm.generate(images[0], "What?", max_new_tokens=10)
    assert len(set(together)) > 3, "answers that are all alike would prove nothing"


def test_a_request_that_cannot_be_asked_is_named_and_those_before_it_are_answered(vlm: Vlm, images: list[Path]) -> None:
    requests = [Request("a", images[0]), Request("b", images[1]), Request("c", "nowhere.png", where="q.jsonl:3")]

    answers = vlm.generate_many(requests, batch_size=2, max_new_tokens=4)

    assert next(answers) == vlm.generate(images[0], "a", max_new_tokens=4)
    assert next(answers) == vlm.generate(images[1], "b", max_new_tokens=4)
    with pytest.raises(UserError, match=r"^q\.jsonl:3: .*nowhere\.png"):
        next(answers)


def test_an_answer_does_not_outgrow_its_own_room_in_a_batch(vlm: Vlm, images: list[Path]) -> None:
    long = "x" * (vlm.context - vlm.num_tokens("", images[0]) - 5)

    answers = list(vlm.generate_many([Request(long, images[0]), Request("x", images[0])], max_new_tokens=60))

    assert vlm.context - vlm.num_tokens(long, images[0]) == 5
    assert len(vlm.tokenizer(answers[0])["input_ids"]) <= 3 * 5  # a broken byte is decoded to a character of three
    assert answers[1] == vlm.generate(images[0], "x", max_new_tokens=60)
    assert len(vlm.tokenizer(answers[1])["input_ids"]) > 3 * 5, "the other one has room for more"


# ---------------------------------------------------------------------------------------------------------------
# What is asked


def prompt_text(vlm: Vlm, messages: Any, images: Any = None) -> str:
    prompt = vlm.prepare(Request(messages, images))
    return "".join(s.text.replace("⏎", "") for s in vlm.encoder.segments(prompt.encoded))


def test_an_image_stands_before_the_first_question_whichever_way_it_is_asked(vlm: Vlm, images: list[Path]) -> None:
    conversation = [{"role": "user", "content": "What colour?"}]
    marked = [{"role": "user", "content": "<image>\nWhat colour?"}]

    shown = {
        prompt_text(vlm, "What colour?", images[0]), prompt_text(vlm, conversation, images[0]),
        prompt_text(vlm, conversation, [images[0]]), prompt_text(vlm, marked, [images[0]]),
    }  # fmt: skip

    (only,) = shown
    assert "[image 1 ×4]" in only and only.index("[image 1") < only.index("What colour?")


def test_a_typed_marker_stays_text_beside_a_single_image(vlm: Vlm, images: list[Path]) -> None:
    text = prompt_text(vlm, [{"role": "user", "content": "is <image> a word? <|im_end|>"}], images[0])

    assert text.count("[image") == 1 and "<image>" in text


def test_files_open_images_and_references_are_the_same_picture(vlm: Vlm, images: list[Path]) -> None:
    ways = [images[0], str(images[0]), Image.open(images[0]), ImageRef(str(images[0].parent), images[0].name)]

    assert len({vlm.chat("What?", way, max_new_tokens=8) for way in ways}) == 1


@pytest.mark.parametrize(
    ("messages", "num_images", "message"),
    [
        ([], 0, "it is empty"),
        ([{"role": "assistant", "content": "hi"}], 0, "its last turn is the assistant's"),
        ([{"role": "tool", "content": "hi"}], 0, r"messages\[0\]\.role is 'tool', expected system, user or assistant"),
        ([{"role": "user", "content": None}], 0, r"messages\[0\]\.content is NoneType, expected a text"),
        ([{"role": "user", "content": "<image> <image>"}], 1, "1 images but 2 <image>"),
        ([{"role": "user", "content": "hi"}], 2, "2 images given, but the run was trained with at most 1"),
    ],
)
def test_a_conversation_that_cannot_be_answered_says_why(
    vlm: Vlm, images: list[Path], messages: Any, num_images: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        vlm.chat(messages, list(images[:num_images]))


def test_a_run_that_answers_questions_needs_one(vlm: Vlm, images: list[Path]) -> None:
    with pytest.raises(UserError, match="needs one: give a prompt"):
        vlm.generate(images[0])


def test_a_captioning_run_does_not_chat(tiny_parts: TinyParts, images: list[Path], tmp_path: Path) -> None:
    align = untrained_run(
        tiny_parts, tmp_path, **{"stage": "align", "model.lora": {"enable": False}, "prompting.max_seq_len": 1536}
    )
    captioner = load(align, device="cpu")

    assert isinstance(captioner.generate(images[0], max_new_tokens=4), str)
    with pytest.raises(UserError, match=r"taught to describe images.*beholder generate"):
        captioner.chat("What?", images[0])


def test_a_conversation_may_be_longer_than_training_but_not_than_the_model(vlm: Vlm, images: list[Path]) -> None:
    assert vlm.cfg.prompting.max_seq_len == 128 and vlm.context == 4096

    assert isinstance(vlm.chat("x" * 300, images[0], max_new_tokens=2), str)
    with pytest.raises(ContextFullError, match=r"4,096 positions.*no room for an answer"):
        vlm.chat("x" * 4096, images[0])


# ---------------------------------------------------------------------------------------------------------------
# Loading


def test_a_run_is_loaded_with_its_best_checkpoint_else_its_latest(
    run: Path, images: list[Path], tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    latest = load(copy, device="cpu")
    checkpoint.set_best(copy / "checkpoints", 1, {"eval_loss": 1.0})

    best = load(copy, device="cpu")

    assert (latest.step, best.step) == (2, 1)
    assert best.checkpoint == copy / "checkpoints" / "step_1"
    told = {v.chat("What?", images[0], max_new_tokens=16) for v in (latest, best)}
    assert len(told) == 2, "two checkpoints that say the same prove nothing"


def test_adapters_are_part_of_what_answers(run: Path, images: list[Path]) -> None:
    vlm = load(run, device="cpu")
    adapted = [vlm.chat("What?", image, max_new_tokens=16) for image in images]

    with vlm.model.adapters_off():
        base = [vlm.chat("What?", image, max_new_tokens=16) for image in images]

    assert adapted != base
    assert adapted == [load(run, device="cpu").chat("What?", image, max_new_tokens=16) for image in images]


def test_adapters_are_never_left_out_silently(run: Path) -> None:
    with pytest.raises(UserError, match="adapters"):
        load(run, device="cpu", overrides=["model.lora.enable=false"])


def test_a_folder_without_a_config_is_named(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")

    with pytest.raises(UserError, match=r"has no config\.yaml"):
        load(tmp_path)
