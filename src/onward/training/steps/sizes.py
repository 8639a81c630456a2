"""Sizes of the parts of a step on a GPU, rounded up, so that many parts have equal ones and can be recorded.

Rounding changes last bits, since kernels add in an order that depends on their sizes. So it is a function of the part
and the model alone, whether or not anything is recorded, and on every GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from onward.data.plan.loader import FlatBatch

WORK = 3e13
"""Tokens times weights of a part up to which a GPU waits for the host, which launches its kernels; only there it pays
to record a part. An H200 needs about 0.3 s for so much, about as long as the host takes to launch it."""
STEPS, LEAST = 8, 128
"""Tokens are rounded up to an eighth of the power of two below them, and to a multiple of this; targets to an eighth of
the tokens; the longest row to this times a power of four."""
ROWS = 8
"""The number of rows is rounded up to a multiple of this."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a part that is laid end to end.

    Args:
        tokens: tokens, including those of the row that fills up.
        targets: targets, including those of weight 0 that fill up.
        rows: rows, including the one that fills up and empty ones.
        longest: at least the tokens of the longest row.
    """

    tokens: int
    targets: int
    rows: int
    longest: int


def sizes_of(lengths: Sequence[int], targets: int, weights: int) -> Sizes | None:
    """Return the sizes of a part of rows of these lengths; None if nothing is rounded.

    Args:
        weights: number of weights of the model.
    """
    tokens = _rounded(sum(lengths))
    if tokens * weights > WORK:
        return None
    fill = tokens - sum(lengths)
    rows, eighth = -(-(len(lengths) + 1) // ROWS) * ROWS, tokens // STEPS
    longest = LEAST
    while longest < max(*lengths, fill):
        longest *= 4
    return Sizes(tokens, min(tokens - 1, -(-targets // eighth) * eighth), rows, longest)


def filled(flat: FlatBatch, sizes: Sizes) -> FlatBatch:
    """Return rows laid end to end, filled up to these sizes by a row without targets and by targets of weight 0.

    The targets that fill up are spread over the tokens, since gradients for the same token are added one by one.
    """
    fill, more = sizes.tokens - len(flat.input_ids), sizes.targets - len(flat.before_targets)
    zeros = np.zeros(fill, dtype=np.int64)
    weights = np.ones(len(flat.before_targets), np.float32) if flat.weights is None else flat.weights
    return replace(
        flat,
        input_ids=np.concatenate([flat.input_ids, zeros]),
        position_ids=np.concatenate([flat.position_ids, zeros]),
        before_targets=np.concatenate([flat.before_targets, np.arange(more, dtype=np.int64)]),
        lengths=(*flat.lengths, fill) if fill else flat.lengths,
        weights=np.concatenate([weights, np.zeros(more, np.float32)]),
    )


def _rounded(count: int) -> int:
    unit = max(LEAST, (1 << max(0, count.bit_length() - 1)) // STEPS)
    return -(-count // unit) * unit
