"""Attention to all rows in one call, on a CPU: a plain kernel with the signature of PyTorch's `varlen_attn`."""

from __future__ import annotations

import pytest
import torch

from onward.training.layers.varlen import Varlen


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Attend to rows of which some may be empty; nothing waits for a number."""
    assert (max_q, 0) == (max_k, window_size[1])
    del enable_gqa
    return attended((query, key, value), cu_seq_q, scale, window_size)


def attended(
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor], places: torch.Tensor, scale: float | None,
    window: tuple[int, int],
) -> torch.Tensor:  # fmt: skip
    """Return the attention of rows to themselves: softmax over whole matrices, with a mask."""
    query, (left, right) = parts[0], window
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in parts[1:])
    row = torch.bucketize(torch.arange(len(query)), places[1:-1].long(), right=True)
    behind = torch.arange(len(query))[:, None] - torch.arange(len(query))
    seen = (row[:, None] == row) & (behind >= -right if right >= 0 else True) & (behind <= left if left >= 0 else True)
    scores = torch.einsum("qhd,khd->hqk", query, key) * (scale or query.shape[-1] ** -0.5)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


KERNEL = Varlen.of(attend)


def let_attend_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU attend so, and not look into small buffers, as on a GPU: parts of steps are filled up then."""
    monkeypatch.setattr("onward.training.steps.loss.kernel_for", lambda *_: KERNEL)
    monkeypatch.setattr("onward.training.layers.buffers.SMALL", 0)
