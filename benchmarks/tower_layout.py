"""Images per second of a convolutional tower with channels outermost and innermost, in fp32 and bf16.

    python benchmarks/tower_layout.py [--name tf_efficientnet_lite0] [--threads 2]

The four variants take turns within each round, so that what else the machine does touches all of them; compare by
ratio. Weights are random: they do not change the time.
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="tf_efficientnet_lite0")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    variants: dict[str, tuple[torch.nn.Module, torch.Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            model = timm.create_model(args.name, num_classes=0).eval().to(dtype=dtype).to(memory_format=layout)
            pixels = torch.randn(args.batch, 3, 224, 224).to(dtype=dtype).contiguous(memory_format=layout)
            variants[f"{str(dtype)[6:]} {str(layout)[6:]}"] = model, pixels

    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with torch.no_grad():
        for turn in range(args.rounds + 1):
            for name, (model, pixels) in variants.items():
                started = time.perf_counter()
                model.forward_features(pixels)  # pyright: ignore[reportCallIssue]
                if turn:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started)
    first = statistics.median(next(iter(seconds.values())))
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:28} {args.batch / median:8.1f} images/s   {first / median:5.2f} x")


if __name__ == "__main__":
    main()
