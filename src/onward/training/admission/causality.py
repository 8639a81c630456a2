"""Whether a model looks ahead."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any, cast

import torch
from torch import nn

from onward.training.admission.inputs import LONG, rows, tokens
from onward.training.environment import HALF, autocast

TOLERANCE = 1e-5
"""Change of an earlier logit, relative to the spread of the logits, that is rounding."""
PLACES = 5
"""Tokens of a longer row that are tried."""
LARGEST = 2_000_000_000
"""Weights up to which a model is looked at in float32, whatever its type: rounding hides what looks ahead a little."""


@contextlib.contextmanager
def as_float32(model: nn.Module) -> Generator[None]:
    """Have a model compute in float32 in the body, where that fits; nothing of its weights is lost on the way back."""
    tensors = [*model.parameters(), *model.buffers()]
    lower = [tensor for tensor in tensors if tensor.dtype in HALF]
    if sum(tensor.numel() for tensor in tensors) > LARGEST:
        lower = []
    types = [tensor.dtype for tensor in lower]
    for tensor in lower:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in zip(lower, types, strict=True):
            tensor.data = tensor.data.to(dtype)


def looks_ahead(model: nn.Module, vocabulary: int, device: torch.device, *, length: int = LONG) -> bool:
    """Whether another token at the end, or in the middle, of a row changes a logit before it.

    Args:
        length: tokens of the row; of a longer one, some more tokens are tried.

    Raises:
        ValueError: the logits are not finite.
    """
    ids = tokens(rows([length], vocabulary).rows[0], device)
    before = _logits(model, ids, device)
    eps = max(torch.finfo(parameter.dtype).eps for parameter in model.parameters() if parameter.is_floating_point())
    tolerance = TOLERANCE * eps / torch.finfo(torch.float32).eps
    places = (length - 1, length // 2) if length <= LONG else range(length - 1, 0, -(length // PLACES))
    for place in places:
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + vocabulary // 2) % vocabulary
        after = _logits(model, changed, device)
        moved = (after[:place] - before[:place]).abs().max()
        if float(moved) > tolerance * float(before.std()):
            return True
    return False


def _logits(model: nn.Module, ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the logits of one row, shape (tokens, vocabulary)."""
    with torch.no_grad(), autocast(device, _lowest(model)):
        logits = cast(Any, model)(input_ids=ids, use_cache=False).logits[0].float()
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("its logits are not finite")
    return logits


def _lowest(model: nn.Module) -> torch.dtype:
    """Return the type to compute in: a half type where a weight is left in it."""
    return next((each.dtype for each in model.parameters() if each.dtype in HALF), torch.float32)
