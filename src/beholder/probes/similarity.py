"""How much each layer changes what passes through it: linear CKA between a layer's input and its output.

CKA (Kornblith et al. 2019, arXiv:1905.00414) is 1 where the output is the input up to rotation and scale, and smaller
the more a layer makes of it. Layers with a low one are where adapters have most to say (arXiv:2602.05988).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from beholder.types import UserError

MAX_POSITIONS = 2048
"""Positions, evenly spaced over all samples: what is kept of a layer is so many rows of its width."""


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Of two sets of features of the same rows, ``[n, a]`` and ``[n, b]``; in fp64, between 0 and 1.

    Raises ValueError where one of them is constant: there is nothing to compare.
    """
    x, y = (t.double() - t.double().mean(0) for t in (x, y))
    if len(x) < min(x.shape[1], y.shape[1]):  # the same number, by the smaller product
        k, m = x @ x.T, y @ y.T
        both, one, other = (k * m).sum(), k.norm(), m.norm()
    else:
        both, one, other = (y.T @ x).square().sum(), (x.T @ x).norm(), (y.T @ y).norm()
    if not one * other > 0:
        raise ValueError("features that are the same in every row have no CKA")
    return float(both / (one * other))


def most_changing(similarity: Sequence[float], number: int) -> tuple[int, ...]:
    """The layers with the lowest similarity, in the model's order."""
    return tuple(sorted(sorted(range(len(similarity)), key=lambda k: (similarity[k], k))[:number]))


def layer_similarity(
    module: nn.Module, blocks: Iterable[str], run: Callable[[int], Any], num_samples: int
) -> list[float]:
    """CKA between input and output of every block, first to last.

    ``run(i)``: a forward pass over sample ``i`` alone, without padding. Raises `UserError` for blocks that are not
    called with one sequence of features and give one, each once.
    """
    names = list(blocks)
    each = max(2, MAX_POSITIONS // num_samples)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            before = args[0] if args else kwargs.get("hidden_states")
            after = out[0] if isinstance(out, tuple) else out
            if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.shape[:-1] != after.shape[:-1]:
                raise UserError(
                    f"{name} ({type(module.get_submodule(name)).__name__}) does not give one row of features for each "
                    "it is given, so its input and output cannot be compared"
                )
            rows = before.shape[:-1].numel()
            at = torch.linspace(0, rows - 1, min(each, rows), device=before.device).round().long()
            pair = (t.detach().flatten(0, -2)[at].float().cpu() for t in (before, after))
            seen[name].append(tuple(pair))  # pyright: ignore[reportArgumentType]

        return hook

    hooks = [module.get_submodule(n).register_forward_hook(keep(n), with_kwargs=True) for n in names]
    try:
        with torch.no_grad():
            for i in range(num_samples):
                run(i)
    finally:
        for hook in hooks:
            hook.remove()
    if missed := [n for n in names if len(seen[n]) != num_samples]:
        raise UserError(f"{missed[0]} was called {len(seen[missed[0]])} times for {num_samples} samples")
    return [linear_cka(*(torch.cat(side) for side in zip(*seen[n], strict=True))) for n in names]
