"""Linear CKA, by its properties, and the layers of a small stack."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from beholder.probes.similarity import layer_similarity, linear_cka
from beholder.stages.layers import Layers
from beholder.types import UserError


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_one_for_a_rotation_a_scale_and_a_shift_and_small_for_something_else() -> None:
    x = features(400, 6)
    turn = torch.linalg.qr(features(6, 6, seed=1))[0]

    assert linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1, abs=1e-6)  # fp32 rotates to 1e-7
    assert linear_cka(x, features(400, 6, seed=2)) < 0.05
    assert linear_cka(x, x + features(400, 6, seed=2)) == pytest.approx(linear_cka(x + features(400, 6, seed=2), x))


def test_many_and_few_rows_give_the_same_number_by_either_product() -> None:
    x, y = features(30, 20), features(30, 25, seed=1)
    centred = [t.double() - t.double().mean(0) for t in (x, y)]
    by_gram = (centred[0] @ centred[0].T * (centred[1] @ centred[1].T)).sum()
    by_gram /= (centred[0] @ centred[0].T).norm() * (centred[1] @ centred[1].T).norm()

    assert linear_cka(x, y) == pytest.approx(float(by_gram))
    assert linear_cka(x[:15], y[:15]) == pytest.approx(linear_cka(x[:15].repeat(4, 1), y[:15].repeat(4, 1)))


def test_features_that_never_change_have_none() -> None:
    with pytest.raises(ValueError, match="the same in every row"):
        linear_cka(torch.ones(9, 3), features(9, 3))


class Keep(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return 2 * x, None


class Halve(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, ::2]


class Shuffle(nn.Module):
    """Most of its output has nothing to do with its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.1 * x + x.roll(1, dims=1).square()


def test_a_layer_that_changes_what_passes_through_it_is_told_from_one_that_does_not() -> None:
    stack = nn.Sequential(Keep(), nn.Identity())
    stack.add_module("shuffle", Shuffle())

    def run(i: int) -> None:
        x = features(1, 50, 8, seed=i)
        for layer in stack:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x

    found = layer_similarity(stack, ["0", "1", "shuffle"], run, 4)

    assert found[:2] == pytest.approx([1, 1]) and found[2] < 0.5
    assert Layers("run", 3, 4, tuple(found)).most_changing(1) == (2,)
    assert not any(m._forward_hooks for m in stack.modules())
    with pytest.raises(UserError, match="called 0 times for 4 samples"):
        layer_similarity(stack, ["1"], lambda i: None, 4)
    with pytest.raises(UserError, match="does not give one row of features"):
        layer_similarity(half := nn.Sequential(Halve()), ["0"], lambda i: half(features(1, 4, 8)), 4)


def test_the_layers_that_change_most_are_named_in_the_models_order() -> None:
    layers = Layers("run", 3, 4, (0.9, 0.2, 0.99, 0.1))

    assert layers.most_changing(2) == (1, 3) and layers.to_json()["similarity"] == [0.9, 0.2, 0.99, 0.1]
