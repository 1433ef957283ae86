"""Which of a tower's outputs are patches, and where in the picture each one lies.

A feature map says it by its shape. A row of tokens may begin (or end) with class, register or pooled tokens that
nothing announces, and may be in any order. What a tower declares is taken when the count agrees with it to the last
token; everything else is found out by changing the picture: a patch's own token is the one that moves most with it.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

MOST_EXTRA = 16
"""Tokens that are no patches, at most. Known towers have up to 8; detectors (YOLOS: 101) are no towers."""

Axes = str
"""``nchw`` or ``nhwc`` (a map), or ``tokens``."""


@dataclass(frozen=True, slots=True)
class Declared:
    """What a tower says of its own output; None where it says nothing."""

    grid: tuple[int, int] | None = None
    """Rows and columns of patches."""
    before: frozenset[int] | None = None
    """How many tokens may come before the patches and need no proof."""
    axes: Axes | None = None
    """Where a map has its channels."""


@dataclass(frozen=True, slots=True)
class PatchLayout:
    """Patches ``[first : first + rows * columns]`` of every image's tokens, row by row; or all of a map."""

    axes: Axes
    rows: int
    columns: int
    first: int = 0

    @property
    def num_patches(self) -> int:
        return self.rows * self.columns

    def take(self, out: Tensor, images: int) -> Tensor:
        """``[images, P, Dv]`` of what the tower gave for that many images."""
        if self.axes == "nchw":
            return out.flatten(2).transpose(1, 2)
        if self.axes == "nhwc":
            return out.flatten(1, 2)
        return per_image(out, images)[:, self.first : self.first + self.num_patches]


class UnknownLayout(Exception):
    """Why an output cannot be read as patches, in half a sentence."""


def per_image(out: Any, images: int) -> Tensor:
    """Tokens by image: some towers (Pixtral) lay a whole batch in one row. Raises `UnknownLayout` for what is no
    tensor."""
    if not isinstance(out, Tensor):
        raise UnknownLayout(f"the tower gives a {type(out).__name__}, not one tensor of patches")
    if out.ndim == 3 and out.shape[0] == 1 and images > 1 and out.shape[1] % images == 0:
        return out.reshape(images, -1, out.shape[2])
    return out


def expected_layout(out: Any, height: int, width: int, declared: Declared) -> tuple[PatchLayout, int]:
    """The layout that the shape of ``[1, …]`` allows, and how many of its tokens are no patches; `find_layout` proves
    it. Raises `UnknownLayout`."""
    out = per_image(out, 1)
    if out.ndim == 4:
        return _map_layout(out, height, width, declared.axes), 0
    if out.ndim != 3:
        raise UnknownLayout(f"the tower gives a tensor of shape {list(out.shape)}, not [images, patches, width]")
    tokens = out.shape[1]
    if declared.grid is not None and 0 <= tokens - declared.grid[0] * declared.grid[1] <= MOST_EXTRA:
        rows, columns = declared.grid
    elif tokens == 1:
        raise UnknownLayout("the tower gives one token for the whole picture, not one for each patch")
    else:  # the largest grid in the picture's proportions
        fits = [(r, c) for r, c in _grids(height, width, tokens) if tokens - r * c <= MOST_EXTRA]
        if not fits:
            raise UnknownLayout(f"{tokens} output tokens are no grid of patches of a {height} x {width} picture")
        rows, columns = fits[-1]
    return PatchLayout("tokens", rows, columns), tokens - rows * columns


def find_layout(
    run: Callable[[Tensor], Any], height: int, width: int, declared: Declared
) -> tuple[PatchLayout, Tensor]:
    """Where the patches are in what ``run`` gives for normalised pictures ``[m, 3, h, w]``, and what it gave for two.

    Raises `UnknownLayout`, and `FloatingPointError` for features that are not finite.
    """
    picture, other = _pictures(height, width)
    twice = run(picture.repeat(2, 1, 1, 1))
    out = per_image(twice, 2)
    if out.shape[0] != 2:
        raise UnknownLayout(f"for 2 pictures the tower gives a tensor of shape {list(twice.shape)}")
    if not bool(torch.isfinite(out).all()):
        raise FloatingPointError
    if not torch.allclose(out[0].float(), out[1].float(), rtol=2e-2, atol=1e-2 * float(out.float().abs().max())):
        raise UnknownLayout("the tower gives other features each time it sees the same picture (random masking?)")
    if twice.shape[0] == 1:
        alone, beside = run(picture), per_image(run(torch.cat([picture, other])), 2)[:1]
        if not torch.allclose(alone.float(), beside.float(), rtol=2e-2, atol=1e-2 * float(alone.float().abs().max())):
            raise UnknownLayout("the features of a picture depend on which others are in its batch")
    layout, extra = expected_layout(out, height, width, declared)
    if layout.axes != "tokens":
        return layout, twice
    if declared.grid == (layout.rows, layout.columns) and declared.before is not None and extra in declared.before:
        return PatchLayout("tokens", layout.rows, layout.columns, first=extra), twice
    first = _locate(run, picture, other, layout, extra)
    if first is None:
        raise UnknownLayout(
            f"its {layout.num_patches + extra} output tokens do not follow a grid of {layout.rows} x {layout.columns} "
            "patches: the token of a patch is not the one that moves most when that patch changes"
        )
    return PatchLayout("tokens", layout.rows, layout.columns, first), twice


