"""A trained run, ready to look at images: ``load(RUN).generate(image, prompt)``, ``.chat(messages, images)``.

The same encoder, decoder and preprocessing as in training serve here; adapters stay unmerged, so what answers is what
was measured. Nothing is measured or written. The terminal is `chat`, question files are `answer_file`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import ValidationError

from beholder.config import GenerateConfig
from beholder.data.formats import marked
from beholder.data.images import as_input
from beholder.model.build import Vlm as Model
from beholder.model.native import NativeModel
from beholder.train.distributed import pick_device
from beholder.train.trained import TrainedRun, open_trained
from beholder.types import Encoded, Example, ImageInput, ImageRef, ImageSlot, Part, Turn, UserError
from beholder.use.stream import AnswerStream

ImageLike = str | Path | Image.Image | ImageRef | ImageInput
"""A file the caller names, an open image, an image of a data set (which may not lie outside its folder), or what
`Vlm.see` made of one."""
Images = ImageLike | Sequence[ImageLike] | None
Messages = str | Sequence[Mapping[str, str] | Turn]
"""What the user says, or a whole conversation as ``{"role": "system" | "user" | "assistant", "content": text}``; a
`Turn` where a message says by itself which image stands where."""


class ContextFullError(UserError):
    """The conversation leaves no room for an answer."""


@dataclass(frozen=True)
class Request:
    """One thing to be answered.

    ``messages`` a text: the user says it, literally. A conversation: with a list of images, the k-th ``<image>`` in the
    user's turns stands for the k-th of them; with a single one nothing is interpreted. None: the instruction a
    captioning run was trained with. Images without a marked place come before the first user turn's text, where
    training has them.
    """

    messages: Messages | None
    images: Images = None
    where: str = ""
    """Where it was read, for error messages."""


@dataclass(frozen=True)
class Prompt:
    """A request as the model takes it."""

    encoded: Encoded
    images: list[ImageInput]
    room: int
    """Tokens that an answer may have before the language model's context ends."""


