"""Files for a browser: a page and what belongs to it, with headers that let nothing else in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache", "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}  # fmt: skip
"""Nothing but the server itself is asked, no other page may show this one, and no text can become a program."""

Pages = Mapping[str, tuple[str, str]]
"""(file, media type) by path. They say nothing of what is served: a browser asks for them before anybody can type a
key."""


def add_pages(app: FastAPI, folder: Path, pages: Pages) -> None:
    """Routes for ``pages``, read once from ``folder``."""
    for path, (file, kind) in pages.items():
        app.add_api_route(path, _sends(folder / file, kind), methods=["GET", "HEAD"], include_in_schema=False)


def _sends(file: Path, kind: str) -> Callable[[], Response]:
    content = file.read_bytes()
    return lambda: Response(content, media_type=kind, headers=HEADERS)
