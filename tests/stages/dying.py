"""A run that dies on its way, in this process: an error out of the evaluation after a step.

What it had measured and kept until then is there, since the real evaluation is called. Death by a signal, which leaves
no chance to clean up, is `test_peers`', `test_kill_resume`'s and `test_guard`'s, in processes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from beholder.stages.watch import Watch


@contextmanager
def dying_at(step: int, *, measured: bool = True) -> Iterator[None]:
    """What runs inside dies after that many steps; ``measured``: after what it read then was logged, else before."""
    real = Watch.on_step

    def on_step(self: Watch, at: int, record: Any) -> Any:
        if at == step and not measured:
            raise RuntimeError("planted")
        found = real(self, at, record)
        if at == step:
            raise RuntimeError("planted")
        return found

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="planted"):
        patch.setattr(Watch, "on_step", on_step)
        yield
