"""What gradient checkpointing saves when the base is frozen and adapters learn: peak memory with and without.

    python benchmarks/checkpointing_memory.py

A Qwen3 of random weights, narrow but deep, adapters on all seven linear maps of every layer; forward and backward from
embeddings that want a gradient, as the connector's do. Every case is a process of its own, so that no allocator's past
is measured. Columns: activations that autograd keeps between forward and backward (bytes of distinct storages, weights
left out), growth of the process's resident memory over a step (ru_maxrss after - before), seconds; on a machine with
CUDA also torch's own peak there.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beholder.config import LlmConfig, LoraConfig
from beholder.model import adapters
from beholder.model.language import load_language
from beholder.prepare.tiny import tiny_llm

DEEP: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
MIB = 2**20


def measure(folder: str, checkpointing: bool, tokens: int, device: str) -> dict[str, float]:
    torch.set_num_threads(1)
    where = torch.device(device)
    cfg = LlmConfig(name_or_path=folder, precision="bf16", gradient_checkpointing=checkpointing)
    language, _ = load_language(cfg, where)
    adapters.attach(language.part, LoraConfig(enable=True, dropout=0.05), seed=0)
    language.train()
    weights = {p.untyped_storage().data_ptr() for p in language.parameters()}
    positions = torch.arange(tokens, device=where)[None]

    def step(count: bool = False) -> float:
        kept: dict[int, int] = {}

        def keep(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        embeds = language.embed(torch.arange(tokens, device=where)[None] % 200).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t) if count else nullcontext():
            hidden = language.hidden(embeds, positions)
        hidden.float().square().sum().backward()
        return sum(kept.values()) / MIB

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    still = 0
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        still = torch.cuda.memory_allocated()
    began = time.process_time()
    step()
    found = {"seconds": time.process_time() - began}
    found["grown"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    if where.type == "cuda":
        found["cuda"] = (torch.cuda.max_memory_allocated() - still) / MIB
    found["kept"] = step(count=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--case", nargs=3, metavar=("FOLDER", "CHECKPOINTING", "DEVICE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        folder, checkpointing, device = args.case
        print(json.dumps(measure(folder, checkpointing == "True", args.tokens, device)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(tiny_llm(Path(scratch) / "deep", num_hidden_layers=args.layers, **DEEP))
        print(f"{args.layers} layers of width {DEEP['hidden_size']}, {args.tokens} tokens, bf16; MiB")
        print(f"{'':<24}{'kept by autograd':>18}{'process grew by':>18}{'CUDA peak':>12}{'seconds':>10}", flush=True)
        for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            for checkpointing in (False, True):
                command = [sys.executable, __file__, "--tokens", str(args.tokens), "--case"]
                done = subprocess.run(
                    [*command, folder, str(checkpointing), device], check=True, stdout=subprocess.PIPE, text=True
                )
                found = json.loads(done.stdout.splitlines()[-1])
                name = f"{device}, {'checkpointing' if checkpointing else 'plain'}"
                cuda = f"{found['cuda']:.0f}" if "cuda" in found else "-"
                print(f"{name:<24}{found['kept']:>18.0f}{found['grown']:>18.0f}{cuda:>12}{found['seconds']:>10.1f}")


if __name__ == "__main__":
    main()
