"""A server in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from beholder.web.server import listen, server_for

KEY = "a-key-of-the-tests-0123456789"


@contextmanager
def running(
    app: Any, key: str | None = None, *, patience_s: float = 5, grace_s: float = 2
) -> Iterator[tuple[int, Any]]:
    """The port that ``app`` answers at, and its server."""
    listening = listen("127.0.0.1", 0, key)
    port = int(listening.getsockname()[1])
    server = server_for(app, patience_s=patience_s, grace_s=grace_s)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="server")
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        assert server.started
        yield port, server
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
