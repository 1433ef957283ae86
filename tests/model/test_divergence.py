"""KL between teacher and student: against the definition written out, its bound and its expectation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from beholder.model.divergence import Full, Teacher, TopK, divergence, sampled, tail_gap, top_k
from beholder.types import UserError

V, N = 37, 11


def rows(seed: int, sharp: float = 2.0) -> Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * sharp


def plain(logits: Tensor, teacher: Tensor, t: float) -> Tensor:
    """The definition."""
    p, q = torch.softmax(teacher / t, -1), torch.softmax(logits / t, -1)
    return (p * (p.log() - q.log())).sum(-1)


def with_gradient(logits: Tensor, teacher: Teacher, t: float) -> tuple[Tensor, Tensor]:
    leaf = logits.float().requires_grad_()
    kl = divergence(leaf, teacher, t)
    return kl.detach(), torch.autograd.grad(kl.sum(), leaf)[0]


@pytest.mark.parametrize("t", [1.0, 2.0, 5.0])
def test_full_and_top_all_are_the_definition_and_its_gradient(t: float) -> None:
    logits, teacher = rows(1), rows(2)
    leaf = logits.clone().requires_grad_()
    expected = plain(leaf, teacher, t)
    slope = torch.autograd.grad(expected.sum(), leaf)[0]
    log_p = torch.log_softmax(teacher, -1).float()

    for known in (Full(log_p), top_k(log_p, V, (t,))):
        kl, gradient = with_gradient(logits, known, t)
        torch.testing.assert_close(kl, expected.detach().float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, slope.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        slope, ((torch.softmax(logits / t, -1) - torch.softmax(teacher / t, -1)) / t), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, V - 1])
def test_top_k_is_too_small_by_its_bound_exactly(k: int, t: float) -> None:
    logits, teacher = rows(3), rows(4)
    log_p = torch.log_softmax(teacher, -1).float()
    full = plain(logits, teacher, t).float()

    kl = divergence(logits.float(), top_k(log_p, k, (1.0, t)), t)

    gap = tail_gap(logits.float(), log_p, k, t)
    assert (gap >= -1e-6).all() and (kl <= full + 1e-5).all() and (kl >= -1e-6).all()
    torch.testing.assert_close(kl + gap, full, rtol=1e-4, atol=1e-5)
    tail = top_k(log_p, k, (t,)).tail[:, 0]
    assert (gap < full).all() and tail.isfinite().all()


def test_the_gradient_of_top_k_spreads_the_tail_as_the_student_does() -> None:
    logits, teacher, t, k = rows(5), rows(6), 2.0, 4
    log_p = torch.log_softmax(teacher, -1).float()
    _, gradient = with_gradient(logits, top_k(log_p, k, (t,)), t)

    p, q = torch.softmax(teacher / t, -1), torch.softmax(logits / t, -1)
    ids = p.topk(k, -1).indices
    inside = torch.zeros_like(p, dtype=torch.bool).scatter(-1, ids, True)
    p_tail, q_tail = (x.masked_fill(inside, 0).sum(-1, keepdim=True) for x in (p, q))
    wanted = torch.where(inside, p, p_tail * q / q_tail)
    torch.testing.assert_close(gradient, ((q - wanted) / t).float(), rtol=1e-4, atol=1e-6)


def test_the_expectation_of_sampled_ids_is_the_full_divergence_and_gradient() -> None:
    logits, teacher, t = rows(7, 1.0), rows(8, 1.0), 2.0
    log_p = torch.log_softmax(teacher, -1).float()
    many = 40_000
    drawn = sampled(log_p, many, t, torch.Generator().manual_seed(0))

    kl, gradient = with_gradient(logits, drawn, t)

    expected, slope = with_gradient(logits, Full(log_p), t)
    torch.testing.assert_close(kl, expected, rtol=0, atol=6 * 4 / many**0.5)  # six standard errors
    torch.testing.assert_close(gradient, slope, rtol=0, atol=6 * 0.25 / many**0.5)
    few = torch.stack([divergence(logits.float(), sampled(log_p, 12, t, torch.Generator().manual_seed(s)), t)
                       for s in range(400)])  # fmt: skip
    assert (few.mean(0) - expected).abs().max() < 6 * few.std(0).max() / 20
    assert few.min() < 0, "a single value may be negative"


def test_a_certain_teacher_has_no_tail_and_no_nan() -> None:
    log_p = torch.full((2, V), float("-inf"))
    log_p[:, 3] = 0.0
    logits = rows(9)[:2].float()

    for known in (Full(log_p), top_k(log_p, 2, (2.0,)), sampled(log_p, 5, 2.0, torch.Generator())):
        kl, gradient = with_gradient(logits, known, 2.0)
        torch.testing.assert_close(kl, -torch.log_softmax(logits / 2, -1)[:, 3])
        assert gradient.isfinite().all()


def test_a_teacher_against_itself_is_at_0() -> None:
    log_p = torch.log_softmax(rows(10), -1).float()
    for known in (Full(log_p), top_k(log_p, 6, (1.0, 2.0))):
        assert divergence(log_p, known, 2.0).abs().max() < 1e-6


def test_what_it_was_not_made_for_is_refused() -> None:
    log_p = torch.log_softmax(rows(11), -1).float()
    with pytest.raises(UserError, match="k is 38, expected 1 to 37"):
        top_k(log_p, V + 1, (1.0,))
    with pytest.raises(UserError, match="made for temperatures 1, 2, not 3"):
        divergence(log_p, top_k(log_p, 2, (1.0, 2.0)), 3.0)
    with pytest.raises(UserError, match="drawn at temperature 2, not 1"):
        divergence(log_p, sampled(log_p, 2, 2.0, torch.Generator()), 1.0)


def test_a_top_k_is_made_of_log_probabilities_whatever_their_precision() -> None:
    exact = torch.log_softmax(rows(12), -1).float()
    rough = top_k(exact.half(), 8, (2.0,))
    assert isinstance(rough, TopK) and rough.log_p.dtype == torch.float32
    logits = rows(13).float()
    torch.testing.assert_close(
        divergence(logits, rough, 2.0), divergence(logits, top_k(exact, 8, (2.0,)), 2.0), rtol=1e-2, atol=1e-2
    )
