"""One adapted layer: PEFT's, with its products in the base's 16 bits. Importing it takes seconds (peft brings
transformers)."""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

ADAPTER = "default"
"""The one adapter's name inside PEFT's layers; it is not part of the saved names."""


class Learning:
    """What an adapted layer does while it learns and at rest.

    While it learns, its scaling is alpha / r; else that times ``model.lora.strength``, which is what its checkpoint's
    ``lora_alpha`` says. Between the base and the trained weights lies a model that has kept more of the base (WiSE-FT,
    Wortsman et al. 2022, arXiv:2109.01903).
    """

    scaling: dict[str, float]
    lora_dropout: nn.ModuleDict
    scalings: tuple[float, float]
    """At rest, and while learning."""

    def learn(self, mode: bool) -> None:
        self.scaling[ADAPTER] = self.scalings[mode]
        self.lora_dropout.train(mode)


class AdaptedLinear(Learning, PeftLinear):
    """PEFT's layer; over a base stored in 16 bits, the adapter's two products are computed in these 16 bits.

    PEFT computes them in fp32 and adds them to the rounded output: several passes over fp32 copies of the activations.
    Here the fp32 weights A and B are rounded for the products (which accumulate in fp32), as autocast would, and added
    into the base's output and input gradient in place. It costs a rounding of ``x A`` and of each gradient product
    (2^-9 of the adapter's own contribution in bf16); weights, optimizer and sums over micro-batches stay fp32. Over an
    fp32 base it is PEFT's computation, bit for bit. ``benchmarks/lora_step.py`` prints what it saves.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        # One config may cover both kinds of layer, so each is asked for its own.
        self.fan_in_fan_out = self.is_target_conv_1d_layer = isinstance(self.get_base_layer(), Conv1D)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        half = x.dtype in (torch.bfloat16, torch.float16) and type(base) in (nn.Linear, Conv1D)
        half = half and base.weight.dtype == x.dtype
        if self.disable_adapters or self.merged or not half:
            return super().forward(x, *args, **kwargs)
        down, up = adapter_weights(self)
        dropout = self.lora_dropout[ADAPTER]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        weight: Any = base.weight
        weight = weight.t() if self.fan_in_fan_out else weight
        return _AdaptedProduct.apply(x, weight, base.bias, down, up, self.scaling[ADAPTER], p)  # pyright: ignore[reportReturnType]


class _AdaptedProduct(torch.autograd.Function):
    """``x W' + bias + scaling * dropout(x) A' B'`` with gradients for x, A and B; W and bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float, p: float
    ) -> Tensor:
        ctx.scaling, ctx.p = scaling, p
        rows = x.reshape(-1, x.shape[-1])
        keep = _keep(rows, p) if p else None
        down_16, up_16 = (down / (1 - p)).to(x.dtype), (up * scaling).to(x.dtype)
        narrow = _kept(rows, keep) @ down_16.t()
        out = F.linear(rows, weight, bias)
        out.addmm_(narrow, up_16.t())
        ctx.save_for_backward(rows, weight, narrow, down_16, up_16, keep)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        rows, weight, narrow, down_16, up_16, keep = ctx.saved_tensors
        grad = grad_outputs[0]
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_narrow = grad_rows @ up_16
        grad_up = (narrow.t() @ grad_rows).t().float() * ctx.scaling
        grad_down = (grad_narrow.t() @ _kept(rows, keep)).float() / (1 - ctx.p)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_rows @ weight
            if keep is None:
                grad_x.addmm_(grad_narrow, down_16)
            else:
                grad_x += _kept(grad_narrow @ down_16, keep)
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        return grad_x, None, None, grad_down, grad_up, None, None


def _keep(rows: Tensor, p: float) -> Tensor:
    """Which entries dropout leaves, as int16 masks: -1 with probability 1 - p (to 1 / 65,536), else 0.

    On a CPU four entries share a draw of 64 bits, and a mask is applied to the bits of the 16-bit floats: together a
    fifth of the time of torch's dropout, which took a quarter of a step.
    """
    if rows.device.type != "cpu":
        return torch.empty_like(rows, dtype=torch.int16).bernoulli_(1 - p).neg_()
    draws = torch.empty((rows.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    lanes = draws.view(torch.int16)[: rows.numel()].view(rows.shape)
    return torch.ge(lanes, round(p * 2**16) - 2**15, out=torch.empty_like(lanes)).neg_()


def _kept(values: Tensor, keep: Tensor | None) -> Tensor:
    return values if keep is None else (values.view(torch.int16) & keep).view(values.dtype)


def adapter_weights(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """(A ``[r, d_in]``, B ``[d_out, r]``); of a convolution ``[r, c_in, kh, kw]`` and ``[c_out, r, 1, 1]``."""
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    assert isinstance(down, nn.Parameter) and isinstance(up, nn.Parameter)
    return down, up
