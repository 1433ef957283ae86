"""The routes of ``beholder watch``, all of them GET, and its server: what stands before them is that of ``serve``."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from beholder.runs import to_json
from beholder.types import UserError
from beholder.use.serving.conversation import Limits
from beholder.use.serving.guard import Guard, Metrics, error_response
from beholder.use.serving.schema import ApiError
from beholder.use.serving.server import key_from, listen, server_for
from beholder.use.watching.so_far import SoFar
from beholder.use.watching.state import album, state

PAGE = {
    "/": ("watch.html", "text/html"), "/watch.css": ("watch.css", "text/css"),
    "/watch.js": ("watch.js", "text/javascript"),
}  # fmt: skip
"""The page, which says nothing of the run: a browser asks for it before anybody can type a key."""
EVERY_S = 1.0
"""The folder is looked at no more often, however many ask."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}  # fmt: skip

Scope = MutableMapping[str, Any]
_Made = tuple[str, bytes]


class Viewer:
    """The folder as it was last looked at, made into bytes once for all who ask."""

    def __init__(self, run: str | Path) -> None:
        self.look = SoFar(run)
        self._busy = asyncio.Lock()
        self._at = float("-inf")
        self._made: dict[str, _Made] = {}
        self._album_of: int | None = None

    async def get(self, name: str) -> _Made:
        """(ETag, body) of ``state`` or ``golden``, a second old at most."""
        async with self._busy:
            if time.monotonic() - self._at >= EVERY_S:
                await asyncio.to_thread(self._refresh)
                self._at = time.monotonic()
            return self._made[name]

    def _refresh(self) -> None:
        self.look.look()
        self._made["state"] = _bytes(state(self.look))
        if self._album_of != self.look.changed:
            self._made["golden"] = _bytes(album(self.look) if self.look.exists else {"steps": [], "cards": []})
            self._album_of = self.look.changed


def _bytes(told: dict[str, Any]) -> _Made:
    body = to_json(told).encode("utf-8", "replace")
    return f'"{hashlib.sha256(body).hexdigest()[:24]}"', body


class _Page:
    """Lets the page itself be had without the key."""

    def __init__(self, guarded: Any, bare: Any, key: str | None) -> None:
        self._guarded, self._bare, self._key = guarded, bare, key

    async def __call__(self, scope: Scope, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        free = scope["type"] == "http" and self._key is not None and scope["path"] in PAGE
        await (self._bare if free else self._guarded)(scope, receive, send)


def build_watch(run: str | Path, key: str | None = None) -> Any:
    """The application for ``run``, a folder that may not be there yet."""
    viewer = Viewer(run)
    app = FastAPI(title="Beholder watch", docs_url=None, redoc_url=None, openapi_url=None)
    files = {path: (Path(__file__).with_name(name).read_bytes(), kind) for path, (name, kind) in PAGE.items()}

    def page(body: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
        async def give() -> Response:
            return Response(body, media_type=f"{kind}; charset=utf-8", headers=HEADERS | {"Cache-Control": "no-cache"})

        return give

    for path, (body, kind) in files.items():
        app.add_api_route(path, page(body, kind), methods=["GET", "HEAD"])

    async def told(name: str, request: Request) -> Response:
        tag, body = await viewer.get(name)
        head = HEADERS | {"ETag": tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=head)
        return Response(body, media_type="application/json", headers=head)

    @app.get("/state")
    async def show_state(request: Request) -> Response:
        return await told("state", request)

    @app.get("/golden")
    async def show_golden(request: Request) -> Response:
        return await told("golden", request)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        says = f"{request.method} {request.url.path[:80]}: {error.detail}."
        return error_response(ApiError(error.status_code, says, code="unknown_url", headers=error.headers))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return error_response(ApiError(500, "The run could not be read; the terminal has the reason.", code="failed"))

    routes = frozenset({*PAGE, "/state", "/golden", "/health"})
    return _Page(Guard(app, key=key, metrics=Metrics(lambda: 0, lambda: 0), routes=routes), app, key)


def watch(
    run: str | Path, *, host: str = "127.0.0.1", port: int = 8001, key_env: str | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:  # fmt: skip
    """Show ``run``, which may not have begun, until SIGTERM or Ctrl-C. ``ready`` is told the address.

    Raises `UserError` for a ``run`` that is a file, and where others could reach the address and there is no key.
    """
    key = key_from(key_env, os.environ)
    if Path(run).exists() and not Path(run).is_dir():
        raise UserError(f"{run} is a file; give the folder of a run (its output_dir and run_name)")
    with listen(host, port, key) as listening:
        at = listening.getsockname()
        shown = f"[{at[0]}]" if ":" in at[0] else at[0]
        ready(f"http://{shown}:{at[1]}/")
        server_for(build_watch(run, key), Limits()).run(sockets=[listening])
