"""What a stage minimises: functions ``(model, batch) -> LossTerms``, sums and counts, never means.

The division happens once, in `engine`, by the supervised tokens of the whole effective batch. Loss mathematics
lives in `model.losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from beholder.types import Batch, LossTerms, TokenLosses


class TokenLossModel(Protocol):
    """Anything that turns a batch into the loss of each supervised token: `model.vlm.VisionLanguageModel`."""

    def __call__(self, batch: Batch) -> TokenLosses: ...


Objective = Callable[[TokenLossModel, Batch], LossTerms]


def next_token(model: TokenLossModel, batch: Batch) -> LossTerms:
    """Next-token prediction: negative log-likelihood in nats, summed over the supervised tokens."""
    losses = model(batch)
    return LossTerms(total=losses.nll.float().sum(), tokens=losses.nll.numel())


OBJECTIVES: dict[str, Objective] = {"next_token": next_token}
"""By the name a stage has it under (`config.stages`)."""
