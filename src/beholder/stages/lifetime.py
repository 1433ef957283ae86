"""One writer a folder, and a record that is honest about how the run ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from beholder.runs import RunDir
from beholder.train import restore
from beholder.train.distributed import Dist
from beholder.train.nonfinite import NonFiniteError
from beholder.types import Status


@contextmanager
def sole_writer(run: RunDir, dist: Dist) -> Iterator[None]:
    """The main process holds the folder's lock; an error there reaches the others."""
    lock = run.lock() if dist.is_main else nullcontext()
    error: BaseException | None = None
    try:
        lock.__enter__()
    except Exception as e:
        error = e
    dist.raise_together(error)
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


@contextmanager
def honest_status(run: RunDir, dist: Dist) -> Iterator[None]:
    """Whatever ends a run early is written into ``run.json`` as what it is."""
    try:
        yield
    except BaseException as e:
        # The second is an evaluation whose loss is not finite.
        status = Status.STOPPED_BY_GUARDRAIL if isinstance(e, NonFiniteError | FloatingPointError) else Status.FAILED
        if isinstance(e, KeyboardInterrupt | SystemExit):
            status = Status.CANCELLED
        if dist.is_main and run.run_path.exists():
            run.set_status(status, error=f"{type(e).__name__}: {e}")
        raise


def is_finished(run: RunDir, source: Path | None) -> bool:
    """Whether the run's last step was trained and its evidence written: then there is nothing left to do."""
    if source is None or not (run.path / "evidence.json").is_file():
        return False
    record = run.read_json("run.json")
    return record.get("status") == Status.SUCCEEDED and record.get("step") == restore.read_trainer(source)["step"]
