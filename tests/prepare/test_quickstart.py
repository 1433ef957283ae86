"""What is asked of the quickstart and cannot be given is refused before anything is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from beholder.prepare.quickstart import run_quickstart
from beholder.types import UserError


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"part": "fourth"}, "no part 'fourth'; its parts are align, instruct, multi"),
        ({"resume": "outputs/x"}, "--resume of the quickstart is auto or never"),
        ({"overrides": ["multi.train.train_steps=3"]}, "multi.train.train_steps=3 is for a part that is not run"),
        ({"part": "align", "scale": "full"}, "--scale full is for the later parts, and only align is run"),
    ],
)
def test_what_no_part_takes_is_refused(asked: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run_quickstart(tmp_path, **asked)

    assert not list(tmp_path.iterdir())
