"""Image tokens into the text sequence: count, locate, scatter. Pure tensor functions.

Used alike by training, evaluation and generation. A count that does not agree stops with both numbers, because features
that slip by one would corrupt every embedding after them without an error.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from beholder.types import Batch, UserError


def check_images(batch: Batch, num_visual_tokens: int) -> None:
    """Refuse a batch whose image count or reserved positions do not fit the model, naming the sample and both
    counts."""
    slots = len(batch.image_lengths)
    if len(batch.images) != slots:
        per_sample = {name: int((batch.image_sample == i).sum()) for i, name in enumerate(batch.ids)}
        raise UserError(
            f"the batch holds {len(batch.images)} images but its prompts reserve room for {slots} "
            f"(places per sample: {per_sample}). Truncation or a lost image is the usual cause."
        )
    if wrong := (batch.image_lengths != num_visual_tokens).nonzero().flatten().tolist():
        name, width = batch.ids[int(batch.image_sample[wrong[0]])], int(batch.image_lengths[wrong[0]])
        raise UserError(
            f"sample {name!r}: its image has {width} reserved positions but the connector gives {num_visual_tokens} "
            "tokens per image. Encode with the model's num_visual_tokens."
        )


def scatter_images(
    embeds: Float[Tensor, "b t dh"],
    positions: Int[Tensor, "s"],
    tokens: Float[Tensor, "s2 dh"],
) -> Float[Tensor, "b t dh"]:
    """``embeds`` with the row at flat position ``positions[i]`` replaced by ``tokens[i]``, images one after another.

    Out of place and differentiable in ``tokens``. ``positions`` count ``row * T + t``. Raises `UserError` with both
    counts when they disagree, and when a position lies outside the batch (checked on the CPU only: no device sync).
    """
    if len(positions) != len(tokens):
        raise UserError(
            f"the images produced {len(tokens)} visual tokens but the sequence reserves {len(positions)} positions. "
            "Truncation inside an image, a lost image, or another num_visual_tokens is the usual cause."
        )
    rows, length, width = embeds.shape
    if positions.device.type == "cpu" and positions.numel():
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= rows * length:
            raise UserError(f"image positions {low}..{high} lie outside the batch of {rows} x {length} positions")
    flat = embeds.reshape(rows * length, width)
    return flat.index_copy(0, positions, tokens.to(embeds.dtype)).view(rows, length, width)


def supervised_positions(
    supervise: Bool[Tensor, "b t"], position_ids: Int[Tensor, "b t"]
) -> tuple[Int[Tensor, "k"], Int[Tensor, "k"]]:
    """Flat positions of the supervised tokens, and of the position that predicts each: the one before, same sample."""
    targets = supervise.reshape(-1).nonzero().squeeze(1)
    if supervise.device.type == "cpu":
        first = position_ids.reshape(-1)[targets] == 0
        assert not bool(first.any()), "the first token of a sample has no predecessor and cannot be supervised"
    return targets, targets - 1


def spans_to_positions(spans: list[tuple[int, int]], num_visual_tokens: int, name: str) -> Int[Tensor, "s"]:
    """``[start, stop)`` spans of one sequence as positions, refusing a span of another length."""
    for k, (start, stop) in enumerate(spans):
        if stop - start != num_visual_tokens:
            raise UserError(
                f"{name}: image {k + 1} has {stop - start} reserved positions, the connector gives {num_visual_tokens}"
            )
    return torch.tensor([t for span in spans for t in range(*span)], dtype=torch.int64)
