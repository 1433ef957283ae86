"""One adapted convolution: PEFT's, and where channels convolve in groups, which PEFT's cannot, one of our own.
Importing it takes seconds (peft brings transformers)."""

import warnings
from typing import Any

import torch
from peft.tuners.lora import Conv2d as PeftConv2d
from torch import Tensor, nn
from torch.func import functional_call

from beholder.model.adapted_linear import ADAPTER, Learning, adapter_weights


class AdaptedConv(Learning, PeftConv2d):
    """PEFT's layer: a convolution into r channels, and a 1 x 1 convolution out of them.

    Of a convolution in groups (depth-wise: as many as channels) PEFT asks that r be a multiple of their number, and it
    does not merge one. There the weight itself, seen as a matrix ``[c_out, c_in / groups * kh * kw]``, gets the
    low-rank difference B A, as in loralib (Hu et al. 2021), which merges exactly.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups")
            groups, base_layer.groups = base_layer.groups, 1  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
            try:
                super().__init__(base_layer, adapter_name, **kwargs)
            finally:
                base_layer.groups = groups  # pyright: ignore[reportAttributeAccessIssue]
        self.grouped = groups != 1
        if self.grouped:
            weight, r = base_layer.weight, self.r[ADAPTER]
            assert isinstance(weight, Tensor) and isinstance(r, int)
            self.lora_A[ADAPTER] = nn.Linear(weight[0].numel(), r, bias=False, device=weight.device)
            self.lora_B[ADAPTER] = nn.Linear(r, weight.shape[0], bias=False, device=weight.device)

    def get_delta_weight(self, adapter: str) -> Tensor:
        down, up = adapter_weights(self)
        weight = self.get_base_layer().weight
        assert isinstance(weight, Tensor)
        return (up.flatten(1) @ down.flatten(1)).view(weight.shape) * self.scaling[adapter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        weight = self.get_base_layer().weight
        assert isinstance(weight, Tensor)
        weight.data += self.get_delta_weight(ADAPTER)
        self.merged_adapters.append(ADAPTER)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.grouped or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        delta = {"weight": self.get_delta_weight(ADAPTER).to(x.dtype)}
        if isinstance(bias := getattr(base, "bias", None), Tensor):
            delta["bias"] = torch.zeros_like(bias)
        # through the layer itself: some of timm's pad by their own rule
        return self.base_layer(x) + functional_call(base, delta, (self.lora_dropout[ADAPTER](x),))
