"""`POST /v1/looks` and `hide_images`: what of an answer the images explain, word by word, is what the model says."""
# ruff: noqa: E402  (nothing else is worth importing where the extra is not installed)

from __future__ import annotations

import json
import math
import re
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
httpx: Any = pytest.importorskip("httpx")

import torch
from PIL import Image
from tests.conftest import TinyParts
from tests.use.serving import Running, asking, data_uri, see, serving
from tests.use.slow import slowly
from tests.use.talking import untrained_run

from beholder.config import GenerateConfig
from beholder.types import ImageInput, Turn, UserError
from beholder.use.looks import CLEAR, Looks, Token, Word, hidden, looks, spans_of
from beholder.use.serving.app import PAGE
from beholder.use.serving.conversation import Limits
from beholder.use.vlm import ContextFullError, Request, Vlm, load

CHAT, LOOKS = "/v1/chat/completions", "/v1/looks"
QUESTION, ANSWER = "What colour?", "Red, I think: a red blob."
SMALL = Limits(max_batch=2, max_waiting=2, max_tokens=40, max_images=4, max_image_bytes=200_000, grace_s=10.0)


@pytest.fixture(scope="module")
def run(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sets = {"stage": "multi", "prompting.max_images_per_sample": 3, "prompting.max_seq_len": 512}
    return untrained_run(tiny_parts, tmp_path_factory.mktemp("looked"), **sets)


@pytest.fixture(scope="module")
def tiny(vlm: Vlm) -> Iterator[Running]:
    with serving(vlm, limits=SMALL) as running:
        yield running


def inputs_of(vlm: Vlm, images: Sequence[Path]) -> list[ImageInput]:
    return [vlm.see(Image.open(image).convert("RGB")) for image in images]


def answered(*content: Any, answer: Any = ANSWER) -> dict[str, Any]:
    """A body of `LOOKS`."""
    said = [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]
    return {"model": "tiny", "messages": said}


@torch.no_grad()
def plainly(vlm: Vlm, shown: Sequence[ImageInput], question: str, answer: str) -> list[float]:
    """Log-probabilities of an answer's tokens, by the model's parts and nothing of ours around them."""
    prompt = vlm.prepare(Request(question, list(shown)))
    said = vlm.tokenizer(answer, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([*prompt.encoded.ids.tolist(), *said])
    embeds = vlm.model.language.embed(ids[None])
    for k, (start, stop) in enumerate(prompt.encoded.image_spans):
        embeds[0, start:stop] = vlm.model.visual_tokens([shown[k]])[0].to(embeds.dtype)
    states = vlm.model.language.hidden(embeds, torch.arange(len(ids))[None])
    logits = vlm.model.language.head(states[0]).float().log_softmax(-1)
    first = len(prompt.encoded.ids)
    return [float(logits[t - 1, ids[t]]) for t in range(first, len(ids))]


def measured(vlm: Vlm, shown: Sequence[ImageInput], answer: str = ANSWER, rows: int = 8) -> Looks:
    prompt = vlm.prepare_answered(Request(QUESTION, list(shown)), answer)
    return looks(vlm, prompt, spans_of(vlm, prompt), hidden(vlm), rows=rows)


def tokens_of(found: Looks) -> list[Token]:
    return [token for word in found.words for token in word.tokens]


@pytest.mark.parametrize("num_images", [1, 3])
def test_values_are_the_losses_of_a_plain_pass(vlm: Vlm, images: list[Path], num_images: int) -> None:
    shown, blank = inputs_of(vlm, images[:num_images]), hidden(vlm)

    found = tokens_of(measured(vlm, shown))

    assert [t.shown for t in found] == pytest.approx(plainly(vlm, shown, QUESTION, ANSWER), abs=1e-4)
    none = plainly(vlm, [blank] * num_images, QUESTION, ANSWER)
    assert [t.hidden for t in found] == pytest.approx(none, abs=1e-4)
    for k in range(num_images):
        one = plainly(vlm, [*shown[:k], blank, *shown[k + 1 :]], QUESTION, ANSWER)
        assert [t.hidden_alone[k] for t in found] == pytest.approx(one, abs=1e-4)
    assert max(abs(t.shown - t.hidden) for t in found) > 1e-3  # it looks, so that something was compared


def test_hidden_is_the_probes_empty_image(vlm: Vlm) -> None:
    """Normalised pixels 0, which SigLIP's mean of 0.5 makes a middle grey."""
    grey = vlm.see(Image.new("RGB", (64, 64), (128, 128, 128)))

    found, expected = hidden(vlm).features, vlm.model.keep(grey).features

    assert found is not None and expected is not None
    assert torch.equal(found, expected)


def test_fewer_rows_at_once_give_the_same(vlm: Vlm, images: list[Path]) -> None:
    shown = inputs_of(vlm, images[:3])

    whole, halved = (tokens_of(measured(vlm, shown, rows=rows)) for rows in (8, 2))

    for a, b in zip(whole, halved, strict=True):
        assert (a.id, a.text) == (b.id, b.text)
        assert (a.shown, a.hidden, *a.hidden_alone) == pytest.approx((b.shown, b.hidden, *b.hidden_alone), abs=1e-5)


def test_of_a_model_that_ignores_its_images_they_explain_nothing(run: Path, images: list[Path]) -> None:
    blind = load(run, device="cpu")
    with torch.no_grad():
        for weight in blind.model.connector.parameters():
            weight.zero_()

    found = measured(blind, inputs_of(blind, images[:2]))

    assert [w.explained for w in found.words] == pytest.approx([0.0] * len(found.words), abs=1e-5)
    assert [x for w in found.words for x in w.explained_alone] == pytest.approx([0.0] * 2 * len(found.words), abs=1e-5)
    assert found.counted()[1:] == (0, 0)


def test_an_answer_is_put_after_what_was_asked(
    tiny_parts: TinyParts, vlm: Vlm, images: list[Path], tmp_path: Path
) -> None:
    captions = load(
        untrained_run(tiny_parts, tmp_path, stage="align", **{"model.lora": {"enable": False}}), device="cpu"
    )
    conversation = [Turn("user", ("Hello",)), Turn("assistant", ("Hi.",)), Turn("user", ("And now?",))]
    for asked, model in (
        (Request(QUESTION, images[0]), vlm), (Request(conversation), vlm),
        (Request(None, [images[0]]), captions), (Request("In a word:", [images[0]]), captions),
    ):  # fmt: skip
        before, whole = model.prepare(asked), model.prepare_answered(asked, ANSWER)
        said = model.tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
        assert whole.encoded.ids.tolist() == [*before.encoded.ids.tolist(), *said]
        assert whole.encoded.num_targets == len(said) and whole.encoded.supervise[-len(said) :].all()
        assert whole.room == before.room - len(said)
    with pytest.raises(UserError, match="empty"):
        vlm.prepare_answered(Request(QUESTION, images[0]), "")
    with pytest.raises(ContextFullError, match="positions"):
        vlm.prepare_answered(Request(QUESTION, images[0]), "red " * vlm.context)


def test_the_route_tells_words_that_join_to_the_answer(vlm: Vlm, web: Any, images: list[Path]) -> None:
    content = [*see(images[0])[:1], *see(images[1])]

    answer = web.post(LOOKS, json=answered(*content))

    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert (told["object"], told["model"], told["unit"], told["images"]) == ("looks", "tiny", "nats", 2)
    assert "".join(word["text"] for word in told["words"]) == ANSWER
    assert [w["text"] for w in told["words"] if not w["counts"]] == [",", ":", "."]
    expected = measured(vlm, inputs_of(vlm, images[:2]))
    for word, own in zip(told["words"], expected.words, strict=True):
        assert word["explained"] == pytest.approx(own.explained, abs=1e-5)
        assert word["explained"] == pytest.approx(
            math.fsum(t["logprob"] - t["logprob_hidden"] for t in word["tokens"]), abs=1e-9
        )
        for k in range(2):
            lost = math.fsum(t["logprob"] - t["logprob_hidden_by_image"][k] for t in word["tokens"])
            assert word["explained_by_image"][k] == pytest.approx(lost, abs=1e-9)
    assert told["summary"]["words"] == 6
    assert told["summary"]["nats"] == pytest.approx(sum(w["explained"] for w in told["words"]))
    assert len(told["summary_by_image"]) == 2


def test_a_word_counts_from_a_factor_of_two() -> None:
    def word(text: str, nats: float) -> Word:
        return Word(text, (Token(1, text, 0.0, -nats, (-nats / 2,)),))

    found = Looks((word("a", CLEAR), word(" b", CLEAR - 1e-9), word(" c", -CLEAR), word(".", 9.0), word(" d", 3.0)))

    assert found.counted() == (4, 2, 1)
    assert found.counted(0) == (4, 1, 0)
    assert found.nats == pytest.approx(CLEAR - 1e-9 + 9 + 3)


def test_with_the_images_hidden_it_answers_as_to_empty_ones(vlm: Vlm, web: Any, images: list[Path]) -> None:
    def told(**more: Any) -> str:
        return web.post(CHAT, json=asking(see(images[0]), **more)).json()["choices"][0]["message"]["content"]

    how = GenerateConfig(temperature=0.0, max_new_tokens=8)

    assert told(hide_images=True) == vlm.answers([Request(QUESTION, [hidden(vlm)])], how)[0]
    assert told(hide_images=False) == told() == vlm.answers([Request(QUESTION, [images[0]])], how)[0]


IMAGE = {"type": "image_url", "image_url": {"url": data_uri(Image.new("RGB", (4, 4), "red"))}}
TEXT = {"type": "text", "text": QUESTION}
GOOD = answered(IMAGE, TEXT)
HOSTILE: dict[str, tuple[Any, str | None]] = {
    "no body": ({}, "model"),
    "no JSON": ("{", None),
    "another parameter": (GOOD | {"stream": True}, "stream"),
    "no messages": (GOOD | {"messages": []}, "messages"),
    "ends with the user": (GOOD | {"messages": GOOD["messages"][:1]}, "messages[0].role"),
    "an answer alone": (GOOD | {"messages": GOOD["messages"][1:]}, "messages[0].role"),
    "an answer to an answer": (GOOD | {"messages": [*GOOD["messages"], GOOD["messages"][1]]}, "messages"),
    "no image": (answered(TEXT), "messages"),
    "an image in the answer": (answered(IMAGE, answer=[IMAGE]), "messages[1].content[0]"),
    "an empty answer": (answered(IMAGE, TEXT, answer=""), "messages"),
    "no answer": (answered(IMAGE, TEXT, answer=None), "messages[1].content"),
    "an endless answer": (answered(IMAGE, TEXT, answer="red " * 100_000), "messages"),
    "too many images": (answered(*[IMAGE] * 4, TEXT), "messages[0].content[3]"),
    "broken base64": (
        answered({"type": "image_url", "image_url": {"url": "data:image/png;base64,%%"}}, TEXT),
        "messages[0].content[0].image_url.url",
    ),
    "no picture": (
        answered({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, TEXT),
        "messages[0].content[0].image_url.url",
    ),
    "another role": (GOOD | {"messages": [{"role": "tool", "content": "x"}, *GOOD["messages"]]}, "messages[0].role"),
}  # fmt: skip


def refused(answer: Any, status: int, param: str | None) -> None:
    assert answer.status_code == status, (answer.status_code, answer.text)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 1_000
    assert error["param"] == param


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_looked_at_is_refused_by_its_field(web: Any, tiny: Running, name: str) -> None:
    body, param = HOSTILE[name]
    content = body if isinstance(body, str) else json.dumps(body)

    refused(web.post(LOOKS, content=content, headers={"Content-Type": "application/json"}), 400, param)

    assert tiny.service.places == SMALL.max_batch + SMALL.max_waiting


def test_other_refusals(web: Any, tiny: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(web.post(LOOKS, json=GOOD | {"model": "gpt"}), 404, "model")
    refused(web.post(LOOKS, content=json.dumps(GOOD), headers={"Content-Type": "text/plain"}), 415, None)
    refused(web.get(LOOKS), 405, None)
    refused(web.post(CHAT, json=asking(hide_images=True)), 400, "hide_images")
    refused(web.post(CHAT, json=asking(see(IMAGE["image_url"]["url"]), hide_images="yes")), 400, "hide_images")
    monkeypatch.setattr(tiny.service, "places", 0)
    refused(web.post(LOOKS, json=GOOD), 429, None)


def test_control_tokens_spelled_in_an_answer_are_text(vlm: Vlm, web: Any) -> None:
    for spelled in list(vlm.tokenizer.get_added_vocab())[:4]:
        told = web.post(LOOKS, json=answered(IMAGE, TEXT, answer=f"a{spelled}b")).json()
        assert "".join(word["text"] for word in told["words"]) == f"a{spelled}b"
        assert not {t["id"] for w in told["words"] for t in w["tokens"]} & set(vlm.encoder.eos_ids)


def test_a_client_that_leaves_stops_it(vlm: Vlm, tiny: Running) -> None:
    """Three images are five rows, which are three batches of this server."""
    body = json.dumps(answered(IMAGE, IMAGE, IMAGE, TEXT)).encode()
    head = f"POST {LOOKS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    until = time.monotonic() + 20
    rows: list[int] = []

    def wait(model: Any, given: Any) -> None:
        rows.append(len(given[0].ids))
        time.sleep(0.5)

    hook = vlm.model.register_forward_pre_hook(wait)
    try:
        with socket.create_connection(("127.0.0.1", tiny.port)) as client:
            client.sendall(f"{head}\r\n\r\n".encode() + body)
            while not rows and time.monotonic() < until:
                time.sleep(0.01)
        while tiny.service.batcher.num_running and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        hook.remove()

    assert rows == [2]
    while tiny.service.places < SMALL.max_batch + SMALL.max_waiting and time.monotonic() < until:
        time.sleep(0.01)
    assert tiny.service.places == SMALL.max_batch + SMALL.max_waiting


def test_it_runs_between_two_pieces_of_an_answer(vlm: Vlm, web: Any, tiny: Running, images: list[Path]) -> None:
    """An answer that is being written is cut for it, goes on afterwards, and is the same."""
    body = asking(see(images[0]), stream=True, max_tokens=24)
    with slowly(vlm, 0.05), web.stream("POST", CHAT, json=body) as answer:
        lines = answer.iter_lines()
        told = [next(lines) for _ in range(4)]
        begun = time.monotonic()
        with httpx.Client(base_url=tiny.url, timeout=60, trust_env=False) as other:
            assert other.post(LOOKS, json=answered(*see(images[1]))).status_code == 200
        took = time.monotonic() - begun
        told += list(lines)

    said = [json.loads(line[6:]) for line in told if line.startswith("data: {")]
    text = "".join(c["delta"].get("content", "") for e in said for c in e["choices"])
    how = GenerateConfig(temperature=0.0, max_new_tokens=24)
    assert text == vlm.answers([Request(QUESTION, [images[0]])], how)[0]
    assert took < 24 * 0.05  # less than the whole answer takes


# ---------------------------------------------------------------------------------------------------------------
# The page, as far as it can be looked at without a browser (`test_page` has one)


def test_the_page_asks_nobody_else_and_runs_nothing_that_is_said_to_it(web: Any) -> None:
    for path, (_, kind) in PAGE.items():
        answer = web.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[a-z]", re.sub(r"// .*", "", answer.text))
        assert web.head(path).status_code == 200
    html, script = web.get("/").text, web.get("/page.js").text
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:|<script(?! src=)", html)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|localStorage|Function\(", script
    )


def test_the_page_is_told_what_it_has_to_know(web: Any) -> None:
    told = web.get("/v1/models").json()["data"][0]

    assert (told["max_images"], told["max_tokens"], told["chats"]) == (3, 40, True)
    assert web.get("/health").json() == {"status": "ok", "needs_key": False}
