"""What a stage minimises: functions ``(model, batch) -> LossTerms``, sums and counts, never means.

The division happens once, in `engine`, by the supervised tokens of the whole effective batch. Loss mathematics
lives in `model.losses` and `model.divergence`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from beholder.config import DistillConfig, RunConfig
from beholder.model.divergence import Full, Teacher, divergence, says, teacher_of
from beholder.model.losses import head_losses
from beholder.types import Batch, LossTerms, Supervised, TokenLosses, UserError


class TokenLossModel(Protocol):
    """Anything that turns a batch into the loss of each supervised token: `model.vlm.VisionLanguageModel`."""

    def __call__(self, batch: Batch) -> TokenLosses: ...


Objective = Callable[[Any, Batch], LossTerms]


def next_token(model: TokenLossModel, batch: Batch) -> LossTerms:
    """Next-token prediction: negative log-likelihood in nats, summed over the supervised tokens."""
    losses = model(batch)
    return LossTerms(total=losses.nll.float().sum(), tokens=losses.nll.numel())


class Learner(Protocol):
    """What a student is here: `model.vlm.Seeing`."""

    language: Any

    def supervised(self, batch: Batch) -> Supervised: ...


class Distill:
    """``(1 - α) · NLL + α · T² · Σ wᵢ KL(teacherᵢ ‖ student)``, each summed over the supervised tokens (Hinton et al.
    2015, arXiv:1503.02531; the distillation guide's loss with its terms per token).

    α and T are functions of the share of the ``total_steps`` that is done (`Batch.step`). T² makes the divergence's
    gradient, which is (q_T - p_T) / T per logit, as large as at T = 1; the NLL is at temperature 1 always. Teachers are
    those of `Batch.taught`, in the order of the config; one that is asked now is one of ``asked``, by its number.
    """

    def __init__(self, cfg: DistillConfig, total_steps: int, asked: Sequence[Learner] = ()) -> None:
        self.cfg, self.total_steps, self.asked = cfg, total_steps, asked
        self.parts = ("sft_loss", "distill_loss", "teacher_kl") if cfg.taught else ("sft_loss",)

    def __call__(self, model: Learner, batch: Batch, /) -> LossTerms:
        alpha, t = self.cfg.at(batch.step, self.total_steps)
        found, nll, kl = taught_losses(model, batch, self.cfg, self.asked, alpha, t)
        sft, divergences = nll.detach().sum(), kl.detach().sum()
        return LossTerms(
            total=found.float().sum(),
            tokens=found.numel(),
            parts=dict(zip(self.parts, (sft, t**2 * divergences, divergences), strict=False)),
            settings={"alpha": alpha, "temperature": t} if self.cfg.taught else {},
        )


def taught_losses(
    model: Learner, batch: Batch, cfg: DistillConfig, asked: Sequence[Learner], alpha: float, t: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(what is minimised, NLL, Σ wᵢ KLᵢ at temperature ``t``) of every supervised token, fp32 [K], in the order of
    `Supervised`; the first carries the graph. No divergence where the batch brings no teachers, and none of a token
    that a teacher says nothing of (``vocabulary: shared``), whose weight is the data's then."""
    found, language = model.supervised(batch), model.language
    teachers = _teachers(batch, cfg, found.sample, language.vocab, asked)
    weights = [teacher.weight for teacher in cfg.teachers]

    def loss(logits: Tensor, which: slice) -> tuple[Tensor, ...]:
        nll = F.cross_entropy(logits.float(), found.targets[which], reduction="none")
        kl, silent = torch.zeros_like(nll), torch.zeros_like(nll)
        for weight, teacher in zip(weights, teachers, strict=False):  # none, or all
            own = teacher(which)
            kl = kl + weight * divergence(logits, own, t)
            silent = silent + weight * (~says(own)).float()
        return (1 - alpha * (1 - silent)) * nll + alpha * t**2 * kl, nll, kl

    learns = language.head_learns
    total, nll, kl = head_losses(language.head, found.hidden, loss, language.vocab, head_learns=learns)
    for teacher in teachers:
        if isinstance(teacher, _Asked):
            teacher.check()
    return total, nll, kl


def _teachers(
    batch: Batch, cfg: DistillConfig, owner: Tensor, vocab: int, asked: Sequence[Learner]
) -> list[Callable[[slice], Teacher]]:
    """What each teacher says of some of the tokens, in the order of `Supervised`."""
    assert len(batch.taught) in (0, len(cfg.teachers)), (len(batch.taught), len(cfg.teachers))
    back = _back(owner)
    teachers: list[Callable[[slice], Teacher]] = []
    for number, own in enumerate(batch.taught):
        if isinstance(own, Batch):
            teachers.append(_ask(asked[number], own, vocab, back))
            continue
        here = {name: column.to(back.device, non_blocking=True)[back] for name, column in own.items()}
        teachers.append(partial(_of, teacher_of(here, cfg.kept_temperatures)))
    return teachers


def spoken_of(batch: Batch, cfg: DistillConfig) -> Tensor:
    """bool [K], in the order of `Supervised`: whether some teacher says something of the token."""
    owner = batch.sample_index[batch.supervise]
    said = torch.zeros_like(owner, dtype=torch.bool)
    for own in batch.taught:
        said |= torch.ones_like(said) if isinstance(own, Batch) else says(teacher_of(own, cfg.kept_temperatures))
    return said[_back(owner)]


def _back(owner: Tensor) -> Tensor:
    """int64 [K]: from sample by sample, as teachers speak, to the order of the batch."""
    return owner.argsort(stable=True).argsort()


def _of(teacher: Teacher, which: slice) -> Teacher:
    """What it says of some of the tokens."""
    own = {f.name: getattr(teacher, f.name) for f in fields(teacher)}
    return replace(teacher, **{name: t[which] for name, t in own.items() if isinstance(t, Tensor)})


@torch.no_grad()
def _ask(teacher: Learner, batch: Batch, vocab: int, back: Tensor) -> _Asked:
    """A teacher's log-probabilities at its supervised tokens; its head, too, runs on a chunk of them at a time."""
    found = teacher.supervised(batch)
    hidden = found.hidden[found.sample.argsort(stable=True)][back.to(found.hidden.device)]
    return _Asked(teacher.language.head, hidden, vocab, batch.ids, back.device)


@dataclass(eq=False, slots=True)
class _Asked:
    """Says of a chunk of tokens what a teacher's head makes of them. Whether all of it is finite is asked once, by
    `check`: each time, a GPU's host waits for it."""

    head: Callable[[Tensor], Tensor]
    hidden: Tensor
    vocab: int
    ids: Sequence[str]
    device: torch.device
    """The student's."""
    sound: Tensor | None = None

    @torch.no_grad()
    def __call__(self, which: slice) -> Teacher:
        log_p, sound = _log_p(self.head(self.hidden[which]), self.vocab)
        self.sound = sound if self.sound is None else self.sound & sound
        return Full(log_p.to(self.device))

    def check(self) -> None:
        if self.sound is not None:
            _require(self.sound, self.ids)


def log_probabilities(logits: Tensor, vocab: int, ids: Sequence[str] = ()) -> Tensor:
    """fp32 [K, vocab]: of the ids that the student has; what a teacher's table has beyond them is left out, what it has
    not is impossible. Raises `UserError` for logits that are NaN or leave no id possible."""
    log_p, sound = _log_p(logits, vocab)
    _require(sound, ids)
    return log_p


def _log_p(logits: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """`log_probabilities`, and bool []: whether they are."""
    log_p = torch.log_softmax(logits[:, :vocab].float(), dim=-1)
    sound = (~log_p.isnan()).all() & (log_p.amax(-1) > -torch.inf).all()
    return F.pad(log_p, (0, vocab - log_p.shape[-1]), value=-torch.inf), sound


def _require(sound: Tensor, ids: Sequence[str]) -> None:
    if not bool(sound):
        raise UserError(
            f"the teacher gives no finite log-probabilities (samples {', '.join(map(repr, ids[:4]))}); its weights may "
            "be damaged, or its precision too narrow for it (try fp32)"
        )


OBJECTIVES: dict[str, Callable[[RunConfig, int, Sequence[Learner]], Objective]] = {
    "next_token": lambda cfg, total_steps, asked: next_token,
    "distill": lambda cfg, total_steps, asked: Distill(cfg.learnt_from, total_steps, asked),
}
"""Made from a run's config, its steps and the teachers that are asked; by the name a stage has it under
(`config.stages`)."""
