"""A job of two processes of which one fails: the other ends soon, with the cause, and ``run.json`` says it.

The processes are forked from this one, so that none pays for imports; they run the command itself.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import MakeConfig

from beholder import cli
from beholder.config.file import dump_config
from beholder.probes import loss
from beholder.stages import measure
from beholder.train import objectives, peers
from beholder.train.checkpoint import latest_checkpoint
from beholder.types import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.slow,  # seconds each on an idle core, but on a busy one a wait for another process takes what it takes
]


@dataclass
class Ended:
    code: int
    seconds: float
    """After the fault; negative for one that ended before."""
    said: str


def job(
    config: Path, fault: Callable[[int, Callable[[], None]], None], *, then: Callable[[list[int]], None] | None = None
) -> list[Ended]:
    """Two processes of ``beholder run CONFIG``, each with ``fault(rank, now)`` put in; ``now()`` notes the instant."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mark, pids = config.with_suffix(".fault"), []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
                )
                said = os.open(config.with_suffix(f".{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(said, 1)
                os.dup2(said, 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                sys.argv = ["beholder", "run", str(config)]
                fault(rank, lambda: mark.write_text(repr(time.time())))
                try:
                    cli.main()
                    code = 0
                except SystemExit as e:
                    code = int(e.code or 0)
                except BaseException:  # as Python ends on it
                    traceback.print_exc()
                    code = 1
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    if then is not None:
        while not mark.exists():
            time.sleep(0.05)
        then(pids)
    ended: dict[int, tuple[int, float]] = {}
    deadline = time.monotonic() + 120
    while len(ended) < 2:
        for pid in pids:
            if pid not in ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
                ended[pid] = (os.waitstatus_to_exitcode(found[1]), time.time())
        if time.monotonic() > deadline:
            for pid in pids:
                if pid not in ended:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    at = float(mark.read_text())
    return [
        Ended(ended[pid][0], ended[pid][1] - at, config.with_suffix(f".{rank}").read_text())
        for rank, pid in enumerate(pids)
    ]


def in_training(rank: int, what: Callable[[], Any], call: int = 3) -> Callable[[int, Callable[[], None]], None]:
    """``what()`` in the ``call``-th forward pass of process ``rank``."""

    def fault(mine: int, now: Callable[[], None]) -> None:
        calls, real = [0], objectives.next_token

        def objective(model: Any, batch: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                now()
                what()
            return real(model, batch)

        if mine == rank:
            objectives.OBJECTIVES["next_token"] = lambda *_: objective

    return fault


def in_evaluation(rank: int, what: Callable[[], Any]) -> Callable[[int, Callable[[], None]], None]:
    """``what()`` when process ``rank`` is to measure held-out losses the first time."""

    def fault(mine: int, now: Callable[[], None]) -> None:
        def sample_losses(*_: Any, **__: Any) -> Any:
            now()
            what()

        if mine == rank:
            loss.sample_losses = sample_losses

    return fault


def throw(error: BaseException) -> Callable[[], None]:
    def what() -> None:
        raise error

    return what


def hang() -> None:
    time.sleep(3600)


@pytest.fixture
def config(tiny_config: MakeConfig, tmp_path: Path) -> Callable[..., Path]:
    def make(**sets: Any) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(dump_config(tiny_config(tmp_path, **{"train.save_every": 1, **sets})))
        return path

    return make


def status(tmp_path: Path) -> tuple[str, str]:
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    return record["status"], record["error"]


@pytest.mark.parametrize("where", [in_training, in_evaluation])
@pytest.mark.parametrize(("error", "code", "kind"), [
    (KeyError("planted"), 1, "ProcessError"), (UserError("planted"), 2, "UserError"),
    (FloatingPointError("planted"), 4, "FloatingPointError"),
])  # fmt: skip
def test_a_failure_of_the_other_process_is_the_cause_and_what_it_is(
    config: Any, tmp_path: Path, where: Any, error: BaseException, code: int, kind: str
) -> None:
    main, other = job(config(), where(1, throw(error)))

    assert (main.code, other.code) == (code, 1 if code == 1 else code), main.said[-2000:]
    assert main.seconds < 5, main
    said = status(tmp_path)
    assert said[0] == ("stopped_by_guardrail" if code == 4 else "failed")
    assert said[1].startswith(f"{kind}: process 1 ") and "planted" in said[1], said
    assert "Traceback" not in main.said and ("Traceback" in other.said) == (code == 1)


def test_a_killed_process_is_named_and_the_run_goes_on_from_its_checkpoint(config: Any, tmp_path: Path) -> None:
    main, other = job(config(), in_training(1, lambda: os.kill(os.getpid(), signal.SIGKILL)))

    assert (main.code, other.code) == (1, -signal.SIGKILL) and main.seconds < 5, main
    assert status(tmp_path)[0] == "failed"
    assert "ProcessError: process 1 (pid " in status(tmp_path)[1] and "ended without a word" in status(tmp_path)[1]
    latest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert latest is not None and latest.name == "step_2"
    straight = job(config(), lambda rank, now: now())
    assert [e.code for e in straight] == [3, 0], straight[0].said[-2000:]  # four steps of random parts fail their gates
    assert "from " in straight[0].said and "after step 2" in straight[0].said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_hangs_ends_the_job_after_the_timeout_and_is_named(
    config: Any, tmp_path: Path, rank: int
) -> None:
    """Also the main one, which cannot write its own end: what waits for nothing but a clock is ended by a thread."""
    ended = job(config(**{"train.timeout_s": 3}), in_training(rank, hang))

    assert [e.code for e in ended] == [1, 1], ended
    assert all(3 <= e.seconds < 3 + 8 for e in ended), ended
    assert status(tmp_path)[0] == "failed"
    assert f"process {rank} did not come to where the others wait" in status(tmp_path)[1]
    assert "no sign of life for 3 s" in status(tmp_path)[1]


def test_an_error_after_the_others_have_ended_in_order_is_its_own_cause(config: Any, tmp_path: Path) -> None:
    def fault(rank: int, now: Callable[[], None]) -> None:
        def make_evidence(*_: Any) -> Any:
            now()
            if rank == 0:
                time.sleep(2)
                raise KeyError("planted")

        measure.make_evidence = make_evidence

    main, other = job(config(), fault)

    assert main.code == 1 and other.seconds < main.seconds, (main, other)
    assert status(tmp_path) == ("failed", "KeyError: 'planted'")


def test_a_signal_ends_a_process_that_waits_for_one_that_hangs(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "STOP_WAIT_S", 1.5)
    ended = job(config(), in_training(1, hang), then=lambda pids: [os.kill(pid, signal.SIGTERM) for pid in pids])

    assert [e.code for e in ended] == [143, 1] and all(e.seconds < 1.5 + 8 for e in ended), ended
    assert status(tmp_path)[0] == "cancelled"
