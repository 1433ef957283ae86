"""The one thread that writes: answers are those of the model by itself, whoever comes, goes or waits beside them."""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import TinyParts
from tests.use.slow import slowly
from tests.use.talking import untrained_run

from beholder.config import GenerateConfig
from beholder.use.serving.batching import Batcher, Done, Event, Job
from beholder.use.vlm import Prompt, Request, Vlm, load


@pytest.fixture(scope="module")
def vlm(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Vlm:
    return load(untrained_run(tiny_parts, tmp_path_factory.mktemp("served")), device="cpu")


@pytest.fixture(scope="module")
def asked(vlm: Vlm, tiny_parts: TinyParts) -> list[Request]:
    images = sorted(tiny_parts.images.glob("*.png"))[:6]
    words = ["What colour?", "Which?", "Say what you see in the picture, and why.", "Hm", "Colour", "A?"]
    return [Request(text, [image]) for text, image in zip(words, images, strict=True)]


@pytest.fixture
def batcher(vlm: Vlm) -> Iterator[Batcher]:
    made = Batcher(vlm, max_batch=3)
    yield made
    made.close()
    assert not made.alive


class Heard:
    """What a job told."""

    def __init__(self, prompt: Prompt, tokens: int = 24, **more: Any) -> None:
        temperature, top_p = more.pop("temperature", 0.0), more.pop("top_p", 1.0)
        how = GenerateConfig(temperature=temperature, top_p=top_p, max_new_tokens=tokens)
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.job = Job(prompt, how, self.events.put, **more)
        self.text = ""

    def wait(self) -> Done:
        while True:
            event = self.events.get(timeout=60)
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Done):
                assert self.events.empty()
                return event
            self.text += event

    def pieces(self, count: int) -> None:
        for _ in range(count):
            event = self.events.get(timeout=60)
            assert isinstance(event, str)
            self.text += event


def alone(vlm: Vlm, request: Request, tokens: int = 24) -> str:
    return vlm.answers([request], GenerateConfig(temperature=0.0, max_new_tokens=tokens))[0]


def test_those_who_wait_are_answered_as_by_themselves(vlm: Vlm, asked: list[Request], batcher: Batcher) -> None:
    tokens = [24, 3, 40, 17, 9, 24]
    heard = [Heard(vlm.prepare(request), n) for request, n in zip(asked, tokens, strict=True)]

    for one in heard:
        batcher.submit(one.job)
    done = [one.wait() for one in heard]

    assert [one.text for one in heard] == [alone(vlm, r, n) for r, n in zip(asked, tokens, strict=True)]
    assert all(d.num_tokens <= n for d, n in zip(done, tokens, strict=True))
    assert batcher.num_waiting == 0


def test_a_newcomer_does_not_wait_for_a_long_answer(vlm: Vlm, asked: list[Request], batcher: Batcher) -> None:
    long, short = Heard(vlm.prepare(asked[0]), 120), Heard(vlm.prepare(asked[1]), 4)
    with slowly(vlm, 0.005) as rows:
        batcher.submit(long.job)
        long.pieces(3)
        batcher.submit(short.job)
        short.wait()
        written = len(long.job.ids)
        long.wait()

    assert written < 80
    assert {1, 2} <= set(rows)
    assert (long.text, short.text) == (alone(vlm, asked[0], 120), alone(vlm, asked[1], 4))


def test_an_answer_that_nobody_wants_stops_at_the_next_token(vlm: Vlm, asked: list[Request], batcher: Batcher) -> None:
    left, next_one = Heard(vlm.prepare(asked[0]), 120), Heard(vlm.prepare(asked[1]), 4)
    with slowly(vlm, 0.02) as rows:
        batcher.submit(left.job)
        left.pieces(2)
        left.job.cancelled = True
        steps, written = len(rows), len(left.job.ids)
        batcher.submit(next_one.job)
        next_one.wait()

    assert len(left.job.ids) <= written + 1
    assert len(rows) - steps <= 1 + 4
    assert next_one.text == alone(vlm, asked[1], 4)


def test_who_leaves_gives_up_its_row_and_the_others_go_on(vlm: Vlm, asked: list[Request], batcher: Batcher) -> None:
    stays, leaves = Heard(vlm.prepare(asked[0]), 80), Heard(vlm.prepare(asked[2]), 80)
    with slowly(vlm, 0.005) as rows:
        for one in (stays, leaves):
            batcher.submit(one.job)
        leaves.pieces(2)
        leaves.job.cancelled = True
        written = len(leaves.job.ids)
        stays.wait()

    assert len(leaves.job.ids) <= written + 1
    assert rows[-1] == 1
    assert stays.text == alone(vlm, asked[0], 80)


