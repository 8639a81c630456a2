"""Finds how long a row a model has positions for."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from onward.training.admission.inputs import LONG, rows, tokens
from onward.training.device.environment import autocast
from onward.training.device.errors import is_of_the_device

_STATED = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions")
"""Config keys that state the number of positions."""


def most_positions(
    model: PreTrainedModel, vocabulary: range, max_length: int, device: torch.device, dtype: torch.dtype
) -> int | None:
    """Return the length in tokens of the longest row that a model can take; None if `max_length` is not too long.

    Args:
        vocabulary: the token ids that rows may have.
        max_length: tokens of the longest row that the run may have.
        dtype: the type that steps compute in: weights of several types, as trained parts have, need its context.
    """
    with torch.no_grad(), autocast(device, dtype):
        learned = _learned(model, vocabulary, device)
        if learned is not None and learned < max_length:
            return learned
        stated = _stated(model)
        if stated is None or stated >= max_length or _takes(model, vocabulary, stated + 1, device):
            return None
        return stated


def _stated(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config(decoder=True)
    found = [vars(config).get(key, getattr(config, key, None)) for key in _STATED]
    return min((each for each in found if isinstance(each, int) and each > 1), default=None)


def _takes(model: PreTrainedModel, vocabulary: range, length: int, device: torch.device) -> bool:
    """Whether a model takes a row of this length; on a GPU, a lookup beyond a table would break the whole process."""
    if device.type != "cpu" and _has_table(model, length - 1):
        return False
    ids = torch.arange(length, device=device)[None] % len(vocabulary) + vocabulary.start
    try:
        cast(Any, model)(input_ids=ids, use_cache=False)
    except (RuntimeError, IndexError, ValueError, AssertionError) as error:
        if is_of_the_device(error):
            raise
        return False
    return True


def _has_table(model: PreTrainedModel, positions: int) -> bool:
    """Whether a part of a model holds a tensor with as many rows as there are positions."""
    embedding = model.get_input_embeddings()
    for part in model.modules():
        held = [*vars(part)["_buffers"].values(), *vars(part).values()]
        if isinstance(part, nn.Embedding) and part is not embedding:
            held.append(part.weight)
        if any(isinstance(each, torch.Tensor) and positions in each.shape for each in held):
            return True
    return False


def _learned(model: PreTrainedModel, vocabulary: range, device: torch.device) -> int | None:
    """Return the length of the longest row that a table of positions covers; None if there is no such table.

    A table of positions is an embedding of which one more row is looked up for each further token.
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
