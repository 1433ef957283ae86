"""The routes: chat completions, models, health, metrics. Text and images are made ready by one thread, answers written
by another; requests that neither has room for are refused at once."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import generate_latest

from beholder.types import ImageInput, UserError
from beholder.use.looks import Looks, hidden, looks, spans_of
from beholder.use.serving import schema
from beholder.use.serving.batching import Batcher, Done, Job, Task
from beholder.use.serving.conversation import (
    Limits,
    Picture,
    answer_of,
    decoding_of,
    nothing_to_hide,
    pictures_of,
    request_of,
)
from beholder.use.serving.metrics import Metrics
from beholder.use.serving.pictures import PictureError, Pictures
from beholder.use.serving.schema import ChatRequest, LooksRequest
from beholder.use.vlm import ContextFullError, Prompt, Vlm
from beholder.web.errors import ApiError, answer_errors
from beholder.web.guard import Guard
from beholder.web.pages import Pages, add_pages

RETRY_AFTER_S = 1
CHAT, LOOKS = "/v1/chat/completions", "/v1/looks"
PAGE: Pages = {
    "/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css"), "/page.js": ("page.js", "text/javascript"),
}  # fmt: skip
"""To talk to the model."""
log = logging.getLogger("beholder.serve")
T = TypeVar("T")


class Service:
    """A model with what it takes to ask it from an event loop."""

    def __init__(self, vlm: Vlm, name: str, limits: Limits, pictures: Pictures) -> None:
        self.vlm, self.name, self.limits, self.pictures = vlm, name, limits, pictures
        self.metrics = Metrics(lambda: self.batcher.num_waiting, lambda: self.batcher.num_running)
        self.hidden = hidden(vlm)  # the model is this thread's until another has it
        self.batcher = Batcher(vlm, max_batch=limits.max_batch, watch=self.metrics.rows.observe)
        self.created = int(time.time())
        self.places = limits.max_batch + limits.max_waiting
        # One thread: a tokenizer may not be used by two, and one open picture at a time bounds memory.
        self._ready = ThreadPoolExecutor(1, "prepare")
        self._fetch = ThreadPoolExecutor(4, "fetch")

    def close(self) -> None:
        self.batcher.close()
        for pool in (self._ready, self._fetch):
            pool.shutdown(wait=False, cancel_futures=True)

    def take_place(self) -> None:
        """Raises `ApiError` when all are taken; `leave_place` gives it back."""
        if not self.batcher.alive:
            raise ApiError(503, "The server is stopping.", code="unavailable")
        if self.places == 0:
            raise ApiError(
                429, "The queue is full; try again later.", code="rate_limit_exceeded",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )  # fmt: skip
        self.places -= 1

    def leave_place(self) -> None:
        self.places += 1

    def _pool(self, url: str) -> ThreadPoolExecutor:
        """Whoever sends a picture along does not wait for those that are fetched."""
        return self._fetch if url[:4].lower() == "http" else self._ready

    @property
    def described(self) -> dict[str, Any]:
        """The model, with what a page that talks to it has to know."""
        return schema.model(
            self.name, self.created, max_images=min(self.limits.max_images, self.vlm.cfg.max_images),
            max_tokens=self.limits.max_tokens, chats=self.vlm.cfg.template != "caption",
        )  # fmt: skip

    async def prepare(self, asked: ChatRequest) -> Prompt:
        """Raises `ApiError` for what cannot be asked."""
        pictures = pictures_of(self.vlm, asked, self.limits)
        if asked.hide_images:
            nothing_to_hide(pictures, "hide_images")
        prompt = await self._seen(pictures, lambda images: self.vlm.prepare(request_of(self.vlm, asked, images)))
        return replace(prompt, images=[self.hidden] * len(pictures)) if asked.hide_images else prompt

    async def prepare_looks(self, asked: LooksRequest) -> tuple[Prompt, list[tuple[str, int]]]:
        """A question with its answer, and the words of that. Raises `ApiError` for what cannot be asked."""
        pictures = pictures_of(self.vlm, asked, self.limits)
        answer = answer_of(asked, pictures)

        def made(images: list[ImageInput]) -> tuple[Prompt, list[tuple[str, int]]]:
            prompt = self.vlm.prepare_answered(request_of(self.vlm, asked.question, images), answer)
            return prompt, spans_of(self.vlm, prompt)

        return await self._seen(pictures, made)

    async def _seen(self, pictures: Sequence[Picture], make: Callable[[list[ImageInput]], T]) -> T:
        """What ``make`` makes of the pictures, in the thread that has the tokenizer."""
        loop = asyncio.get_running_loop()
        read = self.pictures.read
        data = await asyncio.gather(
            *(
                loop.run_in_executor(self._pool(picture.url), _naming, picture.param, read, picture.url)
                for picture in pictures
            )
        )

        def ready() -> T:
            images = [
                _naming(picture.param, lambda raw: self.vlm.see(self.pictures.decode(raw)), raw)
                for picture, raw in zip(pictures, data, strict=True)
            ]
            return make(images)

        try:
            return await loop.run_in_executor(self._ready, ready)
        except UserError as error:
            full = isinstance(error, ContextFullError)
            raise ApiError(
                400, str(error), param="messages", code="context_length_exceeded" if full else "invalid_value"
            ) from None


def _naming(param: str, function: Any, *given: Any) -> Any:
    """``function`` with its errors about an image naming the field."""
    try:
        return function(*given)
    except (PictureError, UserError) as error:
        text = str(error)
        raise ApiError(400, f"{text[:1].upper()}{text[1:]}.", param=param, code="invalid_image") from None


class Asking:
    """One request while it is answered: events of the model's thread as they come, and whether anybody listens."""

    def __init__(self, service: Service, request: Request) -> None:
        self.service, self.begun = service, time.monotonic()
        self.gone = False
        self.job: Job | Task | None = None
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._watch = asyncio.create_task(self._until_gone(request))

    def submit(self, prompt: Prompt, asked: ChatRequest) -> None:
        seed = None if asked.seed is None else asked.seed % 2**63
        how = decoding_of(asked, self.service.limits)
        self._submit(Job(prompt, how, self._tell, seed=seed, stop=asked.stops))

    async def result(self, work: Callable[[Callable[[], bool]], Any]) -> Any:
        """What ``work`` gives in the model's thread, as `Task` has it; None once nobody listens. Raises `ApiError` when
        it fails."""
        self._submit(Task(work, self._tell))
        told = await self._events.get()
        if isinstance(told, BaseException) and not self.gone:
            raise _failed(told)
        return None if self.gone else told

    def _submit(self, job: Job | Task) -> None:
        self.job = job
        job.cancelled = self.gone
        self.service.batcher.submit(job)

    async def events(self) -> AsyncIterator[str | Done]:
        """Pieces and the end; nothing more once nobody listens. Raises `ApiError` when writing fails."""
        first = True
        while not self.gone:
            match await self._events.get():
                case None:
                    return
                case BaseException() as error:
                    raise _failed(error)
                case event:
                    if first:
                        self.service.metrics.first.observe(time.monotonic() - self.begun)
                        first = False
                    if isinstance(event, Done):
                        assert isinstance(self.job, Job)
                        self.service.metrics.tokens.labels("prompt").inc(len(self.job.prompt.encoded.ids))
                        self.service.metrics.tokens.labels("completion").inc(event.num_tokens)
                    yield event
                    if isinstance(event, Done):
                        return

    def usage(self, done: Done) -> dict[str, int]:
        assert isinstance(self.job, Job)
        return schema.usage(len(self.job.prompt.encoded.ids), done.num_tokens)

    def leave(self) -> None:
        """Nobody needs it any more."""
        self._watch.cancel()
        if self.job is not None:
            self.job.cancelled = True

    async def _until_gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        if self.job is not None:
            self.job.cancelled = True
        self._events.put_nowait(None)

    def _tell(self, event: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server is gone
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


def _failed(error: BaseException) -> ApiError:
    if isinstance(error, UserError):
        return ApiError(400, str(error), param="messages", code="invalid_value")
    log.error("an answer failed", exc_info=error)
    return ApiError(500, "The model failed at this answer; the server's log has the reason.", code="failed")


class EventStream(Response):
    """An answer in pieces, as server-sent events. ``first`` was taken from ``events`` before: what goes wrong until
    then has a status. ``held`` is let go at the end."""

    def __init__(
        self, asking: Asking, events: AsyncIterator[str | Done], first: str | Done | None, *, with_usage: bool,
        held: ExitStack,
    ) -> None:  # fmt: skip
        super().__init__(media_type="text/event-stream")
        self._asking, self._events, self._first, self._with_usage = asking, events, first, with_usage
        self._held = held

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for line in self._lines():
                await send({"type": "http.response.body", "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._held.close()

    async def _lines(self) -> AsyncIterator[bytes]:
        name, created, model = _answer_id(), int(time.time()), self._asking.service.name
        more: dict[str, Any] = {"usage": None} if self._with_usage else {}

        def chunk(delta: Mapping[str, Any], reason: str | None = None) -> bytes:
            return _line(schema.chunk(name, created, model, delta, reason) | more)

        yield chunk({"role": "assistant", "content": ""})
        try:
            async for event in self._all():
                if isinstance(event, str):
                    yield chunk({"content": event})
                    continue
                yield chunk({}, event.reason)
                if self._with_usage:
                    last = schema.chunk(name, created, model, {})
                    yield _line(last | {"choices": [], "usage": self._asking.usage(event)})
        except ApiError as error:
            yield _line(error.body())
        yield b"data: [DONE]\n\n"

    async def _all(self) -> AsyncIterator[str | Done]:
        if self._first is not None:
            yield self._first
        async for event in self._events:
            yield event


def _answer_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _line(record: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(record) + b"\n\n"


async def read_body(request: Request, limits: Limits) -> bytes:
    """Raises `ApiError` for a body that is too large, no JSON by its header, or does not arrive."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also what a page of another site may not send unasked
        raise ApiError(415, "The content type must be application/json.", code="unsupported_media_type")
    too_large = ApiError(
        413, f"The body has more than {limits.max_body_bytes:,} bytes.", code="request_too_large",
        headers={"Connection": "close"},
    )  # fmt: skip
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > limits.max_body_bytes:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "The body ended early.", code="invalid_json")
                data += message.get("body", b"")
                if len(data) > limits.max_body_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(data)
    except TimeoutError:
        raise ApiError(
            408, f"The body did not arrive within {limits.body_timeout_s:g} s.", code="timeout",
            headers={"Connection": "close"},
        ) from None  # fmt: skip


_REF = "#/components/schemas/{model}"
_SCHEMAS: dict[str, Any] = {}
for _asked in (ChatRequest, LooksRequest):
    _schema = _asked.model_json_schema(ref_template=_REF)
    _SCHEMAS |= {**_schema.pop("$defs"), _asked.__name__: _schema}


def _body(kind: type) -> dict[str, Any]:
    """A body is read by hand, within limits, so that FastAPI does not see its type."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model=kind.__name__)}}}
    return {"requestBody": {"content": content, "required": True}}


def build_app(service: Service, key: str | None) -> FastAPI:
    """The application. ``service`` is closed with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="Beholder", docs_url=None, redoc_url=None, lifespan=lifespan)

    @app.get("/health")
    async def health() -> Response:
        alive = service.batcher.alive
        status = {"status": "ok" if alive else "stopping", "needs_key": key is not None}
        return JSONResponse(status, 200 if alive else 503)

    add_pages(app, Path(__file__).parent / "page", PAGE)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse(schema.models(service.described))

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        _check_model(service, name)
        return JSONResponse(service.described)

    @app.post(CHAT, openapi_extra=_body(ChatRequest))
    async def chat(request: Request) -> Response:
        return await _chat(service, request)

    @app.post(LOOKS, openapi_extra=_body(LooksRequest))
    async def looked_at(request: Request) -> Response:
        return await _looked_at(service, request)

    answer_errors(app, "The server failed; its log has the reason.")
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        told = describe()
        told.setdefault("components", {}).setdefault("schemas", {}).update(_SCHEMAS)
        return told

    app.openapi = openapi
    routes = frozenset(path for route in app.routes if (path := getattr(route, "path", None)))
    app.add_middleware(Guard, key=key, pages=PAGE, told=partial(service.metrics.answered, routes))
    return app


async def _chat(service: Service, request: Request) -> Response:
    service.take_place()
    with ExitStack() as held:
        held.callback(service.leave_place)
        asked = schema.read_request(await read_body(request, service.limits))
        _check_model(service, asked.model)
        decoding_of(asked, service.limits)
        asking = Asking(service, request)
        held.callback(asking.leave)
        asking.submit(await service.prepare(asked), asked)
        in_pieces, options = asked.stream, asked.stream_options or schema.StreamOptions()
        del asked  # and the pictures with it, as the model has what it wants of them
        events = asking.events()
        if in_pieces:
            first = await anext(events, None)
            return EventStream(asking, events, first, with_usage=options.include_usage, held=held.pop_all())
        text, done = "", None
        async for event in events:
            if isinstance(event, Done):
                done = event
            else:
                text += event
        if done is None:
            return Response(status_code=499)
        return JSONResponse(schema.completion(_answer_id(), service.name, text, done.reason, asking.usage(done)))


async def _looked_at(service: Service, request: Request) -> Response:
    service.take_place()
    with ExitStack() as held:
        held.callback(service.leave_place)
        asked = schema.read_request(await read_body(request, service.limits), LooksRequest)
        _check_model(service, asked.model)
        asking = Asking(service, request)
        held.callback(asking.leave)
        prompt, spans = await service.prepare_looks(asked)
        del asked
        num_images = len(prompt.images)

        def look(wanted: Callable[[], bool]) -> Looks:
            return looks(service.vlm, prompt, spans, service.hidden, rows=service.limits.max_batch, wanted=wanted)

        found = await asking.result(look)
        if found is None:
            return Response(status_code=499)
        variants = 2 + (num_images if num_images > 1 else 0)
        service.metrics.tokens.labels("prompt").inc(variants * len(prompt.encoded.ids))
        return JSONResponse(schema.looked(service.name, found, num_images))


def _check_model(service: Service, name: str) -> None:
    if name != service.name:
        raise ApiError(
            404, f"The model '{name[:80]}' does not exist; this server has '{service.name}'.", param="model",
            code="model_not_found",
        )  # fmt: skip
