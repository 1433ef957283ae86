"""A server of a tiny run in a thread of its own, and what tests ask it."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from beholder.use.serving.app import Service, build_app
from beholder.use.serving.conversation import Limits
from beholder.use.serving.pictures import Fetcher, Pictures
from beholder.use.serving.server import listen, server_for
from beholder.use.vlm import Vlm

KEY = "a-key-of-the-tests-0123456789"


@dataclass(frozen=True)
class Running:
    """A server, its address, and what is inside."""

    port: int
    service: Service
    server: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving(
    vlm: Vlm, *, key: str | None = None, limits: Limits | None = None, fetcher: Fetcher | None = None
) -> Iterator[Running]:
    """A server of ``vlm`` as the model "tiny"."""
    limits = limits or Limits(max_tokens=64, body_timeout_s=5, grace_s=20)
    pictures = Pictures(limits.max_image_bytes, limits.max_megapixels, fetcher or Fetcher())
    service = Service(vlm, "tiny", limits, pictures)
    listening = listen("127.0.0.1", 0, key)
    port = int(listening.getsockname()[1])
    server = server_for(build_app(service, key), limits)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="server")
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        assert server.started
        yield Running(port, service, server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def data_uri(image: Path | Image.Image | bytes, kind: str = "png") -> str:
    if isinstance(image, Path):
        image = image.read_bytes()
    if isinstance(image, Image.Image):
        held = io.BytesIO()
        image.save(held, kind)
        image = held.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def see(image: Any, text: str = "What colour?") -> list[dict[str, Any]]:
    """The content of a message about an image."""
    url = image if isinstance(image, str) else data_uri(image)
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]


def asking(content: Any = "What colour?", **more: Any) -> dict[str, Any]:
    """A body."""
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 8} | more
