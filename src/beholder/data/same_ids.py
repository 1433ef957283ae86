"""Whether our encoder lays a conversation out as a native model's own processor does: the same ids, prompt and whole.

Ids and mask are ours (`chat`), appended together; the processor's ids are what the model was trained on. A difference
would be another model's prompt, so it is refused, with the place of the first one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from beholder.data import template_bounds
from beholder.data.chat_template import RENDERING_FAULTS
from beholder.types import Example, ImageRef, ImageSlot, Turn, UserError, printable

if TYPE_CHECKING:
    from PIL import Image

    from beholder.data.chat import ChatEncoder

SIZES = ((40, 56), (96, 64), (33, 200))
"""(height, width) of the pictures in the conversations of the proof: three shapes, so three numbers of tokens."""

_ASK, _TELL = "What is in the picture?", "A red square, and a blue disc."
CONVERSATIONS: dict[str, tuple[Turn, ...]] = {
    "a question about one image": (
        Turn("user", (ImageSlot(0), "\n", _ASK)), Turn("assistant", (_TELL,)),
    ),
    "an image after the words": (
        Turn("user", ("Look: ", ImageSlot(0))), Turn("assistant", (_TELL,)),
    ),
    "several turns": (
        Turn("user", (ImageSlot(0), _ASK)), Turn("assistant", (_TELL,)),
        Turn("user", ("And what not?",)), Turn("assistant", ("No. 42 is not: über, 图片.",)),
    ),
    "several images": (
        Turn("user", ("First: ", ImageSlot(0), " then ", ImageSlot(1), "\n", ImageSlot(2), _ASK)),
        Turn("assistant", (_TELL,)),
    ),
    "words alone": (
        Turn("user", ("What is the capital of France?",)), Turn("assistant", ("Paris.",)),
    ),
    "a system turn": (
        Turn("system", ("You answer briefly.",)), Turn("user", (ImageSlot(0), _ASK)), Turn("assistant", (_TELL,)),
    ),
}  # fmt: skip


def check_same_ids(encoder: ChatEncoder) -> None:
    """Refuse a processor whose ids differ from ours on one of `CONVERSATIONS`, showing the first difference.

    What the template refuses (a system turn, several images in a turn) is no difference: a record of that kind is
    refused as well, by name. Supervised is what the processor writes after its own prompt, up to the end token.
    """
    import numpy as np

    processor: Any = encoder.images
    pictures = [_picture(size) for size in SIZES]
    proven = 0
    for name, turns in CONVERSATIONS.items():
        slots = sum(isinstance(p, ImageSlot) for t in turns for p in t.parts)
        example = Example(name, tuple(ImageRef("", f"{k}") for k in range(slots)), turns, file="proof")
        # Labels and the run's own system text are the run's, not the processor's.
        label, encoder.image_label = encoder.image_label, ""
        system, encoder.system = encoder.system, None
        longest, encoder.max_seq_len = encoder.max_seq_len, 10**9
        try:
            whole, asked = encoder.encode(example, SIZES[:slots]), encoder.encode_prompt(example, SIZES[:slots])
            for said, asks in ((turns, False), (turns[:-1], True)):
                _check_bounds(processor, messages(said), prompt=asks)
            theirs = processor.ids(messages(turns), pictures[:slots], prompt=False)
            prompt = processor.ids(messages(turns[:-1]), pictures[:slots], prompt=True)
        except UserError:
            continue
        finally:
            encoder.image_label, encoder.system, encoder.max_seq_len = label, system, longest
        _compare(encoder, name, whole.ids.tolist(), theirs)
        proven += 1
        if encoder.prompt_note:  # generation starts otherwise on purpose, and says so
            continue
        _compare(encoder, f"{name}, asked", asked.ids.tolist(), prompt)
        last = first = int(np.flatnonzero(whole.supervise)[-1])
        while whole.supervise[first - 1]:
            first -= 1
        if first != len(prompt) or int(whole.ids[last]) not in encoder.eos_ids:
            raise UserError(
                f"what is supervised in a conversation with {name} is not what follows on the processor's prompt, up "
                f"to an end token: it begins at position {first}, the prompt has {len(prompt)} ids"
            )
    if not proven:
        raise UserError(
            "the chat template of this model's processor takes none of the conversations that the layout is proven on; "
            "give another as prompting.chat_template"
        )


def messages(turns: Sequence[Turn]) -> list[Mapping[str, Any]]:
    """The turns as transformers' chat templates take them, in parts."""
    said: list[Mapping[str, Any]] = []
    for turn in turns:
        parts: list[dict[str, str]] = []
        for part in turn.parts:
            if isinstance(part, ImageSlot):
                parts.append({"type": "image"})
            elif parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += part
            else:
                parts.append({"type": "text", "text": part})
        said.append({"role": turn.role, "content": parts})
    return said


def _picture(size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    return Image.new("RGB", (size[1], size[0]), (200, 40, 40))


def _check_bounds(processor: Any, conversation: list[dict[str, Any]], *, prompt: bool) -> None:
    """Refuse a template that would hang in the processor's own rendering, which bounds nothing."""
    try:
        template_bounds.render(
            processor.chat_template, conversation, **processor.processor.tokenizer.special_tokens_map,
            add_generation_prompt=prompt,
        )  # fmt: skip
    except RENDERING_FAULTS as e:
        raise UserError(f"the processor's chat template refuses a conversation: {e}") from e


def _compare(encoder: ChatEncoder, name: str, ours: Sequence[int], theirs: Sequence[int]) -> None:
    if list(ours) == list(theirs):
        return
    at = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))

    def shown(ids: Sequence[int]) -> str:
        near = list(ids[max(0, at - 4) : at + 5])
        return f"'{printable(encoder.tokenizer.decode(near), one_line=True)}' (ids {near})"

    raise UserError(
        f"the processor's ids are not ours on a conversation with {name}, from position {at} on ({len(theirs)} ids, "
        f"ours {len(ours)}): it gives {shown(theirs)}, ours are {shown(ours)}. A model would be trained on another "
        "layout than it knows; give a chat template that writes what the processor reads (prompting.chat_template), or "
        "report the class"
    )
