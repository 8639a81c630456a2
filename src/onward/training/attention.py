"""Attention over the rows of a batch laid end to end: every row by itself, no padding, no mask.

Registered with transformers under `ROW_ATTENTION`. Which rows there are is said around the forward pass, so that it
does not depend on which arguments a model hands down to its layers. Outside of `rows_of` it is transformers' own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ROW_ATTENTION = "onward_rows"

PADDING_FREE = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "olmo2", "phi3", "smollm3", "starcoder2"}
)  # fmt: skip
"""Model types whose tokens meet in attention only and whose logits are the head's output: each is tested."""

_row_lengths: ContextVar[tuple[int, ...] | None] = ContextVar("row_lengths", default=None)


@contextlib.contextmanager
def rows_of(lengths: tuple[int, ...]) -> Generator[None]:
    """Say that the one sequence of the forward pass inside is made of rows of these lengths."""
    token = _row_lengths.set(lengths)
    try:
        yield
    finally:
        _row_lengths.reset(token)


def is_padding_free(model_type: str) -> bool:
    """Whether a model of this type may be given rows laid end to end."""
    return model_type in PADDING_FREE


def row_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each row to itself.

    Args:
        query: shape (1, heads, tokens, dim); key and value may have fewer heads that divide them.

    Returns:
        Shape (1, tokens, heads, dim), and no weights.
    """
    lengths = _row_lengths.get()
    if lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    # split, not slices: backward of a slice fills and adds a tensor of the full size for every row
    rows = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    shared = query.shape[1] != key.shape[1]
    attended: list[torch.Tensor] = []
    for row_query, row_key, row_value in rows:
        mask = _window(row_query.shape[2], sliding_window, query.device)
        attended.append(
            functional.scaled_dot_product_attention(
                row_query, row_key, row_value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
                scale=scaling, enable_gqa=shared,
            ).transpose(1, 2)
        )  # fmt: skip
    return torch.cat(attended, dim=1), None


def _window(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return which positions see which where a row is longer than the sliding window, else None."""
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=device)
    distance = places[:, None] - places[None, :]
    return (distance >= 0) & (distance < window)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    return sdpa_mask(*args, **kwargs) if _row_lengths.get() is None else None


AttentionInterface.register(ROW_ATTENTION, row_attention)
AttentionMaskInterface.register(ROW_ATTENTION, _mask)
