"""LoRA layers in one autograd node: PEFT's arithmetic with fewer passes over memory and fewer tensors kept.

The base weight is frozen, so that backward needs the layer's input for the small matrices only.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.autograd.function import once_differentiable

ADAPTER = "default"


def fuse_lora(model: nn.Module) -> None:
    """Let the plain LoRA layers of a model compute in one node; others stay as PEFT made them."""
    for layer in model.modules():
        if type(layer) is LoraLinear and _is_plain(layer):
            layer.__class__ = FusedLoraLinear


def _is_plain(layer: LoraLinear) -> bool:
    return (
        type(layer.base_layer) is nn.Linear
        and list(layer.lora_A) == [ADAPTER]
        and not layer.lora_variant
        and not layer.fan_in_fan_out
        and cast(Any, layer.lora_B[ADAPTER]).bias is None
    )


class FusedLoraLinear(LoraLinear):
    """A LoRA layer with one adapter: `x W^T + b + scaling * dropout(x) A^T B^T`."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output, shape (..., out)."""
        if self.disable_adapters or self.merged or self.active_adapters != [ADAPTER]:
            return super().forward(x, *args, **kwargs)
        base = cast(nn.Linear, self.base_layer)
        down, up = cast(Any, self.lora_A[ADAPTER]).weight, cast(Any, self.lora_B[ADAPTER]).weight
        dropout = getattr(self.lora_dropout[ADAPTER], "p", 0.0) if self.training else 0.0
        return cast(Any, _Lora).apply(x, base.weight, base.bias, down, up, float(self.scaling[ADAPTER]), dropout)


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor,
        up: torch.Tensor, scaling: float, dropout: float,
    ) -> torch.Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        seen, mask = torch.native_dropout(flat, dropout, train=True) if dropout else (flat, None)
        inner = seen @ down.T
        out = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        out.addmm_(inner, up.T, alpha=scaling)
        ctx.save_for_backward(seen, mask, inner, weight, down, up)
        ctx.scaling, ctx.kept = scaling, 1.0 - dropout
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        seen, mask, inner, weight, down, up = ctx.saved_tensors
        grad = grad_outputs[0].reshape(-1, weight.shape[0])
        inner_grad = (grad @ up).mul_(ctx.scaling)
        down_grad = inner_grad.T @ seen
        up_grad = (grad.T @ inner).mul_(ctx.scaling)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad @ weight
            if mask is None:
                x_grad.addmm_(inner_grad, down)
            else:
                x_grad.addcmul_(inner_grad @ down, mask.to(x_grad.dtype), value=1.0 / ctx.kept)
            x_grad = x_grad.view(*grad_outputs[0].shape[:-1], -1)
        return x_grad, None, None, down_grad, up_grad, None, None
