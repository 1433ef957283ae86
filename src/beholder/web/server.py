"""The listening process: where it may listen, how it stops, and clients that are too slow."""

from __future__ import annotations

import ipaddress
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from beholder.types import UserError

MAX_CONNECTIONS = 512


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with a bound on how long a client may take over its headers, or over reading."""

    patience_s: float

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


PATIENCE_S, GRACE_S = 10.0, 30.0


def server_for(app: FastAPI, *, patience_s: float = PATIENCE_S, grace_s: float = GRACE_S) -> Server:
    """A server of ``app`` for sockets of `listen`. ``patience_s``: for the headers of a request to arrive, and for a
    reader to take what it is sent. ``grace_s``: for what is being answered when the server is told to stop."""
    protocol = type("Protocol", (PatientProtocol,), {"patience_s": patience_s})
    return Server(
        uvicorn.Config(
            app, http=protocol, ws="none", lifespan="on", log_level="error", access_log=False, server_header=False,
            proxy_headers=False, limit_concurrency=MAX_CONNECTIONS, timeout_keep_alive=5,
            timeout_graceful_shutdown=max(1, round(grace_s)),
        )
    )  # fmt: skip


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


def url_of(listening: socket.socket) -> str:
    """Where a listening socket is asked, without a path."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
