"""On a GPU: each kernel that replaces plain PyTorch is as exact as it, and gives the same bits again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_runs import DEVICE, IS_SMALL, LENGTHS, ON_CPU, needs_gpu
from torch import nn

from onward.errors import ModelError
from onward.training.device.environment import describe_environment, deterministic, pick_dtype
from onward.training.device.hardware import UNKNOWN
from onward.training.layers.attention import row_arguments, row_attention
from onward.training.layers.cross_entropy import linear_cross_entropy
from onward.training.layers.facts import layer_facts
from onward.training.layers.matmul import product_in_float
from onward.training.layers.varlen import kernel_for
from onward.training.measuring.fingerprints import fingerprint, mixed_sum

pytestmark = needs_gpu
HALF = torch.bfloat16


def attend(
    parts: list[torch.Tensor], lengths: tuple[int, ...], window: int | None, *, one_call: bool
) -> list[torch.Tensor]:
    """Return output and gradients of attention over rows."""
    own = [part.clone().requires_grad_() for part in parts]
    given = row_arguments(lengths, DEVICE, kernel_for(DEVICE, parts[0].dtype) if one_call else None)
    with deterministic(DEVICE):
        out, _ = row_attention(nn.Identity(), *own, sliding_window=window, **given)
        out.float().square().sum().backward()
    return [out.detach(), *(part.grad for part in own if part.grad is not None)]


def parts_of(lengths: tuple[int, ...], dtype: torch.dtype, *, heads: tuple[int, int] = (4, 2)) -> list[torch.Tensor]:
    """Return query, key and value of rows, random."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, number, sum(lengths), 64) for number in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes]


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the relative error."""
    return float((actual.float() - exact.float()).norm() / exact.float().norm())


@pytest.mark.parametrize("window", [None, 100])
def test_one_call_is_as_exact_as_row_by_row(window: int | None) -> None:
    """Held against float32 output and gradients are no further away than PyTorch's attention of each row."""
    parts = parts_of(LENGTHS, HALF)
    exact = attend([part.float() for part in parts], LENGTHS, window, one_call=False)
    called = attend(parts, LENGTHS, window, one_call=True)
    looped = attend(parts, LENGTHS, window, one_call=False)
    for one, plain, value in zip(called, looped, exact, strict=True):
        assert error(one, value) < max(2e-2, 1.2 * error(plain, value))


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("window", [None, 100])
def test_attention_gives_the_same_bits_again(dtype: torch.dtype, window: int | None) -> None:
    """Forward and backward, ten times, rows of 5 to 4,000 tokens."""
    parts = parts_of(LENGTHS, dtype)
    digests = {tuple(fingerprint(each) for each in attend(parts, LENGTHS, window, one_call=True)) for _ in range(10)}
    assert 1 == len(digests)


def test_no_row_changes_a_bit_of_another() -> None:
    """Other tokens in every second row leave output and gradients of the others as they were."""
    parts = parts_of(LENGTHS, HALF)
    changed = [part.clone() for part in parts]
    places = torch.arange(sum(LENGTHS), device=DEVICE)
    ends = torch.tensor(LENGTHS, device=DEVICE).cumsum(0)
    odd = torch.bucketize(places, ends, right=True) % 2 == 1
    for part in changed:
        part[:, :, odd] *= -1.5
    before, after = (attend(each, LENGTHS, None, one_call=True) for each in (parts, changed))
    assert torch.equal(before[0][:, ~odd], after[0][:, ~odd])
    for first, second in zip(before[1:], after[1:], strict=True):
        assert torch.equal(first[:, :, ~odd], second[:, :, ~odd])


@pytest.mark.skipif(IS_SMALL, reason="the kernel and its libraries are the GPU's")
def test_the_kernel_is_used_and_recorded() -> None:
    """A GPU that multiplies bfloat16 has the kernel, and the record names what bits depend on."""
    dtype = pick_dtype("auto", DEVICE)
    if dtype != HALF:
        pytest.skip("this GPU has no hardware for bfloat16")
    assert kernel_for(DEVICE, HALF) is not None
    assert kernel_for(DEVICE, torch.float32) is None
    found = describe_environment(DEVICE, dtype, layers=layer_facts(DEVICE, dtype))
    print(found)
    assert UNKNOWN not in [found[key] for key in ("cuda", "cublas", "cudnn")]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_the_head_gives_the_same_bits_again(trained: bool, dtype: torch.dtype) -> None:
    """Loss and gradients of many tokens over a large vocabulary, in chunks, three times."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 128, generator=generator).to(DEVICE) for size in (3000, 50_000))
    labels = torch.randint(0, 50_000, (3000,), generator=generator).to(DEVICE)
    digests: set[tuple[str, ...]] = set()
    own = []
    for _ in range(3):
        own: list[Any] = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
        with deterministic(DEVICE):
            loss = linear_cross_entropy(*own, labels, dtype)
            loss.backward()
        digests.add((str(float(loss.detach())), *(fingerprint(each.grad) for each in own if each.grad is not None)))
    assert 1 == len(digests)
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    nn.functional.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum").backward()
    for each, value in zip(own, exact, strict=True):
        assert each.grad is None or error(each.grad, value.grad) < (2e-2 if dtype == HALF else 1e-4)


def test_products_are_not_rounded() -> None:
    """Of half factors in float32, as on a CPU."""
    left, right = (torch.randn(shape, device=DEVICE).to(HALF) for shape in ((300, 700), (700, 200)))
    exact = left.double() @ right.double()
    assert torch.float32 == product_in_float(left, right).dtype
    assert float((product_in_float(left, right).double() - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.skipif(ON_CPU, reason="a CPU adds up in order")
def test_what_does_not_repeat_is_refused_by_name() -> None:
    """An operation that has no deterministic form on CUDA is named, in the backward pass too."""
    with pytest.raises(ModelError, match=r"the model uses \S*histc"), deterministic(DEVICE):
        torch.histc(torch.ones(9, device=DEVICE), bins=3)
    values = torch.ones(1, 1, 4, 4, 4, device=DEVICE, requires_grad=True)
    with pytest.raises(ModelError, match="no deterministic form"), deterministic(DEVICE):
        nn.functional.avg_pool3d(values, 2).sum().backward()


def test_a_fingerprint_is_that_of_the_bits_in_main_memory() -> None:
    """What is added up on the device is what a CPU adds up."""
    bits = torch.arange(-5, 100_000, dtype=torch.int32)
    assert mixed_sum(bits) == mixed_sum(bits.to(DEVICE))
