"""What adapters cost a training step on a CPU: the base alone, PEFT's own layer, and ours.

    python benchmarks/lora_step.py --threads 1

Forward and backward through the decoder of SmolLM2-135M-Instruct (the quickstart's folder) from embeddings that want a
gradient, as the connector's do; samples of text packed in one row. Seconds of processor time, the least of several
rounds, and how far the final hidden states and all adapters' gradients are from those over an fp32 base (relative):
what the bf16 base costs with PEFT's layer is the measure for what ours adds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Literal

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor

from beholder.config import LlmConfig, LoraConfig
from beholder.model import adapted_linear, adapters
from beholder.model.language import LanguageModel, load_language, load_tokenizer

FOLDER = "data/quickstart/llm/SmolLM2-135M-Instruct"
TEXT = (
    "A narrow street runs down to the harbour between white houses. Two boats lie on the sand, one green and one blue, "
    "and a man in a straw hat mends a net beside them. Behind the roofs the sky is already dark, so it will rain soon."
)


def prepared(layer: type[torch.nn.Module], dropout: float, precision: Literal["fp32", "bf16"]) -> LanguageModel:
    language, _ = load_language(LlmConfig(name_or_path=FOLDER, precision=precision), torch.device("cpu"))
    if layer is not torch.nn.Linear:
        adapters.attach(language.part, LoraConfig(enable=True, dropout=dropout), seed=0)
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():  # fresh ones are 0 and would hide every difference
            for name, weight in adapters.adapter_parameters(language.part).items():
                if "lora_B" in name:
                    weight.normal_(0, 0.002, generator=draw)
        for module in language.modules():
            if isinstance(module, adapted_linear.AdaptedLinear):
                module.forward = layer.forward.__get__(module)  # the computation that is measured
    language.train()
    return language


def step(language: LanguageModel, ids: Tensor, positions: Tensor, probe: Tensor) -> tuple[float, Tensor, Tensor | None]:
    """(seconds, hidden states, gradients of all adapters)."""
    embeds = language.embed(ids).requires_grad_()
    for weight in language.parameters():
        weight.grad = None
    began = time.process_time()
    hidden = language.hidden(embeds, positions)
    (hidden.float() * probe).sum().backward()
    seconds = time.process_time() - began
    gradients = [w.grad.reshape(-1) for w in language.parameters() if w.grad is not None]
    return seconds, hidden.detach().float(), torch.cat(gradients) if gradients else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not Path(FOLDER).is_dir():
        parser.exit(1, f"{FOLDER} is missing; run `beholder assets` first\n")
    models = {
        "PEFT's layer, fp32 base": prepared(PeftLinear, 0.0, "fp32"),
        "base": prepared(torch.nn.Linear, 0.0, "bf16"),
        "PEFT's layer": prepared(PeftLinear, 0.0, "bf16"),
        "ours": prepared(adapted_linear.AdaptedLinear, 0.0, "bf16"),
        "PEFT's layer, dropout 0.05": prepared(PeftLinear, 0.05, "bf16"),
        "ours, dropout 0.05": prepared(adapted_linear.AdaptedLinear, 0.05, "bf16"),
    }
    text: list[int] = load_tokenizer(LlmConfig(name_or_path=FOLDER))(TEXT)["input_ids"]
    starts = torch.arange(args.samples)[:, None]  # each sample begins one token later
    places = (starts + torch.arange(args.length)) % len(text)
    ids = torch.tensor(text)[places].reshape(1, -1)
    positions = torch.arange(args.length).repeat(args.samples)[None]
    probe = torch.randn(1, ids.shape[1], models["base"].d_text, generator=torch.Generator().manual_seed(2))
    best: dict[str, float] = {}
    outcome: dict[str, tuple[Tensor, Tensor | None]] = {}
    for number in range(args.rounds + 1):  # in turn, so that a busy machine is busy for all of them; the first warms up
        for name, language in models.items():
            seconds, *outcome[name] = step(language, ids, positions, probe)  # type: ignore[assignment]
            best[name] = min(best.get(name, seconds), seconds) if number else float("inf")
    exact = outcome["PEFT's layer, fp32 base"]
    print(f"{'':<28}{'seconds':>9}{'against base':>14}{'hidden':>10}{'gradients':>11}")
    for name in models:
        apart = ""
        if "dropout" not in name and outcome[name][1] is not None:
            errors = (float((a - b).norm() / b.norm()) for a, b in zip(outcome[name], exact, strict=True))  # type: ignore
            apart = "{:>10.1e}{:>11.1e}".format(*errors)
        print(f"{name:<28}{best[name]:>9.2f}{best[name] / best['base'] - 1:>14.0%}{apart}")


if __name__ == "__main__":
    main()
