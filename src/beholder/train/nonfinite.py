"""When a run must stop itself, and who is to blame.

The engine finds a loss or gradient that is not finite before the optimizer steps; this file names the samples.
It runs only after something went wrong, so it may be slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from beholder.train.objectives import TokenLossModel
from beholder.types import Batch

MAX_NAMED = 16
"""Sample ids spelled out in a message."""


class NonFiniteError(RuntimeError):
    """A loss or gradient was NaN or infinite. No weight was touched by the step.

    ``which``: loss or gradient. ``sample_ids``: the samples that give it also when they are alone; if none does, the
    samples of its row or step.
    """

    def __init__(self, which: Literal["loss", "gradient"], step: int, sample_ids: Sequence[str]) -> None:
        self.which, self.step, self.sample_ids = which, step, tuple(sample_ids)
        named = ", ".join(repr(i) for i in self.sample_ids[:MAX_NAMED])
        more = f" and {len(self.sample_ids) - MAX_NAMED} more" if len(self.sample_ids) > MAX_NAMED else ""
        super().__init__(
            f"the {which} of step {step} is not finite (samples {named}{more}). Training stopped before the optimizer "
            f"stepped: the weights are those of step {step - 1}. Look at the samples with `beholder preview`; if they "
            "are sound, lower train.lr.connector, set train.grad_clip, or use train.precision: bf16 or fp32."
        )


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

    def row(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(-1)[places][None]

    return replace(
        batch,
        input_ids=row(batch.input_ids),
        position_ids=row(batch.position_ids),
        supervise=row(batch.supervise),
        sample_index=torch.zeros_like(row(batch.sample_index)),
        image_positions=batch.image_positions[mine] - places[0],
        image_sample=torch.zeros_like(mine),
        images=[batch.images[i] for i in mine.tolist()],
        ids=[batch.ids[index]],
        rejected=[],
    )
