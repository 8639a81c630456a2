"""Matrix products: by the faster of PyTorch's two CPU libraries, and without rounding for 16-bit types.

PyTorch uses MKL for float32. oneDNN, which PyTorch's compiler uses, takes up to a fifth less time for large products;
for small ones, compiling a kernel for every new shape costs more than it saves.
"""

from __future__ import annotations

import platform
from functools import cache

import torch

from onward.training.device.errors import is_of_the_device

LARGE = 1 << 27
"""The number of multiplications from which oneDNN is faster."""

_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if platform.machine() in {"x86_64", "AMD64"} else None


def times(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `x @ weight.T`, shape (rows, out), without recording it for autograd.

    Args:
        x: shape (rows, into).
        weight: shape (out, into), in any memory order.
    """
    is_large = x.shape[0] * weight.numel() >= LARGE
    if not is_large or _LINEAR is None or x.device.type != "cpu" or {x.dtype, weight.dtype} != {torch.float32}:
        return x @ weight.T
    return _LINEAR(x, weight, None, "none", [], "")


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add `left @ right` to a tensor in place; a GPU does it in one pass, and rounds 16-bit types once instead of
    twice.

    Args:
        total: shape (rows, columns), of the same type as left, shape (rows, inner), and right, shape (inner, columns).
    """
    if total.device.type == "cuda":
        total.addmm_(left, right)
    else:
        total += times(left, right.T)


def product_in_float(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return `left @ right` in float32, without recording it for autograd.

    Kernels for 16-bit types add up in float32 and round at the end; here they do not round, if the release of PyTorch
    has such a product. A CPU multiplies in float32, which gives the same number up to the order of additions: products
    of two 16-bit numbers are exact in float32.

    Args:
        left: shape (rows, inner), of the same type as right, shape (inner, columns).
    """
    if left.dtype == torch.float32:
        return left @ right
    if left.device.type != "cuda":
        return left.float() @ right.float()
    return _to_float(left, right) if _has_float_output(left.device, left.dtype) else (left @ right).float()


def _to_float(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.mm(left, right, out_dtype=torch.float32)


@cache
def _has_float_output(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device can multiply into float32: tried once, with factors in the memory layout used here."""
    try:
        ones = torch.ones(16, 16, device=device, dtype=dtype)
        return _to_float(ones.T, ones).dtype == torch.float32
    except (RuntimeError, TypeError) as error:  # NotImplementedError is a RuntimeError
        if is_of_the_device(error):
            raise
        return False
