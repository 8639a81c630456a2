"""Small rows on which a model is proven: fixed tokens, lengths on both sides of every narrowed limit."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from onward.data.loader import Batch
from onward.data.order import RowReference
from onward.data.tokenized import Row
from onward.training.seeds import fold

SHORT, MIDDLE, LONG = 6, 13, 27
"""Tokens of the rows: below `narrow.LIMIT`, above it, and more than three times as many."""


def rows(lengths: Iterable[int], vocabulary: int, seed: int = 0) -> Batch:
    """Return rows of these lengths; two thirds of their tokens are targets.

    Args:
        vocabulary: token ids go from 0 to one below.
    """
    made = [_row(length, vocabulary, place, seed) for place, length in enumerate(lengths)]
    places = list(range(len(made)))
    return Batch(made, [RowReference("admission", place) for place in places], places)


def tokens(row: Row, device: torch.device) -> torch.Tensor:
    """Return the tokens of a row as a model takes them, shape (1, tokens)."""
    return torch.from_numpy(row.ids.astype(np.int64))[None].to(device)


def _row(length: int, vocabulary: int, place: int, seed: int) -> Row:
    ids = np.array([fold(seed, "admission", place, column) % vocabulary for column in range(length)], dtype=np.int64)
    targets = np.arange(length) % 3 > 0
    return Row(ids, targets)
