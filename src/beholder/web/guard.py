"""What stands before every route: the key, and the name that the server is called by."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable, Container, MutableMapping
from typing import Any

from beholder.web.errors import ApiError, error_response

OPEN = ("/health",)
"""Routes that need no key."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Told = Callable[[str, str, float], None]
"""Is told of every answer: path, status (499: nobody was there any more), seconds."""


class Guard:
    """Around the whole application, so that a route that is added later is guarded too.

    ``key`` None: whoever reaches the port may ask, as long as they call it by a name of this machine (a page in a
    browser that points its own name here does not). ``pages``: paths that may be read without the key.
    """

    def __init__(
        self, app: Any, *, key: str | None, pages: Container[str] = (),
        told: Told = lambda path, status, seconds: None,
    ) -> None:  # fmt: skip
        self._app, self._pages, self._told = app, pages, told
        self._digest = None if key is None else hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun, status = time.monotonic(), "499"

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
            self._told(scope["path"], status, time.monotonic() - begun)

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
        if scope["path"] in self._pages and scope["method"] in ("GET", "HEAD"):
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
