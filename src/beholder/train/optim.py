"""The optimizer, its learning-rate schedule as a pure function of the step, and its state as named tensors.

Which parameters form which group is decided in `model.plan`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from beholder.train.nonfinite import not_finite
from beholder.types import UserError


def build_optimizer(groups: Sequence[Mapping[str, Any]], betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) over named groups, in fp32.

    ``groups`` (`model.plan.param_groups`): each has ``name``, ``params`` as (name, tensor) pairs, ``lr`` (peak) and
    ``weight_decay``. Weights must be fp32: updates smaller than bf16's 8 bits of precision would be lost.
    """
    if not any(group["params"] for group in groups):
        raise UserError("nothing would be trained: the plan leaves no trainable parameter")
    prepared = [{**group, "peak_lr": float(group["lr"])} for group in groups if group["params"]]
    wrong = [name for group in prepared for name, p in group["params"] if p.dtype != torch.float32]
    assert not wrong, f"trainable weights must be fp32: {wrong}"
    return torch.optim.AdamW(prepared, betas=betas)


WSD_DECAY = 0.2
"""Share of the steps after the warm-up in which the rate of schedule ``wsd`` falls."""


def lr_at(
    step: int,
    total_steps: int,
    warmup_ratio: float,
    scheduler: Literal["cosine", "linear", "constant", "wsd"],
    min_lr_ratio: float,
) -> float:
    """Learning-rate factor in [0, 1] of optimizer step ``step`` (0-based) of ``total_steps``.

    Rises linearly over ``ceil(warmup_ratio * total_steps)`` steps, the first of which already learns, to 1, then falls
    to ``min_lr_ratio`` at the last step along half a cosine (Loshchilov & Hutter, arXiv:1608.03983) or a line; wsd
    (warm-up, stable, decay; Hu et al., arXiv:2404.06395) stays at 1 and falls along a line in the last fifth.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    span = total_steps - 1 - warmup
    progress = min(1.0, (step - warmup) / span) if span > 0 else 0.0
    match scheduler:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - (1.0 - min_lr_ratio) * progress
        case "wsd":
            return 1.0 - (1.0 - min_lr_ratio) * max(0.0, 1.0 - (1.0 - progress) / WSD_DECAY)
        case "cosine":
            return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Scale every group's peak learning rate by ``factor``; gives ``{"lr.<group>": value}`` for the log.

    ``connector.decay`` and ``connector.no_decay`` have one peak and are logged once, as ``lr.connector``.
    """
    logged: dict[str, float] = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        logged.setdefault(f"lr.{str(group.get('name', 'all')).partition('.')[0]}", group["lr"])
    return logged


def trainable_parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def named_parameters(optimizer: torch.optim.Optimizer) -> dict[str, torch.nn.Parameter]:
    return {
        name: p
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }


def moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's moments as ``{"<parameter>/<exp_avg | exp_avg_sq>": tensor}``, where they are."""
    return {
        f"{name}/{key}": value
        for name, p in named_parameters(optimizer).items()
        for key, value in optimizer.state.get(p, {}).items()
        if key != "step"
    }


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as ``{"<parameter>/<exp_avg | exp_avg_sq | step>": tensor}``, on the CPU."""
    tensors = {}
    for name, parameter in named_parameters(optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put `optimizer_tensors` back, bit for bit. Strict: an entry that is missing, extra, misshapen or not finite is a
    `UserError`.

    An empty mapping is the state before the first step.
    """
    if not tensors:
        optimizer.state.clear()
        return
    expected = {f"{name}/{key}" for name in named_parameters(optimizer) for key in ("exp_avg", "exp_avg_sq", "step")}
    if expected != set(tensors):
        missing, extra = sorted(expected - set(tensors))[:3], sorted(set(tensors) - expected)[:3]
        raise UserError(
            f"the optimizer state does not fit this model: missing {missing or 'nothing'}, unexpected "
            f"{extra or 'nothing'}. The checkpoint is of another architecture or training plan; resume with its config."
        )
    if bad := not_finite(tensors):
        raise UserError(
            f"the optimizer state has moments that are NaN or infinite: {', '.join(bad[:3])}. The next update would "
            "spoil the weights; use an earlier checkpoint."
        )
    state: dict[torch.Tensor, Any] = {}
    for name, parameter in named_parameters(optimizer).items():
        for key in ("exp_avg", "exp_avg_sq"):
            if tensors[f"{name}/{key}"].shape != parameter.shape:
                raise UserError(
                    f"optimizer state {name}/{key} has shape {list(tensors[f'{name}/{key}'].shape)}, the parameter "
                    f"{list(parameter.shape)}; the checkpoint is of another architecture"
                )
        state[parameter] = {
            "step": tensors[f"{name}/step"].clone(),  # stays on the CPU, where AdamW keeps it
            "exp_avg": tensors[f"{name}/exp_avg"].to(parameter.device, copy=True),
            "exp_avg_sq": tensors[f"{name}/exp_avg_sq"].to(parameter.device, copy=True),
        }
    optimizer.state.clear()
    optimizer.state.update(state)
