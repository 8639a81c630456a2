"""Cross-entropy of a linear head, without ever holding all logits.

The gradient is made in the forward pass, as in the fused linear cross-entropy of Liger Kernel (Hsu et al., 2024) and
Apple's Cut Cross-Entropy (Wijmans et al., 2024); here it is plain PyTorch, in one of two orders. A frozen head is
attention in which tokens are queries and the vocabulary is both keys and values, so its logits are computed for one
part of the vocabulary at a time, with a running log-sum-exp (FlashAttention, Dao et al., 2022), and never leave the
processor's cache. The gradient of a trained head needs whole rows of logits, which are computed for some tokens at a
time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from onward.training.layers.matmul import product_in_float, times

LOGITS_BYTES = 128 << 20
"""Memory for the logits of a chunk of tokens. The more tokens at a time, the less often the head's weights are read."""
CHUNK_BYTES = {"cuda": 512 << 20}
"""The same by device: a GPU is busy only with more tokens at a time; elsewhere `LOGITS_BYTES`."""
TILE_BYTES = {"cpu": 12 << 20, "cuda": 512 << 20}
"""Memory for the logits of a part of the vocabulary, by device: what fits a CPU's cache; elsewhere `LOGITS_BYTES`. A
GPU waits for each launch, so it gets few large parts."""
WORDS = 512
"""The size of such a part is a multiple of this: kernels are fastest for round shapes."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the summed cross-entropy (nats, float32 scalar) of `hidden @ weight.T`.

    Args:
        hidden: shape (tokens, width).
        weight: shape (vocabulary, width).
        labels: shape (tokens,), int64.
        dtype: type of the factors of matrix multiplications; logits, exponents and sums are float32.
        counts: float32, shape (tokens,): the weight of each token's loss; None if each has weight 1.
    """
    column = None if counts is None else counts[:, None]
    with torch.autocast(hidden.device.type, enabled=False):
        if weight.requires_grad and torch.is_grad_enabled():
            return cast(Any, _OfTrainedHead).apply(hidden, weight, labels, dtype, column)
        return cast(Any, _OfFrozenHead).apply(hidden, weight.detach(), labels, dtype, torch.is_grad_enabled(), column)


