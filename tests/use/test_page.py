"""The page of `beholder serve` in a real browser: Debian's (or any) Chromium without a window, through Playwright.

Where there is no Chromium, or no Playwright, these tests are skipped and say so (`pytest -ra`).
"""
# ruff: noqa: E402  (nothing else is worth importing where the extra is not installed)

from __future__ import annotations

import base64
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
playwright: Any = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not installed: pip install playwright"
)

import torch
from tests.conftest import TinyParts
from tests.use.serving import KEY, Running, serving
from tests.use.slow import slowly
from tests.use.talking import untrained_run

from beholder.config import GenerateConfig
from beholder.types import ImageSlot, Turn
from beholder.use.looks import hidden, looks, spans_of
from beholder.use.serving.conversation import Limits
from beholder.use.vlm import Request, Vlm, load

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.slow,  # a browser takes a while to start
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt install chromium"),
]
LIMITS = Limits(max_batch=4, max_waiting=8, max_tokens=60, max_images=4, grace_s=10.0)


@pytest.fixture(scope="module")
def run(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sets = {"stage": "multi", "prompting.max_images_per_sample": 3, "prompting.max_seq_len": 512}
    return untrained_run(tiny_parts, tmp_path_factory.mktemp("page"), **sets)


@pytest.fixture(scope="module")
def vlm(run: Path) -> Vlm:
    """What it sees is loud, so that it decides words."""
    made = load(run, device="cpu")
    with torch.no_grad():
        for weight in made.model.connector.parameters():
            weight.mul_(6.0)
    return made


@pytest.fixture(scope="module")
def tiny(vlm: Vlm) -> Iterator[Running]:
    with serving(vlm, limits=LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM)
        yield opened
        opened.close()


@contextmanager
def opened(browser: Any, url: str, *, said: Callable[[str], bool] = lambda text: False, **how: Any) -> Iterator[Any]:
    """The page; afterwards, that nothing was complained of (but for what ``said`` allows) and nobody else was asked."""
    complaints: list[str] = []
    asked: list[str] = []
    with browser.new_context(**how) as context:
        page = context.new_page()
        page.on("console", lambda told: complaints.append(told.text) if told.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        page.wait_for_load_state("networkidle")
        yield page
    assert [text for text in complaints if not said(text)] == []
    assert [to for to in asked if not to.startswith((f"{url}/", "blob:", "data:"))] == []


@pytest.fixture
def page(browser: Any, tiny: Running) -> Iterator[Any]:
    with opened(browser, tiny.url) as shown:
        yield shown


def ask(page: Any, question: str = "What colour?") -> Any:
    """Asks, and gives the turn once its verdict is there."""
    turns = page.locator(".turn").count()
    page.fill("#question", question)
    page.keyboard.press("Enter")
    turn = page.locator(".turn").nth(turns)
    turn.locator(".verdict strong").wait_for(timeout=30_000)
    return turn


def wait(page: Any, expression: str, arg: Any = None) -> None:
    """Until ``expression`` is true. (Playwright's own way evaluates text inside the page, which the page forbids.)"""
    until = time.monotonic() + 30
    while not page.evaluate(expression, arg):
        assert time.monotonic() < until, expression
        page.wait_for_timeout(20)


def telling(vlm: Vlm, images: list[Path]) -> tuple[Path, str]:
    """A picture and a question that the untrained model says a word to which the picture decides."""
    for image in images:
        for question in ("What colour?", "Which?", "Say what you see.", "Hm", "Where is it?", "A?"):
            asked = Request(question, [image])
            prompt = vlm.prepare_answered(asked, said_by(vlm, asked))
            if any(looks(vlm, prompt, spans_of(vlm, prompt), hidden(vlm)).counted()[1:]):
                return image, question
    raise AssertionError("the tiny model looks at nothing")


def talkative(vlm: Vlm, images: list[Path]) -> tuple[Path, str]:
    """A picture and a question that the untrained model answers in many pieces: bytes that are no letters make none."""
    for image in images:
        for question in ("What colour?", "Which?", "Hm", "Where is it?"):
            if sum(1 for _ in vlm.stream(question, [image], max_new_tokens=LIMITS.max_tokens)) >= 8:
                return image, question
    raise AssertionError("the tiny model says nothing in pieces")


def answers(turn: Any) -> list[str]:
    return turn.locator(".text").all_text_contents()


def said_by(vlm: Vlm, request: Request) -> str:
    return vlm.answers([request], GenerateConfig(temperature=0.0, max_new_tokens=LIMITS.max_tokens))[0]


def test_answer_and_hidden_answer_side_by_side_with_coloured_words(vlm: Vlm, page: Any, images: list[Path]) -> None:
    image, question = telling(vlm, images)
    page.set_input_files("#pick", image)

    with page.expect_response("**/v1/looks") as caught:
        turn = ask(page, question)
    told = caught.value.json()

    assert answers(turn) == [
        said_by(vlm, Request(question, [image])), said_by(vlm, Request(question, [hidden(vlm)])),
    ]  # fmt: skip
    left, right = (turn.locator(".answer").nth(k).bounding_box() for k in (0, 1))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    words = turn.locator(".answer").first.locator(".word")
    assert words.all_text_contents() == [word["text"] for word in told["words"]]
    levels = [
        sum(abs(w["explained"]) >= math.log(step) - 1e-9 for step in (2, 10, 100)) if w["counts"] else 0
        for w in told["words"]
    ]
    shown = words.evaluate_all("spans => spans.map(span => span.className)")
    for word, level, classes in zip(told["words"], levels, shown, strict=True):
        way = "up" if word["explained"] > 0 else "down"
        assert classes == (f"word {way}{level if way == 'up' else min(level, 2)}" if level else "word")
    assert any(levels)
    colours = words.evaluate_all("spans => spans.map(span => getComputedStyle(span).backgroundColor)")
    assert len(set(colours)) > 1
    assert turn.locator(".verdict").inner_text()
    words.first.hover()
    assert "nats" in turn.locator(".detail").inner_text()
    turn.locator("summary").click()
    assert turn.locator("tbody tr").count() == len(told["words"])
    assert page.locator("#live").inner_text().strip()  # what a screen reader is told
    assert turn.locator("[aria-busy=true]").count() == 0


def test_pictures_are_picked_pasted_dropped_numbered_and_removed(
    browser: Any, vlm: Vlm, tiny: Running, images: list[Path]
) -> None:
    with opened(browser, tiny.url, permissions=["clipboard-read", "clipboard-write"]) as page:
        data = [base64.b64encode(image.read_bytes()).decode() for image in images[:3]]
        page.set_input_files("#pick", images[0])
        page.evaluate(
            """async (text) => {
              const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
              const image = new Blob([bytes], {type: "image/png"});
              await navigator.clipboard.write([new ClipboardItem({"image/png": image})]);
            }""", data[1],
        )  # fmt: skip
        page.focus("#question")
        page.keyboard.press("Control+V")
        wait(page, "document.querySelectorAll('#tray li').length === 2")
        dragged = page.evaluate_handle(
            """(text) => {
              const all = new DataTransfer();
              const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
              all.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
              return all;
            }""", data[2],
        )  # fmt: skip
        page.dispatch_event("main", "dragenter", {"dataTransfer": dragged})
        assert page.locator(".dropping").is_visible()
        page.dispatch_event("main", "drop", {"dataTransfer": dragged})
        assert not page.locator(".dropping").is_visible()
        names = page.locator("#tray img").evaluate_all("all => all.map(image => image.alt)")
        assert [name.split(":")[0] for name in names] == ["Picture 1", "Picture 2", "Picture 3"]
        wait(page, "[...document.querySelectorAll('#tray img')].every(image => image.naturalWidth > 0)")

        page.set_input_files("#pick", images[3])  # one more than the run was trained with
        assert "no more than 3 pictures" in page.inner_text("#error")
        page.get_by_role("button", name="Remove picture 1").click()
        names = page.locator("#tray img").evaluate_all("all => all.map(image => image.alt)")
        assert [name.split(":")[0] for name in names] == ["Picture 1", "Picture 2"] and "dropped" in names[1]
        with page.expect_request("**/v1/chat/completions") as caught:
            turn = ask(page)
        parts = json.loads(caught.value.post_data)["messages"][0]["content"]

        assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
        assert parts[1]["image_url"]["url"] == f"data:image/png;base64,{data[2]}"
        assert page.locator("#tray li").count() == 0 and turn.locator(".pictures li").count() == 2
        # Of several pictures each can be looked at by itself.
        radios = turn.get_by_role("radio")
        assert radios.count() == 3
        before = turn.locator("tbody td:nth-child(4)").all_text_contents()
        radios.nth(1).check()
        assert turn.locator("tbody td:nth-child(4)").all_text_contents() != before
        # More than the run looks at begin a new conversation, and it says so before.
        page.set_input_files("#pick", images[:2])
        assert "new conversation" in page.inner_text("#tray-note")
        with page.expect_request("**/v1/chat/completions") as caught:
            ask(page)
        assert len(json.loads(caught.value.post_data)["messages"]) == 1
        assert page.locator(".divider").count() == 1 and page.locator(".turn").count() == 2


def test_an_answer_streams_is_stopped_and_the_conversation_goes_on(
    vlm: Vlm, tiny: Running, page: Any, images: list[Path]
) -> None:
    image, question = talkative(vlm, images)
    page.set_input_files("#pick", image)
    page.fill("#question", question)
    with slowly(vlm, 0.15) as rows:
        page.get_by_role("button", name="Ask").click()
        text = page.locator(".turn .text").first
        wait(page, "document.querySelector('.turn .text')?.textContent.length > 0")
        early = text.text_content()
        wait(page, "before => document.querySelector('.turn .text').textContent.length > before", arg=len(early))
        assert page.evaluate("document.activeElement.id") == "stop"
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("button", name="Ask").wait_for()
        at_stop = len(rows)
        until = time.monotonic() + 10
        while tiny.service.batcher.num_running and time.monotonic() < until:
            time.sleep(0.01)
        assert len(rows) <= at_stop + 2
    partly = text.text_content()
    whole = said_by(vlm, Request(question, [image]))

    assert 0 < len(partly) < len(whole) and whole.startswith(partly)
    assert page.locator(".turn .ended").first.inner_text() == "Stopped."
    turn = ask(page, "Sure?")
    conversation = [
        Turn("user", (ImageSlot(0), "\n", question)),
        Turn("assistant", (partly,)),
        Turn("user", ("Sure?",)),
    ]
    assert answers(turn)[0] == said_by(vlm, Request(conversation, [image]))

    page.get_by_role("button", name="Clear").click()
    assert page.locator(".turn").count() == 0
    with page.expect_request("**/v1/chat/completions") as caught:
        page.fill("#question", "Hello")
        page.keyboard.press("Enter")
    assert [m["role"] for m in json.loads(caught.value.post_data)["messages"]] == ["user"]
    wait(page, "!document.querySelector('.turn [aria-busy]')")
    assert not page.locator(".hidden-answer").is_visible()  # there was no picture that could be hidden


def test_by_keyboard_alone(vlm: Vlm, page: Any, images: list[Path]) -> None:
    page.set_input_files("#pick", images[0])  # the one thing that a dialogue of the system does
    page.focus(".skip")
    order: list[str] = ["skip"]
    for _ in range(12):
        page.keyboard.press("Tab")
        now = page.evaluate(
            """() => {
              const e = document.activeElement;
              const drawn = {pick: e.nextElementSibling, question: e.form}[e.id] ?? e;
              const name = e.id || e.className || e.tagName;
              return [name, getComputedStyle(drawn).outlineStyle, e.matches(":focus-visible")];
            }"""
        )
        if now[0] == "BODY":
            break
        assert now[1] != "none" and now[2], now
        order.append(now[0])
    assert order == ["skip", "clear", "remove", "question", "pick", "check", "send"]

    page.focus("#question")
    page.keyboard.type("What colour?")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Say.")
    assert page.input_value("#question") == "What colour?\nSay."
    with slowly(vlm, 0.1):
        page.keyboard.press("Enter")
        page.locator(".turn .text").first.wait_for()
        page.keyboard.press("Escape")
        page.locator("#send").wait_for()
    page.keyboard.type("Again")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")  # no second answer
    assert not page.is_checked("#check")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait(page, "document.querySelectorAll('.turn').length === 2 && !document.querySelector('[aria-busy]')")
    assert page.evaluate("document.activeElement.id") == "question"
    assert not page.locator(".turn").last.locator(".hidden-answer").is_visible()


def test_what_goes_wrong_is_told_in_the_servers_words(
    browser: Any, tiny: Running, images: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with opened(browser, tiny.url, said=lambda text: "400" in text) as page:
        page.keyboard.press("Tab")
        page.get_by_role("button", name="Ask").click()
        assert page.inner_text("#error") == "Type a question first."
        page.set_input_files("#pick", broken)
        page.fill("#question", "What?")
        with page.expect_response("**/v1/chat/completions") as caught:
            page.keyboard.press("Enter")
        wait(page, "document.getElementById('error').textContent")

        assert page.inner_text("#error") == caught.value.json()["error"]["message"]
        assert page.input_value("#question") == "What?" and page.locator("#tray li").count() == 1
        assert page.locator(".turn").count() == 0
        page.get_by_role("button", name="Remove picture 1").click()
        page.set_input_files("#pick", images[0])
        ask(page, "<img src=x onerror=alert(1)><b>bold</b>")
        assert page.inner_text("#error") == ""
        assert page.locator(".said").inner_text() == "<img src=x onerror=alert(1)><b>bold</b>"
        assert page.locator(".said *").count() == 0


def test_a_key_is_asked_for_and_forgotten(browser: Any, vlm: Vlm, images: list[Path]) -> None:
    with serving(vlm, key=KEY, limits=LIMITS) as running:
        with opened(browser, running.url, said=lambda text: "401" in text) as page:
            assert page.locator("#key").is_visible() and page.evaluate("document.activeElement.id") == "key"
            page.keyboard.type("a wrong key")
            page.keyboard.press("Enter")
            wait(page, "document.getElementById('error').textContent")
            assert "API key" in page.inner_text("#error")
            page.fill("#key", KEY)
            page.keyboard.press("Enter")
            wait(page, "document.getElementById('model').textContent === 'tiny'")
            assert not page.locator("#key").is_visible() and page.input_value("#key") == ""
            page.set_input_files("#pick", images[0])
            assert answers(ask(page))[0]
            kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
            assert kept == '[{},{},""]'
            page.reload()
            page.locator("#key").wait_for()


def test_light_dark_and_narrow(browser: Any, tiny: Running, images: list[Path]) -> None:
    grounds: list[str] = []
    for scheme in ("light", "dark"):
        how = {"color_scheme": scheme, "viewport": {"width": 320, "height": 640}, "reduced_motion": "reduce"}
        with opened(browser, tiny.url, **how) as page:
            page.set_input_files("#pick", images[:2])
            turn = ask(page, "What " + "colour" * 30)
            grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            wide, there = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
            assert wide <= there
            above, below = (turn.locator(".answer").nth(k).bounding_box() for k in (0, 1))
            assert above["x"] == below["x"] and above["y"] + above["height"] <= below["y"]
    assert grounds[0] != grounds[1]
