"""Attention within samples equals masked attention over the row, values and gradients, for any layout."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from beholder.model import attention
from beholder.model.attention import causal_attention, find_segments, segment_attention

Layouts = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3)


def rows_of(layout: list[list[int]]) -> torch.Tensor:
    """Positions of rows that hold samples of the given lengths, filled up with one more run."""
    width = max(sum(row) for row in layout)
    rows = [[*row, width - sum(row)] if sum(row) < width else row for row in layout]
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def tensors(positions: torch.Tensor, heads: int = 4, groups: int = 2, width: int = 8) -> list[torch.Tensor]:
    b, t = positions.shape
    draw = torch.Generator().manual_seed(0)
    shapes = [(b, heads, t, width), (b, groups, t, width), (b, groups, t, width)]
    return [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]


def masked(positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same attention from its definition: within a run of positions, nothing later than oneself."""
    run = (torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(1)
    allowed = (run[:, :, None] == run[:, None, :]) & torch.ones(positions.shape[1], positions.shape[1]).tril().bool()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None]).transpose(1, 2)


@settings(max_examples=60, deadline=None)
@given(Layouts)
def test_every_position_is_placed_once_and_comes_back(layout: list[list[int]]) -> None:
    positions = rows_of(layout)
    segments = find_segments(positions)
    flat = torch.cat([places.reshape(-1) for places in segments.buckets])

    assert torch.equal(flat[segments.inverse], torch.arange(positions.numel()))
    for places in segments.buckets:
        own = positions.reshape(-1)[places]
        assert bool((own[:, 0] == 0).all()), "a sample begins at position 0"
        assert bool((torch.diff(own) >= 0).all()) and places.shape[1] <= 1.25 * int((own.max(1).values + 1).min())


@settings(max_examples=40, deadline=None)
@given(Layouts)
def test_segment_attention_is_masked_attention(layout: list[list[int]]) -> None:
    positions = rows_of(layout)
    q, k, v = tensors(positions)
    expected = masked(positions, q, k, v)
    got, _ = segment_attention(torch.nn.Module(), q, k, v, None, segments=find_segments(positions))
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    # The softmax runs in fp32, the rest in fp64: worst seen 4e-7, gradients 1.4e-6.
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-6)
    wanted = torch.autograd.grad((expected * weight).sum(), [q, k, v])
    for a, b in zip(torch.autograd.grad((got * weight).sum(), [q, k, v]), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)


def test_long_samples_take_torchs_kernel_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = torch.arange(20)[None]
    q, k, v = tensors(positions)
    dense = causal_attention(q, k, v, 0.25)
    monkeypatch.setattr(attention, "DENSE_UP_TO", 10)

    torch.testing.assert_close(causal_attention(q, k, v, 0.25), dense, rtol=0, atol=1e-6)


def capped(module: torch.nn.Module, *given: torch.Tensor) -> bool:
    """Whether transformers' own kernel refuses a soft cap; before 5.16 it did not look."""
    try:
        sdpa_attention_forward(module, *given, softcap=30.0)  # type: ignore[arg-type]
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("case", ["no segments", "window", "soft cap refused"])
def test_what_it_does_not_know_goes_to_transformers(case: str) -> None:
    positions = rows_of([[5, 3]])
    q, k, v = tensors(positions)
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    mask = torch.ones(1, 1, 8, 8).tril().bool() & (torch.ones(8, 8).triu(-1).bool())  # a window of two
    match case:
        case "no segments":
            got, _ = segment_attention(module, q, k, v, mask)
        case "window":
            got, _ = segment_attention(module, q, k, v, mask, segments=find_segments(positions), sliding_window=2)
        case _:
            with pytest.raises(ValueError, match="softcap") if capped(module, q, k, v, mask) else nullcontext():
                segment_attention(module, q, k, v, mask, segments=find_segments(positions), softcap=30.0)
            return
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
