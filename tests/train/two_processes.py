"""Scenarios of test_distributed.py, run on two processes: torchrun --nproc_per_node=2 two_processes.py PARTS OUT.

Each process writes what it saw to OUT/rank<r>.json.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_run import Tiny, settings, train

from beholder.runs import RunDir
from beholder.train.checkpoint import latest_checkpoint
from beholder.train.distributed import Dist, init_distributed, shutdown_distributed
from beholder.train.engine import NonFiniteError
from beholder.train.objectives import next_token
from beholder.types import Batch, LossTerms

EVEN = settings(micro_batch_size=3, gradient_accum=2, packing=True, save_every=2)
UNEVEN = settings(micro_batch_size=3, packing=False)
"""3 samples a step: one process has 2 of them, the other 1."""


def error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return "no error"


def scenarios(tiny: Tiny, out: Path, dist: Dist) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    other = dist.rank == 1

    # what processes say to each other
    mine = {"rank": dist.rank, "text": "é漢" * (1 + 50 * dist.rank), "none": None}
    seen["gathered"] = dist.gather_objects(mine)
    seen["sum"] = dist.all_reduce_sum([0.1 + dist.rank, float("inf") if other else 1.0])
    seen["on_main"] = dist.on_main(lambda: {"rank": dist.rank})
    seen["on_main_error"] = error_of(lambda: dist.on_main(lambda: 1 / 0))
    seen["same"] = error_of(lambda: dist.same_on_all_ranks("the data", "abc"))
    seen["not_same"] = error_of(lambda: dist.same_on_all_ranks("the data", f"abc{dist.rank}"))
    seen["together"] = error_of(lambda: dist.raise_together(ValueError("mine alone") if other else None))

    # the same run as one process, with as many and with unequal numbers of samples
    train(tiny, RunDir(out / "even"), EVEN, total_steps=6, dist=dist)
    train(tiny, RunDir(out / "uneven"), UNEVEN, total_steps=4, dist=dist)

    # a signal that reaches one process only
    class SignalToOne:
        def on_step(self, step: int, record: dict[str, Any]) -> None:
            if step == 3 and other:
                os.kill(os.getpid(), signal.SIGTERM)

    run = RunDir(out / "stopped")
    result = train(tiny, run, EVEN, total_steps=6, dist=dist, callbacks=[SignalToOne()]).result
    dist.barrier()
    seen["signal"] = [result.status, result.signal, result.step]
    resumed = train(tiny, run, EVEN, total_steps=6, dist=dist).result
    seen["resumed"] = [resumed.status, resumed.steps_run]

    # a loss that is not finite in a sample of one process
    model = tiny.model()
    stream = tiny.stream(model, EVEN, multi_image_fraction=0.0)
    bad = stream.mixture.example_at(stream.samples_per_step + 5).id  # step 2, second half

    def poisoned(model: Any, batch: Batch) -> LossTerms:
        terms = next_token(model, batch)
        return LossTerms(terms.total * (float("nan") if bad in batch.ids else 1.0), terms.tokens)

    try:
        train(tiny, RunDir(out / "nan"), EVEN, total_steps=3, dist=dist, objective=poisoned, multi_image_fraction=0.0)
    except NonFiniteError as e:
        seen["nan"] = [e.step, list(e.named)]
    seen["bad"] = bad

    # an image that one process cannot have
    broken = replace(tiny, records=out / "data" / "records.jsonl", images=out / "data" / "images")
    if dist.is_main:
        shutil.copytree(tiny.records.parent, out / "data")
        record = json.loads(broken.records.read_text().splitlines()[0])
        (broken.images / record["images"][0]).unlink()
    dist.barrier()
    options: dict[str, Any] = {"dist": dist, "multi_image_fraction": 0.0}
    seen["missing"] = error_of(lambda: train(broken, RunDir(out / "missing"), EVEN, total_steps=4, **options))
    skip = RunDir(out / "skip")
    train(broken, skip, EVEN, total_steps=4, on_bad_image="skip", **options)
    dist.barrier()
    steps = [r for r in skip.metrics() if "loss" in r]
    seen["skipped"] = [sum(len(r.get("rejected", [])) for r in steps), sum(r["samples"] for r in steps)]

    # a full disk, which only the main process notices
    def full(step: int) -> None:
        raise OSError(28, "No space left on device")

    seen["full"] = error_of(lambda: train(tiny, RunDir(out / "full"), EVEN, total_steps=2, dist=dist, on_save=full))
    seen["latest"] = str(latest_checkpoint(out / "full" / "checkpoints"))
    return seen


def main() -> None:
    torch.set_num_threads(1)
    parts, out = Path(sys.argv[1]), Path(sys.argv[2])
    dist = init_distributed("cpu")
    seen = scenarios(Tiny.at(parts), out, dist)
    (out / f"rank{dist.rank}.json").write_text(json.dumps(seen))
    shutdown_distributed()


if __name__ == "__main__":
    main()
