"""A tokenizer's chat template taken apart, so that ids and mask are built together and not found again in a text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date
from typing import Any, NamedTuple

import jinja2

from beholder.data.bounded import TookTooLong, at_most
from beholder.data.tokens import any_of, spellings
from beholder.types import ImageSlot, Part, Turn, UserError

TEMPLATE_DATE = date(2024, 7, 26)
"""What a chat template gets for today: a sample must be laid out alike tomorrow too, or no resume would be exact."""

_DATED = re.compile(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")


LONGEST = 20.0
"""Seconds that one rendering may take; a thousandth of one is usual."""


class TemplateMisfit(Exception):
    """The template cannot take the conversation, or shows it as something else. The message says why."""


class Piece(NamedTuple):
    """What comes next in a sample."""

    what: str | int | ImageSlot | None
    """Text, the id of a control token, an image, or a border that no token crosses."""
    supervise: bool = False


class _Place(NamedTuple):
    """Where a rendering shows a turn, and what it strips from its ends."""

    turn: int
    part: int
    """Which of the turn's texts; 0 where a turn is one text."""
    strip_left: str | None
    """Characters that go; None: all whitespace; empty: nothing."""
    strip_right: str | None


class _Scaffold(NamedTuple):
    """All that a chat template writes around the turns of one sequence of roles."""

    texts: tuple[str, ...]
    """Before the first place, between places, after the last one."""
    pieces: tuple[tuple[Piece, ...], ...]
    """The same, cut into control tokens and plain text."""
    places: tuple[_Place, ...]


_RENDERING_FAULTS = (
    # raise_exception and what the sandbox forbids
    jinja2.TemplateError,
    # whatever else a template's own code can come to: it divides, calls itself, asks for more than there is
    ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
)  # fmt: skip

_PAD = "\n \n"
"""Put around a turn to see what is stripped: ``trim`` takes all of it, ``strip('\\n')`` the outer newlines."""


