"""A server of a tiny run in a thread of its own, and what tests ask it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tests.web.running import KEY, running

from beholder.use.serving.app import Service, build_app
from beholder.use.serving.conversation import Limits
from beholder.use.serving.pictures import Fetcher, Pictures
from beholder.use.vlm import Vlm

__all__ = ["KEY", "Running", "asking", "data_uri", "see", "serving"]


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
    app = build_app(service, key)
    with running(app, key, patience_s=limits.body_timeout_s, grace_s=limits.grace_s) as (port, server):
        yield Running(port, service, server)


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
