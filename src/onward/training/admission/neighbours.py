"""Checks whether rows laid end to end see each other: other tokens in one row must not change a bit of another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from onward.data.plan.loader import Batch, flatten, pad
from onward.data.tokenized import Row
from onward.training.admission.inputs import SHORT, others, rows
from onward.training.device.environment import autocast
from onward.training.layers.attention import row_arguments
from onward.training.layers.buffers import Buffers
from onward.training.layers.varlen import kernel_for

Logits = list[torch.Tensor]
"""The logits of each row, shape (tokens, vocabulary)."""
PLAIN_TRIES = 8
"""The most batches of short rows in which a row is looked for whose last bits depend on the others."""


def influence(model: nn.Module, batch: Batch, vocabulary: range, device: torch.device, dtype: torch.dtype) -> float:
    """Return how much rows laid end to end change each other's logits, relative to their size; 0.0 if not by a bit.

    Experts multiply as many tokens at once as were routed to them, so that the last bits of a row depend on the others
    in any layout. If they do in plain rows of transformers too, the relative change is returned; otherwise any
    differing bit is a fault and gives infinity. Plain rows are the same ones padded, and short ones of one length, of
    which an expert gets few.
    """
    laid = _largest_change(lambda given: _end_to_end(model, given, device, dtype), model, batch, vocabulary)
    if laid == 0.0:
        return 0.0
    plain = (batch, *(rows([SHORT] * len(batch), vocabulary, seed) for seed in range(PLAIN_TRIES)))
    depends = any(
        _largest_change(lambda given: _padded(model, given, device, dtype), model, each, vocabulary) > 0.0
        for each in plain
    )
    return laid if depends else float("inf")


def _largest_change(logits_of: Callable[[Batch], Logits], model: nn.Module, batch: Batch, vocabulary: range) -> float:
    buffers = Buffers(model)
    with torch.no_grad():
        before = logits_of(batch)
        buffers.restore()
        found = 0.0
        for kept, changed in _variants(batch, vocabulary):
            after = logits_of(changed)
            buffers.restore()
            for place in kept:
                if not torch.equal(before[place], after[place]):
                    moved = (after[place] - before[place]).float().norm() / before[place].float().norm()
                    found = max(found, float(moved))
    return found


def _variants(batch: Batch, vocabulary: range) -> Iterator[tuple[list[int], Batch]]:
    """Yield batches in which every second row has other tokens, with the indices of the unchanged rows."""
    for first in (0, 1):
        rows = [_other(row, vocabulary) if place % 2 == first else row for place, row in enumerate(batch.rows)]
        yield [place for place in range(len(rows)) if place % 2 != first], replace(batch, rows=rows)


def _other(row: Row, vocabulary: range) -> Row:
    return Row(others(row.ids, vocabulary), row.targets)


def _end_to_end(model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> Logits:
    flat = flatten(batch)
    ids, places = (torch.from_numpy(values).to(device) for values in (flat.input_ids, flat.position_ids))
    rows = row_arguments(flat.lengths, device, kernel_for(device, dtype))
    with autocast(device, dtype):
        logits = cast(Any, model)(input_ids=ids[None], position_ids=places[None], use_cache=False, **rows).logits[0]
    return list(logits.split(flat.lengths))


def _padded(model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> Logits:
    padded = pad(batch, 0)
    ids, mask = (torch.from_numpy(values).to(device) for values in (padded.input_ids, padded.attention_mask))
    with autocast(device, dtype):
        logits = cast(Any, model)(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return [own[: len(row.ids)] for own, row in zip(logits, batch.rows, strict=True)]
