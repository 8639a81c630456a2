"""In place of `onward.training.layers.kernels`, which Triton compiles: the same functions in PyTorch's operations."""

# pyright: basic

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def norm(x: Any, weight: Any, eps: float, *, offset: float, rounds: bool, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return rows normed, and what each was multiplied by."""
    value = x.float()
    root = torch.rsqrt(value.pow(2).mean(-1) + eps)
    normed = value * root[:, None]
    normed = normed.to(x.dtype).float() if rounds else normed
    return (normed * (weight.float() + offset)).to(dtype), root


def norm_gradient(grad: Any, given: Any, *, offset: float, rounds: bool, wanted: bool) -> tuple[Any, Any]:
    """Return the gradients of rows and, if requested, of the weight in float32."""
    x, weight, roots = given
    normed, before = x.float() * roots[:, None], grad.float() * (weight.float() + offset)
    before = before.to(x.dtype).float() if rounds else before
    out = (roots[:, None] * (before - normed * (before * normed).mean(-1, keepdim=True))).to(x.dtype)
    scaled = normed.to(x.dtype).float() if rounds else normed
    return out, (grad.float() * scaled).sum(0) if wanted else None


def rotation(x: Any, cos: Any, sin: Any, dtype: torch.dtype, *, back: bool) -> Any:
    """Return heads, shape (tokens, heads, dim), rotated by the angles of their tokens, or a gradient rotated back."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = ((x * sin).to(dtype) if back else x).chunk(2, -1)
    if back:
        return ((x * cos).to(dtype) + torch.cat((second, -first), -1)).contiguous()
    return (x * cos + torch.cat((-second, first), -1) * sin).to(dtype).contiguous()


def gate(value: Any, up: Any) -> Any:
    """Return `silu(value) * up`."""
    return functional.silu(value) * up


def gate_gradient(grad: Any, value: Any, up: Any) -> tuple[Any, Any]:
    """Return the gradients of both inputs of `gate`."""
    share, before = torch.sigmoid(value.float()), (grad * up).float()
    return (before * share * (1 + value.float() * (1 - share))).to(value.dtype), grad * functional.silu(value)
