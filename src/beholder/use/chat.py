"""``beholder chat RUN``: a conversation about images in a terminal, or scripted through a pipe.

Answers go to standard output and everything else to standard error, so ``echo "What colour?" | beholder chat RUN
--image a.png`` prints an answer. What the model writes is shown with control characters escaped. The model is
`vlm`'s; nothing here knows tokens.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import TextIO

from beholder.config import STAGES, GenerateConfig
from beholder.data.places import absent
from beholder.runs import atomic_write, to_json
from beholder.types import ImageSlot, Turn, UserError, printable
from beholder.use.vlm import ContextFullError, Request, Vlm

HELP = """\
/image FILE    show it an image: one more, called image 2 and so on; a run that knows one image starts over with it
/images        what it has been shown
/drop          show it nothing, from the start
/system TEXT   what the model is told before everything else, from the start; without TEXT: nothing
/reset         start over about the same images
/save FILE     write the conversation as a record that `beholder check` and `beholder run` read
/help          these lines
/quit          leave (or Ctrl-D)
Ctrl-C stops an answer; a second one leaves. Anything else is said to the model."""
AT_LENGTH = GenerateConfig(temperature=0.0, max_new_tokens=256)
COMMANDS = ("/image", "/images", "/drop", "/system", "/reset", "/save", "/help", "/quit")


@dataclass
class Conversation:
    """What was said so far, about which images, and how it goes on."""

    vlm: Vlm
    image: InitVar[Path | Sequence[Path] | None] = None
    system: str | None = None
    how: GenerateConfig = AT_LENGTH
    seed: int = 0
    images: list[Path] = field(default_factory=list, init=False)
    """Shown so far, in the order of their numbers."""
    turns: list[dict[str, str]] = field(default_factory=list, init=False)
    """User and assistant turns in alternation."""
    length: int = field(default=0, init=False)
    """Tokens before the last answer, those of the images included."""
    cut: bool = field(default=False, init=False)
    """Whether the last answer was ended by a limit or by the reader, rather than by the model."""
    _shown_at: list[int] = field(default_factory=list, init=False)
    """Of each image, the turn it stands in front of."""

    def __post_init__(self, image: Path | Sequence[Path] | None) -> None:
        self.vlm.check_chats()
        for one in [image] if isinstance(image, Path) else image or ():
            self.add(one)

    @property
    def messages(self) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns]

    def look_at(self, image: Path) -> bool:
        """Show it ``image``: one more where the run knows several, else in place of the one it had. Whether the
        conversation goes on. Raises `UserError` as `add`."""
        if self.vlm.cfg.max_images > 1:
            self.add(image)
            return True
        self.vlm.pipeline.from_file(str(image))
        self.drop()
        self.add(image)
        return False

    def add(self, image: Path) -> None:
        """Show it one image more, in front of what is said next. Raises `UserError`, and changes nothing, when it
        cannot be opened or would be one too many."""
        most = self.vlm.cfg.max_images
        if len(self.images) >= most:
            raise UserError(
                f"{image} would be image {len(self.images) + 1}, and the run was trained with at most {most} a sample "
                "(prompting.max_images_per_sample): give fewer, in a conversation after /drop, or use a run that was "
                "trained with more (stage multi)"
            )
        self.vlm.pipeline.from_file(str(image))
        self.images.append(image)
        self._shown_at.append(len(self.turns))

    def drop(self) -> None:
        """Start over without images."""
        self.images.clear()
        self._start_over()

    def reset(self, system: str | None) -> None:
        """Start over about the same images, with this system text."""
        self.system = system
        self._start_over()

    def _start_over(self) -> None:
        self.turns.clear()
        self._shown_at = [0] * len(self.images)
        self.length = 0

    def _placed(self, turns: Sequence[Mapping[str, str]]) -> list[Turn]:
        """The conversation with each image in front of what was said when it was shown; nothing typed is a marker."""
        system = [] if self.system is None else [Turn("system", (self.system,))]
        placed: list[Turn] = []
        for at, turn in enumerate(turns):
            front = [p for k, shown in enumerate(self._shown_at) if shown == at for p in (ImageSlot(k), "\n")]
            placed.append(Turn("assistant" if turn["role"] == "assistant" else "user", (*front, turn["content"])))
        return [*system, *placed]

    def ask(self, text: str) -> Generator[str]:
        """Say ``text``; the answer in pieces.

        Question and answer are part of the conversation once a piece of the answer was given, also when the reader
        stops half-way; nothing is remembered of a question without an answer.
        """
        said = {"role": "user", "content": text}
        messages = self._placed([*self.turns, said])
        self.length = self.vlm.num_tokens(messages, self.images)
        stream = self.vlm.answer_in_pieces(Request(messages, self.images), self.how, self.seed + len(self.turns))
        try:
            yield from stream
        finally:
            stream.close()
            self.cut = not stream.complete
            if stream.text:
                self.turns += [said, {"role": "assistant", "content": stream.text}]

    def record(self, images: Sequence[str]) -> dict[str, object]:
        """The conversation as a record of kind jsonl, its images under the names ``images``; a marker typed by the user
        would be read as an image place."""
        token = self.vlm.cfg.prompting.image_token
        if any(token in turn["content"] for turn in self.turns if turn["role"] == "user"):
            raise UserError(f"the conversation contains {token} as text, which a record file would take for an image")
        messages = [
            {"role": turn.role, "content": "".join(p if isinstance(p, str) else token for p in turn.parts)}
            for turn in self._placed(self.turns)
        ]
        talked_of = sum(at < len(self.turns) for at in self._shown_at)  # the others have no place in it yet
        return {
            "id": f"chat-{self.vlm.cfg.run_name}", "images": list(images[:talked_of]), "messages": messages,
            "source": "chat",
        }  # fmt: skip


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
    if not conversation.images:
        note("No image yet: /image FILE shows it one.")
    elif len(conversation.images) > 1:
        note(_listed(conversation.images))


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
        with _ctrl_c() as check:
            for piece in pieces:
                print(printable(piece), end="", file=out, flush=True)
                check()
    except ContextFullError as error:
        raise ContextFullError(f"{error}: /reset") from error
    finally:
        pieces.close()
    print(file=out, flush=True)
    shown = len(conversation.images)
    if missing := absent([Turn("user", (line,))], shown):
        note(f"(there is no image {', '.join(map(str, missing))}: it has been shown {shown})")
    if len(conversation.turns) == num_turns:
        note("(the model ended without a word; your line is not part of the conversation)")
    elif conversation.cut:
        note(
            f"(cut after {conversation.how.max_new_tokens} tokens, see --max-new-tokens, or at the end of the context)"
        )
    if before <= trained < conversation.length:
        note(f"(the conversation is longer than the {trained:,} tokens the run was trained on: /reset starts over)")


@contextmanager
def _ctrl_c() -> Iterator[Callable[[], None]]:
    """Ctrl-C inside raises `KeyboardInterrupt`; again when ``check`` is called, for the first may be lost: Python drops
    what is raised while it happens to run a finaliser or a library's callback."""
    came = False

    def interrupted(*_: object) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # Python delivers signals nowhere else
        yield check
        return
    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)


