"""Whether a model looks ahead."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from onward.training.admission.inputs import LONG, rows, tokens
from onward.training.environment import autocast, deterministic

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Change of an earlier logit, relative to the spread of the logits, that is rounding, by compute type."""


def looks_ahead(model: nn.Module, vocabulary: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether another token at the end, or in the middle, of a row changes a logit before it.

    Raises:
        ValueError: the logits are not finite.
    """
    ids = tokens(rows([LONG], vocabulary).rows[0], device)
    before = _logits(model, ids, device, dtype)
    for place in (LONG - 1, LONG // 2):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + vocabulary // 2) % vocabulary
        after = _logits(model, changed, device, dtype)
        moved = (after[:place] - before[:place]).abs().max()
        if float(moved) > TOLERANCE[dtype] * float(before.std()):
            return True
    return False


def _logits(model: nn.Module, ids: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the logits of one row, shape (tokens, vocabulary)."""
    with torch.no_grad(), deterministic(device), autocast(device, dtype):
        logits = cast(Any, model)(input_ids=ids, use_cache=False).logits[0].float()
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("its logits are not finite")
    return logits
