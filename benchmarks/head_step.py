"""The loss of a frozen head with its gradient, ours against autograd's, interleaved.

    python benchmarks/head_step.py                        # 1,950 positions of a 32,768-word vocabulary, bf16
    python benchmarks/head_step.py --vocab 151936 --width 1024 --positions 500

Both take 128 positions at a time and keep the gradient of the hidden states. Autograd's is cross-entropy on the fp32
logits with the arg-max beside it; `model.losses.head_nll` writes softmax - onehot over the log-probabilities and leaves
the arg-max out. Losses and gradients must be equal bit for bit, or the benchmark fails.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beholder.model.losses import CPU_ROWS, head_nll, token_nll


def autograd(head: Tensor, hidden: Tensor, targets: Tensor, argmax: bool) -> tuple[Tensor, Tensor]:
    """(loss of every position, gradient of their sum), chunk by chunk."""
    losses, gradients = [], []
    for start in range(0, len(targets), CPU_ROWS):
        chunk = hidden[start : start + CPU_ROWS].detach().requires_grad_()
        own = targets[start : start + CPU_ROWS]
        logits = F.linear(chunk, head)
        nll = token_nll(logits, own)[0] if argmax else F.cross_entropy(logits.float(), own, reduction="none")
        gradients.append(torch.autograd.grad(nll.sum(), chunk)[0])
        losses.append(nll.detach())
    return torch.cat(losses), torch.cat(gradients)


def ours(head: Tensor, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    hidden = hidden.detach().requires_grad_()
    nll, _ = head_nll(lambda x: F.linear(x, head), hidden, targets, head.shape[0])
    return nll.detach(), torch.autograd.grad(nll.sum(), hidden)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=1950)
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    draw = torch.Generator().manual_seed(0)
    head = (0.05 * torch.randn(args.vocab, args.width, generator=draw)).bfloat16()
    hidden = torch.randn(args.positions, args.width, generator=draw).bfloat16()
    targets = torch.randint(0, args.vocab, (args.positions,), generator=draw)
    ways = {
        "autograd": lambda: autograd(head, hidden, targets, argmax=True),
        "autograd without arg-max": lambda: autograd(head, hidden, targets, argmax=False),
        "ours": lambda: ours(head, hidden, targets),
    }
    results = {name: way() for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name in random.sample(list(ways), len(ways)):
            began = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - began)
    for name in ways:
        ratio = np.array(seconds["autograd"]) / seconds[name]
        spread = f"x {np.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})"
        print(f"{name:<25} {np.median(seconds[name]):.3f} s  {spread}")
    if not all(torch.equal(a, b) for a, b in zip(results["autograd"], results["ours"], strict=True)):
        sys.exit("losses or gradients differ")


if __name__ == "__main__":
    main()
