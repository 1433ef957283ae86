"""A run killed with SIGKILL again and again, also inside a save, ends as the one that was never killed: bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import Tiny, exact_log

from beholder.runs import RunDir, sha256_file


@pytest.mark.parametrize(
    ("num_kills", "seed"), [(10, 0), *(pytest.param(10, seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]
)
def test_a_run_killed_at_random_instants_and_inside_saves_ends_bit_for_bit_as_the_straight_one(
    tiny: Tiny, tmp_path: Path, num_kills: int, seed: int
) -> None:
    command = [
        sys.executable, str(Path(__file__).parent / "kill_resume.py"), str(tiny.llm.parent), str(tmp_path),
        str(num_kills), str(seed),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    kills = told["kills"]
    assert len(kills) == num_kills and sum(k["where"] == "in a save" for k in kills) == num_kills // 2, kills
    assert told["leftovers"] == []
    straight, killed = RunDir(tmp_path / "straight"), RunDir(tmp_path / "killed")
    assert len(exact_log(straight)) == 16
    assert exact_log(killed) == exact_log(straight)
    for name in ("connector.safetensors", "optimizer.safetensors", "connector.json"):
        last = Path("checkpoints", "step_16", name)
        assert sha256_file(killed.path / last) == sha256_file(straight.path / last), name
