"""A chat request as the model is asked: which image stands where, what may not be asked, its limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from beholder.config import GenerateConfig
from beholder.types import ImageInput, ImageSlot, Part, Turn
from beholder.use.serving.schema import ChatRequest, Conversation, LooksRequest, Message, TextPart
from beholder.use.vlm import Request, Vlm
from beholder.web.errors import ApiError

CHARACTERS_PER_TOKEN = 16
"""A text with more of them for each of the model's positions is not tokenised: it would not fit."""


@dataclass(frozen=True)
class Limits:
    """What one request may take, and all of them together."""

    max_batch: int = 8
    """Answers written together."""
    max_waiting: int = 32
    """Requests beyond those."""
    max_tokens: int = 1024
    """Of an answer."""
    max_images: int = 16
    """Of a request; never more than the run was trained with."""
    max_image_bytes: int = 10_000_000
    max_megapixels: float = 20.0
    max_body_bytes: int = 32_000_000
    body_timeout_s: float = 10.0
    """For a body to arrive; as long for the headers of a request, and for a reader to take what it is sent."""
    grace_s: float = 30.0
    """What is being answered when the server is told to stop may go on for so long."""


@dataclass(frozen=True)
class Picture:
    """An image of a request, and the field it stands in."""

    url: str
    param: str


def pictures_of(vlm: Vlm, asked: Conversation, limits: Limits) -> list[Picture]:
    """The images in the order in which they stand. Raises `ApiError` for a conversation that cannot be asked."""
    pictures: list[Picture] = []
    num_characters = 0
    for k, message in enumerate(asked.messages):
        for i, part in enumerate(message.parts):
            where = f"messages[{k}].content" if isinstance(message.content, str) else f"messages[{k}].content[{i}]"
            if isinstance(part, TextPart):
                num_characters += len(part.text)
            elif message.role != "user":
                raise ApiError(400, f"Images belong to the user, not to the {message.role}.", param=where,
                               code="invalid_value")  # fmt: skip
            else:
                pictures.append(Picture(part.image_url.url, f"{where}.image_url.url"))
    most = min(limits.max_images, vlm.cfg.max_images)
    if len(pictures) > most:
        raise ApiError(
            400, f"{len(pictures)} images, but this model is asked about at most {most} in a request.",
            param=pictures[most].param.removesuffix(".image_url.url"), code="too_many_images",
        )  # fmt: skip
    if num_characters > CHARACTERS_PER_TOKEN * vlm.context:
        raise ApiError(
            400, f"The messages have {num_characters:,} characters, which is more than the model's {vlm.context:,} "
            "tokens can hold.", param="messages", code="context_length_exceeded",
        )  # fmt: skip
    token = vlm.cfg.prompting.image_token
    for k, message in enumerate(asked.messages):
        typed = message.role == "user" and any(isinstance(p, TextPart) and token in p.text for p in message.parts)
        if typed and not pictures:
            raise ApiError(
                400, f"The text has the marker {token} but no image is given: images are parts of a message, of type "
                "image_url.", param=f"messages[{k}].content", code="missing_image",
            )  # fmt: skip
    return pictures


def request_of(vlm: Vlm, asked: Conversation, images: Sequence[ImageInput]) -> Request:
    """``images`` as `pictures_of` has them."""
    if vlm.cfg.template == "caption":
        if len(asked.messages) != 1 or asked.messages[0].role != "user" or not images:
            raise ApiError(
                400, "This model was taught to describe images, not to chat: it is asked with one message of the user, "
                "an image and, if at all, one text.", param="messages", code="invalid_value",
            )  # fmt: skip
        text = "\n".join(part.text for part in asked.messages[0].parts if isinstance(part, TextPart))
        return Request(text or None, list(images))
    turns, used = [], 0
    for message in asked.messages:
        parts, used = _parts(message, used, first=vlm.cfg.max_images == 1)
        role = "system" if message.role == "developer" else message.role
        turns.append(Turn(role, parts))
    return Request(turns, list(images))


def answer_of(asked: LooksRequest, pictures: Sequence[Picture]) -> str:
    """The answer that is asked about. Raises `ApiError` where there is none, or nothing to hide."""
    last = len(asked.messages) - 1
    if asked.messages[last].role != "assistant" or not last:
        raise ApiError(
            400, "The last message must be the assistant's, the answer to what is said before it.",
            param=f"messages[{last}].role", code="invalid_value",
        )  # fmt: skip
    nothing_to_hide(pictures, "messages")
    return "".join(part.text for part in asked.messages[last].parts if isinstance(part, TextPart))


def nothing_to_hide(pictures: Sequence[Picture], param: str) -> None:
    """Raises `ApiError` when there are no images."""
    if not pictures:
        raise ApiError(400, "There is no image that could be hidden.", param=param, code="missing_image")


def _parts(message: Message, used: int, *, first: bool) -> tuple[tuple[Part, ...], int]:
    """A message's parts, ``used`` images being before it. ``first``: its images before its text, which is the only
    place where a run of a single image has ever seen one."""
    told = sorted(message.parts, key=lambda part: isinstance(part, TextPart)) if first else message.parts
    parts: list[Part] = []
    for k, part in enumerate(told):
        if isinstance(part, TextPart):
            parts.append(part.text)
            continue
        parts.append(ImageSlot(used))
        used += 1
        if k + 1 < len(told):  # as training has images before what is said of them
            parts.append("\n")
    return tuple(part for part in parts if part != ""), used


def decoding_of(asked: ChatRequest, limits: Limits) -> GenerateConfig:
    """Raises `ApiError` for more tokens than the server allows."""
    field, wanted = asked.token_limit
    if wanted is not None and wanted > limits.max_tokens:
        raise ApiError(400, f"{field} is {wanted:,}, but this server writes at most {limits.max_tokens:,} tokens.",
                       param=field, code="invalid_value")  # fmt: skip
    top_p = 1.0 if asked.top_p is None else asked.top_p
    temperature = 0.0 if asked.temperature is None or top_p == 0 else asked.temperature
    return GenerateConfig(
        temperature=temperature, top_p=top_p or 1.0,
        max_new_tokens=limits.max_tokens if wanted is None else wanted,
    )  # fmt: skip
