"""What a finished instruction tuning would be at other strengths of its adapters (`model.lora.strength`), untrained.

    python benchmarks/adapter_strength.py outputs/quickstart/instruct
    python benchmarks/adapter_strength.py RUN --strengths 1 0.8 0.6 --questions 200

The strength is a choice, so it is not made on the test split: answers are measured on training samples that the run has
not been shown, and plain text on every second passage; the other passages stand beside it, for a look at how far the
choice carries. An answer counts when every token of it is the arg-max.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch

from beholder.data import build_data
from beholder.data.collate import eval_batches
from beholder.probes import loss, retention
from beholder.stages.session import split_name
from beholder.types import UserError
from beholder.use.vlm import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 0.9, 0.8, 0.7, 0.65, 0.6])
    parser.add_argument("--questions", type=int, default=800)
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()

    vlm = load(str(args.run), device="cpu")
    model, cfg = vlm.model, vlm.cfg
    data = build_data(
        cfg, vlm.tokenizer, model.geometry, model.num_visual_tokens,
        split_file=args.run / "splits" / split_name(cfg), write_split=False,
    )  # fmt: skip
    shown, whole = data.total_steps(cfg) * cfg.effective_batch, len(data.train)
    if shown >= whole:
        raise UserError(f"the run was shown all of its {whole} training samples; none is left to choose a strength on")
    positions = random.Random(args.seed).sample(range(shown, whole), min(args.questions, whole - shown))
    examples = [data.train.example_at(p) for p in positions]
    builder = data.builder(None, train=False, cfg=cfg)
    batches = list(eval_batches(examples, builder, data.layout, cfg.eval.batch_size))
    kinds = sorted({e.question_type for e in examples if e.question_type})
    texts = retention.load_texts(cfg.eval.retention_path)
    own = cfg.model.lora.alpha / cfg.model.lora.r

    print(
        f"{len(examples)} of {whole - shown} training samples, never shown; text: every second of {len(texts)} passages"
    )
    print(f"{'strength':>8}{'right':>9}" + "".join(f"{k:>18}" for k in kinds) + f"{'loss':>9}{'text':>9}{'others':>9}")
    for strength in args.strengths:
        for layer in model.language.part.adapted:
            layer.scalings = (own * strength, own)  # pyright: ignore[reportAttributeAccessIssue]
        model.train(False)
        losses = loss.sample_losses(model, batches)
        right = torch.tensor([x.correct == x.tokens for x in losses], dtype=torch.float64)
        cells = [100 * float(right.mean())]
        cells += [100 * float(right[[e.question_type == k for e in examples]].mean()) for k in kinds]
        nll = sum(x.nll for x in losses) / sum(x.tokens for x in losses)
        kept = [
            next(m.value for m in retention.measure(model, vlm.tokenizer, half) if m.name == "retention.loss_ratio")
            for half in (texts[::2], texts[1::2])
        ]
        line = f"{strength:>8g}{cells[0]:>8.1f}%" + "".join(f"{c:>17.1f}%" for c in cells[1:])
        print(f"{line}{nll:>9.4f}" + "".join(f"{k:>9.4f}" for k in kept), flush=True)


if __name__ == "__main__":
    main()