def _command(conversation: Conversation, line: str, note: Callable[[str], None]) -> None:
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    match name:
        case "/image" if rest:
            had = bool(conversation.turns)
            goes_on = conversation.look_at(_path(rest))
            number = f"image {len(conversation.images)}: " if conversation.vlm.cfg.max_images > 1 else ""
            note(f"looking at {number}{rest}" + (" (the conversation starts over)" if had and not goes_on else ""))
        case "/images" | "/drop" | "/reset" | "/help" | "/quit" if rest:
            raise UserError(f"{name} takes nothing, and got {rest[:60]!r}; type {name} alone (/help says what it does)")
        case "/images":
            note(_listed(conversation.images) if conversation.images else "no image yet: /image FILE shows it one")
        case "/drop":
            conversation.drop()
            note("no image; the conversation starts over")
        case "/system":
            conversation.reset(rest or None)
            note("no system text; the conversation starts over" if not rest else "told; the conversation starts over")
        case "/reset":
            conversation.reset(conversation.system)
            note("the conversation starts over")
        case "/save" if rest:
            path = _path(rest)
            root = _save(conversation, path)
            # a conversation is a record of a stage of dialogues; more than one image, of one that takes several
            own = conversation.vlm.cfg.stage_record
            stage = own if own.dialogues else next(s for s in STAGES.values() if s.dialogues)
            note(f"saved to {path}; to look it over: beholder check {path} --stage {stage.name} --image-root {root}")
        case "/image" | "/save":
            raise UserError(f"{name} needs a FILE, as in `{name} {'cat.jpg' if name == '/image' else 'talk.jsonl'}`")
        case "/help":
            note(HELP)
        case _:
            raise UserError(f"{name} is no command; there are {', '.join(COMMANDS)}")


def _listed(images: Sequence[Path]) -> str:
    return "\n".join(f"image {k}: {image}" for k, image in enumerate(images, 1))


def _save(conversation: Conversation, path: Path) -> Path:
    """Write the record; gives the folder that its images' names are relative to: the record's own where they all lie
    below it."""
    root, images = path.parent.resolve(), [image.resolve() for image in conversation.images]
    if images and not all(image.is_relative_to(root) for image in images):
        root = Path(os.path.commonpath([image.parent for image in images]))
    record = to_json(conversation.record([image.relative_to(root).as_posix() for image in images])) + "\n"
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
