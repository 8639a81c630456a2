"""Norm, rotation and gate of a decoder as one autograd node each: a kernel on a GPU, the same formula elsewhere.

The formulas are here in PyTorch, so that a CPU can compare everything but the kernels (`kernels.py`) with transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def kernels_of() -> Any:
    """Return the kernels; they are imported only on a GPU, since they need Triton."""
    from onward.training.layers import kernels

    return kernels


@dataclass(frozen=True)
class NormForm:
    """How a norm multiplies a row after dividing it by its root mean square.

    Args:
        offset: added to the weight.
        rounds: whether the row is first rounded to its own type, and the result has the wider type of both; otherwise
            it is multiplied in float32, and the result has the type of the row.
    """

    offset: float
    rounds: bool

    def dtype(self, x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
        """Return the type of the result."""
        return torch.promote_types(x.dtype, weight.dtype) if self.rounds else x.dtype

    @property
    def constants(self) -> dict[str, Any]:
        """The form as arguments of the kernels."""
        return {"offset": self.offset, "rounds": self.rounds}


FORMS = (NormForm(0.0, True), NormForm(1.0, False), NormForm(0.0, False))
"""The forms of Llama and most others, of Gemma, and of OLMo 2."""


def normed(module: nn.Module, form: NormForm, eps: float, x: torch.Tensor) -> torch.Tensor:
    """Return the output of a norm, with the shape of `x`: (..., width)."""
    return cast(Any, _Norm).apply(x, module.weight, form, eps)


def gated(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the output of a decoder's gated MLP, with the shape of `x`: (..., width)."""
    parts = cast(Any, module)
    value, up = parts.gate_proj(x), parts.up_proj(x)
    alike = value.shape == up.shape and value.dtype == up.dtype
    return parts.down_proj(cast(Any, _Gate).apply(value, up) if alike else parts.act_fn(value) * up)


def rotated(plain: Callable[..., Any], *given: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys rotated, like the function that this one replaces.

    Args:
        plain: that function, called if arguments or shapes are not a decoder's.
        given: query and key, shape (1, heads, tokens, dim); cos and sin, shape (1, tokens, dim).
    """
    if named or len(given) != 4:
        return plain(*given, **named)
    query, key, cos, sin = given
    usual = query.dim() == 4 and query.shape[0] == 1 and cos.shape == sin.shape == (1, query.shape[2], query.shape[3])
    if not usual or key.shape[2:] != query.shape[2:]:
        return plain(query, key, cos, sin)
    apply = cast(Any, _Rotation).apply
    return apply(query, cos, sin), apply(key, cos, sin)


def plain_norm(x: torch.Tensor, weight: torch.Tensor, form: NormForm, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row normed, and what it was multiplied by, shape (..., 1)."""
    value = x.float()
    root = torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + eps)
    if form.rounds:
        return weight * (value * root).to(x.dtype), root
    return (value * root * (weight.float() + form.offset)).to(x.dtype), root


def plain_rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return heads rotated: the two halves of a head are the two coordinates of its pairs."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def plain_gate(value: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return `silu(value) * up`."""
    return functional.silu(value) * up


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, form: NormForm, eps: float) -> torch.Tensor:
        if x.is_cuda:
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            dtype = form.dtype(x, weight)
            y, roots = kernels_of().norm(rows, weight.contiguous(), eps, dtype=dtype, **form.constants)
            y = y.view(x.shape)
        else:
            y, roots = plain_norm(x, weight, form, eps)
        ctx.save_for_backward(x, weight, roots)
        ctx.form = form
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, roots = ctx.saved_tensors
        form, wanted = ctx.form, ctx.needs_input_grad[1]
        (grad,) = grad_outputs
        if x.is_cuda:
            rows, after = (each.reshape(-1, x.shape[-1]).contiguous() for each in (x, grad))
            saved = (rows, weight.contiguous(), roots)
            out, sums = kernels_of().norm_gradient(after, saved, wanted=wanted, **form.constants)
            return out.view(x.shape), None if sums is None else sums.to(weight.dtype), None, None
        normed = x.float() * roots
        before = grad.float() * (weight.float() + form.offset)
        if form.rounds:
            before = before.to(x.dtype).float()
        out = (roots * (before - normed * (before * normed).mean(-1, keepdim=True))).to(x.dtype)
        if not wanted:
            return out, None, None, None
        scaled = normed.to(x.dtype).float() if form.rounds else normed
        sums = (grad.float() * scaled).flatten(0, -2).sum(0).to(weight.dtype)
        return out, sums, None, None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.type_of_x = x.dtype
        if not x.is_cuda:
            return plain_rotation(x, cos[:, None], sin[:, None])
        dtype = torch.promote_types(x.dtype, cos.dtype)
        return _turned(x, cos, sin, dtype, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        (grad,) = grad_outputs
        if grad.is_cuda:
            return _turned(grad, cos, sin, ctx.type_of_x, back=True), None, None
        first, second = (grad * sin[:, None]).to(ctx.type_of_x).chunk(2, -1)
        return (grad * cos[:, None]).to(ctx.type_of_x) + torch.cat((second, -first), -1), None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, *, back: bool) -> torch.Tensor:
    """Return rotated heads, shape (1, heads, tokens, dim), with each token's heads one after another in memory."""
    tokens = x[0].transpose(0, 1)
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    y = kernels_of().rotation(tokens, cos[0].contiguous(), sin[0].contiguous(), dtype, back=back)
    return y.transpose(0, 1)[None]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(value, up)
        if value.is_cuda:
            return kernels_of().gate(value.contiguous(), up.contiguous())
        return plain_gate(value, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        value, up = ctx.saved_tensors
        (grad,) = grad_outputs
        if value.is_cuda:
            return kernels_of().gate_gradient(grad.contiguous(), value.contiguous(), up.contiguous())
        share = torch.sigmoid(value.float())
        before = (grad * up).float()
        return (before * share * (1 + value.float() * (1 - share))).to(value.dtype), grad * functional.silu(value)