def test_a_seed_decides_whoever_else_is_there(vlm: Vlm, asked: list[Request], batcher: Batcher) -> None:
    heard = [Heard(vlm.prepare(r), 30, temperature=1.3, seed=5) for r in asked[:2]]
    heard += [Heard(vlm.prepare(asked[0]), 30, temperature=1.3, seed=6), Heard(vlm.prepare(asked[0]), 30)]

    for one in heard:
        batcher.submit(one.job)
    for one in heard:
        one.wait()

    how = GenerateConfig(temperature=1.3, top_p=1.0, max_new_tokens=30)
    assert [one.text for one in heard[:3]] == [
        vlm.answers([request], how, seed)[0] for request, seed in ((asked[0], 5), (asked[1], 5), (asked[0], 6))
    ]
    assert heard[0].text != heard[2].text
    assert heard[3].text == alone(vlm, asked[0], 30)


def test_without_a_seed_every_answer_is_drawn_anew(vlm: Vlm, asked: list[Request], batcher: Batcher) -> None:
    heard = [Heard(vlm.prepare(asked[0]), 30, temperature=1.3) for _ in range(3)]

    for one in heard:
        batcher.submit(one.job)
    for one in heard:
        one.wait()

    assert len({one.text for one in heard}) == 3


@given(data=st.data())
def test_a_stop_ends_the_answer_before_it_and_nothing_of_it_is_said(vlm: Vlm, data: st.DataObject) -> None:
    letters = st.text("ab \ncd", max_size=30)
    whole, stops = data.draw(letters), data.draw(st.lists(st.text("ab \ncd", min_size=1, max_size=4), max_size=3))
    prompt = Prompt(None, [], 10**6)  # pyright: ignore[reportArgumentType]
    heard = Heard(prompt, 10_000, stop=tuple(stops))
    tokens = [ord(letter) for letter in whole]

    for token in (*tokens, 0):
        if heard.job.live:
            heard.job.write(token, lambda ids: "".join(chr(i) for i in ids if i).strip(), frozenset({0}))
    done = heard.wait()

    said = whole.strip()
    # What a stop is found in grows by a token at a time, so an earlier and longer one cannot win over what is there.
    prefixes = [whole[:n].strip() for n in range(1, len(whole) + 1)]
    cut = next((p[: min(p.find(s) for s in stops if s in p)] for p in prefixes if any(s in p for s in stops)), said)
    assert (heard.text.rstrip(), done.reason) == (cut.rstrip(), "stop")
    assert not any(stop in heard.text for stop in stops)


def test_what_goes_wrong_is_told_to_those_it_happened_to(vlm: Vlm, asked: list[Request], batcher: Batcher) -> None:
    def break_(*_: Any) -> None:
        raise RuntimeError("out of memory")

    hook = vlm.model.language.model.register_forward_pre_hook(break_)
    broken = Heard(vlm.prepare(asked[0]), 4)
    batcher.submit(broken.job)
    with pytest.raises(RuntimeError, match="out of memory"):
        broken.wait()
    hook.remove()

    after = Heard(vlm.prepare(asked[0]), 4)
    batcher.submit(after.job)
    after.wait()

    assert after.text == alone(vlm, asked[0], 4)


def test_closing_stops_what_is_written_and_takes_no_more(vlm: Vlm, asked: list[Request]) -> None:
    batcher = Batcher(vlm, max_batch=2)
    heard = Heard(vlm.prepare(asked[0]), 120)
    with slowly(vlm, 0.02):
        batcher.submit(heard.job)
        heard.pieces(2)
        batcher.close()

    assert len(heard.job.ids) < 20
    with pytest.raises(RuntimeError, match="no longer"):
        batcher.submit(Heard(vlm.prepare(asked[0])).job)


def test_an_answer_ends_where_the_model_has_no_more_positions(vlm: Vlm, asked: list[Request], batcher: Batcher) -> None:
    prompt = vlm.prepare(asked[0])
    heard = Heard(Prompt(prompt.encoded, prompt.images, 5), 24)

    batcher.submit(heard.job)
    done = heard.wait()

    assert (done.reason, done.num_tokens) == ("length", 5)


def test_prompts_are_made_while_an_answer_is_written(vlm: Vlm, asked: list[Request], batcher: Batcher) -> None:
    heard = [Heard(vlm.prepare(request), 60) for request in asked]
    prompts = [Request(f"What colour <|im_end|> {k}?", asked[0].images) for k in range(200)]
    before = [vlm.prepare(request).encoded.ids.tolist() for request in prompts]
    for one in heard:
        batcher.submit(one.job)
    during = [vlm.prepare(request).encoded.ids.tolist() for request in prompts]
    for one in heard:
        one.wait()

    assert during == before
    assert [one.text for one in heard] == [alone(vlm, request, 60) for request in asked]