class ChatTemplate:
    """A chat template taken apart: rendered once for each sequence of roles with marks for turns, then filled in.

    So no rendering is ever searched for the record's text. The filled-in text is compared with the template's own
    rendering of the record, every time: a template may look into a message and write something else (Qwen3's does for
    ``</think>``), and that must not go unnoticed.

    What generation starts from must be what training shows before an answer. Where the template's generation prompt is
    not (R1-Distill's ends in ``<think>``, others ignore ``add_generation_prompt`` or leave the model to choose a
    channel), generation starts from the text before a finished answer instead, and `prompt_note` says so. Two
    differences stay: a blank that the model writes, and, with ``thinking``, the reasoning that was asked for.

    A template is code, often of a downloaded model. It runs in Jinja's sandbox (no files, no private attributes), and
    for `LONGEST` seconds at the most. What it may write is not bounded.

    ``placeholder``: for a template that places images itself, and takes messages in parts, what it writes where an
    image goes. What stands around images, and whether they come before the text, is then the template's to say.
    """

    def __init__(self, tokenizer: Any, text: str | None, *, thinking: bool, placeholder: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.placeholder = placeholder
        self.thinking = thinking
        self.text = _frozen_in_time(_template_of(tokenizer) if text is None else text)
        if thinking and "enable_thinking" not in self.text:
            raise UserError(
                "prompting.thinking is true, but the chat template has no enable_thinking; "
                "leave it out, or give a template that has one (prompting.chat_template)"
            )
        self._control_ids = spellings(tokenizer)
        self._control = re.compile(any_of(self._control_ids)) if self._control_ids else None
        self._image_id = None if placeholder is None else self._control_ids.get(placeholder)
        if placeholder is not None and self._image_id is None:
            raise UserError(
                f"the processor's {placeholder!r}, where an image goes, is no control token of its tokenizer"
            )
        added = {t.content: t for t in getattr(tokenizer, "added_tokens_decoder", {}).values()}
        self._eats_left = {t for t in self._control_ids if t in added and added[t].lstrip}
        self._eats_right = {t for t in self._control_ids if t in added and added[t].rstrip}
        self._scaffolds: dict[tuple[tuple[str, ...], bool], _Scaffold] = {}
        self.prompt_note: str | None = None
        """How the start of generation differs from the template's own prompt or from training; set by `end_ids`."""
        self.aligned = False
        """Whether generation starts from what training shows instead of the template's own prompt."""

    def end_ids(self, system: str | None) -> list[int]:
        """The control tokens that end assistant turns, that of the last turn first. Raises `UserError`."""
        user, answer = self._plain("user"), self._plain("assistant")
        roles = (user, answer, user, answer)
        try:
            scaffold = self.scaffold(roles, prompt=False)
            own = self.scaffold(roles[:1], prompt=True).texts[-1]
            header = self.scaffold(roles[:2], prompt=False).texts[-2]
            self.aligned = self._trained_opening(roles[:1]) is not None
        except TemplateMisfit as e:
            raise UserError(
                f"{e}, so it cannot be used; give another one as prompting.chat_template, or set "
                "prompting.template: conversation"
            ) from e
        if system is not None:
            try:
                self.scaffold((self._plain("system"), *roles[:2]), prompt=False)
                self.scaffold((self._plain("system"), *roles[:1]), prompt=True)
            except TemplateMisfit as e:
                raise UserError(
                    f"prompting.system is given, but {e}; leave it out, or give a template that takes a system turn "
                    "(prompting.chat_template)"
                ) from e
        if self.aligned:
            self.prompt_note = (
                f"the chat template's generation prompt ends in {own[-60:]!r}, but before a finished answer it writes "
                f"{header[-60:]!r}, and that is what training shows: generation starts from the latter"
            )
        elif self.thinking and own != header and not header[len(own) :].isspace():
            self.prompt_note = (
                f"prompting.thinking is true: generation starts from {own[-60:]!r}, but a finished answer stands after "
                f"{header[-60:]!r}, so writing the reasoning is not trained"
            )
        ends: list[int] = []
        for pieces, place in zip(scaffold.pieces[:0:-1], scaffold.places[::-1], strict=True):
            if _role(roles[place.turn]) == "assistant":
                ends.append(next(p.what for p in pieces if isinstance(p.what, int)))
        return list(dict.fromkeys(ends))

    def fill(self, turns: Sequence[Turn], *, prompt: bool) -> tuple[list[Piece], int | None]:
        """The rendering of ``turns`` in pieces; and the number of an assistant turn of which nothing is left, or None.

        ``prompt``: with the generation prompt at the end.
        """
        forms, contents = self._forms(turns)
        scaffold = self.scaffold(forms, prompt=prompt)
        pieces, text = list(scaffold.pieces[0]), scaffold.texts[0]
        starts: list[tuple[int, int]] = []
        blank: int | None = None
        for place, after, written in zip(scaffold.places, scaffold.pieces[1:], scaffold.texts[1:], strict=True):
            turn = turns[place.turn]
            whole = contents[place.turn][place.part]
            own = whole.rstrip(place.strip_right).lstrip(place.strip_left)
            parts = turn.parts if self.placeholder is None else (whole,)
            shown = parts if own == whole else _stripped(parts, place)
            supervise = turn.role == "assistant"
            pieces += [Piece(part, supervise and isinstance(part, str)) for part in shown]
            pieces += after
            starts.append((len(text), place.turn))
            text += own + written
            if supervise and not own:
                blank = place.turn
        rendered = self._render_marked(forms, contents, prompt=prompt)
        if rendered != text:
            at = next((k for k, (a, b) in enumerate(zip(rendered, text, strict=False)) if a != b), len(text))
            near = max([i for start, i in starts if start <= at], default=starts[0][1])
            raise TemplateMisfit(
                f"the chat template rewrites the conversation, near turn {near} ({turns[near].role}): it writes "
                f"{rendered[max(0, at - 20) : at + 40]!r} where {text[max(0, at - 20) : at + 40]!r} was expected"
            )
        if prompt and (trained := self._trained_opening(forms)) is not None:
            pieces[len(pieces) - len(scaffold.pieces[-1]) :] = trained
        return self._with_images(pieces, turns), blank

    def _forms(self, turns: Sequence[Turn]) -> tuple[tuple[str, ...], list[list[str]]]:
        """What a scaffold depends on, a turn's role and, where the template places images itself, which of its parts
        are images (``user:it``); and the texts of each turn."""
        if self.placeholder is None:
            return tuple(t.role for t in turns), [[t.text] for t in turns]
        forms: list[str] = []
        contents: list[list[str]] = []
        for turn in turns:
            kinds, texts = "", list[str]()
            for part in turn.parts:
                if isinstance(part, ImageSlot):
                    kinds += "i"
                elif part and kinds.endswith("t"):
                    texts[-1] += part
                elif part:
                    kinds += "t"
                    texts.append(part)
            forms.append(f"{turn.role}:{kinds or 't'}")
            contents.append(texts if kinds else [""])
        return tuple(forms), contents

    def _plain(self, role: str) -> str:
        """The form of a turn of text alone."""
        return role if self.placeholder is None else f"{role}:t"

    def _with_images(self, pieces: list[Piece], turns: Sequence[Turn]) -> list[Piece]:
        """The placeholders that the template wrote as the images they stand for."""
        if self.placeholder is None:
            return pieces
        slots = iter([part for turn in turns for part in turn.parts if isinstance(part, ImageSlot)])
        return [Piece(next(slots)) if p.what == self._image_id else p for p in pieces]

    @property
    def control_ids(self) -> set[int]:
        """The control tokens that the renderings so far are made of."""
        return {
            p.what for s in self._scaffolds.values() for pieces in s.pieces for p in pieces if isinstance(p.what, int)
        }

    def _trained_opening(self, roles: tuple[str, ...]) -> tuple[Piece, ...] | None:
        """What training shows between ``roles`` and the answer to them; None where the template's own generation
        prompt is that, or differs as it may."""
        asked = self.scaffold(roles, prompt=True)
        try:
            answered = self.scaffold((*roles, self._plain("assistant")), prompt=False)
        except TemplateMisfit:  # no such sample can be trained on either
            return None
        if answered.places[:-1] != asked.places or answered.texts[:-2] != asked.texts[:-1]:
            raise TemplateMisfit(
                f"the chat template shows a conversation of {_listed(roles)} otherwise once it is answered, so "
                "generation would not start from what training shows"
            )
        if self._may_differ(asked.texts[-1], answered.texts[-2]):
            return None
        return answered.pieces[-2]

    def _may_differ(self, prompt: str, header: str) -> bool:
        """Whether generation may start after ``prompt`` when a finished answer stands after ``header``."""
        rest = header[len(prompt) :]
        return header.startswith(prompt) and (not rest or rest.isspace() or self.thinking)

    def scaffold(self, roles: tuple[str, ...], *, prompt: bool) -> _Scaffold:
        """The template taken apart for ``roles``."""
        known = self._scaffolds.get((roles, prompt))
        if known is None:
            known = self._take_apart(roles, prompt=prompt)
            if len(self._scaffolds) < 1024:
                self._scaffolds[roles, prompt] = known
        return known

    def _take_apart(self, roles: tuple[str, ...], *, prompt: bool) -> _Scaffold:
        # Private-use characters: no template has them.
        contents = [[f"\ue0a0{i}.{k}\ue0a1" for k in range(_kinds(form).count("t"))] for i, form in enumerate(roles)]
        marks = {mark: (i, k) for i, own in enumerate(contents) for k, mark in enumerate(own)}
        plain = self._render_marked(roles, contents, prompt=prompt)
        for mark, (i, _) in marks.items():
            if plain.count(mark) != 1:
                times = "leaves out" if mark not in plain else f"shows {plain.count(mark)} times"
                raise TemplateMisfit(
                    f"the chat template {times} turn {i} of a conversation of {_listed(roles)}"
                    f"{' and a generation prompt' if prompt else ''} (a {_role(roles[i])} turn)"
                )
        if self.placeholder is not None:
            asked, shown = sum(_kinds(form).count("i") for form in roles), plain.count(self.placeholder)
            if asked != shown:
                raise TemplateMisfit(
                    f"the chat template writes {shown} places ({self.placeholder}) for {asked} images of a "
                    f"conversation of {_listed(roles)}"
                )
        places: list[_Place] = []
        texts: list[str] = []
        pieces: list[tuple[Piece, ...]] = []
        at = 0
        for mark in sorted(marks, key=plain.index):
            i, k = marks[mark]
            start = plain.index(mark)
            texts.append(plain[at:start])
            opening = self._opening(roles, contents, i) if _role(roles[i]) == "assistant" else None
            border = None
            if opening is not None and self._may_differ(opening, plain[:start]):
                border = len(opening) - at
            pieces.append(self._cut(texts[-1], self._is_answer(roles, places), border))
            own = [*contents[i][:k], _PAD + mark + _PAD, *contents[i][k + 1 :]]
            padded = self._render_marked(roles, [*contents[:i], own, *contents[i + 1 :]], prompt=prompt)
            at = start + len(mark)
            places.append(_Place(i, k, *self._stripping(padded, plain[:start], mark, plain[at:], _role(roles[i]))))
        texts.append(plain[at:])
        pieces.append(self._cut(texts[-1], self._is_answer(roles, places), None))
        return _Scaffold(tuple(texts), tuple(pieces), tuple(places))

    @staticmethod
    def _is_answer(roles: Sequence[str], places: Sequence[_Place]) -> bool:
        return bool(places) and _role(roles[places[-1].turn]) == "assistant"

    def _opening(self, roles: tuple[str, ...], contents: Sequence[Sequence[str]], turn: int) -> str | None:
        """What generation of an assistant turn would start from; None where the template cannot tell."""
        try:
            return self._render_marked(roles[:turn], contents[:turn], prompt=True)
        except TemplateMisfit:
            return None

    @staticmethod
    def _stripping(padded: str, before: str, mark: str, after: str, role: str) -> tuple[str | None, str | None]:
        """What a place strips, told from the same rendering with `_PAD` around its mark."""
        inside = padded.removeprefix(before).removesuffix(after)
        left, found, right = inside.partition(mark)
        kinds: dict[str, str | None] = {_PAD: "", _PAD[1:]: "\n", "": None}
        mirrored: dict[str, str | None] = {_PAD: "", _PAD[:-1]: "\n", "": None}
        if not found or left not in kinds or right not in mirrored:
            raise TemplateMisfit(f"the chat template rewrites blanks around a {role} turn: {inside!r} for {_PAD!r}")
        return kinds[left], mirrored[right]

    def _cut(self, text: str, after_answer: bool, opening: int | None) -> tuple[Piece, ...]:
        """Scaffold text → pieces.

        ``after_answer``: it starts with the end of an assistant turn, which belongs to what is learned. ``opening``:
        how much of it generation is given; a blank after that is the model's to write (Mistral's before an answer).
        """
        out: list[Piece] = []
        if after_answer:
            end = self._control.search(text) if self._control is not None else None
            if end is None or text[: end.start()].strip():
                raise TemplateMisfit(
                    f"the chat template ends an assistant turn with {text[:40]!r} instead of a control token of the "
                    "tokenizer, so nothing would teach the model to stop (LLaVA 1.5's own does that; "
                    "configs/native/llava_1_5.jinja is what it was trained with)"
                )
            out += self.split(text[: end.end()], supervise=True)
            rest = text[end.end() :].lstrip() if end.group() in self._eats_right else text[end.end() :]
            opening = None if opening is None else opening - (len(text) - len(rest))
            text = rest
        if opening is None or not 0 <= opening < len(text):
            return (*out, *self.split(text))
        rest = text[opening:]
        return (*out, *self.split(text[:opening]), Piece(None), *self.split(rest, supervise=rest.isspace()))

    def split(self, text: str, *, supervise: bool = False) -> list[Piece]:
        """Control tokens and the text between them, as the tokenizer reads what a template writes."""
        out: list[Piece] = []
        at = 0
        for found in self._control.finditer(text) if self._control is not None else ():
            before = text[at : found.start()]
            if found.group() in self._eats_left:
                before = before.rstrip()
            out += [Piece(before, supervise)] if before else []
            out.append(Piece(self._control_ids[found.group()], supervise))
            at = found.end()
            if found.group() in self._eats_right:
                at = len(text) - len(text[at:].lstrip())
        return [*out, Piece(text[at:], supervise)] if text[at:] else out

    def _render_marked(self, roles: Sequence[str], contents: Sequence[Sequence[str]], *, prompt: bool) -> str:
        messages: list[dict[str, Any]] = []
        for form, texts in zip(roles, contents, strict=True):
            own = iter(texts)
            parts = [{"type": "image"} if k == "i" else {"type": "text", "text": next(own)} for k in _kinds(form)]
            messages.append({"role": _role(form), "content": texts[0] if self.placeholder is None else parts})
        return self._render(messages, prompt=prompt)

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool) -> str:
        try:
            with at_most(LONGEST):
                return self.tokenizer.apply_chat_template(
                    messages, chat_template=self.text, tokenize=False, add_generation_prompt=prompt,
                    enable_thinking=self.thinking, date_string=TEMPLATE_DATE.strftime("%d %b %Y"),
                )  # fmt: skip
        except TookTooLong as e:
            raise TemplateMisfit(
                f"the chat template did not come to an end within {LONGEST:g} s on {len(messages)} turns"
            ) from e
        except jinja2.TemplateSyntaxError as e:
            raise TemplateMisfit(f"the chat template is not valid Jinja (line {e.lineno}: {e.message})") from e
        except _RENDERING_FAULTS as e:
            roles = ", ".join(m["role"] for m in messages)
            told = isinstance(e, jinja2.TemplateError) and str(e)
            why = told or f"{type(e).__name__} ({str(e) or 'no more is known'})"
            raise TemplateMisfit(f"the chat template refuses a conversation of {roles}: {why}") from e


