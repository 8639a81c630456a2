"""Cross-entropy of a linear head without the logits: chunk by chunk, its gradient made in the forward pass.

The idea is that of the fused linear cross-entropy of Liger Kernel (Hsu et al., 2024) and of Apple's Cut Cross-Entropy
(Wijmans et al., 2024); here it is plain PyTorch.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

LOGITS_BYTES = 128 << 20
"""Memory for the logits of one chunk. Larger chunks read the head's weights less often."""


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the summed cross-entropy (nats, float32 scalar) of `hidden @ weight.T`.

    Args:
        hidden: shape (tokens, width).
        weight: shape (vocabulary, width).
        labels: shape (tokens,), int64.
        dtype: type of the matrix multiplications; exponents and sums are float32.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return cast(Any, _LinearCrossEntropy).apply(hidden, weight, labels, dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        chunk = max(1, LOGITS_BYTES // (4 * weight.shape[0]))
        rows, head = hidden.to(dtype), weight.to(dtype)
        buffer = rows.new_empty(min(chunk, len(rows)), len(head))
        hidden_grad = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), device=hidden.device)
        for first in range(0, len(rows), chunk):
            part, wanted = rows[first : first + chunk], labels[first : first + chunk, None]
            logits = torch.mm(part, head.T, out=buffer[: len(part)]).float()
            chosen, largest = logits.gather(1, wanted), logits.amax(1, keepdim=True)
            shares = torch.softmax(logits, 1, out=logits)  # one pass: row by row in the processor's cache
            total += (largest - shares.amax(1, keepdim=True).log() - chosen).sum()
            if hidden_grad is None and weight_grad is None:
                continue
            grad = shares.scatter_add_(1, wanted, torch.full_like(chosen, -1.0)).to(dtype)
            if hidden_grad is not None:
                torch.mm(grad, head, out=hidden_grad[first : first + chunk])
            if weight_grad is not None:
                weight_grad.addmm_(grad.T, part)
        ctx.save_for_backward(
            None if hidden_grad is None else hidden_grad.to(hidden.dtype),
            None if weight_grad is None else weight_grad.to(weight.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (scale,) = grad_outputs
        return (*(None if grad is None else grad * scale for grad in ctx.saved_tensors), None, None)
