"""What the model writes for held-out images: captions and answers alike.

Generation goes through the one encoder and the one loader, so a prompt here is a prefix of a training sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from beholder.config import GREEDY, GenerateConfig
from beholder.data.chat import ChatEncoder
from beholder.data.collate import SampleBuilder
from beholder.data.images import ImageError
from beholder.evidence import Condition
from beholder.probes import measuring
from beholder.probes.wrong_images import SightedModel, blank_image, without_images
from beholder.types import Encoded, Example, ImageInput


class WritingModel(SightedModel, Protocol):
    def generate(
        self,
        prompts: list[Encoded],
        images: list[list[ImageInput]],
        how: GenerateConfig,
        *,
        eos_ids: list[int],
        seed: int,
    ) -> list[list[int]]: ...


@dataclass(frozen=True, slots=True)
class Written:
    """What the model wrote beside its reference: a caption or an answer."""

    id: str
    reference: str
    """`Example.answer_text`."""
    prediction: str
    condition: Condition
    tokens_len: int
    """Generated tokens, the end token not counted."""
    finished: bool = True
    """False when ``max_new_tokens``, or the end of the model's positions, cut it off."""


def write(
    model: WritingModel,
    encoder: ChatEncoder,
    builder: SampleBuilder,
    examples: Sequence[Example],
    settings: GenerateConfig = GREEDY,
    condition: Literal["correct", "zero", "none"] = "correct",
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Written]:
    """Let the model write the last answer of each example, shown its images, (``zero``) an empty one in every place, or
    (``none``) no image and no place for one: what it says to the words alone. The caption template has no such prompt.

    Other samples' images are shown by giving `wrong_images.shuffle_images` of the examples. What is written greedily
    does not depend on the batch size. ``progress(done, total)`` is called after each batch. Raises UserError for a
    prompt that does not fit and for an image that cannot be had, naming the sample; under the builder's policy ``skip``
    such a sample is left out, as it is in the losses.
    """
    blank = blank_image(model, "zero") if condition == "zero" else None
    eos = set(encoder.eos_ids)
    records: dict[int, Written] = {}
    with measuring(model):
        if condition == "none":
            examples = [without_images(example) for example in examples]
        prompts: dict[int, Encoded] = {}
        for i, example in enumerate(examples):
            try:
                prompts[i] = encoder.encode_prompt(example)
            except ImageError as e:  # of a native model, whose layout depends on how large its images are
                if builder.on_bad_image == "error":
                    raise e.needed_by(example.where) from e
        order = list(prompts)
        if settings.temperature == 0:  # alike in length, least is padded
            order.sort(key=lambda i: len(prompts[i].ids))
        for start in range(0, len(order), batch_size):
            chunk: list[int] = []
            images: list[list[ImageInput]] = []
            for i in order[start : start + batch_size]:
                try:
                    own = builder.images(examples[i]) if blank is None else [blank] * len(examples[i].images)
                except ImageError:
                    if builder.on_bad_image == "error":
                        raise
                    continue
                if sizes := [size for image in own if (size := image.size) is not None]:
                    # A native model's prompt is laid out for them, which may be a part of what is in the file.
                    prompts[i] = encoder.encode_prompt(examples[i], sizes)
                chunk.append(i)
                images.append(own)
            outputs = model.generate(
                [prompts[i] for i in chunk], images, settings, eos_ids=encoder.eos_ids, seed=seed + start
            )
            for i, ids in zip(chunk, outputs, strict=True):
                length = next((k for k, token in enumerate(ids) if token in eos), len(ids))
                records[i] = Written(
                    examples[i].id, examples[i].answer_text, encoder.decode(ids), condition, tokens_len=length,
                    finished=length < len(ids),
                )  # fmt: skip
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
    return [records[i] for i in sorted(records)]