def _role(form: str) -> str:
    return form.partition(":")[0]


def _kinds(form: str) -> str:
    """``t`` for each text and ``i`` for each image of a turn; where the template knows no images, one text."""
    return form.partition(":")[2] or "t"


def _listed(forms: Sequence[str]) -> str:
    return ", ".join(map(_role, forms))


def _stripped(parts: tuple[Part, ...], place: _Place) -> list[Part]:
    """The parts with what ``place`` strips off their ends; an image is no blank."""
    out = list(parts)
    for order, strip in (
        (range(len(out)), lambda text: text.lstrip(place.strip_left)),
        (reversed(range(len(out))), lambda text: text.rstrip(place.strip_right)),
    ):
        for k in order:
            part = out[k]
            if not isinstance(part, str):
                break
            out[k] = part = strip(part)
            if part:
                break
    return out


def _template_of(tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as e:
        raise UserError(
            f"prompting.template is chat, but the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat "
            "template; give a Jinja file as prompting.chat_template, set prompting.template: conversation, or use an "
            "instruction-tuned model"
        ) from e


def _frozen_in_time(template: str) -> str:
    """The template with calls for today's date replaced by `TEMPLATE_DATE`."""
    frozen = _DATED.sub(lambda m: json.dumps(TEMPLATE_DATE.strftime(m[1] or m[2] or "")), template)
    if re.search(r"strftime_now(?!\s+is\s+(?:not\s+)?defined)", frozen):  # called, or kept under another name
        raise UserError(
            "the chat template asks for today's date in a way that cannot be frozen, so a sample would be laid out "
            "differently every day; give a copy with a fixed date as prompting.chat_template"
        )
    return frozen
