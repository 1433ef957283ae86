"""Patches are found among a tower's tokens wherever they are, or the tower is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import avg_pool2d

from beholder.model.patch_layout import Declared, UnknownLayout, find_layout

SIDE, PATCH, WIDTH = 5, 8, 24
SIZE = SIDE * PATCH


def tower(before: int = 0, after: int = 0, order: Tensor | None = None, mix: float = 0.5, seed: int = 0) -> Callable:
    """Patch means through a random matrix, every token mixed with the mean of all; class tokens see the mean alone."""
    draw = torch.Generator().manual_seed(seed)
    embed = torch.randn(3, WIDTH, generator=draw)
    own = torch.randn(before + after + SIDE * SIDE, WIDTH, generator=draw)

    def run(pixels: Tensor) -> Tensor:
        patches = avg_pool2d(pixels, PATCH).flatten(2).transpose(1, 2) @ embed
        patches = patches if order is None else patches[:, order]
        whole = patches.mean(1, keepdim=True) * SIDE
        patches = (1 - mix) * patches + mix * whole
        tokens = [whole.expand(-1, before, -1), patches, whole.expand(-1, after, -1)]
        return torch.cat(tokens, 1) + own

    return run


@given(before=st.integers(0, 5), after=st.integers(0, 5), mix=st.floats(0, 0.8), seed=st.integers(0, 1000))
def test_patches_are_found_behind_and_before_other_tokens(before: int, after: int, mix: float, seed: int) -> None:
    # Up to 10 extra tokens: 5 x 5 is the largest grid below 36.
    layout, _ = find_layout(tower(before, after, mix=mix, seed=seed), SIZE, SIZE, Declared())
    assert (layout.rows, layout.columns, layout.first) == (SIDE, SIDE, before)


@pytest.mark.parametrize("order", ["columns first", "shuffled", "reversed"])
def test_tokens_in_another_order_are_refused(order: str) -> None:
    rows = torch.arange(SIDE * SIDE).view(SIDE, SIDE)
    shuffled = torch.randperm(SIDE * SIDE, generator=torch.Generator().manual_seed(3))
    by = {"columns first": rows.T.flatten(), "shuffled": shuffled, "reversed": rows.flatten().flip(0)}
    with pytest.raises(UnknownLayout, match="do not follow a grid of 5 x 5"):
        find_layout(tower(order=by[order]), SIZE, SIZE, Declared())


def test_a_declared_count_needs_no_proof_and_another_one_does() -> None:
    """Tokens that carry no place at all: a declaration is believed, to the last token."""
    placeless = tower(before=1, mix=1.0)
    declared = Declared((SIDE, SIDE), frozenset({0, 1}))
    assert find_layout(placeless, SIZE, SIZE, declared)[0].first == 1
    for other in (Declared(), Declared((SIDE, SIDE)), Declared((SIDE, SIDE), frozenset({0, 2}))):
        with pytest.raises(UnknownLayout, match="do not follow"):
            find_layout(placeless, SIZE, SIZE, other)


def test_a_pooled_output_is_no_patch() -> None:
    with pytest.raises(UnknownLayout, match="one token for the whole picture"):
        find_layout(lambda x: tower()(x).mean(1, keepdim=True), SIZE, SIZE, Declared())
    with pytest.raises(UnknownLayout, match=r"shape \[2, 24\], not \[images, patches, width\]"):
        find_layout(lambda x: tower()(x).mean(1), SIZE, SIZE, Declared())
    with pytest.raises(UnknownLayout, match="gives a list"):
        find_layout(lambda x: [tower()(x)], SIZE, SIZE, Declared())  # type: ignore[arg-type, return-value]


def test_too_many_tokens_beside_a_grid_are_refused() -> None:
    with pytest.raises(UnknownLayout, match="are no grid of patches"):
        find_layout(lambda x: tower()(x).repeat(1, 15, 1)[:, :360], SIZE, SIZE, Declared())  # 18 * 18 + 36


def test_a_batch_in_one_row_is_taken_apart() -> None:
    layout, _ = find_layout(lambda x: tower(1)(x).flatten(0, 1)[None], SIZE, SIZE, Declared())
    pixels = torch.randn(3, 3, SIZE, SIZE)
    rows = tower(1)(pixels)
    assert torch.equal(layout.take(rows.flatten(0, 1)[None], 3), rows[:, 1:])


def test_images_that_see_each_other_are_refused() -> None:
    def run(pixels: Tensor) -> Tensor:
        rows = tower(1)(pixels)
        return (rows + rows.mean(0, keepdim=True)).flatten(0, 1)[None]

    with pytest.raises(UnknownLayout, match="depend on which others are in its batch"):
        find_layout(run, SIZE, SIZE, Declared())


def test_features_drawn_at_random_are_refused() -> None:
    """As ViT-MAE gives them, which shuffles its patches at every call."""

    def run(pixels: Tensor) -> Tensor:
        return torch.stack([t[torch.randperm(SIDE * SIDE)] for t in tower()(pixels)])

    with pytest.raises(UnknownLayout, match="each time it sees the same picture"):
        find_layout(run, SIZE, SIZE, Declared((SIDE, SIDE), frozenset({0})))


@pytest.mark.parametrize(("height", "width"), [(40, 40), (40, 64), (64, 40)])
@pytest.mark.parametrize("last", [False, True])
def test_the_axes_of_a_map_are_those_in_the_pictures_proportions(height: int, width: int, last: bool) -> None:
    weight = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))

    def run(pixels: Tensor) -> Tensor:
        out = avg_pool2d(pixels, 8).permute(0, 2, 3, 1) @ weight
        return out if last else out.permute(0, 3, 1, 2)

    layout, out = find_layout(run, height, width, Declared())

    assert (layout.rows, layout.columns) == (height // 8, width // 8)
    row, column = 2, 3
    there = out[0, row, column] if last else out[0, :, row, column]
    assert torch.equal(layout.take(out, 2)[0, row * layout.columns + column], there)


def test_a_map_as_wide_as_it_is_deep_is_refused() -> None:
    with pytest.raises(UnknownLayout, match="cannot be told which axes"):
        find_layout(lambda x: torch.ones(2, 5, 5, 5), SIZE, SIZE, Declared())
    assert find_layout(lambda x: torch.ones(2, 5, 5, 5), SIZE, SIZE, Declared(axes="nhwc"))[0].axes == "nhwc"