@dataclass(frozen=True)
class Vlm(TrainedRun):
    """A vision-language model as a run left it."""

    def save_merged(self, folder: str | Path) -> None:
        """Write the language model with its adapters merged in, or as it has learned itself, as a plain Hugging Face
        folder (without the eyes; a native model whole, with its processor).

        It loads without peft. Raises `UserError` when the run has neither or ``folder`` is not empty.
        """
        native = self.model if isinstance(self.model, NativeModel) else None
        written = [self.model.language.part] if native is None else native.parts().values()
        connector = None if native is None else native.connector.part
        learned = any(part.adapters or part.merged or (part.name == "language" and part.changed) for part in written)
        if not learned and connector is None:
            raise UserError(
                "this run has no adapters to merge; "
                f"its {'language model' if native is None else 'model'} is the base, unchanged"
            )
        from beholder.model.adapters import save_merged  # peft, for a run with adapters alone

        save_merged(
            self.model.language, self.tokenizer if native is None else native.geometry.processor, Path(folder),
            [] if native is None else [part for part in (native.vision.part, connector) if part is not None],
        )  # fmt: skip

    def generate(
        self, image: ImageLike | Sequence[ImageLike], prompt: str | None = None, *, temperature: float = 0.0,
        top_p: float = 0.9, max_new_tokens: int = 64, seed: int = 0,
    ) -> str:  # fmt: skip
        """What the model says about one or several images.

        ``prompt`` stands after the images and is literal text: a ``<image>`` typed in it stays text. None: the
        instruction a captioning run was trained with; a run that was taught to chat needs a question. ``temperature`` 0
        is greedy.
        """
        if not _listed(image):
            raise UserError("give at least one image")
        return self.answers([Request(prompt, image)], decoding(temperature, top_p, max_new_tokens), seed)[0]

    def chat(
        self, messages: Messages, images: Images = None, *, temperature: float = 0.0, top_p: float = 0.9,
        max_new_tokens: int = 256, seed: int = 0,
    ) -> str:  # fmt: skip
        """The next answer in a conversation; `Request` says where its images go.

        Raises `ContextFullError` when the conversation leaves no room for an answer.
        """
        self.check_chats()
        return self.answers([Request(messages, images)], decoding(temperature, top_p, max_new_tokens), seed)[0]

    def stream(
        self, messages: Messages, images: Images = None, *, temperature: float = 0.0, top_p: float = 0.9,
        max_new_tokens: int = 256, seed: int = 0,
    ) -> AnswerStream:  # fmt: skip
        """As `chat`, in pieces as they are written; joined they are what `chat` gives.

        No piece ends inside a character. Closing the stream, or dropping it, stops the model.
        """
        return self.answer_in_pieces(Request(messages, images), decoding(temperature, top_p, max_new_tokens), seed)

    def generate_many(
        self, requests: Iterable[Request], *, batch_size: int = 8, max_new_tokens: int = 64
    ) -> Iterator[str]:
        """Greedy answers in the order of ``requests``, ``batch_size`` at a time; requests are taken as they are needed.

        The answers are those of `generate`, up to the rounding of a batch in bf16 or fp16. A `UserError` names the
        request that caused it (``Request.where``), after the batches before it were answered.
        """
        waiting, how = iter(requests), decoding(0.0, 1.0, max_new_tokens)
        while batch := list(islice(waiting, batch_size)):
            yield from self.answers(batch, how)

    # -------------------------------------------------------------------------------------------------------------

    def answers(self, requests: Sequence[Request], how: GenerateConfig, seed: int = 0) -> list[str]:
        """The answers to requests that are written together."""
        prompts = [self.prepare(request) for request in requests]
        rooms = [min(how.max_new_tokens, p.room) for p in prompts]
        ids = self.model.generate(
            [p.encoded for p in prompts], [p.images for p in prompts],
            how.model_copy(update={"max_new_tokens": max(rooms)}), eos_ids=self.encoder.eos_ids, seed=seed,
        )  # fmt: skip
        return [self.encoder.decode(own[:room]) for own, room in zip(ids, rooms, strict=True)]

    def answer_in_pieces(self, request: Request, how: GenerateConfig, seed: int = 0) -> AnswerStream:
        """The answer to one, in pieces; for a run that chats."""
        self.check_chats()
        prompt = self.prepare(request)
        how = how.model_copy(update={"max_new_tokens": min(how.max_new_tokens, prompt.room)})

        def write(streamer: Any) -> None:
            self.model.generate(
                [prompt.encoded], [prompt.images], how, eos_ids=self.encoder.eos_ids, seed=seed, streamer=streamer
            )

        return AnswerStream(write, self.encoder.decode, self.encoder.eos_ids)

    @property
    def context(self) -> int:
        """Positions the language model has, prompt and answer together; a run may have trained on fewer."""
        return max(_positions(self.model), self.cfg.prompting.max_seq_len)

    def num_tokens(self, messages: Messages, images: Images = None) -> int:
        """Positions that a conversation takes before its answer, those of its images included."""
        example, shown = self._example(Request(messages, images))
        return len(self.encoder.encode_prompt(example, self.sizes(map(self._input, shown))).ids)

    def check_chats(self) -> None:
        """Raises `UserError` for a run that knows one prompt only."""
        if self.cfg.template == "caption":
            raise UserError(
                f"{self.cfg.run_name} was taught to describe images (stage {self.cfg.stage_name}, prompting.template "
                f"caption), not to chat: use `beholder generate {self.cfg.run_dir} --image FILE`, or tune it on "
                "conversations first (stage instruct, model.connector.load_checkpoint naming this run)"
            )

    def see(self, image: Image.Image) -> ImageInput:
        """An open image as `ImageLike`, in the few bytes that the model wants of it."""
        return as_input(self.pipeline.from_pil(image))

    def prepare(self, request: Request) -> Prompt:
        """What `answers` asks the model. Raises `UserError` for what cannot be asked."""
        try:
            example, images = self._example(request)
            inputs = [self._input(image) for image in images]
            encoded = self.encoder.encode_prompt(example, self.sizes(inputs))
            room = self.context - len(encoded.ids)
            if room < 1:
                raise ContextFullError(
                    f"the conversation takes {len(encoded.ids):,} tokens and the language model has {self.context:,} "
                    "positions, so there is no room for an answer; start over with less text"
                )
            return Prompt(encoded, inputs, room)
        except UserError as error:
            if not request.where:
                raise
            raise UserError(f"{request.where}: {error}") from error

    def prepare_answered(self, request: Request, answer: str) -> Prompt:
        """What `prepare` gives, and after it an answer as training has one: supervised are its tokens, but for the end
        token. Raises `UserError` for what cannot be asked or answered so."""
        prompt = self.prepare(request)
        example, _ = self._example(replace(request, images=prompt.images))
        example = replace(example, turns=(*example.turns, Turn("assistant", (answer,))))
        said = _last_answer(self.encoder.encode(example, self.sizes(prompt.images)), self.encoder.eos_ids)
        if len(said) > prompt.room:
            raise ContextFullError(
                f"the conversation takes {len(prompt.encoded.ids):,} tokens and its answer {len(said):,}, but the "
                f"language model has {self.context:,} positions"
            )
        ids = np.concatenate([prompt.encoded.ids, said])
        return Prompt(
            replace(prompt.encoded, ids=ids, supervise=np.arange(len(ids)) >= len(prompt.encoded.ids)), prompt.images,
            prompt.room - len(said),
        )  # fmt: skip

    def _input(self, image: ImageLike) -> ImageInput:
        match image:
            case ImageInput():
                return image
            case Image.Image():
                return self.see(image)
            case ImageRef():
                return as_input(self.pipeline(image))
            case _:
                return as_input(self.pipeline.from_file(str(image)))

    def _example(self, request: Request) -> tuple[Example, list[ImageLike]]:
        images = _listed(request.images)
        limit = self.cfg.max_images
        if len(images) > limit:
            raise UserError(
                f"{len(images)} images given, but the run was trained with at most {limit} a sample "
                "(prompting.max_images_per_sample): give fewer, or use a run that was trained with more (stage multi)"
            )
        refs = tuple(ImageRef(root="", path=f"image {k + 1}") for k in range(len(images)))
        return Example("prompt", refs, self._turns(request, len(images)), file="input"), images

    def _turns(self, request: Request, num_images: int) -> tuple[Turn, ...]:
        if request.messages is None:
            if self.cfg.template == "chat":
                raise UserError(
                    f"{self.cfg.run_name} answers questions (prompting.template chat), so it needs one: give a prompt"
                )
            return ()  # without a text the encoder's template writes the instruction
        if isinstance(request.messages, str):
            return (Turn("user", (*front(num_images), request.messages)),)
        turns = [m if isinstance(m, Turn) else _turn(m, k) for k, m in enumerate(request.messages)]
        if not turns or turns[-1].role != "user":
            last = "it is empty" if not turns else f"its last turn is the {turns[-1].role}'s"
            raise UserError(f"a conversation to be answered ends with what the user says, but {last}")
        if any(isinstance(message, Turn) for message in request.messages):
            return tuple(turns)
        token = self.cfg.prompting.image_token
        marked = sum(turn.text.count(token) for turn in turns if turn.role == "user")
        if marked and not isinstance(request.images, ImageLike | None):
            if marked != num_images:
                raise UserError(
                    f"{num_images} images but {marked} {token} in the user turns; the k-th {token} stands for the k-th "
                    "image, so the numbers must agree"
                )
            return _marked(turns, token)
        first = next(k for k, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", (*front(num_images), *turns[first].parts))
        return tuple(turns)


def decoding(temperature: float, top_p: float, max_new_tokens: int) -> GenerateConfig:
    """How to write an answer, as one object. Raises `UserError` for numbers that nothing can be written with."""
    try:
        return GenerateConfig(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{first['loc'][0]} is {first['input']}: {first['msg']}") from None


def _listed(images: Images) -> list[ImageLike]:
    if images is None:
        return []
    return [images] if isinstance(images, ImageLike) else list(images)


def front(num_images: int) -> tuple[Part, ...]:
    """The places of images that come before a text, as training data has them."""
    return tuple(part for k in range(num_images) for part in (ImageSlot(k), "\n"))


def _turn(message: Mapping[str, str], index: int) -> Turn:
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise UserError(f"messages[{index}].role is {role!r}, expected system, user or assistant")
    if not isinstance(content, str):
        raise UserError(f"messages[{index}].content is {type(content).__name__}, expected a text")
    return Turn(role, (content,))


def _marked(turns: Sequence[Turn], token: str) -> tuple[Turn, ...]:
    """The user turns with an image place for every ``token``, as `data.formats` reads records."""
    placed: list[Turn] = []
    used = 0
    for turn in turns:
        parts = marked(turn.text, token, used) if turn.role == "user" else [p for p in turn.parts if p != ""]
        used += sum(isinstance(part, ImageSlot) for part in parts)
        placed.append(Turn(turn.role, tuple(parts)))
    return tuple(placed)


def _last_answer(encoded: Encoded, ends: Sequence[int]) -> np.ndarray:
    """int64: the tokens of the last stretch that is supervised, without an end token."""
    where = np.flatnonzero(encoded.supervise)
    own = np.split(where, np.flatnonzero(np.diff(where) > 1) + 1)[-1]
    ids = encoded.ids[own]
    return ids[:-1] if int(ids[-1]) in ends else ids


def _positions(model: Model) -> int:
    """How many positions the language model was made for; 0 when its config does not say."""
    return int(getattr(model.language.config, "max_position_embeddings", None) or 0)


# ---------------------------------------------------------------------------------------------------------------
# Loading


def load(run: str | Path, *, device: str = "auto", overrides: Sequence[str] = ()) -> Vlm:
    """The model of a run folder (its best checkpoint, else its latest verified one) or of one of its
    ``checkpoints/step_<n>`` folders.

    ``overrides``: settings such as ``model.vision.weights=FILE``, for parts that lie elsewhere now; connector and
    adapters still refuse parts that they were not trained on.
    """
    found = open_trained(run, pick_device(device), overrides)
    return Vlm(**{f.name: getattr(found, f.name) for f in fields(found)})