def linear_scores(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy (nats, float32) of each row of `hidden @ weight.T`, and whether its label ranks first.

    A label ranks first if it has the largest logit; of equal ones, the first in the vocabulary counts. Nothing is
    recorded for autograd. The arguments are those of `linear_cross_entropy`; both results have shape (tokens,).
    """
    with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
        rows, head, wanted = hidden.to(dtype), weight.to(dtype), labels[:, None]
        log_sum, chosen = _nothing_yet(rows)
        best, hits = log_sum, torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for _, logits, place in _by_parts(rows, head, wanted):
            found, inside = _found(logits, place)
            chosen = torch.where(inside, found, chosen)
            largest = logits.amax(1, keepdim=True)
            leads = largest > best
            may_hit = (leads & inside & (found == largest))[:, 0]
            hits &= ~leads[:, 0]
            hits[may_hit] = logits[may_hit].argmax(1) == place[may_hit, 0]
            best = torch.maximum(best, largest)
            shares = torch.softmax(logits, 1, out=logits)
            log_sum = torch.logaddexp(log_sum, largest - shares.amax(1, keepdim=True).log_())
    return (log_sum - chosen)[:, 0], hits


class _OfFrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype, graph: bool,
        counts: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        total, grad = _by_vocabulary(hidden.to(dtype), weight.to(dtype), labels[:, None], counts, wants_grad=graph)
        ctx.save_for_backward(None if grad is None else grad.to(hidden.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.saved_tensors[0] * grad_outputs[0], None, None, None, None, None


class _OfTrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype,
        counts: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        total, hidden_grad, weight_grad = _by_tokens(hidden.to(dtype), weight.to(dtype), labels[:, None], counts)
        ctx.save_for_backward(hidden_grad.to(hidden.dtype), weight_grad.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (*(grad * grad_outputs[0] for grad in ctx.saved_tensors), None, None, None)


def _by_vocabulary(
    rows: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor | None, *, wants_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the loss and the gradient of `rows`: softmax times the weights, minus the target's weights."""
    log_sum, chosen = _nothing_yet(rows)
    seen = torch.zeros_like(rows, dtype=torch.float32) if wants_grad else None
    for part, logits, place in _by_parts(rows, head, labels):
        found, inside = _found(logits, place)
        chosen = torch.where(inside, found, chosen)
        largest = logits.amax(1, keepdim=True)
        shares = torch.softmax(logits, 1, out=logits)  # one pass, row by row in the processor's cache
        own_sum = largest - shares.amax(1, keepdim=True).log_()
        before, log_sum = log_sum, torch.logaddexp(log_sum, own_sum)
        if seen is not None:
            seen.mul_((before - log_sum).exp_())
            seen.addcmul_(_product(shares.to(rows.dtype), part), (own_sum - log_sum).exp_())
    grad = None if seen is None else _counted(seen.sub_(head[labels[:, 0]]), counts)
    return _counted(log_sum - chosen, counts).sum(), grad


def _nothing_yet(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the initial log-sum-exp and chosen logit, before any part of the vocabulary; each of shape (tokens, 1)."""
    log_sum = rows.new_full((len(rows), 1), float("-inf"), dtype=torch.float32)
    return log_sum, torch.zeros_like(log_sum)


def _by_parts(
    rows: torch.Tensor, head: torch.Tensor, labels: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield parts of the vocabulary: their weights, logits (tokens, words), and the labels' indices (tokens, 1)."""
    budget = TILE_BYTES.get(rows.device.type, LOGITS_BYTES)
    words = WORDS * max(1, budget // (4 * WORDS * max(1, len(rows))))
    for first in range(0, len(head), words):
        part = head[first : first + words]
        yield part, _product(rows, part.T), labels - first


def _found(logits: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the labels, and which labels are in this part; each of shape (tokens, 1)."""
    words = logits.shape[1]
    return logits.gather(1, place.clamp(0, words - 1)), (place >= 0) & (place < words)


def _less_one(shares: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Subtract 1 in place at a place, shape (tokens, 1), of each row of shares.

    Flat, since a GPU waits otherwise: where it adds in order, many releases of PyTorch copy strides to it.
    """
    rows = torch.arange(0, shares.numel(), shares.shape[1], device=shares.device)
    shares.view(-1).scatter_add_(0, rows + places[:, 0], shares.new_full((len(rows),), -1.0))
    return shares


def _counted(values: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """Multiply values, shape (tokens, any), in place by the weight of each token, shape (tokens, 1)."""
    return values if counts is None else values.mul_(counts)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return times(left, right.T) if left.dtype == torch.float32 else product_in_float(left, right)


def _by_tokens(
    rows: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss, and the gradients of `rows` and of the weights."""
    chunk = max(1, CHUNK_BYTES.get(rows.device.type, LOGITS_BYTES) // (4 * len(head)))
    is_float = rows.dtype == torch.float32
    buffer = rows.new_empty(min(chunk, len(rows)) if is_float else 0, len(head))
    hidden_grad, weight_grad = torch.empty_like(rows), torch.zeros_like(head, dtype=torch.float32)
    total = torch.zeros((), device=rows.device)
    for first in range(0, len(rows), chunk):
        part, wanted = rows[first : first + chunk], labels[first : first + chunk]
        own = None if counts is None else counts[first : first + chunk]
        logits = torch.mm(part, head.T, out=buffer[: len(part)]) if is_float else product_in_float(part, head.T)
        chosen, largest = logits.gather(1, wanted), logits.amax(1, keepdim=True)
        shares = torch.softmax(logits, 1, out=logits)
        total += _counted(largest - shares.amax(1, keepdim=True).log_() - chosen, own).sum()
        grad = _counted(_less_one(shares, wanted), own).to(head.dtype)
        torch.mm(grad, head, out=hidden_grad[first : first + chunk])
        if is_float:
            weight_grad.addmm_(grad.T, part)
        else:  # in a 16-bit type, the sum would be rounded at each chunk
            weight_grad += product_in_float(grad.T, part)
    return total, hidden_grad, weight_grad
