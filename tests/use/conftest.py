"""What tests of a run in use share. A module says which ``run``, and which server of it is ``tiny``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.conftest import TinyParts

from beholder.use.vlm import Vlm, load

if TYPE_CHECKING:  # it needs the extra serve
    from tests.use.serving import Running


@pytest.fixture(scope="module")
def vlm(run: Path) -> Vlm:
    return load(run, device="cpu")


@pytest.fixture(scope="module")
def images(tiny_parts: TinyParts) -> list[Path]:
    return sorted(tiny_parts.images.glob("*.png"))[:6]


@pytest.fixture(scope="module")
def web(tiny: Running) -> Iterator[Any]:
    import httpx

    with httpx.Client(base_url=tiny.url, timeout=60, trust_env=False) as client:
        yield client
