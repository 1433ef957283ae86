"""The text-only suite: is the language model still bit for bit what it was?

With a frozen language model the logits on text must be equal to the last bit before and after training; anything else
means something was trained that should not have been. The prompts are fixed here and cover plain English, other
scripts, code, arithmetic and a chat turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from beholder.evidence import TextOnly
from beholder.probes import Measurable, measuring

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "Water boils at 100 degrees Celsius because",
    "Once upon a time, in a village by the sea, there lived a",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "17 + 25 = 42. 36 + 12 =",
    "La traduction de « bonjour » en allemand est",
    "中国的首都是北京，日本的首都是",
    "Q: What colour do you get when you mix blue and yellow?\nA:",
)


class TextModel(Measurable, Protocol):
    @property
    def device(self) -> torch.device: ...

    def text_logits(self, ids: torch.Tensor, /) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class TextLogits:
    """Logits of the suite: kept on the CPU in their own type, so that two of them can be compared bit by bit."""

    prompts: tuple[str, ...]
    logits: tuple[torch.Tensor, ...]
    digests: tuple[str, ...]
    """sha256 of each prompt's logits, type and shape included."""

    @property
    def sha256(self) -> str:
        """One hash over all prompts."""
        return hashlib.sha256("\n".join(self.digests).encode()).hexdigest()


def text_logits(model: TextModel, tokenizer: Any, prompts: Sequence[str] = PROMPTS) -> TextLogits:
    """Next-token logits of every prompt, one prompt a forward pass.

    One by one and in one thread setting the CPU kernels are deterministic, so equal weights give equal bits within a
    process and between processes on the same machine; they do not across machines or versions of torch.
    """
    logits: list[torch.Tensor] = []
    with measuring(model):
        for prompt in prompts:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.int64, device=model.device)
            logits.append(model.text_logits(ids).detach().cpu().contiguous())
    return TextLogits(tuple(prompts), tuple(logits), tuple(_digest(t) for t in logits))


def compare(before: TextLogits, after: TextLogits) -> TextOnly:
    """Whether the two are equal bit by bit, and the largest difference when they are not."""
    assert before.prompts == after.prompts, "the two measurements used different prompts"
    changed = [p for p, a, b in zip(before.prompts, before.digests, after.digests, strict=True) if a != b]
    difference = 0.0
    for a, b in zip(before.logits, after.logits, strict=True):
        if changed and a.shape == b.shape:
            difference = max(difference, float((a.double() - b.double()).abs().nan_to_num(posinf=1e308).max()))
    return TextOnly(
        prompts=len(before.prompts), logits=sum(t.numel() for t in before.logits), equal=not changed,
        sha256_before=before.sha256, sha256_after=after.sha256, max_abs_difference=difference, changed=changed,
    )  # fmt: skip


def _digest(logits: torch.Tensor) -> str:
    h = hashlib.sha256(f"{logits.dtype} {tuple(logits.shape)}\n".encode())
    h.update(logits.view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
