"""LoRA layers in one autograd node: PEFT's arithmetic with fewer passes over memory and fewer tensors kept.

The base weight is frozen, so backward needs the layer's input for the small matrices only. Layers that read the same
input (query, key and value; gate and up) share one node, as in Unsloth: their small matrices are multiplied as one, and
their input gets one gradient. What the first of them computes for the others lives as long as the forward pass of the
module that holds them, so nothing is left for a later step, whether that pass ended, failed or was a recomputation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.autograd.function import once_differentiable

from onward.training.layers.matmul import times

ADAPTER = "default"
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that a decoder calls one after another on the same input."""


def fuse_lora(model: nn.Module) -> None:
    """Replace each plain LoRA layer of a model by a `FusedLoraLinear`; others stay as PEFT made them.

    Names, order and identity of parameters stay the same.
    """
    fused: dict[nn.Module, FusedLoraLinear] = {}
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is LoraLinear and _can_fuse(layer):
                if layer not in fused:
                    fused[layer] = FusedLoraLinear(layer)
                setattr(parent, name, fused[layer])
        for names in SIBLINGS:
            if len(_siblings(parent, names)) > 1:
                parent.register_forward_pre_hook(partial(_begin_sharing, names))
                parent.register_forward_hook(partial(_end_sharing, names), always_call=True)


def _can_fuse(layer: LoraLinear) -> bool:
    return (
        type(layer.base_layer) is nn.Linear
        and list(layer.lora_A) == [ADAPTER]
        and not layer.lora_variant
        and not layer.fan_in_fan_out
        and cast(Any, layer.lora_B[ADAPTER]).bias is None
        and not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
    )


def _siblings(parent: nn.Module, names: Sequence[str]) -> list[FusedLoraLinear]:
    layers = [getattr(parent, name, None) for name in names]
    return [layer for layer in layers if isinstance(layer, FusedLoraLinear)]


def _begin_sharing(names: Sequence[str], parent: nn.Module, _arguments: object) -> None:
    """Before the parent's forward pass; dropout gives each layer another input, so there is nothing to share."""
    layers = _siblings(parent, names)
    can_share = parent.training and all(layer.adapts and not layer.dropout for layer in layers)
    shared = _Shared(layers) if can_share else None
    for layer in layers:
        layer.shared = shared


def _end_sharing(names: Sequence[str], parent: nn.Module, _arguments: object, _output: object) -> None:
    for layer in _siblings(parent, names):
        layer.shared = None


class FusedLoraLinear(LoraLinear):
    """A LoRA layer with one adapter: `x W^T + b + scaling * dropout(x) A^T B^T`.

    Args:
        layer: the layer that PEFT made; its parameters, adapters and settings are taken over.
    """

    shared: _Shared | None
    """Set while the module that holds this layer and its siblings computes."""

    def __init__(self, layer: LoraLinear) -> None:  # pyright: ignore[reportMissingSuperCall]
        nn.Module.__init__(self)
        vars(self).update(vars(layer))
        self.shared = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output, shape (..., out)."""
        if not self.adapts:
            return super().forward(x, *args, **kwargs)
        return _compute([self], x)[0] if self.shared is None else self.shared.output(self, x)

    @property
    def adapts(self) -> bool:
        """Whether the adapter is in force, and not merged into the weight."""
        return not self.disable_adapters and not self.merged and self.active_adapters == [ADAPTER]

    @property
    def dropout(self) -> float:
        """The probability of the adapter's dropout now."""
        return getattr(self.lora_dropout[ADAPTER], "p", 0.0) if self.training else 0.0

    @property
    def matrices(self) -> tuple[torch.Tensor | None, ...]:
        """Base weight, bias, and the two matrices of the adapter."""
        base = cast(nn.Linear, self.base_layer)
        return base.weight, base.bias, cast(Any, self.lora_A[ADAPTER]).weight, cast(Any, self.lora_B[ADAPTER]).weight


class _Shared:
    """What sibling layers compute together in one forward pass: the first one called computes for all of them."""

    def __init__(self, layers: Sequence[FusedLoraLinear]) -> None:
        self._layers = layers
        self._input: torch.Tensor | None = None
        self._outputs: dict[FusedLoraLinear, torch.Tensor] = {}

    def output(self, layer: FusedLoraLinear, x: torch.Tensor) -> torch.Tensor:
        """Return one layer's output."""
        if self._input is not x or layer not in self._outputs:
            self._input, self._outputs = x, dict(zip(self._layers, _compute(self._layers, x), strict=True))
        return self._outputs.pop(layer)


def _compute(layers: Sequence[FusedLoraLinear], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    scalings = [float(layer.scaling[ADAPTER]) for layer in layers]
    return cast(Any, _Lora).apply(x, layers[0].dropout, scalings, *(m for layer in layers for m in layer.matrices))


def _reshaped(out: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """Return a tensor in another shape that is no view: models may write into what a layer returns."""
    return torch.ops.aten._unsafe_view.default(out, shape)


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dropout: float, scalings: list[float], *matrices: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        weights, biases, downs, ups = (cast(Any, matrices[kind::4]) for kind in range(4))
        flat = x.reshape(-1, x.shape[-1])
        seen, mask = torch.native_dropout(flat, dropout, train=True) if dropout else (flat, None)
        down = torch.cat(downs) if len(downs) > 1 else downs[0]
        ranks = [len(each) for each in downs]
        inner = seen @ down.T
        outs: list[torch.Tensor] = []
        for weight, bias, up, scaling, part in zip(weights, biases, ups, scalings, inner.split(ranks, 1), strict=True):
            out = times(flat, weight)
            if bias is not None:
                out += bias
            out.addmm_(part, up.T, alpha=scaling)
            outs.append(_reshaped(out, [*x.shape[:-1], out.shape[-1]]))
        ctx.save_for_backward(seen, mask, inner, down, *weights, *ups)
        ctx.scalings, ctx.kept, ctx.ranks = scalings, 1.0 - dropout, ranks
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        seen, mask, inner, down, *rest = ctx.saved_tensors
        layers = len(rest) // 2
        weights, ups = rest[:layers], rest[layers:]
        grads = [grad.reshape(-1, len(weight)) for grad, weight in zip(grad_outputs, weights, strict=True)]
        inner_grad = torch.cat([(g @ up).mul_(s) for g, up, s in zip(grads, ups, ctx.scalings, strict=True)], 1)
        down_grads = (inner_grad.T @ seen).split(ctx.ranks)
        parts = inner.split(ctx.ranks, 1)
        up_grads = [(g.T @ part).mul_(s) for g, part, s in zip(grads, parts, ctx.scalings, strict=True)]
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = times(grads[0], weights[0].T)
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                x_grad += times(grad, weight.T)
            if mask is None:
                x_grad.addmm_(inner_grad, down)
            else:
                x_grad.addcmul_(inner_grad @ down, mask.to(x_grad.dtype), value=1.0 / ctx.kept)
            x_grad = x_grad.view(*grad_outputs[0].shape[:-1], -1)
        adapters = [grad for pair in zip(down_grads, up_grads, strict=True) for grad in (None, None, *pair)]
        return (x_grad, None, None, *adapters)
