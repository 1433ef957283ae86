"""Image tokens land where they belong, or nothing happens at all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beholder.model.fusion import scatter_images, spans_to_positions, supervised_positions
from beholder.types import UserError


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_exactly_the_reserved_rows_are_overwritten(data: st.DataObject) -> None:
    b, t = data.draw(st.integers(1, 3)), data.draw(st.integers(4, 12))
    s = data.draw(st.integers(0, b * t))
    positions = torch.tensor(data.draw(st.permutations(range(b * t))))[:s]
    embeds, tokens = torch.zeros(b, t, 5), torch.arange(1.0, s + 1).view(s, 1).expand(s, 5)

    out = scatter_images(embeds, positions, tokens).reshape(-1, 5)

    assert float(embeds.abs().sum()) == 0, "the input is not written to"
    expected = [0.0] * (b * t)
    for k, place in enumerate(positions.tolist()):
        expected[place] = k + 1.0
    assert out[:, 0].tolist() == expected


def test_gradients_reach_the_tokens_and_not_the_overwritten_text() -> None:
    embeds, tokens = torch.zeros(1, 6, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    scatter_images(embeds, torch.tensor([3, 1]), tokens).mul(torch.arange(6.0)[None, :, None]).sum().backward()

    assert tokens.grad is not None and tokens.grad[:, 0].tolist() == [3, 1]
    assert embeds.grad is not None and embeds.grad[0, :, 0].tolist() == [0, 0, 2, 0, 4, 5]


@pytest.mark.parametrize("given", [4, 6])
def test_another_number_of_tokens_names_both_counts(given: int) -> None:
    with pytest.raises(UserError, match=rf"produced {given} visual tokens .* reserves 8 positions"):
        scatter_images(torch.zeros(1, 20, 2), torch.arange(8), torch.zeros(given, 2))


def test_a_position_outside_the_batch_is_refused() -> None:
    with pytest.raises(UserError, match="outside the batch"):
        scatter_images(torch.zeros(1, 4, 2), torch.tensor([3, 4]), torch.zeros(2, 2))


def test_a_target_is_predicted_from_the_position_before_it_in_its_own_sample() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    supervise = torch.zeros(2, 6, dtype=torch.bool)
    supervise[0, 2] = supervise[0, 4] = supervise[1, 5] = True

    where, before = supervised_positions(supervise, positions)

    assert where.tolist() == [2, 4, 11] and before.tolist() == [1, 3, 10]
    supervise[0, 3] = True  # would be predicted from the sample before
    with pytest.raises(AssertionError, match="no predecessor"):
        supervised_positions(supervise, positions)


def test_spans_become_positions_and_a_cut_one_is_refused() -> None:
    assert spans_to_positions([(2, 4), (7, 9)], 2, "p").tolist() == [2, 3, 7, 8]
    assert spans_to_positions([], 2, "p").shape == (0,)
    with pytest.raises(UserError, match="image 2 has 1 reserved positions, the connector gives 2"):
        spans_to_positions([(2, 4), (7, 8)], 2, "p")
