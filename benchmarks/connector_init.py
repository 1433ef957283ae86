"""Which initial scale lets a perceiver converge: latents at std 0.02, 0.2, 1.0, with and without the output norm.

Trains one connector per choice on the real parts of the quickstart (SmolLM2-135M, EfficientNet-lite0, easy-VQA), same
seed, same samples, same order, and prints the loss on the way and what the held-out pictures are captioned as.

    python benchmarks/connector_init.py                      # about 1 s a step of 16 on 2 cores, 6 choices x 120 steps
    python benchmarks/connector_init.py --steps 40 --std 0.02 1.0 --norm rms

One run, seed 42, 100 steps, 128 held-out pictures (test loss in nats per token / exact captions):

    latent_std    rms, lr 3e-4     none, lr 3e-4    rms, lr 1e-3    tokens alike at the start
    0.02          0.245 / 77 %     0.297 / 55 %     0.557 / 20 %    0.98
    0.2           0.206 / 77 %     0.275 / 66 %                     0.63
    1.0           0.134 / 83 %     0.165 / 73 %     0.187 / 73 %    0.16

The parts are those of `beholder quickstart` (downloaded once; `BEHOLDER_ASSETS` works offline).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
import torch

from beholder.config import ConnectorConfig, LlmConfig, ModelConfig, VisionConfig
from beholder.data.chat import ChatEncoder
from beholder.data.collate import Layout, Sample, collate
from beholder.data.images import ImagePipeline
from beholder.model.build import build_vlm
from beholder.model.connector import build_connector
from beholder.model.plan import TrainPlan, apply_train_plan, param_groups
from beholder.model.vlm import VisionLanguageModel
from beholder.prepare.packages import Assets, prepare_quickstart
from beholder.types import Example, ImageInput, ImageRef, Turn

CPU = torch.device("cpu")


@dataclass
class Result:
    latent_std: float
    output_norm: str
    lr: float
    losses: dict[int, float]
    """Training loss in nats per supervised token, averaged over the last tenth of the steps so far."""
    test_loss: float
    exact: float
    """Share of held-out pictures captioned exactly."""
    sameness: float
    """Mean cosine between the visual tokens of one picture before the first step: 1 is all alike."""
    seconds: float


def load_samples(model: VisionLanguageModel, encoder: ChatEncoder, records: Path, root: Path, num: int) -> list[Sample]:
    """Encoded captions with tower features in memory; the tower runs once for all choices."""
    pipeline = ImagePipeline(model.geometry, 50.0)
    samples: list[Sample] = []
    with records.open("rb") as lines:
        rows = [orjson.loads(line) for _, line in zip(range(num), lines, strict=False)]
    for start in range(0, len(rows), 64):
        refs = [ImageRef(str(root), row["images"][0]) for row in rows[start : start + 64]]
        features = model.patches([ImageInput(pixels=pipeline(ref)) for ref in refs]).bfloat16()
        for row, ref, feature in zip(rows[start : start + 64], refs, features, strict=True):
            example = Example(row["id"], (ref,), (Turn("assistant", (row["caption"],)),))
            encoded = encoder.encode(encoder.apply_template(example))
            samples.append((row["id"], encoded, [ImageInput(features=feature.clone())]))
    return samples


@torch.no_grad()
def evaluate(
    model: VisionLanguageModel, encoder: ChatEncoder, samples: Sequence[Sample], layout: Layout
) -> tuple[float, float]:
    """(nats per token, share of exactly right captions) on held-out samples."""
    nll, tokens, right = 0.0, 0, 0
    for start in range(0, len(samples), 32):
        part = samples[start : start + 32]
        out = model(collate(part, layout))
        nll, tokens = nll + float(out.nll.double().sum()), tokens + out.nll.numel()
        # A caption decoded greedily is right exactly when every token of it is the arg-max after the right prefix.
        right += sum(bool(out.correct[out.sample == i].all()) for i in range(len(part)))
    return nll / tokens, right / len(samples)


def train(
    model: VisionLanguageModel, encoder: ChatEncoder, cfg: ConnectorConfig, train_set: Sequence[Sample],
    test_set: Sequence[Sample], *, steps: int, batch: int, lr: float, seed: int,
) -> Result:  # fmt: skip
    g, layout = model.geometry, Layout(True, 256, 8)
    model.connector = build_connector(
        cfg, num_patches=g.num_patches, d_vision=g.d_vision, d_text=model.language.d_text,
        embed_rms=model.language.embed_rms, seed=seed,
    )  # fmt: skip
    apply_train_plan(model, TrainPlan())
    with torch.no_grad():
        tokens = torch.nn.functional.normalize(model.visual_tokens(train_set[0][2])[0].float(), dim=-1)
    n = tokens.shape[0]
    sameness = float((tokens @ tokens.T)[~torch.eye(n, dtype=torch.bool)].mean())
    optimizer = torch.optim.AdamW(param_groups(model, lr, 0.01))
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    losses: list[float] = []
    shown: dict[int, float] = {}
    began = time.perf_counter()
    order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(seed)).tolist()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / max(1, round(0.05 * steps)))
        picked = [train_set[order[(step * batch + i) % len(order)]] for i in range(batch)]
        out = model(collate(picked, layout))
        loss = out.nll.sum() / out.nll.numel()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % max(1, steps // 6) == 0:
            recent = losses[-max(1, steps // 10) :]
            shown[step + 1] = round(sum(recent) / len(recent), 4)
    seconds = time.perf_counter() - began
    model.eval()
    test_loss, exact = evaluate(model, encoder, test_set, layout)
    return Result(cfg.resampler.latent_std, cfg.output_norm, lr, shown, test_loss, exact, sameness, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--std", type=float, nargs="+", default=[0.02, 0.2, 1.0])
    parser.add_argument("--norm", nargs="+", default=["rms", "none"], choices=["rms", "none"])
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--test", type=int, default=128, help="held-out pictures")
    parser.add_argument("--dim", type=int, default=512, help="width of the perceiver")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, help="also write the results here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    assets: Assets = prepare_quickstart()

    def connector(std: float, norm: str) -> ConnectorConfig:
        return ConnectorConfig.model_validate(
            {"num_visual_tokens": args.tokens, "output_norm": norm, "resampler": {"dim": args.dim, "latent_std": std}}
        )

    cfg = ModelConfig(
        llm=LlmConfig(name_or_path=str(assets.llm)),
        vision=VisionConfig(name_or_path="timm/tf_efficientnet_lite0", weights=str(assets.vision_weights)),
        connector=connector(1.0, "rms"),
    )
    model, tokenizer = build_vlm(cfg, compute_precision="bf16", device=CPU, seed=args.seed)
    assert isinstance(model, VisionLanguageModel)
    encoder = ChatEncoder(
        tokenizer, num_visual_tokens=args.tokens, max_seq_len=256, template="caption",
        instruction="Describe the image in one sentence.", instruction_multi="-",
    )  # fmt: skip
    wanted = min(4000, args.steps * args.batch)
    train_set = load_samples(model, encoder, assets.captions_train, assets.images_train, wanted)
    test_set = load_samples(model, encoder, assets.captions_test, assets.images_test, args.test)
    model.drop_vision()
    print(f"{len(train_set)} train, {len(test_set)} test pictures; {args.steps} steps of {args.batch}", flush=True)
    results = []
    for norm in args.norm:
        for std in args.std:
            for lr in args.lr:
                result = train(
                    model, encoder, connector(std, norm), train_set, test_set,
                    steps=args.steps, batch=args.batch, lr=lr, seed=args.seed,
                )  # fmt: skip
                results.append(result)
                path = "  ".join(f"{step}:{loss:.3f}" for step, loss in result.losses.items())
                print(
                    f"latent_std {std:<5} output_norm {norm:<5} lr {lr:.0e}  alike at start {result.sameness:.2f}  "
                    f"train loss {path}  test loss {result.test_loss:.3f}  exact {result.exact:.1%}  "
                    f"{result.seconds:.0f} s",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
