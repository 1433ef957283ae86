"""Kills a run with SIGKILL again and again and resumes it; test_kill_resume.py calls it.

kill_resume.py PARTS OUT NUM_KILLS SEED prints JSON. One warm process builds the model, runs straight once in a child,
then forks a child per life of the killed run, so that no life pays for imports. Half of the kills come at a random
time, half at a random system call of a random save.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_run import Tiny, settings, train

from beholder.runs import RunDir
from beholder.train.checkpoint import latest_checkpoint, problem

STEPS = 16
CFG = settings(micro_batch_size=2, gradient_accum=2, save_every=1, keep_checkpoints=2, packing=True)
CALLS = ("open", "write", "fsync", "mkdir", "rename", "rmdir", "unlink")
CALLS_PER_SAVE = 40


def fork(child: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child()
            code = 0
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_in_save(number_of_save: int, call: int) -> Callable[[int], None]:
    """An ``on_save`` that lets the process kill itself before the ``call``-th system call of its n-th save."""
    saves = [0]

    def on_save(step: int) -> None:
        saves[0] += 1
        if saves[0] != number_of_save:
            return
        left = [call]

        def counted(real: Any) -> Any:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return wrapper

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))

    return on_save


def main() -> None:
    parts, out, num_kills, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    tiny, rng = Tiny.at(parts), random.Random(seed)
    model = tiny.model(dropout=0.1)
    pristine = {k: v.clone() for k, v in model.connector.state_dict().items()}
    # A first backward and optimizer step import much; children inherit it. Only the connector and its gradients change.
    train(tiny, RunDir(out / "warm"), CFG, total_steps=1, model=model)

    def life(run: RunDir, on_save: Callable[[int], None] = lambda step: None) -> Callable[[], None]:
        def child() -> None:
            model.connector.load_state_dict(pristine)
            with run.lock():
                train(tiny, run, CFG, total_steps=STEPS, model=model, on_save=on_save)

        return child

    straight, killed = RunDir(out / "straight"), RunDir(out / "killed")
    began = time.perf_counter()
    assert wait(fork(life(straight))) == 0
    straight_s = time.perf_counter() - began

    kills: list[dict[str, Any]] = []
    lives = 0
    # Kills are spread over the run: each life may do about its share of the steps before it ends.
    share = max(1, STEPS // (num_kills + 1))
    while len(kills) < num_kills and lives < 10 * num_kills:
        lives += 1
        where = "in a save" if len(kills) % 2 else "at a time"
        if where == "in a save":
            pid = fork(life(killed, kill_in_save(rng.randint(1, share), rng.randint(1, CALLS_PER_SAVE))))
        else:
            pid = fork(life(killed))
            time.sleep(rng.uniform(0.02, share * straight_s / STEPS + 0.1))
            os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        steps = [p.name for p in killed.checkpoints.glob("step_*")] if killed.checkpoints.is_dir() else []
        latest = latest_checkpoint(killed.checkpoints, warn=lambda message: sys.exit(f"broken: {message}"))
        if code == -signal.SIGKILL:
            kills.append({"where": where, "latest": latest.name if latest else None, "checkpoints": len(steps)})
        else:
            assert code == 0, code
            if latest is not None and latest.name == f"step_{STEPS}":
                break  # it finished: no more to kill
        assert all(problem(killed.checkpoints / s) is None for s in steps), steps
    assert wait(fork(life(killed))) == 0
    leftovers = [p.name for p in killed.checkpoints.iterdir() if not p.name.startswith("step_")]
    print(json.dumps({"kills": kills, "straight_s": straight_s, "leftovers": leftovers}))


if __name__ == "__main__":
    main()
