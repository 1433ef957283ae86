"""``beholder chat RUN``: a conversation about an image in a terminal, or scripted through a pipe.

Answers go to standard output and everything else to standard error, so ``echo "What colour?" | beholder chat RUN
--image a.png`` prints an answer. What the model writes is shown with control characters escaped. The model is
`vlm`'s; nothing here knows tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from beholder.config import GenerateConfig
from beholder.runs import atomic_write, to_json
from beholder.types import UserError, printable
from beholder.use.vlm import ContextFullError, Request, Vlm

HELP = """\
/image FILE    talk about this image, from the start
/system TEXT   what the model is told before everything else, from the start; without TEXT: nothing
/reset         start over about the same image
/save FILE     write the conversation as a record that `beholder check` and `beholder run` read
/help          these lines
/quit          leave (or Ctrl-D)
Ctrl-C stops an answer; a second one leaves. Anything else is said to the model."""
AT_LENGTH = GenerateConfig(temperature=0.0, max_new_tokens=256)
COMMANDS = ("/image", "/system", "/reset", "/save", "/help", "/quit")


@dataclass
class Conversation:
    """What was said so far, about which image, and how it goes on."""

    vlm: Vlm
    image: Path | None = None
    system: str | None = None
    how: GenerateConfig = AT_LENGTH
    seed: int = 0
    turns: list[dict[str, str]] = field(default_factory=list, init=False)
    """User and assistant turns in alternation."""
    length: int = field(default=0, init=False)
    """Tokens before the last answer, those of the image included."""
    cut: bool = field(default=False, init=False)
    """Whether the last answer was ended by a limit or by the reader, rather than by the model."""

    def __post_init__(self) -> None:
        self.vlm.check_chats()
        if self.image is not None:
            self.look_at(self.image)

    @property
    def messages(self) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns]

    def look_at(self, image: Path) -> None:
        """Start over about another image. Raises `UserError`, and changes nothing, when it cannot be opened."""
        self.vlm.pipeline.from_file(str(image))
        self.image = image
        self._start_over()

    def reset(self, system: str | None) -> None:
        """Start over about the same image, with this system text."""
        self.system = system
        self._start_over()

    def _start_over(self) -> None:
        self.turns.clear()
        self.length = 0

    def ask(self, text: str) -> Generator[str]:
        """Say ``text``; the answer in pieces.

        Question and answer are part of the conversation once a piece of the answer was given, also when the reader
        stops half-way; nothing is remembered of a question without an answer.
        """
        said = {"role": "user", "content": text}
        messages = [*self.messages, said]
        self.length = self.vlm.num_tokens(messages, self.image)
        stream = self.vlm.answer_in_pieces(Request(messages, self.image), self.how, self.seed + len(self.turns))
        try:
            yield from stream
        finally:
            stream.close()
            self.cut = not stream.complete
            if stream.text:
                self.turns += [said, {"role": "assistant", "content": stream.text}]

    def record(self, image: str | None) -> dict[str, object]:
        """The conversation as a record of kind jsonl, its image under the name ``image``; a marker typed by the user
        would be read as an image place."""
        token = self.vlm.cfg.prompting.image_token
        if any(token in turn["content"] for turn in self.turns if turn["role"] == "user"):
            raise UserError(f"the conversation contains {token} as text, which a record file would take for an image")
        messages = self.messages
        if self.image is not None:
            first = next((k for k, turn in enumerate(messages) if turn["role"] == "user"), None)
            if first is not None:
                messages[first] = {**messages[first], "content": f"{token}\n{messages[first]['content']}"}
        images = [] if image is None else [image]
        return {"id": f"chat-{self.vlm.cfg.run_name}", "images": images, "messages": messages, "source": "chat"}


def talk(conversation: Conversation, *, source: TextIO, out: TextIO, notes: TextIO) -> None:
    """Read lines from ``source`` until its end or ``/quit``, answer each on ``out``, and say the rest on ``notes``.

    A terminal gets a prompt, and errors are told there and the conversation goes on. A pipe is a script: the first
    error is raised.
    """
    terminal = source.isatty()
    read = _utf8(_terminal_lines(notes) if terminal else lambda: source.readline() or None)

    def note(text: str) -> None:
        print(printable(text), file=notes, flush=True)

    if terminal:
        _greet(conversation, note)
    interrupted = False
    while True:
        try:
            line = read()
            if line is None or line.strip() == "/quit":
                return
            if line.strip():
                interrupted = False
                _respond(conversation, line.strip(), out, note)
        except UserError as error:
            if not terminal:
                raise
            note(f"error: {error}")
        except KeyboardInterrupt:
            if interrupted:
                note("")
                return
            interrupted = True
            note("\n(stopped; Ctrl-C again or /quit leaves)")


def _greet(conversation: Conversation, note: Callable[[str], None]) -> None:
    vlm = conversation.vlm
    note(f"{vlm.cfg.run_name}, step {vlm.step}. /help lists the commands.")
    if vlm.cfg.stage_record.writes == "caption":
        note("This run aligned a connector (stage align); it was not taught to chat. Expect descriptions, not answers.")
    if conversation.image is None:
        note("No image yet: /image FILE shows it one.")


def _terminal_lines(notes: TextIO) -> Callable[[], str | None]:
    """Lines as a person types them, with history and editing where the platform has them; None at Ctrl-D."""
    import contextlib

    with contextlib.suppress(ImportError):  # not on every platform; typing works without
        import readline  # noqa: F401

    def read() -> str | None:
        try:
            return input("you> ")
        except EOFError:
            print(file=notes)
            return None

    return read


def _utf8(read: Callable[[], str | None]) -> Callable[[], str | None]:
    """``read``, with a `UserError` for bytes that are no text, however the platform's standard input hands them on."""

    def checked() -> str | None:
        try:
            line = read()
            if line is not None:
                line.encode()  # in the C locale foreign bytes arrive as surrogates, which no tokenizer takes
        except UnicodeError as error:
            raise UserError(f"standard input is not UTF-8 ({error}); convert it, as with iconv -t UTF-8") from None
        return line

    return checked


