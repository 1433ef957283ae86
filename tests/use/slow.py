"""A model that takes its time, for tests of what happens meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from beholder.use.vlm import Vlm


@contextmanager
def slowly(vlm: Vlm, seconds: float) -> Iterator[list[int]]:
    """Inside, every step of the language model takes so much longer; the rows of each step so far."""
    rows: list[int] = []

    def wait(module: Any, args: Any, given: dict[str, Any]) -> None:
        time.sleep(seconds)
        there = given.get("inputs_embeds")
        there = there if there is not None else given.get("input_ids", args[0] if args else None)
        rows.append(0 if there is None else int(there.shape[0]))

    hook = vlm.model.language.model.register_forward_pre_hook(wait, with_kwargs=True)
    try:
        yield rows
    finally:
        hook.remove()