def _map_layout(out: Tensor, height: int, width: int, axes: Axes | None) -> PatchLayout:
    """A map's spatial axes are those in the picture's proportions."""
    if axes is None:
        _, a, b, c = out.shape
        fits = [
            name
            for name, (rows, columns) in (("nchw", (b, c)), ("nhwc", (a, b)))
            if _fits(rows, columns, height, width)
        ]
        if len(fits) != 1:
            raise UnknownLayout(
                f"of its feature map {list(out.shape)} it cannot be told which axes are rows and columns of a "
                f"{height} x {width} picture"
            )
        (axes,) = fits
    rows, columns = out.shape[2:] if axes == "nchw" else out.shape[1:3]
    return PatchLayout(axes, rows, columns)


def _fits(rows: int, columns: int, height: int, width: int) -> bool:
    """Whether a grid has the picture's proportions, up to less than one row or column of rounding."""
    return abs(rows * width - columns * height) < max(height, width) and (height != width or rows == columns)


def _grids(height: int, width: int, tokens: int) -> Iterator[tuple[int, int]]:
    """Grids of at least 2 x 2 in the picture's proportions, smallest first."""
    for rows in range(2, tokens // 2 + 1):
        for columns in {rows * width // height, -(-rows * width // height)}:
            if columns >= 2 and rows * columns <= tokens and _fits(rows, columns, height, width):
                yield rows, columns


def _pictures(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Two smooth noise pictures, always the same ones."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, max(2, height // 8), max(2, width // 8), generator=draw)
    return interpolate(noise, size=(height, width), mode="bicubic").split(1)  # type: ignore[return-value]


def _locate(
    run: Callable[[Tensor], Any], picture: Tensor, other: Tensor, layout: PatchLayout, extra: int
) -> int | None:
    """How many tokens come before the patches, or None when no answer makes the tokens follow their patches.

    The corner patches and the middle one are changed in turn. In the table of how far each of their tokens moved, the
    one matching of patches to tokens that carries most must be each with its own: that is blind to tokens that move
    more than others and to patches that count for more.
    """
    height, width = picture.shape[2:]
    last_row, last_column = layout.rows - 1, layout.columns - 1
    cells = sorted(
        {(0, 0), (0, last_column), (last_row, 0), (last_row, last_column), (layout.rows // 2, layout.columns // 2)}
    )
    pictures = [picture]
    for row, column in cells:
        changed = picture.clone()
        y = slice(row * height // layout.rows, (row + 1) * height // layout.rows)
        x = slice(column * width // layout.columns, (column + 1) * width // layout.columns)
        changed[:, :, y, x] = other[:, :, y, x]
        pictures.append(changed)
    out = per_image(run(torch.cat(pictures)), len(pictures)).double().cpu()
    moved = torch.linalg.vector_norm(out[1:] - out[:1], dim=-1)
    moved = moved.clamp_min(1e-6 * float(moved.max()) or 1.0).log()
    own = torch.tensor([row * layout.columns + column for row, column in cells])
    best: tuple[float, int] | None = None
    for first in range(extra + 1):
        table = moved[:, own + first]
        matched = float(table.diag().sum())
        rows = torch.arange(len(cells))
        others = (p for p in itertools.permutations(range(len(cells))) if p != tuple(range(len(cells))))
        if any(float(table[rows, list(p)].sum()) >= matched - 1e-6 for p in others):
            continue
        clear = matched / len(cells) - float(table.mean())
        if best is None or clear > best[0]:
            best = (clear, first)
    return None if best is None else best[1]
