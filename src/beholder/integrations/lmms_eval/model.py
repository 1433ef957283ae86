"""The classes that lmms-eval asks. What a run cannot do is an error that says so, never an empty answer."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from PIL import Image, ImageFile

from beholder.config import GenerateConfig
from beholder.data.collate import PADDED, collate
from beholder.data.formats import marked
from beholder.probes import measuring
from beholder.types import ImageSlot, Part, Turn, UserError
from beholder.use.vlm import Prompt, Request, Vlm, decoding, front, load

IMAGE = "<image>"
"""As lmms-eval's tasks mark an image in a text."""
MAX_NEW_TOKENS = 1024
"""Of an answer whose task does not say; as lmms-eval's own models have it."""
MAX_ROUNDS = 100
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1, None), "length_penalty": (1, 0, None),
    "num_return_sequences": (1,), "top_k": (0, None), "no_repeat_ngram_size": (0, None), "min_new_tokens": (0, None),
}  # fmt: skip
"""Settings that are taken at the values that change nothing."""
KNOWN = (
    "until", "max_new_tokens", "max_gen_toks", "max_tokens", "temperature", "top_p", "do_sample", "repetition_penalty",
)  # fmt: skip
log = logging.getLogger("beholder.lmms_eval")


@dataclass(frozen=True)
class How:
    """A task's generation settings as a run takes them."""

    decoding: GenerateConfig
    until: tuple[str, ...]

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> How:
        """Raises `UserError` for what would change the answer in a way that is not there."""
        for name, values in PLAIN.items():
            if name in given and given[name] not in values:
                raise UserError(f"generation_kwargs: {name} is {given[name]!r}, but answers are written without it")
        if unknown := sorted(set(given) - set(PLAIN) - set(KNOWN)):
            _warn_once(f"generation_kwargs without effect: {', '.join(unknown)}")
        until = given.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(until)
        if not all(isinstance(stop, str) for stop in stops):
            raise UserError(f"generation_kwargs: until is {until!r}, expected a text or a list of texts")
        tokens = next((given[k] for k in KNOWN[1:4] if given.get(k) is not None), MAX_NEW_TOKENS)
        drawn = given.get("do_sample")
        temperature = given.get("temperature")
        if temperature is None:
            temperature = 1.0 if drawn else 0.0
        temperature = 0.0 if drawn is False else float(temperature)
        penalty = float(given.get("repetition_penalty") or 1.0)
        if not 0 < penalty <= 100:
            raise UserError(f"generation_kwargs: repetition_penalty is {penalty:g}, expected a number above 0")
        how = decoding(temperature, float(given.get("top_p") or 1.0), int(tokens))
        return cls(how.model_copy(update={"repetition_penalty": penalty}), tuple(stop for stop in stops if stop))

    def cut(self, text: str) -> str:
        """``text`` up to the first of the stops."""
        ends = [k for stop in self.until if (k := text.find(stop)) >= 0]
        return text[: min(ends)].strip() if ends else text


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        log.warning(text)


