"""Token losses as sums and counts: pure tensor functions, shared by training and by every probe.

Never a mean: whoever knows the whole effective batch divides once. Legend: K supervised tokens, V vocabulary, Dh width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
    for a head without trained weights. d nll / d logits = softmax - onehot is written over the log-probabilities;
    autograd would fill and read two more arrays of this size (``benchmarks/head_step.py``).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], rows: int) -> Tensor:
        nll, grads = [], []
        for start in range(0, hidden.shape[0], rows):
            chunk = hidden[start : start + rows].detach().requires_grad_()
            own = targets[start : start + rows, None]
            with torch.enable_grad():
                logits = head(chunk)
            slope = torch.log_softmax(logits.detach(), dim=-1, dtype=torch.float32)
            nll.append(-slope.gather(1, own)[:, 0])
            slope.exp_().scatter_add_(1, own, torch.full_like(own, -1, dtype=torch.float32))
            grads.append(torch.autograd.grad(logits, chunk, slope.to(logits.dtype))[0])
        ctx.save_for_backward(torch.cat(grads))
        return torch.cat(nll)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad_hidden,) = ctx.saved_tensors
        return (grad_outputs[0][:, None] * grad_hidden).to(grad_hidden.dtype), None, None, None


def in_chunks(terms: Callable[..., Tensor], rows: int, *aligned: Tensor) -> Tensor:
    """``terms`` of ``rows`` rows of each tensor at a time, one after the other. With gradients, in what ``terms`` calls
    as well, keeping of more than one chunk what went in alone: what comes between (logits) is computed again in the
    backward pass."""
    count = aligned[0].shape[0]
    if count <= rows or not torch.is_grad_enabled():
        parts = zip(*(t.split(rows) for t in aligned), strict=True)
        return torch.cat([terms(*part) for part in parts])
    kept = [
        checkpoint(terms, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(*(t.split(rows) for t in aligned), strict=True)
    ]
    return torch.cat(kept)


def _rows_at_once(hidden: Tensor, vocab: int, max_logits: int, *, twice: bool) -> int:
    """Tokens of a chunk. ``twice``: what does not fit at once is computed again, so a cache decides nothing."""
    rows = max(1, max_logits // vocab)
    return rows if twice or hidden.device.type != "cpu" else min(rows, CPU_ROWS)


def head_nll(
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "k dh"],
    targets: Int[Tensor, "k"],
    vocab: int,
    max_logits: int = MAX_LOGITS,
    *,
    trained: bool = False,
) -> tuple[Float[Tensor, "k"], Bool[Tensor, "k"] | None]:
    """`token_nll` of ``head(hidden)``, never holding more than ``max_logits`` logits. ``trained``: the head has weights
    that learn; where its logits do not fit at once, those of a chunk are computed again for the backward pass.

    While gradients of ``hidden`` are recorded nobody asks for the arg-max, which costs as much as the softmax: None
    then. K = 0 gives an empty tensor that still hangs on the graph of ``hidden``.
    """
    learning = torch.is_grad_enabled() and hidden.requires_grad
    if hidden.shape[0] == 0:
        return hidden.float().sum(-1), None if learning else targets == targets
    rows = _rows_at_once(hidden, vocab, max_logits, twice=learning and trained)
    if learning and trained:
        return in_chunks(lambda h, t: token_nll(head(h), t)[0], rows, hidden, targets), None
    if learning:
        return _FrozenHeadNll.apply(hidden, targets, head, rows), None  # pyright: ignore[reportReturnType]
    parts = [token_nll(head(h), t) for h, t in zip(hidden.detach().split(rows), targets.split(rows), strict=True)]
    return torch.cat([nll for nll, _ in parts]), torch.cat([correct for _, correct in parts])


# ---------------------------------------------------------------------------------------------------------------
# Losses of a chunk of logits, whatever they are


ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, ...]]
"""(logits [n, V] of these supervised tokens, which) -> numbers [n] of each, the first of which is minimised. A token's
numbers depend on its own logits alone."""


class _FrozenHead(torch.autograd.Function):
    """As `_FrozenHeadNll`, for any `ChunkLoss`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Callable[[Tensor], Tensor], loss: ChunkLoss, rows: int
    ) -> tuple[Tensor, ...]:
        found, grads = [], []
        for start in range(0, hidden.shape[0], rows):
            chunk = hidden[start : start + rows].detach().requires_grad_()
            with torch.enable_grad():
                numbers = loss(head(chunk), slice(start, start + chunk.shape[0]))
            grads.append(torch.autograd.grad(numbers[0], chunk, torch.ones_like(numbers[0]))[0])
            found.append([n.detach() for n in numbers])
        ctx.save_for_backward(torch.cat(grads))
        out = tuple(map(torch.cat, zip(*found, strict=True)))
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad_hidden,) = ctx.saved_tensors
        return (grad_outputs[0][:, None] * grad_hidden).to(grad_hidden.dtype), None, None, None


def head_losses(
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "k dh"],
    loss: ChunkLoss,
    vocab: int,
    *,
    head_learns: bool,
    max_logits: int = MAX_LOGITS,
) -> tuple[Tensor, ...]:
    """The numbers of ``loss`` for all supervised tokens, never holding more than ``max_logits`` logits; the first
    carries the graph. K = 0 gives empty tensors that still hang on the graph of ``hidden``.

    A frozen head's chunks leave K x Dh numbers for the backward pass; those of one that learns are computed once more
    there (`in_chunks`).
    """
    if hidden.shape[0] == 0:
        numbers = loss(head(hidden), slice(0, 0))
        return (numbers[0] + hidden.float().sum(-1), *numbers[1:])
    rows = _rows_at_once(hidden, vocab, max_logits, twice=head_learns)
    if torch.is_grad_enabled() and hidden.requires_grad and not head_learns:
        return _FrozenHead.apply(hidden, head, loss, rows)  # pyright: ignore[reportReturnType]

    def terms(h: Tensor, which: Tensor) -> Tensor:
        return torch.stack(loss(head(h), slice(int(which[0]), int(which[-1]) + 1)), dim=-1)

    return in_chunks(terms, rows, hidden, torch.arange(hidden.shape[0])).unbind(-1)
