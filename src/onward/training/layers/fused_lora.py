"""LoRA layers in one autograd node: PEFT's arithmetic with fewer passes over memory and fewer tensors kept.

The base weight is frozen, so the backward pass needs the layer's input only for the small matrices. Layers with the
same input (query, key and value; gate and up) share one node, as in Unsloth: their small matrices are multiplied as
one, and their input gets one gradient. What the first of them computes for the others lives only as long as the forward
pass of the module that holds them, so nothing is left for a later step, whether that pass ended, failed or was a
recomputation.

Below float32, the node multiplies in the compute type, with its adapters cast all at once for a forward pass
(`lowered`); gradients of adapters leave it in float32, unrounded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.autograd.function import once_differentiable

from onward.training.layers.matmul import add_product, product_in_float, times

ADAPTER = "default"
"""PEFT's name for the only adapter of a run."""
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that a decoder calls one after another on the same input."""


def fuse_lora(model: nn.Module) -> None:
    """Replace each plain LoRA layer of a model with a `FusedLoraLinear`; others stay as PEFT made them.

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
    """Begin sharing before the parent's forward pass; with dropout, inputs differ and nothing is shared."""
    layers = _siblings(parent, names)
    can_share = parent.training and all(layer.adapts and not layer.dropout for layer in layers)
    shared = _Shared(layers) if can_share else None
    for layer in layers:
        layer.shared = shared


def _end_sharing(names: Sequence[str], parent: nn.Module, _arguments: object, _output: object) -> None:
    for layer in _siblings(parent, names):
        layer.shared = None


@contextlib.contextmanager
def lowered(layers: Sequence[FusedLoraLinear], dtype: torch.dtype) -> Generator[None]:
    """Let layers use one cast of their adapters in the body, made in a few launches for all of them.

    A layer that runs outside the body, as in a recomputation, casts its own, to the same bits.
    """
    if not layers or dtype == torch.float32:
        yield
        return
    adapters = [matrix.detach() for layer in layers for matrix in layer.adapters]
    flat = adapters[0].new_empty(sum(matrix.numel() for matrix in adapters), dtype=dtype)
    pieces = flat.split([matrix.numel() for matrix in adapters])
    cast_ones = [piece.view(matrix.shape) for piece, matrix in zip(pieces, adapters, strict=True)]
    torch._foreach_copy_(cast_ones, adapters)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    for layer, down, up in zip(layers, cast_ones[::2], cast_ones[1::2], strict=True):
        layer.low = (down, up)
    try:
        yield
    finally:
        for layer in layers:
            layer.low = None


def fused_layers(model: nn.Module) -> list[FusedLoraLinear]:
    """Return the fused layers of a model, each once."""
    return [layer for layer in model.modules() if isinstance(layer, FusedLoraLinear)]


class FusedLoraLinear(LoraLinear):
    """A LoRA layer with one adapter: `x W^T + b + scaling * dropout(x) A^T B^T`.

    Args:
        layer: the layer that PEFT made; its parameters, adapters and settings are taken over.
    """

    shared: _Shared | None
    """Set while the module that holds this layer and its siblings computes."""
    low: tuple[torch.Tensor, torch.Tensor] | None
    """The adapter's matrices in the compute type, while `lowered`."""

    def __init__(self, layer: LoraLinear) -> None:  # pyright: ignore[reportMissingSuperCall]
        nn.Module.__init__(self)
        vars(self).update(vars(layer))
        self.shared = self.low = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output, shape (..., out)."""
        if not self.adapts:
            return super().forward(x, *args, **kwargs)
        return _compute([self], x)[0] if self.shared is None else self.shared.output(self, x)

    @property
    def adapts(self) -> bool:
        """Whether the adapter is active and not merged into the weight."""
        return not self.disable_adapters and not self.merged and self.active_adapters == [ADAPTER]

    @property
    def dropout(self) -> float:
        """The current probability of the adapter's dropout."""
        return getattr(self.lora_dropout[ADAPTER], "p", 0.0) if self.training else 0.0

    @property
    def adapters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the two matrices of the adapter, in the type in which they are trained."""
        return cast(Any, self.lora_A[ADAPTER]).weight, cast(Any, self.lora_B[ADAPTER]).weight

    def adapters_in(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the two matrices of the adapter in a compute type, outside autograd."""
        if self.low is not None and self.low[0].dtype == dtype:
            return self.low
        down, up = self.adapters
        return down.detach().to(dtype), up.detach().to(dtype)

    @property
    def matrices(self) -> tuple[torch.Tensor | None, ...]:
        """Return base weight, bias, and the two matrices of the adapter."""
        base = cast(nn.Linear, self.base_layer)
        return base.weight, base.bias, *self.adapters


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
    kind, settings = x.device.type, _Settings(layers)
    matrices = (matrix for layer in layers for matrix in layer.matrices)
    if not torch.is_autocast_enabled(kind):
        return cast(Any, _Lora).apply(x, settings, *matrices)
    settings.dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return cast(Any, _Lora).apply(x, settings, *matrices)


