"""What stands before every route: the key, the name the server is called by, counting; and how errors look."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from beholder.use.serving.schema import ApiError

OPEN = ("/health",)
"""Routes that need no key."""
PAGE = {
    "/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css"), "/page.js": ("page.js", "text/javascript"),
}  # fmt: skip
"""The page to talk to the model, which says nothing of it: a browser asks for it before anybody can type a key."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Metrics:
    """What ``/metrics`` tells, in a registry of its own."""

    def __init__(self, waiting: Callable[[], float], running: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("beholder_requests_total", "Requests by route and status.", ["route", "code"], **made)
        self.seconds = Histogram("beholder_request_seconds", "Until the end of the answer.", ["route"], **made)
        self.first = Histogram("beholder_first_token_seconds", "Until the first piece of an answer.", **made)
        self.tokens = Counter("beholder_tokens_total", "Tokens read and written.", ["kind"], **made)
        self.rows = Histogram(
            "beholder_batch_rows", "Answers written together.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **made
        )
        Gauge("beholder_waiting", "Answers that wait for the model.", **made).set_function(waiting)
        Gauge("beholder_running", "Answers that are being written.", **made).set_function(running)


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, dict(error.headers or {}))


class Guard:
    """Around the whole application, so that a route that is added later is guarded too.

    ``key`` None: whoever reaches the port may ask, as long as they call it by a name of this machine (a page in a
    browser that points its own name here does not).
    """

    def __init__(self, app: Any, *, key: str | None, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app, self._metrics, self._routes = app, metrics, routes
        self._digest = None if key is None else hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun, status = time.monotonic(), "499"  # nobody was there any more

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            refused = self._refused(scope)
            if refused is not None:
                await error_response(refused)(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        finally:
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - begun)

    def _refused(self, scope: Scope) -> ApiError | None:
        if scope["path"] in OPEN:
            return None
        if self._digest is None:
            host = _header(scope, b"host").decode("latin-1").lower()
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name in LOOPBACK:
                return None
            return ApiError(
                403, f"Without a key the server answers to {', '.join(LOOPBACK)} alone; start it with --api-key-env "
                "to call it by another name.", code="host_not_allowed",
            )  # fmt: skip
        if scope["path"] in PAGE and scope["method"] in ("GET", "HEAD"):
            return None
        scheme, _, token = _header(scope, b"authorization").partition(b" ")
        given = hashlib.sha256(token.strip()).digest()
        if scheme.lower() == b"bearer" and hmac.compare_digest(given, self._digest):
            return None
        return ApiError(
            401, "Missing or incorrect API key. Send it as the header Authorization: Bearer KEY.",
            code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip


def _header(scope: Scope, name: bytes) -> bytes:
    """The only header of this name; nothing when there are several."""
    found = [value for key, value in scope["headers"] if key == name]
    return found[0] if len(found) == 1 else b""