def _respond(conversation: Conversation, line: str, out: TextIO, note: Callable[[str], None]) -> None:
    """One line of the user: a command, or something said to the model."""
    if line.startswith("/"):
        _command(conversation, line, note)
        return
    trained = conversation.vlm.cfg.prompting.max_seq_len
    before, num_turns = conversation.length, len(conversation.turns)
    pieces = conversation.ask(line)
    try:
        for piece in pieces:
            print(printable(piece), end="", file=out, flush=True)
    except ContextFullError as error:
        raise ContextFullError(f"{error}: /reset") from error
    finally:
        pieces.close()
    print(file=out, flush=True)
    if len(conversation.turns) == num_turns:
        note("(the model ended without a word; your line is not part of the conversation)")
    elif conversation.cut:
        note(
            f"(cut after {conversation.how.max_new_tokens} tokens, see --max-new-tokens, or at the end of the context)"
        )
    if before <= trained < conversation.length:
        note(f"(the conversation is longer than the {trained:,} tokens the run was trained on: /reset starts over)")


def _command(conversation: Conversation, line: str, note: Callable[[str], None]) -> None:
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    match name:
        case "/image" if rest:
            had = bool(conversation.turns)
            conversation.look_at(_path(rest))
            note(f"looking at {rest}" + (" (the conversation starts over)" if had else ""))
        case "/system":
            conversation.reset(rest or None)
            note("no system text; the conversation starts over" if not rest else "told; the conversation starts over")
        case "/reset":
            conversation.reset(conversation.system)
            note("the conversation starts over")
        case "/save" if rest:
            path = _path(rest)
            root = _save(conversation, path)
            note(f"saved to {path}; to look it over: beholder check {path} --stage instruct --image-root {root}")
        case "/image" | "/save":
            raise UserError(f"{name} needs a FILE, as in `{name} {'cat.jpg' if name == '/image' else 'talk.jsonl'}`")
        case "/help":
            note(HELP)
        case _:
            raise UserError(f"{name} is no command; there are {', '.join(COMMANDS)}")


def _save(conversation: Conversation, path: Path) -> Path:
    """Write the record; gives the folder that its image's name is relative to: the record's own where it lies below."""
    root, image = path.parent, conversation.image
    if image is not None:
        below = image.resolve().is_relative_to(root.resolve())
        root = root if below else image.parent
        image = image.resolve().relative_to(root.resolve()) if below else Path(image.name)
    record = to_json(conversation.record(None if image is None else image.as_posix())) + "\n"
    try:
        if path.exists():
            raise UserError(f"{path} is there already; give another name")
        if not path.parent.is_dir():
            raise UserError(f"{path.parent} is no folder; give a file in an existing one")
        atomic_write(path, record)
        return root
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); give another name") from None


def _path(typed: str) -> Path:
    """A path as a person types or drops it, with or without quotes around it."""
    quoted = len(typed) > 1 and typed[0] == typed[-1] and typed[0] in "'\""
    path = Path(typed[1:-1] if quoted else typed)
    try:
        return path.expanduser()
    except RuntimeError:  # ~name of nobody
        raise UserError(f"{path}: there is no user {path.parts[0]}; for a file of that name type ./{path}") from None
