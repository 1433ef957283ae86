"""The one sequence encoder: conversation → token ids + supervision mask + image spans, appended together.

The only file that knows templates and token ids; training, evaluation, preview and generation all come through here.
A tokenizer's own chat template is taken apart once for each sequence of roles (`ChatTemplate`), so that ids and mask
are built together here too. Image loading and row layout live elsewhere (`images`, `collate`), and so does everything a
tensor is needed for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np

from beholder.data.chat_template import ChatTemplate, Piece, TemplateMisfit
from beholder.data.tokens import END_TOKENS, control_tokens, leading_ids, tokenizer_fingerprint, without_word_mark
from beholder.types import Encoded, Example, ImageProcessor, ImageRef, ImageSlot, Part, Turn, UserError, printable

_LAYOUT_VERSION = 1
"""Part of the fingerprint: raise it when the same example would be laid out as other ids."""


class EncodeError(UserError):
    """A sample cannot be laid out as tokens; the message names file, record and id.

    Batches name and count such a sample instead of stopping the run, under ``reason``.
    """

    reason = "cannot_encode"


class TooLongError(EncodeError):
    """A sample does not fit into ``max_seq_len``."""

    reason = "too_long"


class Segment(NamedTuple):
    """A stretch of an encoded sample as a person reads it."""

    kind: Literal["prompt", "target", "image"]
    text: str


class ChatEncoder:
    """Lays an `Example` out as ``[bos] user text and images "\\n" target eos``; only target and eos are supervised.

    An image is ``im_start`` + N reserved positions + ``im_end``. The reserved positions carry an id the vocabulary
    already has; the model overwrites their embeddings, so the frozen embedding table never grows (S1-3).

    Literal text is tokenised piece by piece, each run of text between images and turns on its own. So a prompt is a
    prefix of its full sample by construction, and no merge can reach across the border of what is supervised. A control
    token's spelling inside literal text stays text, for every tokenizer: see `literal`.

    ``template``: ``caption`` puts the sample's images before ``instruction`` (template A; B with
    ``instruction_multi`` for several images) and takes the assistant text as target. ``conversation`` keeps the
    record's own user text, turns joined by newlines; records without user text get A or B.

    ``chat`` writes what the tokenizer's chat template (or the Jinja text ``chat_template``) renders, character for
    character. Supervised is what the model has to write after the template's generation prompt: each assistant turn,
    with the blank that some templates put beside it, and its end token. An image may stand anywhere in a user turn, and
    samples without one are fine. ``system`` goes before conversations that have no system turn; ``thinking`` is the
    template's ``enable_thinking``. Generation starts from what training shows before an answer, also where the
    template's own generation prompt is something else (`prompt_note` says so). A template that dates its text always
    gets the date `chat_template.TEMPLATE_DATE`.

    ``image_label``: literal text before each image of a sample with several, ``{k}`` its number from 1, so that words
    can name an image; a text that ends with it already keeps its own. Only the layout has it: a sample without its
    images has no labels either.

    ``too_long``: what `encode` does with a sample longer than ``max_seq_len``.

    ``images``: a native model's own way with images, under template chat. Where they stand is then the template's to
    say, and how many positions each takes the processor's, by the size that ``size_of`` tells of it;
    ``num_visual_tokens`` is None.

    Raises `UserError` when the tokenizer has no end token, ``num_visual_tokens`` leaves no room, or the chat template
    is missing or of no use.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        num_visual_tokens: int | None,
        max_seq_len: int,
        template: Literal["caption", "conversation", "chat"],
        instruction: str,
        instruction_multi: str,
        im_start: str = "auto",
        im_end: str = "auto",
        image_label: str = "",
        chat_template: str | None = None,
        system: str | None = None,
        thinking: bool = False,
        too_long: Literal["truncate_answer", "reject"] = "truncate_answer",
        images: ImageProcessor | None = None,
        size_of: Callable[[ImageRef], tuple[int, int]] | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no end token (eos_token), so a target "
                "could not end; give its folder a tokenizer_config.json with eos_token"
            )
        assert (num_visual_tokens is None) == (images is not None), (num_visual_tokens, images)
        assert images is None or template == "chat", template
        if num_visual_tokens is not None and max_seq_len <= num_visual_tokens:
            raise UserError(
                f"prompting.max_seq_len is {max_seq_len}, but one image alone takes {num_visual_tokens} tokens; "
                "raise max_seq_len or lower model.connector.num_visual_tokens"
            )
        self.tokenizer = tokenizer
        self.num_visual_tokens = num_visual_tokens
        self.images, self._size_of = images, size_of
        self._places: dict[tuple[int, int], list[Piece]] = {}
        self.max_seq_len = max_seq_len
        self.template = template
        self.instruction = instruction
        self.instruction_multi = instruction_multi
        self.system = system
        self.image_label = image_label
        self.too_long = too_long
        self._cache: dict[tuple[str, bool], list[int]] = {}

        self._control_pattern, self._control_ids = control_tokens(tokenizer)
        special: dict[str, int] = tokenizer.get_added_vocab()
        self._chat: ChatTemplate | None = None
        self._bare: Any = None
        self._marks_after_control = False
        ends: list[int] = []
        if template == "chat":
            placeholder = None if images is None else images.placeholder
            self._chat = ChatTemplate(tokenizer, chat_template, thinking=thinking, placeholder=placeholder)
            ends = self._chat.end_ids(system)
            self._bare = without_word_mark(tokenizer)
            self._marks_after_control = self._bare is not None and self._marks_words_after(ends[0])
        self.eos_ids: list[int] = [*ends]
        """Ids that end a generated text; the first one ends every target (chat: the last turn of the template)."""
        for end in [tokenizer.eos_token_id, *(special[t] for t in END_TOKENS if t in special)]:
            if end not in self.eos_ids:
                self.eos_ids.append(end)
        self.bos_ids: list[int] = leading_ids(tokenizer)
        native = "<|vision_start|>" in special and "<|vision_end|>" in special
        self.im_start_ids = self._bracket(im_start, "<|vision_start|>" if native else "[")
        self.im_end_ids = self._bracket(im_end, "<|vision_end|>" if native else "]")
        pad: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.reserved_id: int = special.get("<|image_pad|>", pad) if images is None else images.token_id
        """What stands at reserved positions before the model overwrites their embeddings. Any existing id does."""

        facts = {
            "version": _LAYOUT_VERSION, "tokenizer": tokenizer_fingerprint(tokenizer), "template": template,
            "num_visual_tokens": num_visual_tokens, "max_seq_len": max_seq_len, "instruction": instruction,
            "instruction_multi": instruction_multi, "bos": self.bos_ids, "eos": self.eos_ids[0],
            "im_start": self.im_start_ids, "im_end": self.im_end_ids, "reserved": self.reserved_id,
        }  # fmt: skip
        if self._chat is not None:
            facts |= {"chat_template": self._chat.text, "system": system, "thinking": thinking}
            if self._chat.aligned:  # named only then: others are prompted as before
                facts["prompt"] = "as trained"
        if images is not None:
            facts["images"] = images.fingerprint
        # named only then: runs from before the setting keep their fingerprint
        if too_long != "truncate_answer":
            facts["too_long"] = too_long
        if image_label:
            facts["image_label"] = image_label
        self.fingerprint: str = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        """sha256 over everything that decides which ids an example gives."""

    @property
    def chat_text(self) -> tuple[str, bool]:
        """(the chat template as it is used, thinking), under template chat."""
        assert self._chat is not None
        return self._chat.text, self._chat.thinking

    @property
    def prompt_note(self) -> str | None:
        """What a person should know about where generation starts (`ChatTemplate.prompt_note`); mostly nothing."""
        return self._chat.prompt_note if self._chat is not None else None

    # -------------------------------------------------------------------------------------------------------------
    # Templates

    def apply_template(self, example: Example) -> Example:
        """``example`` with the user turn the model will see. Applying it twice changes nothing.

        A question, that is an example with a user turn and no assistant turn, keeps its own words under every template.
        Under chat the turns are the record's own, after the system turn of ``system`` where there is none.
        """
        if self.template == "chat":
            if self.system is None or any(t.role == "system" for t in example.turns):
                return example
            return replace(example, turns=(Turn("system", (self.system,)), *example.turns))
        spoken = [t for t in example.turns if t.role == "assistant"]
        asked = any(t.role == "user" for t in example.turns)
        if asked and (self.template == "conversation" or not spoken):
            return example
        if len(spoken) > 1:
            raise EncodeError(
                f"{example.where}: template caption takes one assistant text, got {len(spoken)} assistant turns; "
                "set prompting.template: conversation"
            )
        if not example.images:
            raise EncodeError(f"{example.where}: the caption templates describe images, but the sample has none")
        parts: list[Part] = []
        for k in range(len(example.images)):
            parts += [ImageSlot(k), "\n"]
        parts.append(self.instruction if len(example.images) == 1 else self.instruction_multi)
        return replace(example, turns=(Turn("user", tuple(parts)), *spoken))

    # -------------------------------------------------------------------------------------------------------------
    # Encoding

    def encode(self, example: Example, sizes: Sequence[tuple[int, int]] | None = None) -> Encoded:
        """The whole sample. ``sizes``: (height, width) of its images where they decide its layout and nothing else
        tells them. Longer than ``max_seq_len``: the end of the last target that fits is cut, and nothing else.

        A cut target has no end token: the model must not learn to stop there. Raises `EncodeError` when there is
        nothing to supervise, when images and slots differ, or when the chat template refuses or rewrites the
        conversation; `TooLongError` when the prompt alone does not fit, when an image would be cut, or when the sample
        is too long and ``too_long`` is reject.
        """
        example = self.apply_template(example)
        draft = self._lay_out(example, example.turns, sizes, prompt=False)
        if not any(draft.supervise):
            raise EncodeError(f"{example.where}: no assistant turn, so there is nothing to learn from it")
        if len(draft.ids) > self.max_seq_len and example.answer_text:
            draft.drop_unsupervised_end()  # what a chat template writes after the last end token teaches nothing
        if len(draft.ids) <= self.max_seq_len:
            return draft.finish(truncated=False)
        prompt = draft.supervise.index(True)
        if prompt >= self.max_seq_len:
            raise self._too_long(example, prompt)
        if self.too_long == "reject":
            raise TooLongError(
                f"{example.where}: the sample has {len(draft.ids)} tokens, prompting.max_seq_len is {self.max_seq_len} "
                "and prompting.too_long is reject; raise max_seq_len or set too_long: truncate_answer"
            )
        length = len(draft.ids)
        del draft.ids[self.max_seq_len :], draft.supervise[self.max_seq_len :]
        draft.drop_unsupervised_end()  # a later user turn without its answer teaches nothing
        cut_images = [k for k, (_, end) in draft.spans.items() if end > len(draft.ids)]
        if cut_images:
            raise TooLongError(
                f"{example.where}: image {cut_images[0] + 1} of {len(example.images)} lies beyond prompting."
                f"max_seq_len {self.max_seq_len} (the sample has {length} tokens); raise max_seq_len"
            )
        return draft.finish(truncated=True)

    def encode_prompt(self, example: Example, sizes: Sequence[tuple[int, int]] | None = None) -> Encoded:
        """What generation starts from: the ids of `encode` up to where the last assistant turn starts, none supervised.

        A conversation that ends with the user's turn is taken whole. Under chat it ends with the template's generation
        prompt where that is a prefix of the sample, else with what the sample has before the answer. Raises
        `EncodeError` as `encode` does, `TooLongError` when it does not fit.
        """
        example = self.apply_template(example)
        turns = example.turns[:-1] if example.turns and example.turns[-1].role == "assistant" else example.turns
        draft = self._lay_out(example, turns, sizes, prompt=True)
        if len(draft.ids) > self.max_seq_len:
            raise self._too_long(example, len(draft.ids))
        draft.supervise = [False] * len(draft.ids)
        return draft.finish(truncated=False)

    def _lay_out(
        self, example: Example, turns: Sequence[Turn], sizes: Sequence[tuple[int, int]] | None, *, prompt: bool
    ) -> _Draft:
        where = example.where
        slots = sorted(p.index for t in turns for p in t.parts if isinstance(p, ImageSlot))
        if slots != list(range(len(example.images))):
            raise EncodeError(
                f"{where}: {len(example.images)} images, but the text has {len(slots)} image places "
                f"(for images {[s + 1 for s in slots]}); each image needs exactly one place"
            )
        if self.images is not None and (most := self.images.most_images) is not None and len(slots) > most:
            raise EncodeError(
                f"{where}: {len(slots)} images, but this class of native model takes {most} a sample; give fewer, or "
                "another model"
            )
        for i, turn in enumerate(turns):
            if turn.role == "assistant" and any(isinstance(p, ImageSlot) for p in turn.parts):
                raise EncodeError(f"{where}: an image inside an assistant turn; images belong to user turns")
            if turn.role == "assistant" and not turn.text:
                raise EncodeError(f"{where}: assistant turn {i} is empty: '' has no token to supervise")
        if self.images is not None:
            if sizes is None:
                assert self._size_of is not None, "nothing tells how large the images are"
                sizes = [self._size_of(ref) for ref in example.images]
            turns = self._labelled(turns, len(example.images))
        draft = _Draft()
        text, learned = "", False  # not yet tokenised: pieces that meet become one run, as the tokenizer would see them
        inside = False

        def tokenise() -> None:
            nonlocal text, inside
            if text:
                ids = (self.literal if learned else self._literal_cached)(text, where, inside=inside)
                if learned and not ids:
                    raise EncodeError(f"{where}: an assistant turn is empty: {text!r} has no token to supervise")
                draft.add(ids, supervise=learned)
                text, inside = "", True

        pieces = (
            self._chat_pieces(where, turns, prompt=prompt) if self.template == "chat" else self._plain_pieces(turns)
        )
        native: ImageSlot | None = None
        for what, supervise in pieces if sizes is None else self._expanded(where, pieces, sizes):
            if sizes is not None and isinstance(what, ImageSlot):
                native = what
                continue
            if isinstance(what, ImageSlot) and len(example.images) > 1:
                if learned:  # a template may put nothing but control tokens between an answer and an image
                    tokenise()
                    learned = False
                text += self._label(what, text)
            if what is None or not isinstance(what, str) or supervise != learned:
                tokenise()
            match what:
                case str():
                    text, learned = text + what, supervise
                case int():
                    if native is not None and what == self.reserved_id:
                        draft.reserved.setdefault(native.index, []).append(len(draft.ids))
                    draft.add([what], supervise=supervise)
                    inside = not self._marks_after_control
                case ImageSlot():
                    assert self.num_visual_tokens is not None
                    draft.add(self.im_start_ids)
                    draft.spans[what.index] = (len(draft.ids), len(draft.ids) + self.num_visual_tokens)
                    draft.add([self.reserved_id] * self.num_visual_tokens)
                    draft.add(self.im_end_ids)
                    inside = True
                case None:
                    pass
        tokenise()
        if sizes is not None:
            draft.sizes = tuple(sizes)
            draft.spans = {k: (where[0], where[-1] + 1) for k, where in draft.reserved.items()}
        return draft

    def _label(self, slot: ImageSlot, before: str) -> str:
        """What names the image; nothing where the text before it does already."""
        label = self.image_label.format(k=slot.index + 1)
        return "" if before.rstrip().endswith(label.rstrip()) else label

    def _labelled(self, turns: Sequence[Turn], num_images: int) -> Sequence[Turn]:
        """The turns with ``image_label`` before each image of several: what stands around an image is the template's,
        so its label has to be there before."""
        if num_images < 2 or not self.image_label:
            return turns
        labelled: list[Turn] = []
        for turn in turns:
            parts: list[Part] = []
            for part in turn.parts:
                if isinstance(part, ImageSlot):
                    before = parts[-1] if parts else ""
                    if label := self._label(part, before if isinstance(before, str) else ""):
                        parts.append(label)
                parts.append(part)
            labelled.append(replace(turn, parts=tuple(parts)))
        return labelled

    def _expanded(self, where: str, pieces: Iterable[Piece], sizes: Sequence[tuple[int, int]]) -> Iterator[Piece]:
        """Each image followed by what its processor writes for it. Raises `EncodeError` for a size it refuses."""
        assert self.images is not None and self._chat is not None
        pieces = list(pieces)
        if [p.what for p in pieces[: len(self.bos_ids)]] != self.bos_ids:  # as the processor's tokenizer does by itself
            yield from (Piece(i) for i in self.bos_ids)
        for piece in pieces:
            yield piece
            if isinstance(piece.what, ImageSlot):
                size = sizes[piece.what.index]
                known = self._places.get(size)
                if known is None:
                    try:
                        known = self._chat.split(self.images.place(size))
                    except ValueError as e:  # such as an aspect ratio beyond 200
                        raise EncodeError(
                            f"{where}: image {piece.what.index + 1} is {size[1]} x {size[0]}, which the model's own "
                            f"processor refuses: {e}"
                        ) from e
                    if len(self._places) < 4096:
                        self._places[size] = known
                yield from known

    def _plain_pieces(self, turns: Sequence[Turn]) -> Iterator[Piece]:
        """Turns joined by newlines, an end token after each target."""
        yield from (Piece(i) for i in self.bos_ids)
        for i, turn in enumerate(turns):
            if i and turns[i - 1].role == "assistant":
                yield Piece("\n")
            if turn.role == "assistant":
                yield Piece(turn.text, supervise=True)
                yield Piece(self.eos_ids[0], supervise=True)
            else:
                yield from (Piece(part) for part in turn.parts)
                yield Piece("\n")

    def _chat_pieces(self, where: str, turns: Sequence[Turn], *, prompt: bool) -> list[Piece]:
        """What the chat template renders. Raises `EncodeError` when that is not the record's own text."""
        assert self._chat is not None
        spoken = [t.role for t in turns if t.role != "system"]
        if "user" not in spoken:
            raise EncodeError(f"{where}: the conversation has no user turn; the chat template needs a question")
        if spoken[0] != "user":
            raise EncodeError(f"{where}: the conversation starts with the assistant; its first turn must be the user's")
        try:
            pieces, blank = self._chat.fill(turns, prompt=prompt)
        except TemplateMisfit as e:
            raise EncodeError(
                f"{where}: {e}; change the record, or give a template that takes it as prompting.chat_template"
            ) from e
        if blank is not None:
            raise EncodeError(
                f"{where}: assistant turn {blank} is empty: {turns[blank].text!r} has no token to supervise, because "
                "the chat template strips it"
            )
        return pieces

    def _too_long(self, example: Example, prompt: int) -> TooLongError:
        images = f"{len(example.images)} images" + (f" of {n}" if (n := self.num_visual_tokens) else "")
        return TooLongError(
            f"{example.where}: the prompt alone takes {prompt} tokens ({images}) and prompting.max_seq_len is "
            f"{self.max_seq_len}, so no target would be left; raise max_seq_len or use fewer "
            f"{'images or visual tokens' if n else 'or smaller images'}"
        )

    # -------------------------------------------------------------------------------------------------------------
    # Text ↔ ids

    def literal(self, text: str, where: str = "text", *, inside: bool = False) -> list[int]:
        """``text`` as ordinary tokens: never a control token, whatever the text spells.

        ``inside``: under template chat, the text goes on where other text stood, so a tokenizer that marks the first
        word of a text (Llama's ``▁``) must not do so here.

        Tokenizers look for control tokens before they tokenise, and ``split_special_tokens`` only stops them from
        looking for the *special* ones (Qwen's ``<think>`` and ``<tool_call>`` are not marked so). Text that spells any
        of them is therefore cut inside the spelling and the pieces are tokenised one by one. Raises `EncodeError` for
        text that is not valid Unicode.
        """
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise EncodeError(f"{where}: the text is not valid Unicode: {e}") from None
        cuts = sorted({m.start() + 1 for m in self._control_pattern.finditer(text)}) if self._control_pattern else []
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ids = [i for k, piece in enumerate(pieces) for i in self._tokenize(piece, inside=inside or k > 0)]
        if not self._control_ids.isdisjoint(ids):  # a normalizer put one together, such as NFKC or lower-casing
            ids = [i for k, character in enumerate(text) for i in self._tokenize(character, inside=inside or k > 0)]
        if not self._control_ids.isdisjoint(ids):
            bad = self.tokenizer.convert_ids_to_tokens(sorted(self._control_ids.intersection(ids)))
            raise EncodeError(f"{where}: the tokenizer turns ordinary text into the control tokens {bad}")
        return ids

    def _tokenize(self, text: str, *, inside: bool = False) -> list[int]:
        if inside and self._bare is not None:
            self._bare.encode_special_tokens = True  # each time: a copy in another process has forgotten it
            return list(self._bare.encode(text, add_special_tokens=False).ids)
        out = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        return list(out["input_ids"])

    def _literal_cached(self, text: str, where: str, *, inside: bool) -> list[int]:
        """Prompts repeat; targets do not."""
        ids = self._cache.get((text, inside))
        if ids is None:
            ids = self.literal(text, where, inside=inside)
            if len(self._cache) < 256:
                self._cache[text, inside] = ids
        return ids

    def _marks_words_after(self, control: int) -> bool:
        """Whether the tokenizer by itself marks a word that follows a control token, or only the first of a text."""
        spelled = str(self.tokenizer.convert_ids_to_tokens(control))
        ids = list(self.tokenizer(f"{spelled}a", add_special_tokens=False)["input_ids"])
        return ids == [control, *self._tokenize("a")]

    def _bracket(self, text: str, auto: str) -> list[int]:
        text = auto if text == "auto" else text
        token = self.tokenizer.get_vocab().get(text)
        return [token] if token is not None else self.literal(text, "prompting.im_start / im_end", inside=True)

    def decode(self, ids: Iterable[int]) -> str:
        """Generated ids → text: cut at the first end token, control tokens left out, outer whitespace stripped."""
        kept: list[int] = []
        for i in ids:
            if int(i) in self.eos_ids:
                break
            kept.append(int(i))
        return str(self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()

    def check_table(self, rows: int) -> None:
        """Refuse an embedding table that lacks a row for an id that can occur: that of ordinary text, or one that
        templates and brackets write. A control token that nothing writes may lie beyond (Gemma 3's image token does,
        in its text-only models)."""
        written = {*self.bos_ids, self.eos_ids[0], *self.im_start_ids, *self.im_end_ids, self.reserved_id}
        if self._chat is not None:
            written |= self._chat.control_ids
        vocab: dict[str, int] = self.tokenizer.get_vocab()
        beyond = {t: i for t, i in vocab.items() if i >= rows and (i in written or i not in self._control_ids)}
        if beyond:
            named = ", ".join(f"{printable(t)!r} ({i})" for t, i in sorted(beyond.items(), key=lambda ti: ti[1])[:4])
            raise UserError(
                f"the tokenizer {getattr(self.tokenizer, 'name_or_path', '')!r} gives ids that the language model's "
                f"embedding table of {rows} rows does not have: {named}{', …' if len(beyond) > 4 else ''}; they do not "
                "belong together (the table never grows)"
            )

    # -------------------------------------------------------------------------------------------------------------
    # For people

    def segments(self, encoded: Encoded) -> list[Segment]:
        """The sample cut where its meaning changes; invisible and direction-changing characters made visible."""
        image_at = {start: (k, stop) for k, (start, stop) in enumerate(encoded.image_spans)}
        out: list[Segment] = []
        i, total = 0, len(encoded.ids)
        while i < total:
            if i in image_at:
                k, stop = image_at[i]
                out.append(Segment("image", f"[image {k + 1} ×{stop - i}]"))
                i = stop
                continue
            stop = i + 1
            while stop < total and stop not in image_at and encoded.supervise[stop] == encoded.supervise[i]:
                stop += 1
            text = self.tokenizer.decode(
                encoded.ids[i:stop].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            out.append(
                Segment("target" if encoded.supervise[i] else "prompt", printable(str(text)).replace("\n", "⏎\n"))
            )
            i = stop
        return out


class _Draft:
    """Ids and mask grow together, so they cannot disagree."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.supervise: list[bool] = []
        self.spans: dict[int, tuple[int, int]] = {}
        self.reserved: dict[int, list[int]] = {}
        """Of each image, where its layout is a processor's."""
        self.sizes: tuple[tuple[int, int], ...] = ()

    def add(self, ids: list[int], *, supervise: bool = False) -> None:
        self.ids += ids
        self.supervise += [supervise] * len(ids)

    def drop_unsupervised_end(self) -> None:
        while self.supervise and not self.supervise[-1]:
            self.ids.pop()
            self.supervise.pop()

    def finish(self, *, truncated: bool) -> Encoded:
        spans = tuple(self.spans[k] for k in range(len(self.spans)))
        where = [np.array(self.reserved[k], dtype=np.int64) for k in range(len(self.reserved))]
        solid = all(stop - start == len(at) for (start, stop), at in zip(spans, where, strict=False))
        return Encoded(
            np.array(self.ids, dtype=np.int64), np.array(self.supervise, dtype=bool), spans, truncated, self.sizes,
            None if solid else tuple(where),
        )  # fmt: skip
