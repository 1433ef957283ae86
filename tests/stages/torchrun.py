"""A command of ours on two processes."""

import os
import subprocess
import sys
from pathlib import Path

SRC = Path(__file__).parents[2] / "src"


def on_two_processes(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """``beholder COMMAND`` under torchrun."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "beholder",
         *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=800, check=False,
    )  # fmt: skip
