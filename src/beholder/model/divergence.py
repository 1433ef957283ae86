"""How far a student's next token is from a teacher's: KL(teacher ‖ student) per supervised token, at a temperature.

Pure tensor functions; sums and counts as in `model.losses`. Legend: K supervised tokens, V vocabulary, k kept ids, m
drawn ids; p the teacher's distribution, q the student's, at temperature 1; p_T ∝ p^(1/T).

A teacher is known in one of three forms (`Teacher`). All give the same expected gradient as the full softmax would, the
first one up to a bound:

- `TopK`: the k likeliest ids and the mass of the rest. What is computed is the divergence after both distributions have
  been merged outside of these ids into one outcome. By the chain rule of KL it is too small by exactly
  ``p_tail · KL(p given the tail ‖ q given the tail)``, never too large, and 0 where ``p_tail`` is (`tail_gap`).
- `Sampled`: m ids drawn from p_T with replacement, and the entropy of p_T (sparse-logit sampling, Anshumann et al.
  2025, arXiv:2503.16870). KL is linear in p_T but for that entropy, so its expectation, and that of its gradient, is
  the full one's; a single value may be negative.
- `Full`: log-probabilities of the whole vocabulary, for an online teacher and for tests.

Temperature. ``p_T`` is not a function of the kept log-probabilities alone: its normaliser needs the rest as well. So a
`TopK` holds, for each temperature that it was made for, the log-mass ``log Σ_rest p^(1/T)``, which makes p_T exact on
the kept ids; a `Sampled` is drawn at one temperature. The gradient of the divergence with respect to the student's
logits is (q_T - p_T) / T; the factor T² of Hinton et al. (2015, arXiv:1503.02531), which keeps it as large as at T = 1,
is the objective's business.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from beholder.types import UserError


@dataclass(frozen=True, slots=True)
class TopK:
    ids: Int[Tensor, "n k"]
    log_p: Float[Tensor, "n k"]
    """At temperature 1."""
    tail: Float[Tensor, "n t"]
    """log Σ p^(1/T) over all other ids, per temperature; -inf: there are none."""
    temperatures: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    ids: Int[Tensor, "n m"]
    """Drawn from p_T; one that was drawn twice stands there twice."""
    entropy: Float[Tensor, "n"]
    """Of p_T, nats."""
    temperature: float


@dataclass(frozen=True, slots=True)
class Full:
    log_p: Float[Tensor, "n v"]
    """At temperature 1."""


Teacher = TopK | Sampled | Full


def columns(teacher: Teacher) -> dict[str, Tensor]:
    """A form's numbers, [n, …] each, as the row store keeps them and batches carry them (`teacher_of`)."""
    match teacher:
        case TopK(ids, log_p, tail, _):
            return {"ids": ids, "log_p": log_p, "tail": tail}
        case Sampled(ids, entropy, _):
            return {"ids": ids, "entropy": entropy[:, None]}
        case Full(log_p):
            return {"log_p": log_p}


def teacher_of(found: Mapping[str, Tensor], temperatures: tuple[float, ...]) -> Teacher:
    """The form whose `columns` these are."""
    if "tail" in found:
        return TopK(found["ids"].long(), found["log_p"].float(), found["tail"], temperatures)
    if "entropy" in found:
        return Sampled(found["ids"].long(), found["entropy"][:, 0], temperatures[0])
    return Full(found["log_p"].float())


def says(teacher: Teacher) -> Bool[Tensor, "n"]:
    """Whether it says something of each token; of one from another tokenizer, it may not."""
    match teacher:
        case TopK(_, log_p, tail, _):
            return (log_p[:, 0] > -math.inf) | (tail[:, 0] > -math.inf)
        case Sampled(ids, _, _):
            return torch.ones_like(ids[:, 0], dtype=torch.bool)
        case Full(log_p):
            return torch.ones_like(log_p[:, 0], dtype=torch.bool)


