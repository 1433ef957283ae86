"""What never ends is stopped, wherever it runs; what ends is left alone."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from beholder.data import chat_template
from beholder.data.bounded import TookTooLong, at_most
from beholder.data.chat_template import ChatTemplate
from beholder.prepare.tiny import tiny_tokenizer
from beholder.types import UserError

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
SOUND = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def stopped() -> bool:
    try:
        with at_most(0.2):
            spin(30)
    except TookTooLong:
        return True
    return False


def spin(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def test_it_is_stopped_in_any_thread_and_nobody_else_is() -> None:
    with ThreadPoolExecutor(2) as pool:
        long, short = pool.submit(stopped), pool.submit(time.sleep, 0.6)
        assert stopped() and long.result()
        short.result()
    for where in (ThreadPoolExecutor(1), None):
        quick(0.2) if where is None else where.submit(quick, 0.2).result()
    time.sleep(0.6)  # nothing comes through afterwards


def quick(seconds: float) -> None:
    with at_most(seconds):
        pass
    spin(2 * seconds)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_it_is_stopped_in_a_forked_process() -> None:
    assert stopped()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(stopped)


@pytest.mark.parametrize("when", ["always", "once it is asked something long"])
def test_a_chat_template_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    monkeypatch.setattr(chat_template, "LONGEST", 0.3)
    tokenizer = tiny_tokenizer(tmp_path)
    text = ENDLESS if when == "always" else "{% if messages | length > 4 %}" + ENDLESS + "{% endif %}"
    template = ChatTemplate(tokenizer, text + SOUND + PROMPT, thinking=False)

    if when == "always":
        with pytest.raises(UserError, match=r"did not come to an end within 0.3 s on \d turns, so it cannot be used"):
            template.end_ids(None)
        return
    assert template.end_ids(None)
    with pytest.raises(chat_template.TemplateMisfit, match=r"did not come to an end within 0.3 s on 5 turns"):
        template.scaffold(("user", "assistant", "user", "assistant", "user"), prompt=True)
