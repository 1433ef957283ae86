"""What it saves to train the last layers alone: steps of all layers, of the last K, and of the last K from what was
kept of the layers below (`features.layers`).

    python benchmarks/kept_layers.py --threads 1

A language model of SmolLM2-135M's shape with random weights and LoRA r 16, connector and tower frozen: samples of text
of one length, forward, head on the supervised tail, backward. Seconds of processor time, the least of several rounds,
and MiB that autograd keeps. The break-even pass is the one from which keeping (which costs writing in the first pass)
has been worth it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from beholder.config import LoraConfig
from beholder.config.parts import Layers
from beholder.model import adapters
from beholder.model.language import LanguageModel
from beholder.model.losses import head_nll
from beholder.store.layers import LayerStore


def prepared(layers: Layers, dtype: torch.dtype) -> LanguageModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49_152, tie_word_embeddings=True,
    )  # fmt: skip
    causal_lm: Any = LlamaForCausalLM(config)
    language = LanguageModel(causal_lm.to(dtype), "SmolLM2-135M's shape")
    adapters.attach(language.part, LoraConfig(enable=True, r=16, alpha=32, dropout=0.0, llm_layers=layers), seed=0)
    for weight in adapters.adapter_parameters(language.part).values():
        weight.requires_grad_(True)
    language.train()
    return language


def step(language: LanguageModel, ids: Tensor, tail: int, store: LayerStore | None) -> tuple[float, float]:
    """(seconds, MiB that autograd kept)."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    began = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if store is None:
            hidden = language.hidden(language.embed(ids), positions)
        else:
            rows = [store.read(row.numpy().tobytes(), len(row)) for row in ids]
            if any(row is None for row in rows):
                rows = list(language.keep(language.embed(ids), positions))
                for row, own in zip(ids, rows, strict=True):
                    store.put(row.numpy().tobytes(), own)
            hidden = language.finish(torch.stack([row for row in rows if row is not None]), positions)
        picked = hidden[:, -tail:].reshape(-1, hidden.shape[-1])
        head_nll(language.head, picked, ids[:, -tail:].reshape(-1), language.vocab)[0].sum().backward()
    seconds = time.process_time() - began
    own = {p.untyped_storage()._cdata for p in language.parameters()}
    for weight in language.parameters():
        weight.grad = None
    return seconds, sum(size for address, size in kept.items() if address not in own) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--targets", type=int, default=32)
    parser.add_argument("--last", type=int, default=2)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    ids = torch.randint(0, 49_152, (args.samples, args.length), generator=torch.Generator().manual_seed(1))
    every, last = prepared("all", dtype), prepared(f"last-{args.last}", dtype)
    with tempfile.TemporaryDirectory() as folder:
        below = {"below": last.below_fingerprint()}
        with LayerStore(Path(folder), below, width=last.d_text, dtype=dtype, max_bytes=10**9) as store:
            first = step(last, ids, args.targets, store)[0]
            cases = {"all layers": (every, None), f"last {args.last}": (last, None), "… kept": (last, store)}
            best = {
                name: min(step(language, ids, args.targets, keeper) for _ in range(args.rounds))
                for name, (language, keeper) in cases.items()
            }
    whole = best["all layers"][0]
    print(f"{args.samples} samples of {args.length} tokens, {args.targets} supervised, {args.precision}")
    for name, (seconds, mib) in best.items():
        print(f"{name:<14}{seconds:>8.2f} s a step{whole / seconds:>7.1f} x{mib:>10.0f} MiB kept for the backward pass")
    plain, kept = best[f"last {args.last}"][0], best["… kept"][0]
    passes = 1 + max(0.0, first - plain) / (plain - kept)
    print(f"first pass, which writes: {first:.2f} s; worth it from pass {passes:.2f}")


if __name__ == "__main__":
    main()
