"""Kernels of norm, rotation and gate: the numbers of the same formula in PyTorch, rounded at the same places.

On a machine without a GPU that has Triton they run in its interpreter: `TRITON_INTERPRET=1 ONWARD_GPU_TESTS=cpu`.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from gpu_runs import DEVICE, ON_CPU, needs_gpu

from onward.training.layers.decoder_nodes import FORMS, NormForm, kernels_of, plain_gate, plain_norm, plain_rotation

pytestmark = [
    *needs_gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(ON_CPU and os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles for no CPU"),
]
HALF = torch.float16 if ON_CPU else torch.bfloat16
"""Triton's interpreter does not round bfloat16."""
TYPES = ((HALF, HALF), (torch.float32, torch.float32), (HALF, torch.float32))
ROWS = ((7, 16), (33, 100), (300, 128))


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Any:
    """Return random numbers that take a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE).requires_grad_()


def assert_near(given: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    """Hold tensors against each other: where a half type was rounded to, few numbers differ, by its last bit."""
    assert given.dtype == wanted.dtype
    share, limit = (1.0, 1e-6) if dtype == torch.float32 else (1e-3, 1e-2)
    assert int((given != wanted).sum()) <= max(2, share * given.numel())
    torch.testing.assert_close(given.float(), wanted.float(), rtol=limit, atol=limit)


@pytest.mark.parametrize("form", FORMS, ids=["rounds", "offset", "plain"])
@pytest.mark.parametrize("types", TYPES, ids=["half", "float32", "mixed"])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_a_norm(form: NormForm, types: tuple[torch.dtype, torch.dtype], rows: tuple[int, int]) -> None:
    """Output and gradients; only the order of sums differs, so that in a half type nearly all bits are equal."""
    x, weight = numbers(rows, types[0]), numbers(rows[1:], types[1], 1)
    wanted, _ = plain_norm(x, weight, form, 1e-6)
    grad = torch.randn_like(wanted)
    x_grad, weight_grad = torch.autograd.grad(wanted, (x, weight), grad)
    kind: dict[str, Any] = {"offset": form.offset, "rounds": form.rounds}
    x, weight = x.detach(), weight.detach()
    given, roots = kernels_of().norm(x, weight, 1e-6, dtype=form.dtype(x, weight), **kind)
    assert_near(given, wanted.detach(), types[0])
    into_x, into_weight = kernels_of().norm_gradient(grad, (x, weight, roots), wanted=True, **kind)
    assert_near(into_x, x_grad, types[0])
    scale = float(weight_grad.float().norm())
    assert float((into_weight - weight_grad.float()).norm()) <= (1e-2 if types[1] == HALF else 1e-5) * scale
    assert torch.equal(into_x, kernels_of().norm_gradient(grad, (x, weight, roots), wanted=False, **kind)[0])


@pytest.mark.parametrize("types", TYPES, ids=["half", "float32", "mixed"])
@pytest.mark.parametrize("shape", [(5, 3, 8), (17, 20, 12), (64, 8, 128)], ids=str)
def test_a_rotation(types: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int]) -> None:
    """Forward and back, every bit."""
    tokens, _, dim = shape
    x = numbers(shape, types[0])
    cos, sin = (numbers((tokens, dim), types[1], seed).detach() for seed in (1, 2))
    wanted = plain_rotation(x, cos[:, None], sin[:, None])
    grad = torch.randn_like(wanted)
    (x_grad,) = torch.autograd.grad(wanted, x, grad)
    assert torch.equal(wanted.detach(), kernels_of().rotation(x.detach(), cos, sin, wanted.dtype, back=False))
    assert torch.equal(x_grad, kernels_of().rotation(grad, cos, sin, x.dtype, back=True))


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("size", [5, 2048, 30001])
def test_a_gate(dtype: torch.dtype, size: int) -> None:
    """Output and gradients; exponentials may differ in a last bit."""
    value, up = numbers((size,), dtype), numbers((size,), dtype, 1)
    wanted = plain_gate(value, up)
    grad = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, (value, up), grad)
    assert_near(kernels_of().gate(value.detach(), up.detach()), wanted.detach(), dtype)
    for given, one in zip(kernels_of().gate_gradient(grad, value.detach(), up.detach()), grads, strict=True):
        assert_near(given, one, dtype)
