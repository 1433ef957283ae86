"""Two processes under torchrun train as one does, and stop as one does. One launch plays all scenarios."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import Tiny, exact_log, train
from two_processes import EVEN, UNEVEN

from beholder.runs import RunDir
from beholder.train.distributed import Dist, init_distributed, pick_device
from beholder.types import UserError


@pytest.fixture(scope="module")
def two(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Folder of the runs, and what each process saw."""
    out = tmp_path_factory.mktemp("two")
    here = Path(__file__).parent
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        str(here / "two_processes.py"), str(tiny.llm.parent), str(out),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return out, [json.loads((out / f"rank{r}.json").read_text()) for r in (0, 1)]


@pytest.mark.parametrize(("name", "cfg", "steps"), [("even", EVEN, 6), ("uneven", UNEVEN, 4)])
def test_two_processes_make_the_run_of_one(
    two: Any, tiny: Tiny, tmp_path: Path, name: str, cfg: Any, steps: int
) -> None:
    """Same samples, tokens and learning rates to the bit. Loss and gradient norm to 1e-5 (measured: 1e-6), weights to
    1e-3 of the largest: fp32 sums are grouped otherwise, and AdamW divides small gradients by their own size."""
    alone = train(tiny, RunDir(tmp_path), cfg, total_steps=steps)
    one, both = exact_log(RunDir(tmp_path)), exact_log(RunDir(two[0] / name))
    assert len(one) == len(both) == steps
    for a, b in zip(one, both, strict=True):
        assert all(a[k] == b[k] for k in ("step", "epoch", "lr.connector", "tokens", "samples", "images"))
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
    weights = load_file(two[0] / name / "checkpoints" / f"step_{steps}" / "connector.safetensors")
    for key, value in alone.model.connector.state_dict().items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-3 * float(value.abs().max()))


def test_a_signal_to_one_process_stops_both_at_the_same_step_and_the_resumed_run_is_the_straight_one(two: Any) -> None:
    out, ranks = two
    assert [r["signal"] for r in ranks] == [["cancelled", 15, 3]] * 2
    assert [r["resumed"] for r in ranks] == [["succeeded", 3]] * 2
    assert exact_log(RunDir(out / "stopped")) == exact_log(RunDir(out / "even"))
    files = [load_file(out / n / "checkpoints/step_6/connector.safetensors") for n in ("stopped", "even")]
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[1])


def test_a_loss_that_is_not_finite_on_one_process_stops_both_with_its_samples(two: Any) -> None:
    for seen in two[1]:
        step, samples = seen["nan"]
        assert step == 2 and seen["bad"] in samples


def test_an_image_one_process_cannot_read_stops_both_or_is_counted_once(two: Any) -> None:
    errors = sorted(seen["missing"] for seen in two[1])
    assert all("records.jsonl" in e for e in errors)
    assert sum(e.startswith("UserError: process ") for e in errors) == 1, errors
    assert [seen["skipped"] for seen in two[1]] == [[1, 23]] * 2
    named = [pair for r in RunDir(two[0] / "skip").metrics() for pair in r.get("rejected", [])]
    assert len(named) == 1


def test_an_error_while_saving_reaches_every_process(two: Any) -> None:
    assert two[1][0]["full"].startswith("OSError: [Errno 28]")
    assert two[1][1]["full"].startswith("ProcessError: process 0 failed: OSError")
    assert [seen["latest"] for seen in two[1]] == ["None"] * 2


def test_processes_exchange_plain_data_and_exact_sums(two: Any) -> None:
    for seen in two[1]:
        assert [g["rank"] for g in seen["gathered"]] == [0, 1]
        assert seen["gathered"][1]["text"] == "é漢" * 51 and seen["gathered"][0]["none"] is None
        assert seen["sum"][0] == 0.1 + 1.1 and math.isinf(seen["sum"][1])
        assert seen["on_main"] == {"rank": 0}
        assert seen["same"] == "no error"
        assert (
            "the data differs between the processes of this run (process 0: abc0, process 1: abc1)" in seen["not_same"]
        )
    assert two[1][0]["on_main_error"].startswith("ZeroDivisionError")
    assert two[1][1]["on_main_error"].startswith("ProcessError: process 0 failed: ZeroDivisionError")
    assert two[1][1]["together"] == "ValueError: mine alone"
    assert two[1][0]["together"] == "ProcessError: process 1 failed: ValueError: mine alone"


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    dist = init_distributed("cpu")
    assert (dist.rank, dist.world_size, dist.is_main) == (0, 1, True)
    assert dist.all_reduce_sum([1.5]) == [1.5] and dist.gather_objects({"a": 1}) == [{"a": 1}]
    dist.barrier()
    with pytest.raises(ValueError, match="mine"):
        Dist().raise_together(ValueError("mine"))


def test_a_device_that_is_not_there_is_named() -> None:
    assert pick_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device is cuda but this machine has no usable CUDA GPU"):
            pick_device("cuda")
        with pytest.raises(UserError, match="device is mps"):
            pick_device("mps")
