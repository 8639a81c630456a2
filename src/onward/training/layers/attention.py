"""Attention over the rows of a batch laid end to end: each row attends to itself, without padding or mask.

On a GPU and in a 16-bit type, one call attends to all rows (`varlen.py`); elsewhere, or if that kernel does not fit, it
is PyTorch's attention row by row.

It is registered with transformers as `ROW_ATTENTION`. The lengths of the rows are a keyword of the forward pass, which
a decoder passes to its layers and a layer to its attention; so they are also there when a layer is recomputed in the
backward pass. Without that keyword, the model attends as with transformers' own `sdpa`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from onward.errors import ModelError
from onward.training.layers.varlen import RowKernel, Varlen

ROW_ATTENTION = "onward_rows"

PADDING_FREE = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "olmo2", "phi3", "smollm3", "starcoder2"}
)  # fmt: skip
"""Model types whose rows are laid end to end in runs made before there was an admission (`admission/`)."""


def takes_rows(model: PreTrainedModel) -> bool:
    """Return whether rows are laid end to end for this model."""
    return cast(Any, model.config)._attn_implementation == ROW_ATTENTION


def lay_end_to_end(model: PreTrainedModel) -> None:
    """Make a model attend to rows laid end to end, each to itself.

    Raises:
        ValueError: its attention cannot be replaced by another that computes the same.
    """
    if not model._supports_sdpa:  # pyright: ignore[reportPrivateUsage]
        raise ValueError("its attention is its own implementation")
    model.set_attn_implementation(ROW_ATTENTION)
    if not takes_rows(model):
        raise ValueError("its attention cannot be set")


def row_arguments(
    lengths: tuple[int, ...], device: torch.device, kernel: Varlen | None, shape: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Return the keywords of a forward pass over one sequence made of rows of these lengths.

    The empty mask has four dimensions, so transformers makes none of its own and passes it on as it is. Attention that
    gets it without the lengths knows that they were lost on the way.

    Args:
        kernel: attends to all rows in one call, if it fits; otherwise attention is computed row by row.
        shape: the rows that the kernel is called with (`RowKernel.of`).
    """
    mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)
    called = {} if kernel is None else {"row_kernel": RowKernel.of(kernel, lengths, device, shape)}
    return {"row_lengths": lengths, "attention_mask": mask, **called}


def row_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    row_lengths: tuple[int, ...] | None = None,
    row_kernel: RowKernel | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the causal attention of each row to itself.

    The signature is the one that transformers calls; `row_lengths` and `row_kernel` come from `row_arguments`.

    Args:
        query: shape (1, heads, tokens, dim); key and value may have fewer heads, by a divisor.

    Returns:
        The output, shape (1, tokens, heads, dim), and no weights.

    Raises:
        ModelError: the model did not pass the lengths of the rows to its attention.
        RuntimeError: only the device knows them, as in a recording, and the kernel does not fit.
    """
    if row_lengths is None:
        _require_no_rows(module, attention_mask)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _require_plain(module, kwargs)
    if row_kernel is not None and not dropout and row_kernel.kernel.fits(query, key, value, sliding_window):
        return row_kernel.attend((query, key, value), sliding_window, scaling), None
    if not row_lengths:
        raise RuntimeError("attention is computed row by row, for which the host has to know the rows")
    # split, not slices: the backward pass of a slice fills and adds a tensor of the full size for every row
    rows = zip(query.split(row_lengths, 2), key.split(row_lengths, 2), value.split(row_lengths, 2), strict=True)
    return torch.cat([_attend(*row, sliding_window, dropout, scaling) for row in rows], dim=1), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Return one row's causal attention to itself, shape (1, tokens, heads, dim)."""
    mask = _window(query.shape[2], window, query.device)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    ).transpose(1, 2)  # fmt: skip


def _window(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return which positions see which if a row is longer than the sliding window, else None."""
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=device)
    distance = places[:, None] - places[None, :]
    return (distance >= 0) & (distance < window)


def _require_no_rows(module: nn.Module, attention_mask: torch.Tensor | None) -> None:
    if attention_mask is not None and attention_mask.shape[-1] == 0:
        raise ModelError(
            f"in transformers {transformers.__version__} this model does not pass the lengths of its rows to its "
            "attention, so rows would see each other",
            where=type(module).__name__,
            hint="Nothing was trained. Install the releases with which the run was made (onward doctor names them), "
            "then: onward train",
        )


def _require_plain(module: nn.Module, extra: Mapping[str, Any]) -> None:
    """Refuse what changes attention scores (sinks, position biases, a soft cap): it is not implemented here."""
    asked = [
        name
        for name, value in extra.items()
        if (isinstance(value, torch.Tensor) and value.is_floating_point()) or (name == "softcap" and value is not None)
    ]
    if asked:
        raise ModelError(f"its attention is given {', '.join(asked)}", where=type(module).__name__)


AttentionInterface.register(ROW_ATTENTION, row_attention)
AttentionMaskInterface.register(ROW_ATTENTION, sdpa_mask)