def top_k(log_p: Float[Tensor, "n v"], k: int, temperatures: tuple[float, ...]) -> TopK:
    """The k likeliest ids of each row. Raises `UserError` for a k that the vocabulary does not have."""
    if not 1 <= k <= log_p.shape[-1]:
        raise UserError(f"k is {k}, expected 1 to {log_p.shape[-1]}, the size of the vocabulary")
    kept, ids = log_p.float().topk(k, dim=-1)
    rest = log_p.float().scatter(-1, ids, -math.inf)
    tail = torch.stack([torch.logsumexp(rest / t, dim=-1) for t in temperatures], dim=-1)
    return TopK(ids, kept, tail, temperatures)


def sampled(log_p: Float[Tensor, "n v"], m: int, temperature: float, generator: torch.Generator) -> Sampled:
    """m draws from each row's p_T."""
    tempered = torch.log_softmax(log_p.float() / temperature, dim=-1)
    p = tempered.exp()
    ids = torch.multinomial(p, m, replacement=True, generator=generator)
    return Sampled(ids, -(torch.where(p > 0, tempered, 0.0) * p).sum(-1), temperature)


def divergence(logits: Float[Tensor, "n v"], teacher: Teacher, temperature: float) -> Float[Tensor, "n"]:
    """KL(p_T ‖ q_T) of each row in nats, fp32, differentiable in ``logits``. Raises `UserError` for a temperature that
    the teacher's form was not made for."""
    log_q = torch.log_softmax(logits.float() / temperature, dim=-1)
    match teacher:
        case Full(log_p):
            log_p = torch.log_softmax(log_p.float() / temperature, dim=-1)
            return (log_p.exp() * (_finite(log_p) - log_q)).sum(-1)
        case Sampled(ids, entropy, drawn_at):
            if drawn_at != temperature:
                raise UserError(f"the teacher's ids were drawn at temperature {drawn_at:g}, not {temperature:g}")
            return -log_q.gather(-1, ids).mean(-1) - entropy
        case TopK(ids, log_p, tail, temperatures):
            if temperature not in temperatures:
                known = ", ".join(f"{t:g}" for t in temperatures)
                raise UserError(f"the teacher's top-k was made for temperatures {known}, not {temperature:g}")
            raised = log_p.float() / temperature
            rest = tail[:, temperatures.index(temperature)].float()
            total = torch.logaddexp(torch.logsumexp(raised, -1), rest)
            said = total > -math.inf  # of a token the teacher may have nothing to say (vocabulary: shared)
            raised, total = (
                raised.where(said[:, None], torch.zeros_like(raised)),
                total.where(said, torch.zeros_like(total)),
            )
            kept, log_p_tail = raised - total[:, None], rest - total
            own = log_q.gather(-1, ids)
            out = (kept.exp() * (_finite(kept) - own)).sum(-1)
            out = out + log_p_tail.exp() * (_finite(log_p_tail) - _log_rest(log_q, ids))
            return torch.where(said, out, torch.zeros_like(out))


def _log_rest(log_q: Tensor, ids: Tensor) -> Tensor:
    """log of the mass outside of ``ids``: a sum over these, not 1 minus the others, which cancels where they are nearly
    all."""
    rest = log_q.scatter(-1, ids, -math.inf)
    whole = ids.shape[-1] == log_q.shape[-1]
    return log_q.new_zeros(log_q.shape[0]) if whole else torch.logsumexp(rest, dim=-1)


def _finite(log_p: Tensor) -> Tensor:
    """0 · log 0 is 0."""
    return log_p.masked_fill(log_p == -math.inf, 0.0)


def tail_gap(
    logits: Float[Tensor, "n v"], log_p: Float[Tensor, "n v"], k: int, temperature: float
) -> Float[Tensor, "n"]:
    """How much smaller the divergence of the top k is than the full one: p_tail · KL(p given the tail ‖ q given it)."""
    ids = log_p.topk(k, dim=-1).indices
    p, q = (torch.log_softmax(x.float() / temperature, dim=-1) for x in (log_p, logits))
    if k == log_p.shape[-1]:
        return p.new_zeros(p.shape[0])
    p_tail, q_tail = _log_rest(p, ids), _log_rest(q, ids)
    inside = p.scatter(-1, ids, -math.inf) - p_tail[:, None]
    apart = (inside.exp() * (_finite(inside) - (q - q_tail[:, None]))).sum(-1)
    return p_tail.exp() * apart
