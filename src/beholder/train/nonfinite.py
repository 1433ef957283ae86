"""When a run must stop itself, and who is to blame.

The engine finds a loss or gradient that is not finite before the optimizer steps, and weights or moments that are not
before they are saved; this file names the samples and the tensors. But for `not_finite` it runs only after something
went wrong, so it may be slow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch

from beholder.train.objectives import TokenLossModel
from beholder.types import Batch, Taught

MAX_NAMED = 16
"""Sample ids spelled out in a message."""


class NonFiniteError(RuntimeError):
    """Something of a training step was NaN or infinite. Nothing that is not finite was saved.

    ``which``: loss or gradient, found before a weight was touched; ``named`` are then the ids of the samples that give
    it also when they are alone, or, if none does, the samples of its row or step. Else weights or optimizer state,
    found after the update and before a save; ``named`` are the tensors.
    """

    def __init__(
        self, which: Literal["loss", "gradient", "weights", "optimizer state"], step: int, named: Sequence[str]
    ) -> None:
        self.which, self.step, self.named = which, step, tuple(named)
        some = ", ".join(repr(i) for i in self.named[:MAX_NAMED])
        some += f" and {len(self.named) - MAX_NAMED} more" if len(self.named) > MAX_NAMED else ""
        if which in ("loss", "gradient"):
            message = (
                f"the {which} of step {step} is not finite (samples {some}). Training stopped before the optimizer "
                f"stepped: the weights are those of step {step - 1}. Look at the samples with `beholder preview`; if "
                "they are sound, lower train.lr.connector, set train.grad_clip, or use train.precision: bf16 or fp32."
            )
        else:
            message = (
                f"after the update of step {step} the {which} that would be saved are not finite ({some}), although "
                "loss and gradient were. They were not saved: the latest checkpoint is an earlier, sound one, and the "
                "same command goes on from it. If it happens again, lower train.lr or set train.grad_clip; if it does "
                "not, suspect the memory of the machine."
            )
        super().__init__(message)


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors with a NaN or an infinity. One norm over all of them tells when there is none."""
    if bool(torch.isfinite(torch.nn.utils.get_total_norm([t.detach() for t in tensors.values()]))):
        return []
    return [name for name, t in tensors.items() if not bool(torch.isfinite(t).all())]


@torch.no_grad()
def samples_with_bad_loss(model: TokenLossModel, batch: Batch) -> list[str]:
    """Ids of the samples of ``batch`` that have a token whose loss is NaN or infinite, each looked at alone."""
    losses = model(batch)
    suspects = losses.sample[~torch.isfinite(losses.nll)].unique().tolist()
    if len(suspects) < 2:
        return [batch.ids[i] for i in suspects]
    # A NaN spreads over its packed row: attention weights of 0 times NaN are NaN.
    alone = [i for i in suspects if not bool(torch.isfinite(model(only(batch, i)).nll).all())]
    return [batch.ids[i] for i in alone or suspects]


def only(batch: Batch, index: int) -> Batch:
    """Sample number ``index`` of a batch, padded or packed, as a batch of its own: one row, no padding."""
    places = (batch.sample_index.reshape(-1) == index).nonzero().squeeze(1)  # neighbours in one row
    mine = (batch.image_sample == index).nonzero().squeeze(1)
    shown = (batch.image_sample == index).repeat_interleave(batch.image_lengths)

    def row(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(-1)[places][None]

    return replace(
        batch,
        input_ids=row(batch.input_ids),
        position_ids=row(batch.position_ids),
        supervise=row(batch.supervise),
        sample_index=torch.zeros_like(row(batch.sample_index)),
        image_positions=batch.image_positions[shown] - places[0],
        image_lengths=batch.image_lengths[mine],
        image_sample=torch.zeros_like(mine),
        images=[batch.images[i] for i in mine.tolist()],
        image_sizes=[batch.image_sizes[i] for i in mine.tolist()] if batch.image_sizes else [],
        ids=[batch.ids[index]],
        rejected=[],
        taught=[_taught(batch, own, index) for own in batch.taught],
    )


def _taught(batch: Batch, own: Taught, index: int) -> Taught:
    if isinstance(own, Batch):
        return only(own, index)
    owner = batch.sample_index[batch.supervise].sort(stable=True).values
    return {name: t[owner == index] for name, t in own.items()}
