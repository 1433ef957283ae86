"""The conversation at the terminal: what is remembered, what each command does, how it is interrupted."""

from __future__ import annotations

import contextlib
import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import TinyParts
from tests.use.talking import briefly, untrained_run

from beholder.config import SourceConfig
from beholder.data.sources import open_sources
from beholder.types import UserError, printable
from beholder.use.chat import Conversation, talk
from beholder.use.vlm import ContextFullError, Request, Vlm, load


@pytest.fixture(scope="module")
def vlm(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Vlm:
    return load(untrained_run(tiny_parts, tmp_path_factory.mktemp("talk")), device="cpu")


@pytest.fixture(scope="module")
def several(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Vlm:
    """Of stage multi, with at most 3 images."""
    sets = {"stage": "multi", "prompting.max_images_per_sample": 3, "prompting.max_seq_len": 512}
    return load(untrained_run(tiny_parts, tmp_path_factory.mktemp("several"), **sets), device="cpu")


@pytest.fixture
def pictures(tiny_parts: TinyParts) -> list[Path]:
    return sorted(tiny_parts.images.glob("*.png"))[:4]


@pytest.fixture
def image(tiny_parts: TinyParts) -> Path:
    return min(tiny_parts.images.glob("*.png"))


def scripted(conversation: Conversation, *lines: str) -> tuple[str, str]:
    """What a script of ``lines`` is answered, and told besides."""
    out, notes = io.StringIO(), io.StringIO()
    talk(conversation, source=io.StringIO("".join(f"{line}\n" for line in lines)), out=out, notes=notes)
    return out.getvalue(), notes.getvalue()


def test_a_script_gets_the_answers_alone_on_its_output(vlm: Vlm, image: Path) -> None:
    out, _ = scripted(Conversation(vlm, image, how=briefly(8)), "What colour?", "", "Sure?", "/quit", "Never asked")

    first = vlm.chat("What colour?", image, max_new_tokens=8)
    said = [("user", "What colour?"), ("assistant", first), ("user", "Sure?")]
    second = vlm.chat([{"role": r, "content": c} for r, c in said], image, max_new_tokens=8)
    assert out == f"{printable(first)}\n{printable(second)}\n"


def test_the_system_text_comes_first_and_starts_over(vlm: Vlm, image: Path) -> None:
    conversation = Conversation(vlm, image, "Be brief.", how=briefly(4))

    scripted(conversation, "What?")
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant"]
    _, notes = scripted(conversation, "/system Answer in one word.")

    assert conversation.messages == [{"role": "system", "content": "Answer in one word."}]
    assert "starts over" in notes
    scripted(conversation, "/system")
    assert conversation.messages == []


def test_another_image_starts_over_and_a_missing_one_changes_nothing(vlm: Vlm, tiny_parts: TinyParts) -> None:
    first, other = sorted(tiny_parts.images.glob("*.png"))[:2]
    conversation = Conversation(vlm, first, how=briefly(4))
    scripted(conversation, "What?")

    with pytest.raises(UserError, match=r"nowhere\.png"):
        scripted(conversation, "/image nowhere.png")
    kept = (list(conversation.images), len(conversation.turns))
    scripted(conversation, f"/image '{other}'")

    assert kept == ([first], 2)
    assert (conversation.images, conversation.turns) == ([other], [])


def test_reset_keeps_image_and_system_text(vlm: Vlm, image: Path) -> None:
    conversation = Conversation(vlm, image, "Be brief.", how=briefly(4))

    again = [scripted(conversation, "What?", "/reset")[0] for _ in range(2)]

    assert again[0] == again[1]
    assert (conversation.images, conversation.system, conversation.turns) == ([image], "Be brief.", [])


# ---------------------------------------------------------------------------------------------------------------
# Several images


def shown(conversation: Conversation, text: str) -> str:
    """The prompt for what is said next, images as ``[image k ×4]``."""
    messages = conversation._placed([*conversation.turns, {"role": "user", "content": text}])
    prompt = conversation.vlm.prepare(Request(messages, conversation.images))
    return "".join(s.text.replace("⏎", "") for s in conversation.vlm.encoder.segments(prompt.encoded))


def test_images_are_numbered_as_in_training_wherever_they_come_from(
    several: Vlm, pictures: list[Path], tmp_path: Path
) -> None:
    """One layout: what a training record of the same gives up to its answer."""
    question = "What colour is image 2?"
    told = {"role": "user", "content": f"<image>\n<image>\n{question}"}
    file = tmp_path / "records.jsonl"
    names = [p.name for p in pictures[:2]]
    file.write_text(json.dumps({"images": names, "messages": [told, {"role": "assistant", "content": "red"}]}))
    source = SourceConfig(json_path=str(file), image_root=str(pictures[0].parent))
    (example,) = open_sources([source], image_token="<image>", max_images=3, on_reject="error", chat=True)
    trained = several.encoder.encode(example)
    asked = several.prepare(Request(question, pictures[:2])).encoded
    chat = Conversation(several, pictures[:2], how=briefly(4))

    assert trained.ids[: len(asked.ids)].tolist() == asked.ids.tolist()
    assert trained.image_spans == asked.image_spans
    assert "Image 1: " in shown(chat, question) and "Image 2: " in shown(chat, question)
    out, _ = scripted(chat, question)
    assert out == f"{printable(several.generate(pictures[:2], question, max_new_tokens=4))}\n"


def test_one_image_more_stands_before_what_is_said_next_and_the_conversation_goes_on(
    several: Vlm, pictures: list[Path]
) -> None:
    conversation = Conversation(several, pictures[0], how=briefly(4))
    assert "Image 1" not in shown(conversation, "What?")

    _, notes = scripted(conversation, "What?", f"/image {pictures[1]}", "/images")

    assert conversation.images == pictures[:2] and len(conversation.turns) == 2
    assert f"looking at image 2: {pictures[1]}" in notes and "starts over" not in notes
    assert "there is no image" not in notes
    assert "(there is no image 5: it has been shown 2)" in scripted(conversation, "What is in image 5?")[1]
    assert f"image 1: {pictures[0]}\nimage 2: {pictures[1]}" in notes
    first, _, rest = shown(conversation, "And image <image> 2?").partition("What?")
    assert "Image 1: " in first and "[image 1 ×" in first and "[image 2 ×" not in first
    assert rest.index("Image 2: ") < rest.index("[image 2 ×") < rest.index("And image <image> 2?"), "typed text is text"

    scripted(conversation, "And 2?", "/reset")
    first, _, rest = shown(conversation, "Both?").partition("Both?")
    assert "[image 1 ×" in first and "[image 2 ×" in first and conversation.turns == []
    scripted(conversation, "/drop")
    assert conversation.images == [] and "[image" not in shown(conversation, "None?")


@pytest.mark.parametrize(
    "line", ["/drop 0", "/drop -1", "/drop x", "/drop 99999999999999999999", "/reset all", "/images 2"]
)
def test_a_command_that_takes_nothing_refuses_what_follows_it_and_does_nothing(
    several: Vlm, pictures: list[Path], line: str
) -> None:
    conversation = Conversation(several, pictures[:2])

    with pytest.raises(UserError, match=r"/\w+ takes nothing, and got '.*'; type /\w+ alone"):
        scripted(conversation, line)
    assert conversation.images == pictures[:2]


def test_what_is_shown_changes_the_answer_of_that_image_alone(several: Vlm, pictures: list[Path]) -> None:
    a, b, c = pictures[:3]

    def seen(*images: Path) -> list[Any]:
        prompt = several.prepare(Request("What?", images))
        return [i.pixels for i in prompt.images]

    assert all(torch.equal(x, y) for x, y in zip(seen(a, b, c), [*seen(a), *seen(b), *seen(c)], strict=True))
    assert not torch.equal(seen(a)[0], seen(b)[0])


def test_one_image_too_many_says_what_to_do_and_changes_nothing(several: Vlm, pictures: list[Path]) -> None:
    conversation = Conversation(several, pictures[:3])

    with pytest.raises(UserError, match=r"would be image 4, .* at most 3 a sample .*/drop, or use a run"):
        scripted(conversation, f"/image {pictures[3]}")
    with pytest.raises(UserError, match=r"4 images given, .* at most 3 a sample .*: give fewer"):
        several.generate(pictures[:4], "What?")
    assert conversation.images == pictures[:3]


def test_a_saved_conversation_about_several_images_keeps_their_places(
    several: Vlm, pictures: list[Path], tmp_path: Path
) -> None:
    conversation = Conversation(several, pictures[:2], how=briefly(4))
    file = tmp_path / "talk.jsonl"
    scripted(conversation, "Both?", f"/image {pictures[2]}", "And this?", f"/save {file}")

    source = SourceConfig(json_path=str(file), image_root=str(pictures[0].parent))
    (example,) = open_sources([source], image_token="<image>", max_images=3, on_reject="error", chat=True)
    assert [t.text for t in example.turns[::2]] == ["<image>\n<image>\nBoth?", "<image>\nAnd this?"]
    assert [Path(ref.path).name for ref in example.images] == [p.name for p in pictures[:3]]


def test_a_saved_conversation_is_a_record_to_train_on(vlm: Vlm, image: Path, tmp_path: Path) -> None:
    conversation = Conversation(vlm, image, "Be brief.", how=briefly(8))
    file = tmp_path / "talk.jsonl"
    scripted(conversation, "What?", "Sure?")

    notes = scripted(conversation, f"/save {file}")[1]

    assert f"--stage instruct --image-root {image.parent}" in notes

    source = SourceConfig(dataset="jsonl", json_path=str(file), image_root=str(image.parent))
    (example,) = open_sources([source], image_token="<image>", max_images=1, on_reject="error", chat=True)
    assert [t.role for t in example.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert example.turns[1].text == "<image>\nWhat?" and example.turns[3].text == "Sure?"
    assert example.turns[2].text == conversation.turns[1]["content"]
    with pytest.raises(UserError, match="there already"):
        scripted(conversation, f"/save {file}")


def test_a_typed_marker_cannot_be_saved_as_an_image_place(vlm: Vlm, image: Path, tmp_path: Path) -> None:
    conversation = Conversation(vlm, image, how=briefly(4))

    with pytest.raises(UserError, match="<image> as text"):
        scripted(conversation, "is <image> a word?", f"/save {tmp_path / 'talk.jsonl'}")

    assert not (tmp_path / "talk.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/picture a.png", "/picture is no command; there are /image"),
        ("/image", "needs a FILE"),
        ("/save ", "needs a FILE"),
        ("/save /nowhere/at/all.jsonl", "is no folder"),
        (f"/save {'x' * 5000}", "cannot be written"),
        (
            "/image ~nosuchuser/x.png",
            r"there is no user ~nosuchuser; for a file of that name type \./~nosuchuser/x.png",
        ),
        ("/save '~nosuchuser/x'", "there is no user"),
    ],
)
def test_a_wrong_command_ends_a_script_and_says_what_there_is(vlm: Vlm, line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        scripted(Conversation(vlm), line)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_input_that_is_not_utf8_is_told(vlm: Vlm, errors: str) -> None:
    """Python reads standard input strictly, or in the C locale with foreign bytes smuggled through."""
    source = io.TextIOWrapper(io.BytesIO("größer?\n".encode("latin-1")), encoding="utf-8", errors=errors)

    with pytest.raises(UserError, match="standard input is not UTF-8"):
        talk(Conversation(vlm), source=source, out=io.StringIO(), notes=io.StringIO())


def test_help_lists_every_command(vlm: Vlm) -> None:
    from beholder.use.chat import COMMANDS

    _, notes = scripted(Conversation(vlm), "/help")

    assert all(command in notes for command in COMMANDS)


def test_a_full_context_says_so_and_suggests_reset(vlm: Vlm, image: Path) -> None:
    conversation = Conversation(vlm, image, how=briefly(4))
    scripted(conversation, "What?")

    with pytest.raises(ContextFullError, match=r"no room for an answer.*: /reset"):
        scripted(conversation, "x" * vlm.context)

    assert len(conversation.turns) == 2, "a question without an answer is not remembered"


def test_a_conversation_longer_than_training_is_noted_once(vlm: Vlm, image: Path) -> None:
    conversation = Conversation(vlm, image, how=briefly(4))

    _, notes = scripted(conversation, "x" * 40, "x" * 40, "x" * 40)

    assert notes.count("longer than the 128 tokens") == 1


def test_a_cut_answer_is_noted(vlm: Vlm, image: Path) -> None:
    stream = vlm.stream("What?", image, max_new_tokens=3)
    list(stream)
    assert not stream.complete, "the case under test"

    _, notes = scripted(Conversation(vlm, image, how=briefly(3)), "What?")

    assert "cut after 3 tokens" in notes


class Interrupting(io.StringIO):
    """Output during which the user presses Ctrl-C after some pieces."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def write(self, text: str) -> int:
        if text != "\n":
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return super().write(text)


def test_ctrl_c_keeps_what_was_said_and_a_second_one_leaves(vlm: Vlm, image: Path) -> None:
    conversation = Conversation(vlm, image, how=briefly(200))
    out, notes = Interrupting(after=2), io.StringIO()
    lines = iter(["What?\n", KeyboardInterrupt(), "Never read\n"])

    class Keyboard(io.StringIO):
        def readline(self, *_: object) -> str:  # type: ignore[override]
            line = next(lines)
            if isinstance(line, KeyboardInterrupt):
                raise line
            return line

    talk(conversation, source=Keyboard(), out=out, notes=notes)

    assert next(lines) == "Never read\n"
    assert "stopped" in notes.getvalue()
    whole = vlm.chat("What?", image, max_new_tokens=200)
    (_, answer) = conversation.turns
    assert 0 < len(answer["content"]) < len(whole) and whole.startswith(answer["content"])


class Losing(io.StringIO):
    """Output during which Ctrl-C comes while Python runs a callback, which drops what is raised there."""

    def write(self, text: str) -> int:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_stops_an_answer_even_where_its_exception_is_lost(vlm: Vlm, image: Path) -> None:
    conversation, notes = Conversation(vlm, image, how=briefly(200)), io.StringIO()
    before = signal.getsignal(signal.SIGINT)

    talk(conversation, source=io.StringIO("What?\n"), out=Losing(), notes=notes)

    assert "(stopped" in notes.getvalue() and signal.getsignal(signal.SIGINT) is before
    assert conversation.cut and len(conversation.turns[1]["content"]) < len(
        vlm.chat("What?", image, max_new_tokens=200)
    )


def test_a_run_without_conversations_is_refused_at_the_start(tiny_parts: TinyParts, tmp_path: Path) -> None:
    align = untrained_run(tiny_parts, tmp_path, **{"stage": "align", "model.lora": {"enable": False}})

    with pytest.raises(UserError, match="taught to describe images"):
        Conversation(load(align, device="cpu"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[2Jgone", "\\u001b[2Jgone"),
        ("\u202eabc", "\\u202eabc"),
        ("👩\u200d🔬", "👩\u200d🔬"),
        ("\r\x07\x9b", "\\u000d\\u0007\\u009b"),
        ("größer 犬", "größer 犬"),
    ],
)
def test_what_the_model_says_has_no_power_over_the_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert "".join(map(printable, text)) == shown
