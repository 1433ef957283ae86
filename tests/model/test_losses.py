"""Token losses against the definition, chunk by chunk and in one piece."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from beholder.model.losses import head_losses, head_nll, token_nll


def case(k: int, vocab: int = 17, width: int = 6) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(k)
    head = torch.nn.Linear(width, vocab, bias=False).requires_grad_(False)
    head.weight.copy_(torch.randn(vocab, width, generator=draw))
    hidden = torch.randn(k, width, generator=draw).requires_grad_()
    return head, hidden, torch.randint(0, vocab, (k,), generator=draw)


def test_nll_is_minus_the_log_of_the_targets_probability() -> None:
    logits, targets = torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, 0.0]]), torch.tensor([2, 1])

    nll, correct = token_nll(logits, targets)

    expected = -torch.log_softmax(logits.double(), -1)[torch.arange(2), targets]
    torch.testing.assert_close(nll.double(), expected, rtol=0, atol=1e-6)
    assert correct.tolist() == [True, False]


def test_nll_of_bf16_logits_is_computed_in_fp32() -> None:
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()

    nll, _ = token_nll(logits, torch.tensor([1, 2, 3]))

    assert nll.dtype == torch.float32
    expected = F.cross_entropy(logits.double(), torch.tensor([1, 2, 3]), reduction="none")
    torch.testing.assert_close(nll.double(), expected, rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 12), rows=st.integers(1, 12))
def test_chunks_change_neither_losses_nor_gradients(k: int, rows: int) -> None:
    head, hidden, targets = case(k)
    weight = torch.rand(k, generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(head(hidden), targets, reduction="none")
    seen: list[int] = []

    def counted(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[0])
        return head(x)

    nll, nobody_asked = head_nll(counted, hidden, targets, vocab=17, max_logits=rows * 17)
    assert nobody_asked is None and max(seen) <= rows and sum(seen) == k, "each row once, at most so many at a time"
    with torch.no_grad():
        measured, correct = head_nll(head, hidden, targets, vocab=17, max_logits=rows * 17)

    # Worst seen 1e-6 on values up to 9, 7e-7 on gradients near 1.
    torch.testing.assert_close(nll, expected, rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(measured, expected, rtol=1e-6, atol=3e-6)
    assert correct is not None and torch.equal(correct, head(hidden).argmax(-1) == targets)
    wanted = torch.autograd.grad((expected * weight).sum(), hidden)[0]
    torch.testing.assert_close(torch.autograd.grad((nll * weight).sum(), hidden)[0], wanted, rtol=1e-5, atol=1e-6)


def test_nothing_supervised_gives_an_empty_loss_on_the_graph() -> None:
    head, hidden, targets = case(0)

    nll, _ = head_nll(head, hidden, targets, vocab=17)
    with torch.no_grad():
        _, correct = head_nll(head, hidden, targets, vocab=17)

    assert correct is not None and nll.shape == correct.shape == (0,)
    assert torch.equal(torch.autograd.grad(nll.sum(), hidden)[0], torch.zeros(0, 6))


class Capped(torch.nn.Module):
    """Gemma's soft cap, whose gradient is taken from its own output: nothing may be written over the logits."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(self.head(x) / 3)


def test_a_capped_head_gets_the_gradients_of_plain_autograd() -> None:
    head, hidden, targets = case(9)
    capped = Capped(head)
    expected = F.cross_entropy(capped(hidden), targets, reduction="none")

    nll, _ = head_nll(capped, hidden, targets, vocab=17, max_logits=4 * 17)

    torch.testing.assert_close(nll, expected, rtol=1e-6, atol=3e-6)
    ours, plain = (torch.autograd.grad(x.sum(), hidden)[0] for x in (nll, expected))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_without_gradients_no_graph_is_made() -> None:
    head, hidden, targets = case(4)
    with torch.no_grad():
        nll, _ = head_nll(head, hidden, targets, vocab=17)

    assert not nll.requires_grad
    assert not head_nll(head, hidden.detach(), targets, vocab=17)[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_follow_fp32(dtype: torch.dtype) -> None:
    head, hidden, targets = case(8, vocab=200)
    exact = torch.autograd.grad(F.cross_entropy(head(hidden), targets, reduction="sum"), hidden)[0]
    half = hidden.detach().to(dtype).requires_grad_()

    nll, _ = head_nll(head.to(dtype), half, targets, vocab=200, max_logits=600)
    got = torch.autograd.grad(nll.sum(), half)[0].float()

    # One rounding of probabilities and one of the result, 8 bits each: worst seen 0.8 % of the largest entry.
    assert float((got - exact).abs().max() / exact.abs().max()) < 0.04


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_any_loss_of_chunks_is_that_of_all_logits_at_once(rows: int, learns: bool) -> None:
    torch.manual_seed(0)
    k, width, vocab = 7, 5, 11
    hidden, targets = torch.randn(k, width, requires_grad=True), torch.randint(0, vocab, (k,))
    head = torch.nn.Linear(width, vocab, bias=False).requires_grad_(learns)
    weights = torch.rand(k)

    def loss(logits: Tensor, which: slice) -> tuple[Tensor, ...]:
        nll, _ = token_nll(logits, targets[which])
        return weights[which] * nll + logits.square().mean(-1), nll

    total, nll = head_losses(head, hidden, loss, vocab, head_learns=learns, max_logits=rows * vocab)
    (total * torch.arange(1, k + 1)).sum().backward()
    found = hidden.grad, head.weight.grad
    hidden.grad = head.weight.grad = None
    expected, plain = loss(head(hidden), slice(0, k))
    (expected * torch.arange(1, k + 1)).sum().backward()

    torch.testing.assert_close(total.detach(), expected.detach())
    torch.testing.assert_close(nll.detach(), plain.detach())
    torch.testing.assert_close(found[0], hidden.grad)
    if learns:
        torch.testing.assert_close(found[1], head.weight.grad)


def test_nothing_supervised_gives_empty_numbers_on_the_graph() -> None:
    hidden = torch.zeros(0, 5, requires_grad=True)
    total, nll = head_losses(torch.nn.Linear(5, 3), hidden, lambda x, _: (x.sum(-1), x.sum(-1)), 3, head_learns=True)
    total.sum().backward()
    assert nll.shape == (0,) and hidden.grad is not None
