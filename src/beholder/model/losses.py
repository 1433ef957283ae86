"""Token losses as sums and counts: pure tensor functions, shared by training and by every probe.

Never a mean: whoever knows the whole effective batch divides once. Legend: K supervised tokens, V vocabulary, Dh width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

MAX_LOGITS = 2**25
"""Logits held at once: 128 MiB in fp32."""
CPU_ROWS = 128
"""Positions whose logits are held at once on a CPU: larger chunks fall out of its cache between the product, the
softmax and its gradient (0.28 s instead of 0.50 s for 920 positions of a 32,768-word vocabulary)."""


def token_nll(logits: Float[Tensor, "k v"], targets: Int[Tensor, "k"]) -> tuple[Float[Tensor, "k"], Bool[Tensor, "k"]]:
    """Negative log-likelihood of each target in nats (fp32), and whether it was the arg-max."""
    return F.cross_entropy(logits.float(), targets, reduction="none"), logits.argmax(-1) == targets


class _FrozenHeadNll(torch.autograd.Function):
    """`token_nll` of ``head(hidden)`` chunk by chunk, keeping K x Dh numbers for the backward pass instead of K x V.

    A token's loss depends on its own hidden state alone, so d nll_k / d hidden_k can be taken while the chunk's logits
    exist and merely scaled by the incoming gradient later: no logits are kept and nothing is computed twice. Right only
    for a head without trained weights.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], rows: int
    ) -> tuple[Tensor, Tensor]:
        needs_grad = bool(ctx.needs_input_grad[0])
        nll, correct, grads = [], [], []
        for start in range(0, hidden.shape[0], rows):
            chunk = hidden[start : start + rows].detach().requires_grad_(needs_grad)
            with torch.set_grad_enabled(needs_grad):
                chunk_nll, chunk_correct = token_nll(head(chunk), targets[start : start + rows])
            if needs_grad:
                grads.append(torch.autograd.grad(chunk_nll, chunk, torch.ones_like(chunk_nll))[0])
            nll.append(chunk_nll.detach())
            correct.append(chunk_correct)
        ctx.save_for_backward(*([torch.cat(grads)] if needs_grad else []))
        right = torch.cat(correct)
        ctx.mark_non_differentiable(right)
        return torch.cat(nll), right

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad_hidden,) = ctx.saved_tensors
        return (grad_outputs[0][:, None] * grad_hidden).to(grad_hidden.dtype), None, None, None


def head_nll(
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "k dh"],
    targets: Int[Tensor, "k"],
    vocab: int,
    max_logits: int = MAX_LOGITS,
) -> tuple[Float[Tensor, "k"], Bool[Tensor, "k"]]:
    """`token_nll` of ``head(hidden)`` for a *frozen* head, never holding more than ``max_logits`` logits.

    K = 0 gives two empty tensors that still hang on the graph of ``hidden``.
    """
    if hidden.shape[0] == 0:
        return hidden.float().sum(-1), torch.zeros(0, dtype=torch.bool, device=hidden.device)
    rows = max(1, max_logits // vocab)
    if hidden.device.type == "cpu":
        rows = min(rows, CPU_ROWS)
    nll, correct = _FrozenHeadNll.apply(hidden, targets, head, rows)  # pyright: ignore[reportGeneralTypeIssues]
    return nll, correct
