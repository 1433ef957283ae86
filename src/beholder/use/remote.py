"""A server with OpenAI's API, asked with care: the one address that was named, in bounded time, for a bounded answer.

No redirect is followed and no proxy of the environment is used, so that nothing (and no key) goes anywhere else.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import SplitResult, urlsplit

import orjson

from beholder.types import UserError, printable
from beholder.web.exchange import exchange

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_BYTES = 4_000_000
"""Of an answer."""
RETRIES = 4
"""After a 429 or a 503."""
MAX_PAUSE_S = 10.0


class Refused(Exception):
    """The server says that it does not answer this request; the message is its own."""


@dataclass(frozen=True)
class Answered:
    """An answer, and how long the server found its prompt."""

    text: str
    finish_reason: str
    prompt_tokens: int | None


class Remote:
    """The server whose API is at ``url`` (``http://127.0.0.1:8000/v1``; ``/v1`` may be left out).

    Raises `UserError` for a URL that is neither https nor of this machine.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout_s: float = 120.0) -> None:
        self.url, self._key, self._timeout_s = url, key, timeout_s
        self._parts = _checked(url)
        self._path = self._parts.path.rstrip("/") or "/v1"

    def model(self) -> str:
        """The one model that the server has. Raises `UserError` where there are several, or none."""
        try:
            listed = self._ask("GET", "/models", None)
            names = [str(row["id"]) for row in listed["data"]]
        except Refused as error:
            raise UserError(f"{self.url} does not list its models: {error}") from None
        except (KeyError, TypeError):
            raise UserError(
                f"{self.url} does not list its models as OpenAI's API does; name one with --model"
            ) from None
        if len(names) != 1:
            some = f": {printable(', '.join(names[:8]))}" if names else ""
            raise UserError(f"{self.url} has {len(names)} models{some}; name the one to compare with --model")
        return names[0]

    def answer(self, model: str, messages: list[dict[str, Any]], max_tokens: int) -> Answered:
        """The greedy answer to a conversation. Raises `Refused` for what the server does not take, `UserError` where it
        cannot be asked at all."""
        body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        told = self._ask("POST", "/chat/completions", body)
        try:
            choice = told["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
            if not isinstance(text, str):
                raise TypeError
        except (KeyError, IndexError, TypeError, AttributeError):
            raise UserError(f"{self.url} answers, but not as OpenAI's chat completions do") from None
        used = told.get("usage")
        tokens = used.get("prompt_tokens") if isinstance(used, dict) else None
        return Answered(text, str(reason), tokens if isinstance(tokens, int) else None)

    def _ask(self, method: str, route: str, body: Mapping[str, Any] | None) -> Any:
        once = partial(self._once, method, self._path + route, None if body is None else orjson.dumps(body))
        status, pause, data = once()
        for _ in range(RETRIES):
            if status not in (429, 503):
                break
            time.sleep(pause)
            status, pause, data = once()
        try:
            told = orjson.loads(data)
        except orjson.JSONDecodeError:
            told = None
        if status == 200 and isinstance(told, dict):
            return told
        says = _message(told)
        match status:
            case 200:
                raise UserError(f"{self.url} answers {route} with what is no JSON object")
            case 401 | 403:
                raise UserError(f"{self.url} wants another key (status {status}): {says}; name it with --api-key-env")
            case 400 | 413 | 422:
                raise Refused(f"status {status}: {says}")
            case _:
                raise UserError(f"{self.url} answers {route} with status {status}: {says}")

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, float, bytes]:
        """(status, seconds to wait before trying again, body)"""
        parts, until = self._parts, time.monotonic() + self._timeout_s
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        head = {"Accept": "application/json"}
        head |= {} if body is None else {"Content-Type": "application/json"}
        head |= {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        try:
            status, told, data = exchange(
                host, port, method, path, until=until, max_bytes=MAX_BYTES, tls=parts.scheme == "https", headers=head,
                body=body,
            )  # fmt: skip
        except TimeoutError:
            raise UserError(f"{self.url} did not answer within {self._timeout_s:g} s") from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UserError(f"{self.url} cannot be asked: {printable(why)}") from None
        if len(data) > MAX_BYTES:
            raise UserError(f"{self.url} answers with more than {MAX_BYTES:,} bytes")
        return status, _pause(told.get("Retry-After")), data


def _checked(url: str) -> SplitResult:
    try:
        if not (url.isascii() and url.isprintable()) or " " in url:
            raise ValueError
        parts = urlsplit(url)
        parts.port  # noqa: B018  (raises ValueError for what is no number)
        if not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError
    except ValueError:
        raise UserError(
            f"{url[:200]!r} is no address of a server, expected one like http://127.0.0.1:8000/v1"
        ) from None
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise UserError(
            f"{url[:200]}: held-out pictures and a key would travel unencrypted; expected https, or http to this "
            f"machine ({', '.join(LOOPBACK)})"
        )
    return parts


def _message(told: Any) -> str:
    """What an error says, in OpenAI's form or FastAPI's."""
    for key in ("error", "detail", "message"):
        found = told.get(key) if isinstance(told, dict) else None
        found = found.get("message") if isinstance(found, dict) else found
        if isinstance(found, str):
            return printable(found[:400])
    return "it does not say why"


def _pause(given: str | None) -> float:
    return min(float(given), MAX_PAUSE_S) if given is not None and given.isdecimal() else 1.0
