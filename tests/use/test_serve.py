"""`beholder serve`: OpenAI's chat completions over HTTP, and the abuses V1 to V8 of a server."""
# ruff: noqa: E402  (nothing else is worth importing where the extra is not installed)

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
httpx: Any = pytest.importorskip("httpx")

import psutil
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.conftest import TinyParts
from tests.use.serving import KEY, Running, asking, data_uri, see, serving
from tests.use.slow import slowly
from tests.use.talking import untrained_run
from typer.testing import CliRunner

from beholder.cli import app
from beholder.config import GenerateConfig
from beholder.types import ImageInput, ImageSlot, Turn, UserError
from beholder.use.serving.app import PAGE
from beholder.use.serving.conversation import Limits, request_of
from beholder.use.serving.schema import read_request
from beholder.use.vlm import Request, Vlm, load

CHAT, LOOKS = "/v1/chat/completions", "/v1/looks"
HEAD = {"Authorization": f"Bearer {KEY}"}
SMALL = Limits(
    max_batch=2, max_waiting=8, max_tokens=64, max_images=4, max_image_bytes=200_000, max_megapixels=1.0,
    max_body_bytes=1_000_000, body_timeout_s=1.0, grace_s=10.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sets = {"stage": "multi", "prompting.max_images_per_sample": 2, "prompting.max_seq_len": 512}
    return untrained_run(tiny_parts, tmp_path_factory.mktemp("served"), **sets)


@pytest.fixture(scope="module")
def tiny(vlm: Vlm) -> Iterator[Running]:
    """A server without a key, with small limits."""
    with serving(vlm, limits=SMALL) as running:
        yield running


def said(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def refused(answer: Any, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The error of an answer, which has OpenAI's form."""
    assert answer.status_code == status, (answer.status_code, answer.text)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert param is None or error["param"] == param, error
    assert code is None or error["code"] == code, error
    return error


def events(text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def greedy(vlm: Vlm, request: Request, tokens: int = 8) -> str:
    return vlm.answers([request], GenerateConfig(temperature=0.0, max_new_tokens=tokens))[0]


# ---------------------------------------------------------------------------------------------------------------
# What it answers


def test_an_answer_is_what_the_run_says_and_counts_its_tokens(vlm: Vlm, web: Any, images: list[Path]) -> None:
    answer = web.post(CHAT, json=asking(see(images[0])))

    assert said(answer) == greedy(vlm, Request("What colour?", [images[0]]))
    record = answer.json()
    assert record["object"] == "chat.completion" and record["model"] == "tiny"
    assert record["choices"][0]["finish_reason"] == "length"
    prompt = vlm.num_tokens("What colour?", [images[0]])
    assert record["usage"] == {"prompt_tokens": prompt, "completion_tokens": 8, "total_tokens": prompt + 8}


def test_a_stream_gives_the_same_in_pieces(vlm: Vlm, web: Any, images: list[Path]) -> None:
    body = asking(see(images[1]), stream=True, stream_options={"include_usage": True}, max_tokens=24)

    answer = web.post(CHAT, json=body)
    told = events(answer.text)

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "".join(c["delta"].get("content", "") for e in told for c in e["choices"]) == greedy(
        vlm, Request("What colour?", [images[1]]), 24
    )
    assert told[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [c["finish_reason"] for e in told for c in e["choices"] if c["finish_reason"]] == ["length"]
    assert told[-1]["choices"] == [] and told[-1]["usage"]["completion_tokens"] == 24
    assert len({e["id"] for e in told}) == 1


def test_a_conversation_with_a_system_text_and_a_second_question(vlm: Vlm, web: Any, images: list[Path]) -> None:
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": see(images[0])},
        {"role": "assistant", "content": "Red."}, {"role": "user", "content": "Sure?"},
    ]  # fmt: skip
    plain = [m if m["role"] != "user" or k != 1 else {"role": "user", "content": "What colour?"}
             for k, m in enumerate(messages)]  # fmt: skip

    assert said(web.post(CHAT, json=asking() | {"messages": messages})) == greedy(vlm, Request(plain, images[0]))


def test_images_stand_where_the_message_has_them(vlm: Vlm) -> None:
    content = [{"type": "text", "text": "One:"}, *see("data:a", "Two:")[:1], *see("data:b", "Which?")]
    asked = read_request(json.dumps(asking(content)).encode())
    given = [ImageInput(), ImageInput()]

    assert request_of(vlm, asked, given).messages == [
        Turn("user", ("One:", ImageSlot(0), "\n", ImageSlot(1), "\n", "Which?"))
    ]


def test_what_shapes_an_answer_has_its_effect(vlm: Vlm, web: Any, images: list[Path]) -> None:
    long = {"max_tokens": 40}
    whole = said(web.post(CHAT, json=asking(see(images[0]), **long)))
    stop = next(letter for letter in whole[3:] if letter != "\N{REPLACEMENT CHARACTER}")
    drawn = {"temperature": 1.3, "seed": 7, "top_p": 0.9, **long}

    cut = web.post(CHAT, json=asking(see(images[0]), stop=[stop], **long))
    once, again, other = (
        said(web.post(CHAT, json=asking(see(images[0]), **(drawn | more)))) for more in ({}, {}, {"seed": 8})
    )

    assert said(cut) == whole[: whole.index(stop)]
    assert cut.json()["choices"][0]["finish_reason"] == "stop"
    assert once == again != other
    assert once == vlm.answers(
        [Request("What colour?", [images[0]])], GenerateConfig(temperature=1.3, top_p=0.9, max_new_tokens=40), 7
    )[0]  # fmt: skip
    assert said(web.post(CHAT, json=asking(see(images[0]), max_completion_tokens=3, max_tokens=None))) == greedy(
        vlm, Request("What colour?", [images[0]]), 3
    )


def test_what_changes_nothing_is_taken(web: Any) -> None:
    more = {
        "n": 1, "user": "me", "logprobs": False, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {},
        "response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "store": False, "metadata": {"a": "b"},
        "stop": None, "seed": None, "temperature": 0, "top_p": 1, "modalities": ["text"], "stream": False,
    }  # fmt: skip

    assert web.post(CHAT, json=asking(**more)).status_code == 200


def test_a_captioning_run_describes_and_does_not_chat(
    tiny_parts: TinyParts, images: list[Path], tmp_path: Path
) -> None:
    captions = untrained_run(tiny_parts, tmp_path, stage="align", **{"model.lora": {"enable": False}})
    told = load(captions, device="cpu")
    assert told.cfg.template == "caption"

    with serving(told) as running, httpx.Client(base_url=running.url, trust_env=False) as client:
        assert said(client.post(CHAT, json=asking(see(images[0])[:1]))) == greedy(told, Request(None, [images[0]]))
        refused(client.post(CHAT, json=asking("Hello")), 400, "messages")


def test_the_openai_client_works(vlm: Vlm, images: list[Path]) -> None:
    openai: Any = pytest.importorskip("openai")
    with serving(vlm, key=KEY) as running:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0) as client:
            content: Any = see(images[0])
            whole = client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": content}], max_tokens=8
            )
            pieces = list(client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": content}], max_tokens=8, stream=True
            ))  # fmt: skip
            names = [model.id for model in client.models.list()]
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], n=3)
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "x"}])
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()

    assert whole.choices[0].message.content == greedy(vlm, Request("What colour?", [images[0]]))
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole.choices[0].message.content
    assert names == ["tiny"]
    assert caught.value.param == "n"


