"""How a run's record says that it ended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from beholder.runs import RunDir
from beholder.stages.lifetime import honest_status
from beholder.train.distributed import Dist
from beholder.types import Status


@pytest.mark.parametrize(
    ("reached", "told"),
    [
        (Status.RUNNING, Status.CANCELLED),
        (Status.SUCCEEDED, Status.SUCCEEDED),  # a study would measure it again
        (Status.STOPPED_BY_GUARDRAIL, Status.STOPPED_BY_GUARDRAIL),
    ],
)
def test_a_signal_while_a_run_tidies_up_does_not_undo_its_end(tmp_path: Path, reached: Status, told: Status) -> None:
    run = RunDir(tmp_path / "run")
    run.create()

    with pytest.raises(SystemExit), honest_status(run, Dist(device=torch.device("cpu"))):
        run.set_status(reached)
        raise SystemExit(143)

    assert run.read_status() == told


def test_an_error_after_the_end_is_still_a_failure(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()

    with pytest.raises(OSError), honest_status(run, Dist(device=torch.device("cpu"))):
        run.set_status(Status.SUCCEEDED)
        raise OSError("the disk is full")

    assert run.read_status() == Status.FAILED
