"""Small rows on which a model is proven: fixed tokens, and lengths on both sides of every lowered limit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from onward.data.plan.loader import Batch
from onward.data.plan.order import RowReference
from onward.data.tokenized import Row
from onward.training.seeds import fold

Ids = TypeVar("Ids", torch.Tensor, NDArray[Any])

SHORT, MIDDLE, LONG = 6, 13, 27
"""Tokens of the rows: below `narrow.LIMIT`, above it, and more than three times as many."""


def rows(lengths: Iterable[int], vocabulary: range, seed: int = 0) -> Batch:
    """Return rows of these lengths; two thirds of their tokens are targets.

    Args:
        vocabulary: the token ids that they may have.
    """
    made = [_row(length, vocabulary, place, seed) for place, length in enumerate(lengths)]
    places = list(range(len(made)))
    return Batch(made, [RowReference("admission", place) for place in places], places)


def tokens(row: Row, device: torch.device) -> torch.Tensor:
    """Return the tokens of a row as input of a model, shape (1, tokens)."""
    return torch.from_numpy(row.ids.astype(np.int64))[None].to(device)


def others(ids: Ids, vocabulary: range) -> Ids:
    """Return a different token in place of each."""
    return (ids - vocabulary.start + len(vocabulary) // 2) % len(vocabulary) + vocabulary.start


def _row(length: int, vocabulary: range, place: int, seed: int) -> Row:
    drawn = (fold(seed, "admission", place, column) % len(vocabulary) for column in range(length))
    ids = np.array([vocabulary[each] for each in drawn], dtype=np.int64)
    targets = np.arange(length) % 3 > 0
    return Row(ids, targets)
