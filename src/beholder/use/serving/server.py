"""The listening process: where it may listen, with which key, how it stops, and clients that are too slow."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from beholder.types import UserError
from beholder.use.serving.app import Service, build_app
from beholder.use.serving.conversation import Limits
from beholder.use.serving.pictures import Fetcher, Pictures, allowed_hosts
from beholder.use.vlm import load

MIN_KEY = 16
"""Characters of a key; shorter ones are guessed."""
MAX_CONNECTIONS = 512


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with a bound on how long a client may take over its headers, or over reading."""

    patience_s = 10.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._headers: Any = self.loop.call_later(self.patience_s, self._too_slow)
        self._reader: Any = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._between_requests():
            if self._headers is None:
                self._headers = self.loop.call_later(self.patience_s, self._too_slow)
        elif self._headers is not None:
            self._headers.cancel()
            self._headers = None

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._reader is None:
            self._reader = self.loop.call_later(self.patience_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_reader()
        if self._headers is not None:
            self._headers.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._say(400, "Bad Request", "invalid_http", msg)

    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _too_slow(self) -> None:
        self._headers = None
        if self._between_requests() and not self.transport.is_closing():
            self._say(408, "Request Timeout", "timeout", f"The request did not arrive within {self.patience_s:g} s.")

    def _say(self, status: int, phrase: str, code: str, message: str) -> None:
        """An answer to what is no request, and the end of the connection."""
        body = (
            f'{{"error":{{"message":"{message}","type":"invalid_request_error","param":null,"code":"{code}"}}}}'
        ).encode()
        head = (
            f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        if self.cycle is None or self.cycle.response_complete:  # else it would stand inside an answer
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _stop_reader(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None


class Server(uvicorn.Server):
    """Ends by itself after SIGTERM or Ctrl-C, rather than by the signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # Python delivers signals nowhere else
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def server_for(app: FastAPI, limits: Limits) -> Server:
    """A server of ``app`` for sockets of `listen`."""
    protocol = type("Protocol", (PatientProtocol,), {"patience_s": limits.body_timeout_s})
    return Server(
        uvicorn.Config(
            app, http=protocol, ws="none", lifespan="on", log_level="error", access_log=False, server_header=False,
            proxy_headers=False, limit_concurrency=MAX_CONNECTIONS, timeout_keep_alive=5,
            timeout_graceful_shutdown=max(1, round(limits.grace_s)),
        )
    )  # fmt: skip


def key_from(name: str | None, environ: Mapping[str, str]) -> str | None:
    """The key in the environment variable ``name``. Raises `UserError` for one that is no key."""
    if name is None:
        return None
    key = environ.get(name, "")
    if not key:
        raise UserError(f"--api-key-env {name}: there is no such environment variable, or it is empty")
    if len(key) < MIN_KEY or not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(
            f"--api-key-env {name}: the key must have at least {MIN_KEY} characters, ASCII without blanks; make one "
            "with: openssl rand -hex 32"
        )
    return key


def listen(host: str, port: int, key: str | None) -> socket.socket:
    """A listening socket. Raises `UserError` where others could reach it and there is no key."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: {error}") from None
    family, kind, protocol, _, address = found[0]
    if key is None and not ipaddress.ip_address(address[0]).is_loopback:
        raise UserError(
            f"--host {host} can be reached from other machines, so a key is needed: put one into an environment "
            "variable and name it with --api-key-env, or listen on 127.0.0.1"
        )
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise UserError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    return listening


def serve(
    run: str, *, host: str = "127.0.0.1", port: int = 8000, key: str | None = None, name: str | None = None,
    limits: Limits | None = None, image_hosts: Sequence[str] = (), device: str = "auto",
    overrides: Sequence[str] = (), ready: Callable[[str, str], None] = lambda url, name: None,
) -> None:  # fmt: skip
    """Serve ``run`` until SIGTERM or Ctrl-C. ``ready`` is told the address and the model's name.

    Raises `UserError` before the model is loaded for what cannot be.
    """
    limits = limits or Limits()
    try:
        hosts = allowed_hosts(image_hosts)
    except ValueError as error:
        raise UserError(f"--allow-image-host {error}: expected a host such as images.example.org") from None
    with listen(host, port, key) as listening:
        vlm = load(run, device=device, overrides=overrides)
        pictures = Pictures(
            limits.max_image_bytes, min(limits.max_megapixels, vlm.cfg.data.max_megapixels),
            Fetcher(hosts, limits.max_image_bytes),
        )  # fmt: skip
        service = Service(vlm, name or vlm.cfg.run_name, limits, pictures)
        at = listening.getsockname()
        shown = f"[{at[0]}]" if ":" in at[0] else at[0]
        ready(f"http://{shown}:{at[1]}/v1", service.name)
        server_for(build_app(service, key), limits).run(sockets=[listening])


def serve_named(run: str, key_env: str | None, **settings: Any) -> None:
    """As `serve`, with the key in the environment variable ``key_env``."""
    serve(run, key=key_from(key_env, os.environ), **settings)
