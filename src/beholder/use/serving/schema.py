"""What OpenAI's chat completions ask and answer: requests as typed records, answers and errors as plain JSON.

A parameter that OpenAI does not know is refused, as there; one that it knows and that changes nothing here is taken;
one that would change the answer and is not done is refused by name.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from beholder.use.looks import CLEAR, Looks, Word
from beholder.web.errors import ApiError

MAX_STOPS = 4
MAX_MESSAGES = 100
"""A chat template is taken apart turn by turn for every order of roles, which costs the square of them."""
MAX_PARTS = 1000
"""Of a message."""
_Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


# ---------------------------------------------------------------------------------------------------------------
# Requests


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ImageUrl(_Asked):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None
    """Taken and without effect: the model sees every image in one size."""


class ImagePart(_Asked):
    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(_Asked):
    type: Literal["text"]
    text: str


_BRANCHES = ("~text", "~image", "~string", "~parts")
"""What pydantic puts into the place of an error beside the fields."""


def _part_kind(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return {"text": "~text", "image_url": "~image"}.get(kind) if isinstance(kind, str) else None


def _content_kind(content: Any) -> str:
    return "~parts" if isinstance(content, list) else "~string"


ContentPart = Annotated[
    Annotated[TextPart, Tag("~text")] | Annotated[ImagePart, Tag("~image")],
    Discriminator(
        _part_kind, custom_error_type="invalid_part",
        custom_error_message='Expected an object whose type is "text" or "image_url"',
    ),
]  # fmt: skip
Content = Annotated[
    Annotated[str, Tag("~string")] | Annotated[list[ContentPart], Tag("~parts"), Field(max_length=MAX_PARTS)],
    Discriminator(_content_kind),
]


class Message(_Asked):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: list[Any] | None = None

    @property
    def parts(self) -> Sequence[TextPart | ImagePart]:
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class StreamOptions(_Asked):
    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(_Asked):
    type: Literal["text"]


class Conversation(_Asked):
    """What every request is about."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class ChatRequest(Conversation):
    """The body of ``POST /v1/chat/completions``."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Default 0, greedy: what the run was measured with."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: _Seed | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=1000)]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=MAX_STOPS)
        ]
        | None
    ) = None  # fmt: skip
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    hide_images: bool | None = None
    """Ours, not OpenAI's: an empty image stands in the place of each (`use.looks`)."""

    # Only as they change nothing.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None

    # What says who asks and how it is kept.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """(the field that was given, its value)"""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


class LooksRequest(Conversation):
    """The body of ``POST /v1/looks``: the last message is the assistant's, the answer that is asked about."""

    @property
    def question(self) -> LooksRequest:
        return self.model_copy(update={"messages": self.messages[:-1]})


Asked = TypeVar("Asked", bound=Conversation)
_NO_NUMBER = re.compile(r'"(\w{1,60})"\s*:\s*(-?(?:NaN|Infinity|inf|nan))')
"""What Python and JavaScript write for a number that is none, with its field."""


def read_request(body: bytes, kind: type[Asked] = ChatRequest) -> Asked:
    """Raises `ApiError` with the field that is wrong."""
    try:
        given = orjson.loads(body)  # neither NaN nor nesting without end
    except orjson.JSONDecodeError as error:
        if odd := _NO_NUMBER.search(error.doc[max(0, error.pos - 100) : error.pos + 9]):
            name, value = odd.groups()
            raise ApiError(400, f"Invalid value for '{name}': {value} is no number of JSON.", param=name,
                           code="invalid_value") from None  # fmt: skip
        raise ApiError(400, f"The body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, "The body is not a JSON object", code="invalid_json")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _refused(first["type"], first["loc"], first["msg"]) from None


def _refused(kind: str, loc: Sequence[str | int], says: str) -> ApiError:
    param = ""
    for step in loc:
        if isinstance(step, int):
            param += f"[{step}]"
        elif step not in _BRANCHES:
            param += f".{step[:80]}" if param else step[:80]
    param = "stop" if loc[:1] == ("stop",) else param
    match kind:
        case "missing":
            return ApiError(400, f"Missing required parameter: '{param}'.", param=param,
                            code="missing_required_parameter")  # fmt: skip
        case "extra_forbidden":
            return ApiError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    code = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
    return ApiError(400, f"Invalid value for '{param}': {says}.", param=param, code=code)


# ---------------------------------------------------------------------------------------------------------------
# Answers


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def completion(name: str, model: str, text: str, reason: str, used: Mapping[str, int]) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {
        "id": name, "object": "chat.completion", "created": int(time.time()), "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}], "usage": used,
    }  # fmt: skip


def chunk(name: str, created: int, model: str, delta: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {
        "id": name, "object": "chat.completion.chunk", "created": created, "model": model,
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}],
    }  # fmt: skip


def models(*those: Mapping[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": list(those)}


def model(name: str, created: int, **more: Any) -> dict[str, Any]:
    """``more``: what OpenAI's has not."""
    return {"id": name, "object": "model", "created": created, "owned_by": "beholder"} | more


def looked(model: str, looks: Looks, num_images: int) -> dict[str, Any]:
    return {
        "object": "looks", "created": int(time.time()), "model": model, "unit": "nats",
        "words": [_word(word) for word in looks.words], "images": num_images,
        "summary": _summary(looks) | {"nats": looks.nats, "threshold": CLEAR},
        "summary_by_image": [_summary(looks, k) for k in range(num_images)],
    }  # fmt: skip


def _word(word: Word) -> dict[str, Any]:
    tokens = [
        {
            "id": token.id, "text": token.text, "logprob": token.shown, "logprob_hidden": token.hidden,
            "logprob_hidden_by_image": list(token.hidden_alone),
        }
        for token in word.tokens
    ]  # fmt: skip
    return {
        "text": word.text, "counts": word.counts, "explained": word.explained,
        "explained_by_image": word.explained_alone, "tokens": tokens,
    }  # fmt: skip


def _summary(looks: Looks, image: int | None = None) -> dict[str, int]:
    words, explained, against = looks.counted(image)
    return {"words": words, "explained": explained, "against": against}
