"""Attention for packed rows on a CPU: each sample attends within itself, samples of like length as one small dense
batch.

Registered with transformers under its own name and used in place of ``sdpa`` there (`language.load_language`). What a
sample may see is the same: causal, from its own first token on. Only the work differs: a packed row of S samples costs
S small squares instead of one large one, and no mask is read.

Why: torch's flash kernel for CPUs works in blocks of hundreds of positions and takes 12 x as long as plain matrix
products for the 36-position samples of a caption set (forward and backward, bf16); on packed rows it computes the
masked part as well. ``benchmarks/segment_attention.py`` prints the comparison.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

NAME = "beholder_segments"

DENSE_UP_TO = 512
"""Samples longer than this go through torch's own kernel: the square of scores would cost more than it saves."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the samples of a ``[B, T]`` batch lie, grouped by length, for attention inside each."""

    buckets: tuple[Tensor, ...]
    """Per bucket, int64 ``[S, L]``: flat position of place l of sample s (a sample's last position, past its end)."""
    inverse: Tensor
    """int64 ``[B * T]``: where each flat position ended up in the buckets' concatenation."""


def find_segments(position_ids: Int[Tensor, "b t"], growth: float = 1.25) -> Segments:
    """Runs of positions that count up by one; a restart or a new row begins the next. No run is longer than ``growth``
    times the shortest of its bucket, so little is padded."""
    rows, length = position_ids.shape
    starts_at = torch.ones(rows, length, dtype=torch.bool)
    starts_at[:, 1:] = position_ids[:, 1:] - position_ids[:, :-1] != 1
    starts = starts_at.reshape(-1).nonzero().squeeze(1)
    lengths = torch.diff(starts, append=torch.tensor([rows * length]))
    order = lengths.argsort(descending=True, stable=True)
    buckets: list[Tensor] = []
    inverse = torch.empty(rows * length, dtype=torch.int64)
    done = offset = 0
    while done < order.numel():
        longest = int(lengths[order[done]])
        members = order[done:]
        members = members[lengths[members] * growth >= longest]
        places = torch.arange(longest)
        inside = places[None] < lengths[members, None]
        flat = starts[members, None] + torch.minimum(places[None], lengths[members, None] - 1)
        inverse[flat[inside]] = (torch.arange(members.numel() * longest).view(-1, longest) + offset)[inside]
        buckets.append(flat)
        offset += flat.numel()
        done += members.numel()
    return Segments(tuple(buckets), inverse)


def causal_attention(
    query: Float[Tensor, "s h l d"], key: Float[Tensor, "s g l d"], value: Float[Tensor, "s g l d"], scale: float
) -> Float[Tensor, "s h l d"]:
    """Plain causal attention, h query heads sharing g key/value heads; scores in the inputs' precision, softmax in
    fp32."""
    s, h, length, d = query.shape
    groups = key.shape[1]
    if length > DENSE_UP_TO:
        key, value = (x.repeat_interleave(h // groups, 1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    scores = (query * scale).reshape(s, groups, h // groups * length, d) @ key.transpose(-1, -2)
    scores = scores.view(s, groups, h // groups, length, length)
    hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    weights = F.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights.view(s, groups, h // groups * length, length) @ value).view(s, h, length, d)


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls: ``[B, H, T, D]`` in, ``[B, T, H, D]`` out.

    Without ``segments`` (generation, the model's own forward) or with a feature it does not know (sliding windows
    shorter than the longest sample, biases, soft caps), it is transformers' own ``sdpa`` with the mask it was given.
    """
    b, h, t, d = query.shape
    window = kwargs.get("sliding_window")
    plain = (
        segments is not None
        and key.shape[2] == t
        and value.shape[-1] == d
        and dropout == 0.0
        and getattr(module, "is_causal", True)
        and (window is None or segments.buckets[0].shape[1] <= window)
        and all(kwargs.get(name) is None for name in ("softcap", "position_bias", "s_aux", "cache"))
    )
    if not plain:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert segments is not None
    scale = d**-0.5 if scaling is None else scaling
    first = segments.buckets[0]
    if len(segments.buckets) == 1 and first.shape == (b, t):  # one sample a row: nothing to gather
        return causal_attention(query, key, value, scale).transpose(1, 2), None
    flat = [x.transpose(1, 2).reshape(b * t, x.shape[1], d) for x in (query, key, value)]
    outputs = []
    for places in segments.buckets:
        s, length = places.shape
        q, k, v = (x.index_select(0, places.reshape(-1)).view(s, length, -1, d).transpose(1, 2) for x in flat)
        outputs.append(causal_attention(q, k, v, scale).transpose(1, 2).reshape(s * length, h, d))
    return torch.cat(outputs).index_select(0, segments.inverse).view(b, t, h, d), None


def register() -> None:
    """Make `NAME` known to transformers, with the mask that ``sdpa`` gets for the cases passed on to it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