class _Settings:
    """What a node needs besides tensors.

    Args:
        layers: the layers that share its input.
    """

    def __init__(self, layers: Sequence[FusedLoraLinear]) -> None:
        self.layers = layers
        self.dropout = layers[0].dropout
        self.scalings = [float(layer.scaling[ADAPTER]) for layer in layers]
        self.dtype: torch.dtype = cast(nn.Linear, layers[0].base_layer).weight.dtype
        """The type that the node multiplies in; autocast's if that is on."""


def _reshaped(out: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """Return a tensor in another shape but not as a view: models may write into the output of a layer."""
    return torch.ops.aten._unsafe_view.default(out, shape)


def _all_in(dtype: torch.dtype, tensors: Sequence[torch.Tensor | None]) -> list[Any]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _scaled(tensors: list[torch.Tensor], factors: list[float]) -> list[torch.Tensor]:
    """Multiply tensors in place, each by its factor, in one launch."""
    torch._foreach_mul_(tensors, factors)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return tensors


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, settings: _Settings, *matrices: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        dropout, scalings, dtype = settings.dropout, settings.scalings, settings.dtype
        weights, biases = (_all_in(dtype, cast(Any, matrices[kind::4])) for kind in range(2))
        adapters = [layer.adapters_in(dtype) for layer in settings.layers]
        downs, ups = [down for down, _ in adapters], [up for _, up in adapters]
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
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
        ctx.scalings, ctx.kept, ctx.ranks, ctx.type_of_x = scalings, 1.0 - dropout, ranks, x.dtype
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        seen, mask, inner, down, *rest = ctx.saved_tensors
        layers = len(rest) // 2
        weights, ups = rest[:layers], rest[layers:]
        grads = [grad.reshape(-1, len(weight)) for grad, weight in zip(grad_outputs, weights, strict=True)]
        inner_grad = torch.cat(_scaled([g @ up for g, up in zip(grads, ups, strict=True)], ctx.scalings), 1)
        down_grads = product_in_float(inner_grad.T, seen).split(ctx.ranks)
        parts = inner.split(ctx.ranks, 1)
        up_grads = [product_in_float(g.T, part) for g, part in zip(grads, parts, strict=True)]
        up_grads = _scaled(up_grads, ctx.scalings)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = times(grads[0], weights[0].T)
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                add_product(x_grad, grad, weight)
            if mask is None:
                x_grad.addmm_(inner_grad, down)
            else:
                x_grad.addcmul_(inner_grad @ down, mask.to(x_grad.dtype), value=1.0 / ctx.kept)
            x_grad = x_grad.view(*grad_outputs[0].shape[:-1], -1).to(ctx.type_of_x)
        adapters = [grad for pair in zip(down_grads, up_grads, strict=True) for grad in (None, None, *pair)]
        return (x_grad, None, *adapters)
