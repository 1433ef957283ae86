"""The routes of ``beholder watch``, all of them GET, and its server."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from beholder.runs import to_json
from beholder.types import UserError
from beholder.watching.so_far import SoFar
from beholder.watching.state import album, state
from beholder.web.errors import answer_errors
from beholder.web.guard import Guard
from beholder.web.pages import HEADERS, Pages, add_pages
from beholder.web.server import listen, server_for, url_of

PAGE: Pages = {
    "/": ("watch.html", "text/html"), "/watch.css": ("watch.css", "text/css"),
    "/watch.js": ("watch.js", "text/javascript"),
}  # fmt: skip
EVERY_S = 1.0
"""The folder is looked at no more often, however many ask."""

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


def build_watch(run: str | Path, key: str | None = None) -> FastAPI:
    """The application for ``run``, a folder that may not be there yet."""
    viewer = Viewer(run)
    app = FastAPI(title="Beholder watch", docs_url=None, redoc_url=None, openapi_url=None)
    add_pages(app, Path(__file__).parent, PAGE)

    async def told(name: str, request: Request) -> Response:
        tag, body = await viewer.get(name)
        head = HEADERS | {"ETag": tag}
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

    answer_errors(app, "The run could not be read; the terminal has the reason.")
    app.add_middleware(Guard, key=key, pages=PAGE)
    return app


def watch(
    run: str | Path, *, host: str = "127.0.0.1", port: int = 8001, key: str | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:  # fmt: skip
    """Show ``run``, which may not have begun, until SIGTERM or Ctrl-C. ``ready`` is told the address.

    Raises `UserError` for a ``run`` that is a file, and where others could reach the address and there is no key.
    """
    if Path(run).exists() and not Path(run).is_dir():
        raise UserError(f"{run} is a file; give the folder of a run (its output_dir and run_name)")
    with listen(host, port, key) as listening:
        ready(f"{url_of(listening)}/")
        server_for(build_watch(run, key)).run(sockets=[listening])
