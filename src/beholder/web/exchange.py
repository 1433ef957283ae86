"""One HTTP request to one address, in bounded time, for a bounded answer. No redirect is followed, no proxy used."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from http.client import HTTPMessage


def exchange(
    host: str,
    port: int,
    method: str,
    target: str,
    *,
    until: float,
    max_bytes: int,
    tls: bool,
    address: str | None = None,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
    reads: Callable[[int], bool] = lambda status: True,
) -> tuple[int, HTTPMessage, bytes]:
    """(status, headers, body) of an answer: of the body at most ``max_bytes`` and one more, and nothing of it unless
    ``reads`` says so of the status. ``address``: the IP to connect to, whatever ``host`` resolves to. ``until``: on
    the clock of `time.monotonic`.

    Raises TimeoutError, OSError and http.client.HTTPException.
    """
    with ExitStack() as stack:
        here = stack.enter_context(socket.create_connection((address or host, port), timeout=left(until)))
        if tls:
            wrap = ssl.create_default_context().wrap_socket  # gives a new object, to which the connection goes over
            here = stack.enter_context(wrap(here, server_hostname=host, do_handshake_on_connect=False))
        # A timeout of a socket is for one read; a server that trickles would never meet it.
        watch = threading.Timer(left(until), _hang_up, (here,))
        watch.start()
        stack.callback(watch.cancel)
        try:
            if isinstance(here, ssl.SSLSocket):
                here.do_handshake()
            connection = http.client.HTTPConnection(host, port)
            connection.sock = here
            connection.request(method, target, body, {"Connection": "close", **(headers or {})})
            with connection.getresponse() as response:
                data = response.read(max_bytes + 1) if reads(response.status) else b""
                status, told = response.status, response.headers
        except (OSError, http.client.HTTPException):
            left(until)  # whatever it looks like when the watch has hung up
            raise
        left(until)
        return status, told, data


def left(until: float) -> float:
    """Seconds. Raises TimeoutError when there are none."""
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
