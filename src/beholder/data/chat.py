"""The one sequence encoder: conversation → token ids + supervision mask + image spans, appended together.

The only file that knows templates and token ids; training, evaluation, preview and generation all come through here.
Image loading and row layout live elsewhere (`images`, `collate`), and so does everything a tensor is needed for.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.text import Text

from beholder.types import Encoded, Example, ImageSlot, Part, Turn, UserError

_LAYOUT_VERSION = 1
"""Part of the fingerprint: raise it when the same example would be laid out as other ids."""

_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "</s>", "<eos>")
"""Special tokens that end a text in the common families; generation stops at any the tokenizer has as a special one."""


class EncodeError(UserError):
    """A sample cannot be laid out as tokens; the message names file, record and id."""


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
    record's own user text, turns joined by newlines; records without user text get A or B. ``chat`` comes with stage 2.

    Raises `UserError` when the tokenizer has no end token or ``num_visual_tokens`` leaves no room.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        num_visual_tokens: int,
        max_seq_len: int,
        template: Literal["caption", "conversation", "chat"],
        instruction: str,
        instruction_multi: str,
        im_start: str = "auto",
        im_end: str = "auto",
    ) -> None:
        if template == "chat":
            raise UserError(
                "prompting.template is chat: the tokenizer's chat template comes with stage 2; "
                "set prompting.template to caption or conversation"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no end token (eos_token), so a target "
                "could not end; give its folder a tokenizer_config.json with eos_token"
            )
        assert num_visual_tokens > 0, num_visual_tokens
        if max_seq_len <= num_visual_tokens:
            raise UserError(
                f"prompting.max_seq_len is {max_seq_len}, but one image alone takes {num_visual_tokens} tokens; "
                "raise max_seq_len or lower model.connector.num_visual_tokens"
            )
        self.tokenizer = tokenizer
        self.num_visual_tokens = num_visual_tokens
        self.max_seq_len = max_seq_len
        self.template = template
        self.instruction = instruction
        self.instruction_multi = instruction_multi
        self._cache: dict[str, list[int]] = {}

        self._control_pattern, self._control_ids = _control_tokens(tokenizer)
        special: dict[str, int] = tokenizer.get_added_vocab()
        self.eos_ids: list[int] = [tokenizer.eos_token_id]
        """Ids that end a generated text; the first one ends every target."""
        self.eos_ids += [special[t] for t in _END_TOKENS if t in special and special[t] not in self.eos_ids]
        self.bos_ids: list[int] = _leading_ids(tokenizer)
        native = "<|vision_start|>" in special and "<|vision_end|>" in special
        self.im_start_ids = self._bracket(im_start, "<|vision_start|>" if native else "[")
        self.im_end_ids = self._bracket(im_end, "<|vision_end|>" if native else "]")
        pad: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.reserved_id: int = special.get("<|image_pad|>", pad)
        """What stands at reserved positions before the model overwrites their embeddings. Any existing id does."""

        facts = {
            "version": _LAYOUT_VERSION, "tokenizer": tokenizer_fingerprint(tokenizer), "template": template,
            "num_visual_tokens": num_visual_tokens, "max_seq_len": max_seq_len, "instruction": instruction,
            "instruction_multi": instruction_multi, "bos": self.bos_ids, "eos": self.eos_ids[0],
            "im_start": self.im_start_ids, "im_end": self.im_end_ids, "reserved": self.reserved_id,
        }  # fmt: skip
        self.fingerprint: str = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        """sha256 over everything that decides which ids an example gives."""

    # -------------------------------------------------------------------------------------------------------------
    # Templates

    def apply_template(self, example: Example) -> Example:
        """``example`` with the user turn the model will see. Applying it twice changes nothing.

        A question, that is an example with a user turn and no assistant turn, keeps its own words under every template.
        """
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

    def encode(self, example: Example) -> Encoded:
        """The whole sample. Longer than ``max_seq_len``: the end of the last target that fits is cut, and nothing else.

        A cut target has no end token: the model must not learn to stop there. Raises `EncodeError` when there is
        nothing to supervise, when the prompt alone does not fit, when an image would be cut, or when images and slots
        differ.
        """
        example = self.apply_template(example)
        draft = self._lay_out(example, example.turns)
        if not any(draft.supervise):
            raise EncodeError(f"{example.where}: no assistant turn, so there is nothing to learn from it")
        if len(draft.ids) <= self.max_seq_len:
            return draft.finish(truncated=False)
        prompt = draft.supervise.index(True)
        if prompt >= self.max_seq_len:
            raise self._too_long(example, prompt)
        stop = self.max_seq_len
        while not draft.supervise[stop - 1]:  # a later user turn without its answer teaches nothing
            stop -= 1
        cut_images = [k for k, (_, end) in draft.spans.items() if end > stop]
        if cut_images:
            raise EncodeError(
                f"{example.where}: image {cut_images[0] + 1} of {len(example.images)} lies beyond prompting."
                f"max_seq_len {self.max_seq_len} (the sample has {len(draft.ids)} tokens); raise max_seq_len"
            )
        draft.ids, draft.supervise = draft.ids[:stop], draft.supervise[:stop]
        return draft.finish(truncated=True)

    def encode_prompt(self, example: Example) -> Encoded:
        """What generation starts from: the ids of `encode` up to where the last assistant turn starts, none supervised.

        A conversation that ends with the user's turn is taken whole. Raises `EncodeError` when it does not fit.
        """
        example = self.apply_template(example)
        turns = example.turns[:-1] if example.turns and example.turns[-1].role == "assistant" else example.turns
        draft = self._lay_out(example, turns)
        if len(draft.ids) > self.max_seq_len:
            raise self._too_long(example, len(draft.ids))
        draft.supervise = [False] * len(draft.ids)
        return draft.finish(truncated=False)

    def _lay_out(self, example: Example, turns: Sequence[Turn]) -> _Draft:
        where = example.where
        slots = sorted(p.index for t in turns for p in t.parts if isinstance(p, ImageSlot))
        if slots != list(range(len(example.images))):
            raise EncodeError(
                f"{where}: {len(example.images)} images, but the text has {len(slots)} image places "
                f"(for images {[s + 1 for s in slots]}); each image needs exactly one place"
            )
        draft = _Draft()
        draft.add(self.bos_ids)
        text = ""  # literal text not yet tokenised: pieces that meet become one run, as the tokenizer would see them
        for i, turn in enumerate(turns):
            if i and turns[i - 1].role == "assistant":
                text += "\n"
            if turn.role == "assistant":
                draft.add(self._literal_cached(text, where))
                text = ""
                if any(isinstance(p, ImageSlot) for p in turn.parts):
                    raise EncodeError(f"{where}: an image inside an assistant turn; images belong to user turns")
                target = self.literal(turn.text, where)
                if not target:
                    raise EncodeError(f"{where}: assistant turn {i} is empty: {turn.text!r} has no token to supervise")
                draft.add([*target, self.eos_ids[0]], supervise=True)
                continue
            for part in turn.parts:
                if isinstance(part, ImageSlot):
                    draft.add(self._literal_cached(text, where))
                    text = ""
                    draft.add(self.im_start_ids)
                    draft.spans[part.index] = (len(draft.ids), len(draft.ids) + self.num_visual_tokens)
                    draft.add([self.reserved_id] * self.num_visual_tokens)
                    draft.add(self.im_end_ids)
                else:
                    text += part
            text += "\n"
        draft.add(self._literal_cached(text, where))
        return draft

    def _too_long(self, example: Example, prompt: int) -> EncodeError:
        images = len(example.images)
        return EncodeError(
            f"{example.where}: the prompt alone takes {prompt} tokens ({images} images of {self.num_visual_tokens}) "
            f"and prompting.max_seq_len is {self.max_seq_len}, so no target would be left; raise max_seq_len or use "
            "fewer images or visual tokens"
        )

    # -------------------------------------------------------------------------------------------------------------
    # Text ↔ ids

    def literal(self, text: str, where: str = "text") -> list[int]:
        """``text`` as ordinary tokens: never a control token, whatever the text spells.

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
        ids = [i for piece in pieces for i in self._tokenize(piece)]
        if not self._control_ids.isdisjoint(ids):  # a normalizer put one together, such as NFKC or lower-casing
            ids = [i for character in text for i in self._tokenize(character)]
        if not self._control_ids.isdisjoint(ids):
            bad = self.tokenizer.convert_ids_to_tokens(sorted(self._control_ids.intersection(ids)))
            raise EncodeError(f"{where}: the tokenizer turns ordinary text into the control tokens {bad}")
        return ids

    def _tokenize(self, text: str) -> list[int]:
        out = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        return list(out["input_ids"])

    def _literal_cached(self, text: str, where: str) -> list[int]:
        """Prompts repeat; targets do not."""
        ids = self._cache.get(text)
        if ids is None:
            ids = self.literal(text, where)
            if len(self._cache) < 256:
                self._cache[text] = ids
        return ids

    def _bracket(self, text: str, auto: str) -> list[int]:
        text = auto if text == "auto" else text
        token = self.tokenizer.get_vocab().get(text)
        return [token] if token is not None else self.literal(text, "prompting.im_start / im_end")

    def decode(self, ids: Iterable[int]) -> str:
        """Generated ids → text: cut at the first end token, control tokens left out, outer whitespace stripped."""
        kept: list[int] = []
        for i in ids:
            if int(i) in self.eos_ids:
                break
            kept.append(int(i))
        return str(self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()

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
            out.append(Segment("target" if encoded.supervise[i] else "prompt", _visible(str(text))))
            i = stop
        return out

    def show(self, encoded: Encoded) -> Text:
        """For a terminal: supervised tokens green, image spans collapsed to ``[image 1 ×64]``."""
        style = {"prompt": "", "target": "bold green", "image": "black on cyan"}
        text = Text()
        for segment in self.segments(encoded):
            text.append(segment.text, style=style[segment.kind])
        return text


class _Draft:
    """Ids and mask grow together, so they cannot disagree."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.supervise: list[bool] = []
        self.spans: dict[int, tuple[int, int]] = {}

    def add(self, ids: list[int], *, supervise: bool = False) -> None:
        self.ids += ids
        self.supervise += [supervise] * len(ids)

    def finish(self, *, truncated: bool) -> Encoded:
        spans = tuple(self.spans[k] for k in range(len(self.spans)))
        return Encoded(np.array(self.ids, dtype=np.int64), np.array(self.supervise, dtype=bool), spans, truncated)


# ---------------------------------------------------------------------------------------------------------------
# What a tokenizer hides


def _control_tokens(tokenizer: Any) -> tuple[re.Pattern[str] | None, frozenset[int]]:
    """Spellings (every start position matches, overlaps included) and ids of tokens that literal text must not become.

    Left out: runs of whitespace, which several families register as added tokens and which are ordinary text, and an
    unknown token that is nothing else, which is where text outside the vocabulary honestly goes.
    """
    spelled: dict[str, int] = dict(tokenizer.get_added_vocab())
    spelled |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    controls = {t: i for t, i in spelled.items() if len(t) > 1 and t.replace("▁", "").strip()}
    ids = set(controls.values())
    if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        ids.discard(tokenizer.unk_token_id)
    longest_first = sorted(controls, key=lambda t: (-len(t), t))
    pattern = re.compile(f"(?={'|'.join(map(re.escape, longest_first))})") if controls else None
    return pattern, frozenset(ids)


def _leading_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text of its own accord: its beginning-of-text token, or nothing."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over what decides how text becomes ids: two tokenizers with equal fingerprints encode alike."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        facts = json.loads(backend.to_str())
        # State of the last call, not of the tokenizer.
        facts.pop("truncation", None)
        facts.pop("padding", None)
    else:
        facts = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    facts["special"] = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _visible(text: str) -> str:
    """Newlines shown and kept; other control, format (bidi) and unassigned characters as escapes."""
    out = []
    for c in text:
        if c == "\n":
            out.append("⏎\n")
        elif unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\u200d":  # joiner: emoji sequences
            out.append(f"\\u{ord(c):04x}")
        else:
            out.append(c)
    return "".join(out)
