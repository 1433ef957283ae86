"""What evaluation costs: a full evaluation of 2,000 held-out samples as a share of an epoch of 16,000.

    python benchmarks/eval_share.py                                   # real parts of the quickstart, some minutes
    python benchmarks/eval_share.py --steps 4 --eval 128 --rounds 2     # a quick look
    python benchmarks/eval_share.py --parts data/quickstart             # parts that `beholder prepare quickstart` made

Both sides are what `beholder run` does: the same model, encoder, stored features, packing and precision; training is
forward, backward, clipping and AdamW on the connector, evaluation `probes.loss.sample_losses`. The store is filled
before anything is timed. ``--steps`` training steps and ``--eval`` held-out samples are timed in turn, and the time per
sample is scaled to 16,000 and 2,000; shares are medians over rounds. Also told: the same evaluation without packing,
and with images from pixels instead of the store. All must give the same loss, or the benchmark fails.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from beholder.data.collate import Layout, eval_batches
from beholder.prepare.packages import prepare_quickstart
from beholder.prepare.quickstart import recipe
from beholder.probes.loss import sample_losses, summarize
from beholder.runs import RunDir
from beholder.stages.session import Session, open_session
from beholder.train.distributed import init_distributed
from beholder.train.objectives import next_token
from beholder.types import Example

TRAIN, EVAL = 16_000, 2_000
"""An epoch and a full evaluation in the seed's shape."""
SAME = {"fp32": 1e-5, "bf16": 2e-2}
"""Allowed relative difference of the loss between layouts. bf16 keeps 8 bits and other rows round otherwise."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, help="folder with llm, vision and data (default: the cache)")
    parser.add_argument("--steps", type=int, default=8, help="training steps a round")
    parser.add_argument("--eval", type=int, default=256, help="held-out samples a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64, help="evaluation batch size")
    parser.add_argument("--precision", choices=list(SAME), help="default: the recipe's")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="SETTING=VALUE")
    parser.add_argument("--goal", type=float, help="fail above this share")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console(highlight=False)
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        session = open_parts(args, Path(folder), console)
        result = measure(session, args)
    show(console, result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))
    if not result["losses_agree"]:
        raise SystemExit("the losses of the layouts do not agree: see the table")
    if args.goal and result["share"] > args.goal:
        raise SystemExit(f"the share {result['share']:.1%} is above the goal {args.goal:.1%}")


def open_parts(args: argparse.Namespace, folder: Path, console: Console) -> Session:
    assets = prepare_quickstart(args.parts, say=lambda line: console.print(line, markup=False))
    # A store of its own: one that another run has filled would make no difference, but nothing is left behind either.
    sets = [f"data.eval_size={args.eval}", f"features.dir={json.dumps(str(folder / 'features'))}"]
    if args.precision:
        sets += [f"train.precision={args.precision}", f"model.llm.precision={args.precision}"]
    cfg = recipe(assets, folder / "run", [*sets, *args.set])
    run = RunDir(cfg.run_dir)
    run.create()
    session = open_session(cfg, run, init_distributed(cfg.device))
    session.fill_features(0, args.steps * args.rounds * cfg.effective_batch + cfg.effective_batch)
    return session


def measure(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    cfg, data, model = session.cfg, session.data, session.model
    assert session.store is not None, "the recipe stores features"
    trained = [p for p in model.connector.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    stream = data.stream(session.store, cfg, rank=0, world_size=1)
    held_out: list[Example] = list(islice(cycle(data.eval_examples), args.eval))

    def train(start: int, stop: int) -> None:
        model.train()
        for step in stream.steps(start, stop):
            targets = sum(batch.num_targets for batch in step)
            for batch in step:
                (next_token(model, batch).total / targets).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        model.train(False)

    def evaluate(layout: Layout, stored: bool) -> Callable[[], float]:
        builder = data.builder(session.store if stored else None, train=False, cfg=cfg)

        def run() -> float:
            losses = sample_losses(model, eval_batches(held_out, builder, layout, args.batch))
            assert len(losses) == len(held_out)
            return summarize(losses, "eval")[0].value

        return run

    variants = {
        "packed, from the store": evaluate(data.layout, True),
        "padded, from the store": evaluate(replace(data.layout, packing=False), True),
        "packed, from pixels": evaluate(data.layout, False),
    }
    train(0, 1)  # first calls allocate and choose kernels
    for run in variants.values():
        run()
    per_train: list[float] = []
    per_eval: dict[str, list[float]] = {name: [] for name in variants}
    agree, off = True, dict.fromkeys(variants, 0.0)
    for k in range(args.rounds):
        seconds, _ = timed(lambda k=k: train(1 + k * args.steps, 1 + (k + 1) * args.steps))
        per_train.append(seconds / (args.steps * cfg.effective_batch))
        first = math.nan
        for name, run in variants.items():
            seconds, value = timed(run)
            per_eval[name].append(seconds / args.eval)
            first = value if math.isnan(first) else first
            off[name] = max(off[name], abs(value / first - 1))
            agree &= off[name] <= SAME[cfg.train.precision]
    shares = {name: share(seconds, per_train) for name, seconds in per_eval.items()}
    return {
        "share": shares["packed, from the store"], "shares": shares, "losses_agree": agree, "loss_off": off,
        "train_samples_per_s": 1 / float(np.median(per_train)),
        "eval_samples_per_s": {name: 1 / float(np.median(s)) for name, s in per_eval.items()},
        "epoch_s": TRAIN * float(np.median(per_train)), "precision": cfg.train.precision,
        "batch": cfg.effective_batch, "eval_batch": args.batch, "visual_tokens": model.num_visual_tokens,
        "threads": torch.get_num_threads(), "device": str(session.dist.device), "torch": torch.__version__,
        "rounds": args.rounds, "steps": args.steps, "eval": args.eval,
    }  # fmt: skip


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    wait: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    found = work()
    wait()
    return time.perf_counter() - start, found


def share(eval_s: Sequence[float], train_s: Sequence[float]) -> float:
    """Median over rounds of a full evaluation's time over an epoch's, both scaled from what was timed in the round."""
    return float(np.median([EVAL * e / (TRAIN * t) for e, t in zip(eval_s, train_s, strict=True)]))


def show(console: Console, result: dict[str, Any]) -> None:
    console.print(
        f"{result['device']}, {result['threads']} threads, torch {result['torch']}, {result['precision']}, "
        f"{result['visual_tokens']} visual tokens; {result['rounds']} rounds of {result['steps']} steps of "
        f"{result['batch']} and {result['eval']} held-out samples in batches of {result['eval_batch']}"
    )
    console.print(
        f"training {result['train_samples_per_s']:.1f} samples/s: an epoch of {TRAIN:,} takes {result['epoch_s']:.0f} s"
    )
    table = Table("evaluation", "samples / s", f"{EVAL:,} take", "share of an epoch", "loss off by")
    for name, speed in result["eval_samples_per_s"].items():
        table.add_row(
            name, f"{speed:.1f}", f"{EVAL / speed:.0f} s", f"{result['shares'][name]:.1%}",
            f"{result['loss_off'][name]:.1e}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
