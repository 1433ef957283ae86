"""The optimizer's groups, its schedule as a pure function, and its state as strict named tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from beholder.train.optim import build_optimizer, load_optimizer_tensors, lr_at, optimizer_tensors, set_lr
from beholder.types import UserError


def groups(width: int = 3, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(width, width, generator=generator).to(dtype))
    bias = torch.nn.Parameter(torch.randn(width, generator=generator).to(dtype))
    return [
        {"name": "connector.decay", "params": [("connector.w", matrix)], "lr": 1e-2, "weight_decay": 0.1},
        {"name": "connector.no_decay", "params": [("connector.b", bias)], "lr": 1e-2, "weight_decay": 0.0},
    ]


def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def weights(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]


@given(
    total=st.integers(1, 5000), warmup=st.floats(0, 1), floor=st.floats(0, 1),
    kind=st.sampled_from(["cosine", "linear", "constant", "wsd"]),
)  # fmt: skip
def test_schedule_rises_to_the_peak_then_never_rises_again(total: int, warmup: float, floor: float, kind: Any) -> None:
    factors = [lr_at(s, total, warmup, kind, floor) for s in range(total)]
    peak = min(math.ceil(warmup * total), total - 1)
    assert all(0 < f <= 1 + 1e-12 for f in factors[:peak]) and all(floor - 1e-12 <= f for f in factors[peak:])
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if total > math.ceil(warmup * total):
        assert factors[peak] == 1.0
    if kind != "constant" and total - 1 > math.ceil(warmup * total):
        assert factors[-1] == pytest.approx(floor, abs=1e-12)


def test_wsd_stays_at_the_peak_and_falls_along_a_line_in_the_last_fifth() -> None:
    factors = [lr_at(s, 101, 0, "wsd", 0.1) for s in range(101)]
    assert factors[:81] == pytest.approx([1.0] * 81)
    assert factors[90] == pytest.approx(0.55) and factors[100] == pytest.approx(0.1)


def test_cosine_has_the_seeds_shape() -> None:
    """2 % of 1000 steps of warm-up, then half a cosine to 10 % of the peak: the middle lies at 55 %."""
    assert lr_at(0, 1000, 0.02, "cosine", 0.1) == pytest.approx(1 / 20)
    assert lr_at(19, 1000, 0.02, "cosine", 0.1) == lr_at(20, 1000, 0.02, "cosine", 0.1) == 1.0
    assert (lr_at(509, 1000, 0.02, "cosine", 0.1) + lr_at(510, 1000, 0.02, "cosine", 0.1)) / 2 == pytest.approx(0.55)
    assert lr_at(999, 1000, 0.02, "cosine", 0.1) == pytest.approx(0.1)


def test_rates_scale_from_each_groups_peak_and_are_logged_once_a_part() -> None:
    optimizer = build_optimizer(groups(), (0.9, 0.999))
    assert set_lr(optimizer, 0.5) == {"lr.connector": 5e-3}
    assert set_lr(optimizer, 0.25) == {"lr.connector": 2.5e-3}
    assert [g["lr"] for g in optimizer.param_groups] == [2.5e-3, 2.5e-3]


def test_weight_decay_pulls_matrices_and_not_biases() -> None:
    optimizer = build_optimizer(groups(), (0.9, 0.999))
    matrix, bias = weights(optimizer)
    for g in optimizer.param_groups:
        for p in g["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(weights(optimizer)[1], bias)
    torch.testing.assert_close(weights(optimizer)[0], matrix * (1 - 1e-2 * 0.1))


def test_state_restored_from_tensors_continues_bit_for_bit() -> None:
    straight, resumed = build_optimizer(groups(), (0.9, 0.95)), build_optimizer(groups(), (0.9, 0.95))
    for s in range(3):
        step(straight, s)
    saved = {k: v.clone() for k, v in optimizer_tensors(straight).items()}
    assert sorted(saved) == sorted(f"connector.{n}/{k}" for n in ("w", "b") for k in ("exp_avg", "exp_avg_sq", "step"))
    with torch.no_grad():
        for p, w in zip([p for g in resumed.param_groups for p in g["params"]], weights(straight), strict=True):
            p.copy_(w)
    load_optimizer_tensors(resumed, saved)
    for s in range(3, 6):
        step(straight, s)
        step(resumed, s)
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(resumed), strict=True))


def test_state_of_another_architecture_is_refused_with_names() -> None:
    optimizer = build_optimizer(groups(), (0.9, 0.999))
    step(optimizer, 0)
    saved = optimizer_tensors(optimizer)
    other = build_optimizer(groups(width=4), (0.9, 0.999))
    with pytest.raises(UserError, match=r"connector.w/exp_avg has shape \[3, 3\], the parameter \[4, 4\]"):
        load_optimizer_tensors(other, saved)
    with pytest.raises(UserError, match=r"missing \['connector.w/step'\], unexpected \['x/step'\]"):
        load_optimizer_tensors(optimizer, {("x/step" if k == "connector.w/step" else k): v for k, v in saved.items()})


def test_nothing_to_train_and_half_precision_weights_are_refused() -> None:
    with pytest.raises(UserError, match="nothing would be trained"):
        build_optimizer([], (0.9, 0.999))
    with pytest.raises(AssertionError, match=r"must be fp32: \['connector.w', 'connector.b'\]"):
        build_optimizer(groups(dtype=torch.bfloat16), (0.9, 0.999))
