"""Whether a model looks ahead, and which tables it looks positions up in."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

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


def learned_positions(model: PreTrainedModel, vocabulary: int, device: torch.device) -> int | None:
    """Return the tokens of the longest row that a model has positions for; None where no table limits them.

    A table of positions is an embedding that is asked for one row more for each further token.
    """
    asked: dict[nn.Module, list[int]] = {}

    def note(part: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor) and not inputs[0].is_floating_point():
            asked.setdefault(part, []).append(int(inputs[0].max()))

    embedding = model.get_input_embeddings()
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding) and part is not embedding]
    if not tables:
        return None
    hooks = [part.register_forward_hook(note) for part in tables]
    batch = rows([LONG, LONG], vocabulary)
    try:
        for length in (LONG - 1, LONG):
            with torch.no_grad():
                cast(Any, model)(input_ids=tokens(batch.rows[0], device)[:, :length], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    limits = [
        cast(nn.Embedding, part).num_embeddings - (places[-1] - (LONG - 1))
        for part, places in asked.items()
        if len(places) == 2 and places[1] == places[0] + 1
    ]
    return min(limits, default=None)
