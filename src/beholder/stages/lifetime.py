"""One writer a folder, and a record that is honest about how the run ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from beholder.config import RunConfig
from beholder.evidence.guardrails import judge, readings
from beholder.runs import RunDir, warn_to_stderr
from beholder.train import restore
from beholder.train.distributed import Dist
from beholder.train.nonfinite import NonFiniteError
from beholder.train.peers import describe
from beholder.types import Status, UserError


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
    """Whatever ends a run early is written into ``run.json`` as what it is: not that the connection to another process
    broke or that torchrun sent a signal, but why that process ended."""

    def write(error: BaseException) -> None:
        # The second is an evaluation whose loss is not finite.
        stopped = isinstance(error, NonFiniteError | FloatingPointError)
        status = Status.STOPPED_BY_GUARDRAIL if stopped else Status.FAILED
        if not (dist.is_main and run.run_path.exists()):
            return
        try:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                if run.read_status() in (Status.SUCCEEDED, Status.STOPPED_BY_GUARDRAIL):
                    return  # it has ended and its evidence is written: a signal while it tidies up changes nothing
                status = Status.CANCELLED
            run.set_status(status, error=describe(error))
        except (UserError, OSError) as e:  # the error that is under way says more
            warn_to_stderr(f"{run.run_path} cannot say how the run ended: {e}")

    if dist.peers is not None:
        dist.peers.on_failure = write
    try:
        yield
    except BaseException as e:
        cause = dist.cause(e)
        write(cause)
        if cause is e:
            raise
        raise cause from e


def is_finished(run: RunDir, source: Path | None, cfg: RunConfig) -> bool:
    """Whether the run's last step was trained and its evidence written: then there is nothing left to do.

    A run that its guardrail stopped has trained its last step, too, unless the config's guardrails no longer stop it or
    say another reason.
    """
    if source is None or not (run.path / "evidence.json").is_file():
        return False
    record = run.read_json("run.json")
    ended = record.get("status") == Status.SUCCEEDED
    if record.get("status") == Status.STOPPED_BY_GUARDRAIL and record.get("stopped"):
        stop = judge(readings(run.metrics()), cfg.guards)
        ended = stop is not None and stop.sentence == record["stopped"]
    return ended and record.get("step") == restore.read_trainer(source)["step"]
