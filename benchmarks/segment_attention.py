"""Attention of one layer, forward and backward, on a CPU: ours per sample against torch's kernel with a mask.

    python benchmarks/segment_attention.py --threads 1

Shapes are SmolLM2-135M's (9 heads on 3, width 64): caption samples as padded rows, and packed into rows. Milliseconds
of processor time, the least of several runs; every line also says how far the two results are apart.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from beholder.model.attention import Segments, find_segments, segment_attention


def positions(lengths: list[int], rows: int) -> Tensor:
    """Row positions of the samples: one per row, padded; or all in ``rows`` rows."""
    if rows == len(lengths):
        longest = max(lengths)
        return torch.stack([torch.cat([torch.arange(n), torch.arange(longest - n)]) for n in lengths])
    return torch.cat([torch.arange(n) for n in lengths]).view(rows, -1)


def least(run: Callable[[], object], times: int) -> float:
    run()
    spent = []
    for _ in range(times):
        began = time.process_time()
        run()
        spent.append(time.process_time() - began)
    return 1e3 * min(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--times", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    draw = torch.Generator().manual_seed(0)
    ragged = torch.randint(80, 125, (32,), generator=draw).tolist()
    ragged[-1] += -sum(ragged) % 4
    cases: list[tuple[str, list[int], int]] = [
        ("16 x 36 padded", [36] * 16, 16), ("16 x 36 packed in 1 row", [36] * 16, 1),
        ("32 x 80..124 padded", ragged, 32), ("32 x 80..124 packed in 1 row", ragged, 1),
    ]  # fmt: skip
    print(f"{'':<32}{'dtype':<10}{'torch, mask':>14}{'per sample':>14}{'ratio':>8}{'difference':>12}")
    for dtype in (torch.bfloat16, torch.float32):
        for name, lengths, rows in cases:
            where = positions(lengths, rows)
            b, t = where.shape
            run_of = (torch.diff(where, prepend=where[:, :1] - 1) != 1).cumsum(1)
            allowed = ((run_of[:, :, None] == run_of[:, None]) & torch.ones(t, t, dtype=torch.bool).tril())[:, None]
            q, k, v = (
                torch.randn(b, t, h, 64, generator=draw).to(dtype).transpose(1, 2).requires_grad_() for h in (9, 3, 3)
            )
            segments: Segments = find_segments(where)

            def masked(q: Tensor = q, k: Tensor = k, v: Tensor = v, allowed: Tensor = allowed) -> Tensor:
                wide = (x.repeat_interleave(3, 1) for x in (k, v))
                return F.scaled_dot_product_attention(q, *wide, attn_mask=allowed).transpose(1, 2)

            def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v, segments: Segments = segments) -> Tensor:
                return segment_attention(torch.nn.Module(), q, k, v, None, segments=segments)[0]

            def step(forward: Callable[[], Tensor], q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
                out = forward()
                torch.autograd.grad(out, [q, k, v], torch.ones_like(out))

            a, c = (least(lambda f=f: step(f), args.times) for f in (masked, ours))  # pyright: ignore[reportCallIssue]
            apart = float((masked().float() - ours().float()).detach().abs().max())
            print(f"{name:<32}{str(dtype)[6:]:<10}{a:>14.1f}{c:>14.1f}{a / c:>7.1f}x{apart:>12.1e}", flush=True)


if __name__ == "__main__":
    main()
