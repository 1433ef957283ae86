"""What a start costs: processor seconds of ``beholder generate``, with and without compiled byte code.

    python benchmarks/cold_start.py IMAGE RUN=SRC [RUN=SRC ...] [--rounds 3]

RUN is a trained run, SRC the ``src`` folder of the code that answers from it; name several to compare versions. The
cases alternate in each round. Without byte code every module is compiled at the start, as it is where
PYTHONDONTWRITEBYTECODE is set and nothing was compiled at installation.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def processor_s(image: Path, run: Path, src: Path, byte_code: bool, empty: str) -> float:
    """User and system seconds of one start, its children included, on one thread."""
    env = dict(os.environ, PYTHONPATH=str(src.resolve()), OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    if not byte_code:
        env["PYTHONPYCACHEPREFIX"] = empty  # compiled modules are looked for here, where there are none
    command = [sys.executable, "-m", "beholder", "generate", str(run.resolve()), "--image", str(image.resolve())]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=env, cwd=run.resolve().parent, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("pairs", nargs="+", metavar="RUN=SRC")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    pairs = [tuple(map(Path, pair.rsplit("=", 1))) for pair in args.pairs]
    seconds: dict[tuple[Path, bool], list[float]] = {}
    with tempfile.TemporaryDirectory() as empty:
        for _ in range(args.rounds):
            for run, src in pairs:
                for byte_code in (False, True):
                    took = processor_s(args.image, run, src, byte_code, empty)
                    seconds.setdefault((src, byte_code), []).append(took)
    for (src, byte_code), took in seconds.items():
        each = " ".join(f"{s:.2f}" for s in took)
        print(f"{src}  byte code {'yes' if byte_code else 'no '}  median {statistics.median(took):.2f} s  ({each})")


if __name__ == "__main__":
    main()
