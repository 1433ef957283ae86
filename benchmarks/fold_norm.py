"""What would a finished run be with its output norm made constant and folded into its projector?

    python benchmarks/fold_norm.py outputs/quickstart/instruct

What `beholder export --fold-norm` measures, of any run with an output norm, whichever class it becomes: how much the
RMS of its visual tokens varies over training images, and on held-out samples the loss with and without folding, their
paired difference and the share of equal greedy answers. In the run's own precision, adapters included.
"""

import argparse
from pathlib import Path

import torch

from beholder.train.trained import open_trained
from beholder.use.export.fold import NUM_CALIBRATION, fold_norm


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("run", type=Path)
    asked.add_argument("--calibration", type=int, default=NUM_CALIBRATION, help="training images")
    args = asked.parse_args()
    opened = open_trained(args.run, torch.device("cpu"))
    for line in fold_norm(opened, args.calibration).measure().told:
        print(line)


if __name__ == "__main__":
    main()
