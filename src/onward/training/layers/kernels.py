"""Kernels for what a decoder computes between its matrix products: norm, rotation, gate. One pass over memory each.

They round where transformers' own code rounds, so that only the order of a norm's sums differs. Nothing is chosen by
timing, nothing is added atomically: the same tensors give the same bits in every process.
(Written in Triton, which comes with PyTorch for CUDA; Tillet et al., 2019. The idea of one kernel for each of these
parts is Liger Kernel's; Hsu et al., 2024.)
"""

# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl

TILE = 2048
"""The most numbers that one program of a norm handles, if a row has fewer."""
PROGRAMS = 256
"""How many programs sum a part of a norm's weight gradient each: a constant, because sums depend on it."""
GATED = 2048
"""How many numbers one program of a gate computes."""
PLAIN = {"enable_fp_fusion": False}
"""A product and a sum are not fused: that would round once where transformers' code rounds twice."""
HEADS = 16
"""The most heads that one program rotates."""
Given: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@triton.jit(do_not_specialize=["rows"])
def _norm(
    x,
    weight,
    y,
    roots,
    rows,
    width,
    eps,
    OFFSET: tl.constexpr,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    place = row[:, None].to(tl.int64) * width + column[None, :]
    given = tl.load(x + place, mask=inside, other=0.0)
    value = given.to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    normed = value * root[:, None]
    if ROUNDS:
        normed = normed.to(given.dtype).to(tl.float32)
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + OFFSET
    tl.store(y + place, (normed * scale[None, :]).to(y.dtype.element_ty), mask=inside)
    tl.store(roots + row, root, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "steps"])