def test_metrics_count_what_was_asked_and_written(vlm: Vlm, images: list[Path]) -> None:
    with serving(vlm) as running, httpx.Client(base_url=running.url, trust_env=False) as client:
        said(client.post(CHAT, json=asking(see(images[0]))))
        client.get("/a/secret/path")
        text = client.get("/metrics").text

    assert f'beholder_requests_total{{code="200",route="{CHAT}"}} 1.0' in text
    assert 'beholder_requests_total{code="404",route="other"} 1.0' in text
    assert 'beholder_tokens_total{kind="completion"} 8.0' in text
    assert "beholder_first_token_seconds_count 1.0" in text
    assert "secret" not in text


# ---------------------------------------------------------------------------------------------------------------
# V1, V8: who may ask


def test_every_route_but_health_and_the_page_needs_the_key(vlm: Vlm) -> None:
    """V1, also of routes that do not exist."""
    with serving(vlm, key=KEY) as running, httpx.Client(base_url=running.url, trust_env=False) as client:
        paths = list(client.get("/openapi.json", headers=HEAD).json()["paths"])
        assert {"/health", "/metrics", "/v1/models", CHAT, LOOKS} <= set(paths)
        wrong = [{}, {"Authorization": "Bearer x"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"},
                 {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer"}, {"X-API-Key": KEY},
                 {"Authorization": b"Bearer \xff\xfe"}]  # fmt: skip
        both = [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer x")]
        for path in [*paths, "/openapi.json", "/docs", "/", "/page.js", "/nothing", "//health", "/health/", "/HEALTH"]:
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
                for headers in (*wrong, both):
                    answer = client.request(method, path, headers=headers)
                    if path == "/health":
                        assert answer.status_code in (200, 405)
                    elif answer.request.url.path in PAGE and method in ("GET", "HEAD"):  # it says nothing of the model
                        assert answer.status_code == 200 and b"tiny" not in answer.content
                    elif method == "HEAD":
                        assert answer.status_code == 401
                    else:
                        error = refused(answer, 401, code="invalid_api_key")
                        assert KEY not in error["message"]
        assert client.get("/v1/models", headers=HEAD).status_code == 200
        assert client.get(f"/v1/models?key={KEY}").status_code == 401


def test_without_a_key_only_names_of_this_machine_are_answered(web: Any, tiny: Running) -> None:
    """What a page of another site can make a browser do: its own name for this address, or a body of another type."""
    for host in ("evil.example", f"evil.example:{tiny.port}", "127.0.0.1.evil.example", "", "localhost.evil.example"):
        refused(web.get("/v1/models", headers={"Host": host}), 403)
    for host in ("localhost", f"127.0.0.1:{tiny.port}", f"[::1]:{tiny.port}", "LOCALHOST"):
        assert web.get("/v1/models", headers={"Host": host}).status_code == 200
    body = json.dumps(asking())
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        refused(web.post(CHAT, content=body, headers={"Content-Type": kind}), 415)
    assert (
        "access-control-allow-origin" not in web.get("/v1/models", headers={"Origin": "https://evil.example"}).headers
    )


# ---------------------------------------------------------------------------------------------------------------
# V2: bodies and clients


def raw(port: int, data: bytes, wait_s: float = 10.0) -> bytes:
    """What comes back for these bytes until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait_s) as client:
        got = b""
        try:
            client.sendall(data)
            while piece := client.recv(65_536):
                got += piece
        except (ConnectionError, TimeoutError):
            pass
        return got


def head(*lines: str, to: str = CHAT) -> bytes:
    return "\r\n".join(
        (f"POST {to} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *lines, "", "")
    ).encode()


def test_a_body_that_is_too_large_is_refused_before_it_is_read(tiny: Running) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    for declared in (1_000_001, 10_000_000, 1_000_000_000, 10**18):
        begun = time.monotonic()
        got = raw(tiny.port, head(f"Content-Length: {declared}"))

        assert b"413" in got.split(b"\r\n")[0] and b"request_too_large" in got
        assert time.monotonic() - begun < 5
    assert process.memory_info().rss - before < 20_000_000


def test_a_body_without_end_is_refused_at_the_limit(tiny: Running) -> None:
    process = psutil.Process()
    before, begun = process.memory_info().rss, time.monotonic()
    piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"

    got = raw(tiny.port, head("Transfer-Encoding: chunked") + piece * 400)

    assert not got or b"413" in got.split(b"\r\n")[0]
    assert time.monotonic() - begun < 10
    assert process.memory_info().rss - before < 40_000_000


@pytest.mark.parametrize("sent", [b"", b"POST ", head()[:-2], head("Content-Length: 100") + b'{"mod',
                                  head("Transfer-Encoding: chunked") + b"5\r\nab"])  # fmt: skip
def test_a_client_that_does_not_finish_its_request_is_let_go(tiny: Running, sent: bytes) -> None:
    begun = time.monotonic()

    got = raw(tiny.port, sent)

    assert b"408" in got.split(b"\r\n")[0] and b'"error"' in got
    assert 0.5 < time.monotonic() - begun < 5


def test_a_client_that_trickles_its_headers_is_let_go(tiny: Running) -> None:
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", tiny.port), timeout=10) as client:
        with pytest.raises(OSError):
            for byte in head() * 100:
                client.send(bytes([byte]))
                time.sleep(0.05)

    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    "sent",
    [
        head(*(f"X-{k}: y" for k in range(10_000))), head(f"X: {'y' * 10_000_000}"),
        b"\x16\x03\x01\x02\x00" * 20 + b"\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n", b"NONSENSE\r\n\r\n", head("Content-Length: -1"),
        head("Content-Length: 1", "Content-Length: 2"), b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
    ],
)  # fmt: skip
def test_what_is_no_request_ends_the_connection(tiny: Running, web: Any, sent: bytes) -> None:
    begun = time.monotonic()

    got = raw(tiny.port, sent)

    assert not got or b" 4" in got.split(b"\r\n")[0][:14]
    assert time.monotonic() - begun < 10
    assert web.get("/health").status_code == 200


def test_who_does_not_read_is_let_go(vlm: Vlm) -> None:
    asked = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100
    with serving(vlm, limits=SMALL) as running:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", running.port))
            client.settimeout(0.2)
            try:
                while True:  # answers pile up until the server takes no more requests
                    client.send(asked)
            except TimeoutError:
                pass
            assert running.server.server_state.connections
            until = time.monotonic() + 20
            while running.server.server_state.connections and time.monotonic() < until:
                time.sleep(0.05)

            assert not running.server.server_state.connections


# ---------------------------------------------------------------------------------------------------------------
# V3, V4: hostile bodies


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(
        b"IDAT", pixels) + chunk(b"IEND", b"")  # fmt: skip


def _big_png() -> bytes:
    held = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(held, "png", optimize=True)
    return held.getvalue()


URL = "messages[0].content[0].image_url.url"
IMAGES: dict[str, Any] = {
    "http": "http://127.0.0.1:1/a.png", "https": "https://example.org/a.png", "file": "file:///etc/passwd",
    "path": "/etc/passwd", "empty": "", "no base64": "data:image/png,abc", "text": "data:text/plain;base64,YWJj",
    "broken": "data:image/png;base64,YW*j", "cut": "data:image/png;base64,YWJ", "letters": "data:image/png;base64,äöü",
    "nothing": "data:image/png;base64,", "no image": data_uri(b"hello"), "svg": data_uri(b"<svg/>", "svg+xml"),
    "eps": data_uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "eps"),
    "20000x20000": data_uri(_png_header(20_000, 20_000)), "2^31": data_uri(_png_header(2**31 - 1, 2**31 - 1)),
    "81 megapixels": data_uri(_big_png()), "cut file": data_uri(_png_header(100, 100)),
    "too many bytes": data_uri(os.urandom(200_100)),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_a_hostile_image_is_refused_with_its_field(web: Any, name: str) -> None:
    process = psutil.Process()
    before, begun = process.memory_info().rss, time.monotonic()

    refused(web.post(CHAT, json=asking(see(IMAGES[name]))), 400, URL, "invalid_image")

    assert time.monotonic() - begun < 1
    assert process.memory_info().rss - before < 60_000_000


DEEP = "[" * 100_000 + "]" * 100_000
BODIES: dict[str, tuple[Any, str | None]] = {
    "deep": (DEEP, None), "deep content": ('{"model":"tiny","messages":' + DEEP + "}", None), "list": ([], None),
    "empty": ("", None), "text": ("nothing", None), "bytes": (b"\xff\xfe\x00", None), "null": ("null", None),
    "NaN": ('{"model":"tiny","messages":[{"role":"user","content":"x"}],"temperature":NaN}', "temperature"),
    "infinite": ('{"model":"tiny","messages":[{"role":"user","content":"x"}],"temperature":1e999}', None),
    "surrogate": ('{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}', None),
    "no messages": ({"model": "tiny"}, "messages"), "no model": ({"messages": asking()["messages"]}, "model"),
    "nobody": (asking() | {"messages": []}, "messages"),
    "messages": (asking() | {"messages": "hello"}, "messages"),
    "many messages": (asking() | {"messages": asking()["messages"] * 400}, "messages"),
    "many parts": (asking([{"type": "text", "text": ""}] * 20_000), "messages[0].content"),
    "message": (asking() | {"messages": ["hello"]}, "messages[0]"),
    "role": (asking() | {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    "tool": (asking() | {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    "no content": (asking() | {"messages": [{"role": "user"}]}, "messages[0].content"),
    "null content": (asking(None), "messages[0].content"), "number": (asking(3), "messages[0].content"),
    "part": (asking(["x"]), "messages[0].content[0]"),
    "part kind": (asking([{"type": "audio", "text": "x"}]), "messages[0].content[0]"),
    "part kind type": (asking([{"type": ["text"], "text": "x"}]), "messages[0].content[0]"),
    "part text": (asking([{"type": "text", "text": 3}]), "messages[0].content[0].text"),
    "no url": (asking([{"type": "image_url", "image_url": {}}]), URL),
    "url": (asking([{"type": "image_url", "image_url": "data:"}]), "messages[0].content[0].image_url"),
    "last is the model": (asking() | {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    "system's image": (
        asking() | {"messages": [{"role": "system", "content": see("data:")}, *asking()["messages"]]},
        "messages[0].content[0]",
    ),
    "marker": (asking("<image> What colour?"), "messages[0].content"),
    "three images": (asking(see("data:") * 3), "messages[0].content[4]"),
    "100 images": (asking(see("data:") * 100), "messages[0].content[4]"),
    "long": (asking("a" * 900_000), "messages"), "too long": (asking("What colour? " * 1_000), "messages"),
    "max_tokens 0": (asking(max_tokens=0), "max_tokens"), "max_tokens 1e9": (asking(max_tokens=10**9), "max_tokens"),
    "max_tokens 1e40": (asking(max_tokens=10**40), None), "max_tokens float": (asking(max_tokens=8.5), "max_tokens"),
    "max_tokens text": (asking(max_tokens="8"), "max_tokens"),
    "max_completion_tokens": (asking(max_completion_tokens=10**9), "max_completion_tokens"),
    "n": (asking(n=1_000_000), "n"), "temperature": (asking(temperature=2.5), "temperature"),
    "temperature below": (asking(temperature=-0.1), "temperature"),
    "temperature text": (asking(temperature="1"), "temperature"),
    "temperature bool": (asking(temperature=True), "temperature"), "top_p": (asking(top_p=1.5), "top_p"),
    "seed": (asking(seed=1.5), "seed"), "seed 2^64": (asking(seed=2**64 - 1), "seed"), "stop": (asking(stop=3), "stop"),
    "stops": (asking(stop=["a"] * 5), "stop"), "huge stops": (asking(stop=["a" * 1_000] * 500), "stop"),
    "empty stop": (asking(stop=""), "stop"), "empty stops": (asking(stop=["a", ""]), "stop"),
    "long stop": (asking(stop="a" * 1_001), "stop"), "stream": (asking(stream="yes"), "stream"),
    "unknown": (asking(best_of=3), "best_of"), "unknown in message": (
        asking() | {"messages": [{"role": "user", "content": "x", "foo": 1}]}, "messages[0].foo"),
    "tools": (asking(tools=[{"type": "function"}]), "tools"), "logprobs": (asking(logprobs=True), "logprobs"),
    "json": (asking(response_format={"type": "json_object"}), "response_format.type"),
    "penalty": (asking(frequency_penalty=0.5), "frequency_penalty"),
    "bias": (asking(logit_bias={"1": 1}), "logit_bias"),
    "audio": (asking(modalities=["audio"]), "modalities[0]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_body_is_refused_with_its_field(web: Any, name: str) -> None:
    body, param = BODIES[name]
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    begun = time.monotonic()

    error = refused(web.post(CHAT, content=content, headers={"Content-Type": "application/json"}), 400, param)

    assert time.monotonic() - begun < 1
    assert len(error["message"]) < 1_000


def test_another_model_is_not_found(web: Any) -> None:
    refused(web.post(CHAT, json=asking() | {"model": "gpt"}), 404, "model", "model_not_found")
    refused(web.get("/v1/models/gpt"), 404, "model", "model_not_found")
    refused(web.get("/v1/nothing"), 404)
    refused(web.get(CHAT), 405)


def test_refusals_are_quick(web: Any) -> None:
    """V4: of 200 hostile bodies, 198 are refused within a tenth of a second."""
    bodies = [asking(see(IMAGES[name])) for name in ("20000x20000", "2^31", "81 megapixels", "too many bytes")]
    bodies += [body for body, _ in BODIES.values() if isinstance(body, dict)]
    times = []
    for k in range(200):
        begun = time.monotonic()
        assert web.post(CHAT, json=bodies[k % len(bodies)]).status_code == 400
        times.append(time.monotonic() - begun)

    assert sorted(times)[197] <= 0.1 + 3 * sorted(times)[100]  # a busy machine is slow with all of them


# ---------------------------------------------------------------------------------------------------------------
# V5


def test_spelled_control_tokens_are_text(vlm: Vlm, images: list[Path]) -> None:
    """Whatever stands in any text of a request: as many control ids as with harmless words."""
    special = sorted(vlm.tokenizer.get_added_vocab().items())
    control = {i for _, i in special} | set(vlm.encoder.eos_ids)

    def counts(word: str) -> int:
        messages = [
            {"role": "system", "content": f"Be {word}."}, {"role": "user", "content": see("data:x", f"What{word}?")},
            {"role": "assistant", "content": word}, {"role": "user", "content": f"{word}{word} Sure?", "name": "a"},
        ]  # fmt: skip
        asked = read_request(json.dumps(asking() | {"messages": messages}).encode())
        opened = vlm.see(Image.open(images[0]).convert("RGB"))
        ids = vlm.prepare(request_of(vlm, asked, [opened])).encoded.ids
        return sum(int(i) in control for i in ids)

    assert special
    for spelled, _ in special:
        assert counts(spelled) == counts("x"), spelled


# ---------------------------------------------------------------------------------------------------------------
# V6: many, and those who leave


def test_fifty_at_once_are_answered_or_told_to_come_back(vlm: Vlm, tiny: Running, images: list[Path]) -> None:
    def ask(k: int) -> tuple[int, str]:
        with httpx.Client(base_url=tiny.url, timeout=120, trust_env=False) as client:
            answer = client.post(CHAT, json=asking(see(images[k % 6]), max_tokens=6))
            if answer.status_code == 429:
                refused(answer, 429, code="rate_limit_exceeded")
                assert int(answer.headers["retry-after"]) >= 1
                return 429, ""
            return answer.status_code, said(answer)

    with slowly(vlm, 0.05), ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))
        assert httpx.get(f"{tiny.url}/health", trust_env=False).status_code == 200

    right = [greedy(vlm, Request("What colour?", [image]), 6) for image in images]
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= SMALL.max_batch + SMALL.max_waiting
    assert all(text == right[k % 6] for k, (status, text) in enumerate(answers) if status == 200)
    assert tiny.service.places == SMALL.max_batch + SMALL.max_waiting


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_answer(vlm: Vlm, tiny: Running, images: list[Path], stream: bool) -> None:
    body = json.dumps(asking(see(images[0]), stream=stream, max_tokens=64)).encode()
    with slowly(vlm, 0.1) as rows:
        client = socket.create_connection(("127.0.0.1", tiny.port))
        client.sendall(head(f"Content-Length: {len(body)}") + body)
        until = time.monotonic() + 20
        while len(rows) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        time.sleep(0.03)
        at_leave = len(rows)
        while tiny.service.batcher.num_running and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.3)

        assert 3 <= len(rows) <= at_leave + 2  # the step that was on its way, and one
    assert tiny.service.places == SMALL.max_batch + SMALL.max_waiting


def test_many_that_leave_leave_nothing_behind(vlm: Vlm, tiny: Running, images: list[Path]) -> None:
    body = json.dumps(asking(see(images[0]), stream=True, max_tokens=64)).encode()

    def ask_and_leave(k: int) -> None:
        with socket.create_connection(("127.0.0.1", tiny.port)) as client:
            client.sendall((head(f"Content-Length: {len(body)}") + body)[: None if k % 3 else 200])
            time.sleep(0.01 * (k % 7))

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(ask_and_leave, range(60)))
    until = time.monotonic() + 20
    whole = SMALL.max_batch + SMALL.max_waiting
    while (tiny.service.places < whole or tiny.service.batcher.num_running) and time.monotonic() < until:
        time.sleep(0.02)

    assert tiny.service.places == whole
    assert (tiny.service.batcher.num_waiting, tiny.service.batcher.num_running) == (0, 0)


# ---------------------------------------------------------------------------------------------------------------
# V7: anything

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12,
)  # fmt: skip
_FIELDS = sorted(read_request(json.dumps(asking()).encode()).__class__.model_fields)


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _paths(inner, (*at, key))


@st.composite
def _bodies(draw: st.DrawFn) -> Any:
    """A right body with a few places in it replaced by anything, or with fields that it may have."""
    body: Any = json.loads(json.dumps(asking(see(_TINY), stream=True, max_tokens=1, stop=["a"], temperature=0.5)))
    for field in draw(st.lists(st.sampled_from(_FIELDS), max_size=3)):
        body[field] = draw(_json)
    for _ in range(draw(st.integers(0, 2))):
        *way, last = draw(st.sampled_from([p for p in _paths(body) if p]))
        inside = body
        for key in way:
            inside = inside[key]
        inside[last] = draw(_json)
    return body


_TINY = data_uri(Image.new("RGB", (4, 4), "red"))


def _fuzz(web: Any, body: Any) -> None:
    answer = web.post(CHAT, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code < 500, (body, answer.text)
    if answer.status_code != 200:
        refused(answer, answer.status_code)


@given(body=_bodies() | _json)
@settings(max_examples=150)
def test_whatever_is_asked_is_answered_or_refused(web: Any, body: Any) -> None:
    _fuzz(web, body)


@pytest.mark.slow
@given(body=_bodies() | _json)
@settings(max_examples=2_000)
def test_two_thousand_bodies_are_answered_or_refused(web: Any, body: Any) -> None:
    """V7."""
    _fuzz(web, body)


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(tiny: Running) -> None:
    """V7, by the tool itself where it is installed."""
    schemathesis: Any = pytest.importorskip("schemathesis")
    described = schemathesis.openapi.from_url(f"{tiny.url}/openapi.json")
    statuses: list[int] = []
    for found in described.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=1_000)
        def ask(case: Any) -> None:
            statuses.append(case.call(timeout=60).status_code)

        ask()
    assert len(statuses) >= 2_000
    assert max(statuses) < 500


def test_the_description_of_the_routes_has_no_loose_end(web: Any) -> None:
    told = web.get("/openapi.json").json()

    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(told)))
    assert "ChatRequest" in names
    assert names <= set(told["components"]["schemas"])


# ---------------------------------------------------------------------------------------------------------------
# The command


def _started(run: Path, *more: str, **environ: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "beholder", "serve", str(run), "--port", "0", "--device", "cpu", *more]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environ
    )
    assert process.stdout is not None
    told = ""
    for line in process.stdout:
        told += line
        if " answers at " in line:
            return process, line.rpartition(" answers at ")[2].strip().removesuffix("/v1")
    raise AssertionError(told)


def test_the_command_serves_and_ends_what_it_began(run: Path, images: list[Path]) -> None:
    """A stream that is under way when SIGTERM comes is finished, no other is taken, the key is in no output."""
    process, url = _started(run, "--api-key-env", "A_KEY", "--name", "tiny", "--grace", "30", A_KEY=KEY)
    try:
        body = asking(see(images[0]), stream=True, max_tokens=300)
        with httpx.Client(base_url=url, headers=HEAD, timeout=60, trust_env=False) as client:
            with client.stream("POST", CHAT, json=body) as answer:
                assert answer.status_code == 200
                pieces = answer.iter_text()
                text = next(pieces)
                process.send_signal(signal.SIGTERM)
                text += "".join(pieces)
        assert events(text)[-1]["choices"][0]["finish_reason"] in ("length", "stop")
        assert process.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health", trust_env=False)
        assert process.stdout is not None
        assert KEY not in process.stdout.read()
    finally:
        process.kill()
        process.communicate()


def test_the_command_does_not_start_where_others_could_reach_it_without_a_key(run: Path) -> None:
    """V8, before anything is loaded."""
    done = CliRunner().invoke(app, ["serve", "no/such/run", "--host", "0.0.0.0", "--port", "0"])

    assert isinstance(done.exception, UserError) and "a key is needed" in str(done.exception)


def test_an_answer_longer_than_the_bound_is_cut_when_the_server_stops(vlm: Vlm) -> None:
    limits = Limits(max_tokens=1_000, grace_s=1.0)
    with slowly(vlm, 0.1), serving(vlm, limits=limits) as running:
        ended: list[Any] = []

        def ask() -> None:
            try:
                ended.append(
                    httpx.post(f"{running.url}{CHAT}", json=asking(max_tokens=900), timeout=60, trust_env=False)
                )
            except httpx.HTTPError as error:
                ended.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        until = time.monotonic() + 20
        while not running.service.batcher.num_running and time.monotonic() < until:
            time.sleep(0.02)
        begun = time.monotonic()
        running.server.should_exit = True
        thread.join(30)

        assert time.monotonic() - begun < 10
        assert len(ended) == 1
    assert not running.service.batcher.alive


def test_the_loop_goes_on_while_the_model_writes(vlm: Vlm, tiny: Running) -> None:
    async def times() -> list[float]:
        async with httpx.AsyncClient(base_url=tiny.url, timeout=60, trust_env=False) as client:
            writing = asyncio.create_task(client.post(CHAT, json=asking(max_tokens=32)))
            took = []
            for _ in range(20):
                begun = time.monotonic()
                assert (await client.get("/health")).status_code == 200
                took.append(time.monotonic() - begun)
            await writing
            return took

    with slowly(vlm, 0.05):
        took = asyncio.run(times())

    assert sorted(took)[10] < 0.5
