"""The key of a server: its own, or the one that another server wants. It is never on a command line."""

from __future__ import annotations

import os
from collections.abc import Mapping

from beholder.types import UserError

MIN_KEY = 16
"""Characters of a server's own key; shorter ones are guessed."""


def key_in(name: str | None, environ: Mapping[str, str] = os.environ, *, least: int = 1) -> str | None:
    """The key in the environment variable ``name``. Raises `UserError` for one that is not there, that a header cannot
    carry, or of fewer than ``least`` characters."""
    if name is None:
        return None
    key = environ.get(name, "")
    if not key:
        raise UserError(f"--api-key-env {name}: there is no such environment variable, or it is empty")
    if len(key) < least or not (key.isascii() and key.isprintable()) or " " in key:
        make = f" and at least {least} characters; make one with: openssl rand -hex 32" if least > 1 else ""
        raise UserError(f"--api-key-env {name}: the key must have ASCII without blanks{make}")
    return key