def _norm_gradient(
    grad,
    x,
    weight,
    roots,
    out,
    sums,
    rows,
    width,
    steps,
    OFFSET: tl.constexpr,
    ROUNDS: tl.constexpr,
    TRAINED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    column = tl.arange(0, WIDTH)
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + OFFSET
    total = tl.zeros((WIDTH,), tl.float32)
    for step in range(steps):
        row = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        place = row[:, None].to(tl.int64) * width + column[None, :]
        given = tl.load(x + place, mask=inside, other=0.0)
        after = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        root = tl.load(roots + row, mask=row < rows, other=0.0)
        normed = given.to(tl.float32) * root[:, None]
        before = after * scale[None, :]
        if ROUNDS:
            before = before.to(given.dtype).to(tl.float32)
        mean = tl.sum(before * normed, 1) / width
        tl.store(out + place, (root[:, None] * (before - normed * mean[:, None])).to(out.dtype.element_ty), mask=inside)
        if TRAINED:
            if ROUNDS:
                normed = normed.to(given.dtype).to(tl.float32)
            total += tl.sum(after * normed, 0)
    if TRAINED:
        tl.store(sums + tl.program_id(0) * width + column, total, mask=column < width)


@triton.jit(do_not_specialize=["heads"])
def _rotation(
    x,
    cos,
    sin,
    y,
    heads,
    half,
    x_token,
    x_head,
    y_token,
    y_head,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    one = column < half
    inside = (head[:, None] < heads) & one[None, :]
    kind = y.dtype.element_ty
    angle = token * 2 * half + column
    cos_first = tl.load(cos + angle, mask=one).to(tl.float32)[None, :]
    cos_second = tl.load(cos + angle + half, mask=one).to(tl.float32)[None, :]
    sin_first = tl.load(sin + angle, mask=one).to(tl.float32)[None, :]
    sin_second = tl.load(sin + angle + half, mask=one).to(tl.float32)[None, :]
    place = x + token * x_token + head[:, None] * x_head + column[None, :]
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        into_first, into_second = second * sin_second, -(first * sin_first)
    else:
        into_first, into_second = -(second * sin_first), first * sin_second
    first = (first * cos_first).to(kind).to(tl.float32) + into_first.to(kind).to(tl.float32)
    second = (second * cos_second).to(kind).to(tl.float32) + into_second.to(kind).to(tl.float32)
    target = y + token * y_token + head[:, None] * y_head + column[None, :]
    tl.store(target, first.to(kind), mask=inside)
    tl.store(target + half, second.to(kind), mask=inside)


@triton.jit
def _gate(gate, up, y, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    kind = y.dtype.element_ty
    value = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    active = (value / (1.0 + tl.exp(-value))).to(kind).to(tl.float32)
    tl.store(y + place, (active * other).to(kind), mask=inside)


@triton.jit
def _gate_gradient(grad, gate, up, into_gate, into_up, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    kind = into_gate.dtype.element_ty
    after = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-value))
    active = (value * share).to(kind).to(tl.float32)
    tl.store(into_up + place, (after * active).to(kind), mask=inside)
    before = (after * other).to(kind).to(tl.float32)
    tl.store(into_gate + place, (before * share * (1.0 + value * (1.0 - share))).to(kind), mask=inside)


def _blocks(width: int) -> dict[str, Any]:
    columns = triton.next_power_of_2(width)
    return {"ROWS": max(1, TILE // columns), "WIDTH": columns, "num_warps": 4 if columns <= TILE else 8}


def norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float, rounds: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows normed, and what each was multiplied by.

    Args:
        x: shape (rows, width), contiguous; the same shape comes back, in `dtype`.
        weight: shape (width,); `offset` is added to it.
        rounds: whether the normed row is rounded to the type of `x` before it is multiplied by the weight.

    Returns:
        The normed rows, and the factors, float32, shape (rows,).
    """
    rows, width = x.shape
    y, roots = torch.empty_like(x, dtype=dtype), x.new_empty(rows, dtype=torch.float32)
    if rows:
        sizes = _blocks(width)
        grid = (triton.cdiv(rows, sizes["ROWS"]),)
        _norm[grid](x, weight, y, roots, rows, width, eps, OFFSET=offset, ROUNDS=rounds, **sizes, **PLAIN)
    return y, roots


def norm_gradient(
    grad: torch.Tensor, given: Given, *, offset: float, rounds: bool, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of `x` and, if requested, of the weight in float32; shapes are those of `norm`.

    Args:
        given: `x`, the weight, and what each row was multiplied by.
    """
    x, weight, roots = given
    rows, width = x.shape
    sizes = _blocks(width)
    blocks = max(1, triton.cdiv(rows, sizes["ROWS"]))
    steps = triton.cdiv(blocks, PROGRAMS) if wanted else 1
    programs = triton.cdiv(blocks, steps)
    out = torch.empty_like(x)
    sums = x.new_empty((programs, width) if wanted else (1,), dtype=torch.float32)
    options = {"OFFSET": offset, "ROUNDS": rounds, "TRAINED": wanted, **sizes, **PLAIN}
    _norm_gradient[(programs,)](grad, x, weight, roots, out, sums, rows, width, steps, **options)
    return out, sums.sum(0) if wanted else None


def rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, *, back: bool) -> torch.Tensor:
    """Return heads rotated by the angles of their tokens, or a gradient rotated back.

    Args:
        x: shape (tokens, heads, dim), the last dimension contiguous.
        cos, sin: shape (tokens, dim), contiguous.

    Returns:
        The shape of `x`, contiguous, in `dtype`.
    """
    tokens, heads, dim = x.shape
    y = x.new_empty(x.shape, dtype=dtype)
    if not tokens:
        return y
    together = min(HEADS, triton.next_power_of_2(heads))
    sizes = {"HEADS": together, "HALF": triton.next_power_of_2(dim // 2)}
    strides = (x.stride(0), x.stride(1), y.stride(0), y.stride(1))
    _rotation[(tokens, triton.cdiv(heads, together))](
        x, cos, sin, y, heads, dim // 2, *strides, BACK=back, **sizes, **PLAIN
    )
    return y


def gate(value: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return `silu(value) * up` for two contiguous tensors of the same shape and type."""
    y = torch.empty_like(value)
    if value.numel():
        _gate[(triton.cdiv(value.numel(), GATED),)](value, up, y, value.numel(), BLOCK=GATED, **PLAIN)
    return y


def gate_gradient(grad: torch.Tensor, value: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of both inputs of `gate`."""
    into_value, into_up = torch.empty_like(value), torch.empty_like(up)
    if value.numel():
        programs = (triton.cdiv(value.numel(), GATED),)
        _gate_gradient[programs](grad, value, up, into_value, into_up, value.numel(), BLOCK=GATED, **PLAIN)
    return into_value, into_up