class Beholder(lmms):
    """A run for lmms-eval's simple tasks. ``pretrained``: its folder, or one of its checkpoints.

    ``batch_size``: answers written together; greedy ones do not depend on it in fp32. ``seed``: of drawn ones.
    """

    is_simple = True

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, device: str | None = None, seed: int = 0,
        max_batch_size: int | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("beholder answers in one process; start lmms_eval without accelerate launch or torchrun")
        try:
            self.batch_size = int(batch_size)
        except ValueError:
            raise UserError(f"batch_size is {batch_size!r}, expected a number; it is not found out") from None
        if self.batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, expected 1 or more")
        # lmms-eval has PIL fill what is missing of an image with grey. No image is read so here: it would not be told.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        self.vlm: Vlm = load(pretrained, device=(device or "auto").partition(":")[0])
        self.seed = seed

    @property
    def device(self) -> torch.device:
        return next(self.vlm.model.parameters()).device

    # -- what lmms-eval calls

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer a request, in their order."""
        asked = [(r, *self._parts(r)) for r in requests]
        out: list[str | None] = [None] * len(asked)
        for how, batch in self._batches([given for _, given, _ in asked]):
            built = [asked[k][2]() for k in batch]
            for k, text in zip(batch, self._answers(built, how), strict=True):
                out[k] = text
                self.cache_hook.add_partial("generate_until", (requests[k].args[0], asked[k][1]), text)
        return [text for text in out if text is not None]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of all rounds, a list a request; what is asked next may depend on them."""
        out: list[list[str]] = []
        for request in requests:
            answers: list[str] = []
            given, rounds = self._rounds(request)
            for build in rounds(answers):
                answers.append(self._answers([build], How.read(given))[0])
            out.append(answers)
            self.cache_hook.add_partial("generate_until_multi_round", (request.args[0], given), answers)
        return out

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(nats, greedy) a request: minus the log-probability of the continuation, the sum of its tokens', and whether
        greedy decoding begins with it.

        lmms-eval's ``multiple_choice`` takes the smallest: its own models give a loss here, not a log-probability.
        """
        for request in requests:
            if len(request.args) != 6:
                raise UserError("beholder does not measure acc_mutual_info: it asks for a text without a question")
        out: list[tuple[float, bool]] = []
        for batch in _chunks(requests, self.batch_size):
            out += self._scored([self._answered(request) for request in batch])
        return out

    # -- what a request asks

    def _doc(self, doc_id: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _parts(self, request: Any) -> tuple[Mapping[str, Any], Callable[[], Request]]:
        """(generation settings, what makes the request once it is its turn: pictures are many)"""
        context, given, to_visual, doc_id, task, split = request.args
        where = f"{task} {split}[{doc_id}]"
        return given, lambda: self._request(context, _images(to_visual(self._doc(doc_id, task, split)), where), where)

    def _rounds(self, request: Any) -> tuple[Mapping[str, Any], Callable[[list[str]], Iterator[Request]]]:
        context, given, to_visual, to_text, doc_id, task, split = request.args
        doc, where = self._doc(doc_id, task, split), f"{task} {split}[{doc_id}]"

        def rounds(answers: list[str]) -> Iterator[Request]:
            yield self._request(context, _images(to_visual(doc), where), where)
            info = None
            while True:
                _check_rounds(answers, where)
                told = to_text(doc, previous_output=list(answers), round_idx=len(answers), previous_round_info=info)
                if not isinstance(told, tuple) or len(told) != 5 or told[2]:
                    return
                visuals, text, _, _, info = told
                yield self._request(text, _images(visuals, where), where)

        return given, rounds

    def _request(self, text: str, images: list[Image.Image], where: str) -> Request:
        if self.vlm.cfg.template == "caption":
            if not images:
                raise UserError(f"{where}: this run was taught to describe images, and the question has none")
            return Request(text.replace(IMAGE, "").strip() or None, images, where)
        return Request([Turn("user", _placed(text, len(images)))], images, where)

    def _answered(self, request: Any) -> Prompt:
        """A question with its continuation as the answer."""
        context, target, to_visual, doc_id, task, split = request.args
        where, doc = f"{task} {split}[{doc_id}]", self._doc(doc_id, task, split)
        text = target(doc) if callable(target) else target
        images = _images(to_visual(doc) if callable(to_visual) else None, where)
        asked = Request([Turn("user", _placed(context, len(images)))], images, where)
        return self.vlm.prepare_answered(asked, str(text).strip())

    # -- what the model says

    def _batches(self, given: Sequence[Mapping[str, Any]]) -> Iterator[tuple[How, list[int]]]:
        """Places of requests that are written together, those of one decoding."""
        alike: dict[How, list[int]] = {}
        for k, settings in enumerate(given):
            alike.setdefault(How.read(settings), []).append(k)
        for how, places in alike.items():
            for batch in _chunks(places, self.batch_size):
                yield how, list(batch)

    def _answers(self, requests: Sequence[Request], how: How) -> list[str]:
        return [how.cut(text) for text in self.vlm.answers(requests, how.decoding, self.seed)]

    def _scored(self, samples: Sequence[Prompt]) -> list[tuple[float, bool]]:
        named = [(str(k), sample.encoded, sample.images) for k, sample in enumerate(samples)]
        with measuring(self.vlm.model):
            out = self.vlm.model(collate(named, PADDED))
        assert out.correct is not None, "measured without gradients"
        owner, nll, right = out.sample.cpu(), out.nll.cpu().double(), out.correct.cpu()
        return [(float(nll[owner == k].sum()), bool(right[owner == k].all())) for k in range(len(samples))]


class BeholderChat(Beholder):
    """A run for lmms-eval's tasks with messages, whose images stand where the message has them."""

    is_simple = False

    def _parts(self, request: Any) -> tuple[Mapping[str, Any], Callable[[], Request]]:
        _, to_messages, given, doc_id, task, split = request.args
        where = f"{task} {split}[{doc_id}]"
        return given, lambda: self._conversation(to_messages(self._doc(doc_id, task, split)), where)

    def _rounds(self, request: Any) -> tuple[Mapping[str, Any], Callable[[list[str]], Iterator[Request]]]:
        _, to_messages, given, doc_id, task, split = request.args
        doc, where = self._doc(doc_id, task, split), f"{task} {split}[{doc_id}]"

        def rounds(answers: list[str]) -> Iterator[Request]:
            yield self._conversation(to_messages(doc), where)
            info = None
            while True:
                _check_rounds(answers, where)
                told = to_messages(doc, round_idx=len(answers), previous_output=list(answers), previous_round_info=info)
                if not isinstance(told, tuple) or len(told) != 4 or told[1]:
                    return
                messages, _, _, info = told
                yield self._conversation(messages, where)

        return given, rounds

    def _conversation(self, messages: Sequence[Mapping[str, Any]], where: str) -> Request:
        images: list[Image.Image] = []
        turns: list[Turn] = []
        for message in messages:
            parts: list[Part] = []
            content = message["content"]
            for piece in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                match piece["type"]:
                    case "text":
                        parts.append(piece["text"])
                    case "image":
                        parts += [ImageSlot(len(images)), "\n"]
                        images += _images([piece["url"]], where)
                    case kind:
                        raise UserError(f"{where}: beholder takes images and text, the task has {kind}")
            if parts and parts[-1] == "\n":
                parts.pop()
            turns.append(Turn(message["role"], tuple(part for part in parts if part != "")))
        if self.vlm.cfg.template == "caption":
            return self._request("".join(p for t in turns for p in t.parts if isinstance(p, str)), images, where)
        return Request(turns, images, where)


def _check_rounds(answers: Sequence[str], where: str) -> None:
    if len(answers) >= MAX_ROUNDS:
        raise UserError(f"{where}: the task asks for more than {MAX_ROUNDS} rounds and says no end")


def _images(found: Any, where: str) -> list[Image.Image]:
    """What ``doc_to_visual`` gives, opened."""
    images: list[Image.Image] = []
    for item in [] if found is None else found:
        if isinstance(item, list | tuple):
            images += _images(item, where)
        elif isinstance(item, Image.Image):
            images.append(item)
        else:
            raise UserError(f"{where}: beholder takes images and text, the task has a {type(item).__name__} (a video?)")
    return images


def _placed(text: str, num_images: int) -> tuple[Part, ...]:
    """A text with its images where it marks them all, else before it, as training has them."""
    if num_images and text.count(IMAGE) == num_images:
        return tuple(marked(text, IMAGE, 0))
    places = front(num_images)
    return (*places, text) if text else places[:-1]


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    waiting = iter(items)
    while chunk := list(itertools.islice(waiting, size)):
        yield chunk
