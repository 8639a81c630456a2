"""The batches of a plan, by step: no iterator, no state, nothing to restore."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from onward.data.plan.order import Plan, RowReference
from onward.data.tokenized import Row, TokenizedFile


@dataclass(frozen=True)
class Batch:
    """The rows of one optimizer step, or of a part of it.

    Args:
        rows: the rows, in the order of the plan.
        references: the file and the index of each row.
        lines: the line of each row in its file.
    """

    rows: list[Row]
    references: list[RowReference]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Tokens in the batch, padding not counted."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def target_tokens(self) -> int:
        """Tokens that the loss covers."""
        return sum(int(np.count_nonzero(row.targets)) for row in self.rows)

    @property
    def weight(self) -> float:
        """The total weight of the tokens that the loss covers; their number if each has weight 1."""
        if all(row.weights is None for row in self.rows):
            return self.target_tokens
        return float(sum(np.sum(_weights_of(row)[row.targets], dtype=np.float64) for row in self.rows))

    def split(self, parts: int) -> list[Batch]:
        """Return the batch in at most `parts` contiguous pieces of nearly equal length, none of them empty."""
        assert parts >= 1, parts
        count = min(parts, len(self))
        bounds = [len(self) * part // count for part in range(count + 1)] if count else [0]
        return self._cut(bounds)

    def split_by_tokens(self, tokens: int) -> list[Batch]:
        """Return the batch in contiguous pieces of at most `tokens` tokens; a longer row is a piece by itself."""
        bounds, filled = [0], 0
        for place, row in enumerate(self.rows):
            if filled and filled + len(row.ids) > tokens:
                bounds.append(place)
                filled = 0
            filled += len(row.ids)
        return self._cut([*bounds, len(self)])

    def split_by_padded_size(self, tokens: int) -> list[Batch]:
        """Return the batch in contiguous pieces of at most `tokens` tokens with padding, or of one longer row."""
        bounds, longest = [0], 0
        for place, row in enumerate(self.rows):
            longest = max(longest, len(row.ids))
            if place > bounds[-1] and (place + 1 - bounds[-1]) * longest > tokens:
                bounds.append(place)
                longest = len(row.ids)
        return self._cut([*bounds, len(self)])

    def longest_first(self) -> Batch:
        """Return the same rows, longest first; rows of equal length keep their order."""
        return self.take(sorted(range(len(self)), key=lambda place: -len(self.rows[place].ids)))

    def take(self, places: Sequence[int]) -> Batch:
        """Return the rows at these places, in this order."""
        return Batch(
            [self.rows[place] for place in places],
            [self.references[place] for place in places],
            [self.lines[place] for place in places],
        )

    def _cut(self, bounds: list[int]) -> list[Batch]:
        return [
            Batch(self.rows[first:last], self.references[first:last], self.lines[first:last])
            for first, last in pairwise(bounds)
        ]


@dataclass(frozen=True)
class PaddedBatch:
    """A batch as rectangular arrays, padded on the right to the longest row.

    Args:
        input_ids: int64, shape (B, T).
        attention_mask: int64, shape (B, T): 1 for tokens, 0 for padding.
        targets: bool, shape (B, T): tokens that the loss covers; never the first of a row, never padding.
        weights: float32, shape (B, T): the weight of each target in the loss; None if each has weight 1.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    targets: NDArray[np.bool_]
    weights: NDArray[np.float32] | None


@dataclass(frozen=True)
class FlatBatch:
    """A batch as one sequence: its rows laid end to end, without padding.

    Args:
        input_ids: int64, shape (tokens,).
        position_ids: int64, shape (tokens,): the position of each token in its row.
        before_targets: int64, shape (targets,): the positions whose next token is a target.
        lengths: tokens of each row.
        weights: float32, shape (targets,): the weight of each target in the loss; None if each has weight 1.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    before_targets: NDArray[np.int64]
    lengths: tuple[int, ...]
    weights: NDArray[np.float32] | None


def batch_at(files: Mapping[str, TokenizedFile], plan: Plan, step_in_file: int) -> Batch:
    """Return the batch of the 0-based step; every step costs the same.

    Args:
        files: every source of the plan, by its SHA-256.
        plan: says which rows the step has.
        step_in_file: the step.

    Raises:
        IndexError: the plan has no such step.
    """
    references = plan.rows_at(step_in_file)
    found = [(files[sha256], row) for sha256, row in references]
    return Batch([file.row(row) for file, row in found], references, [file.line(row) for file, row in found])


def flatten(batch: Batch) -> FlatBatch:
    """Return the rows of a batch laid end to end."""
    targets = [row.targets.copy() for row in batch.rows]
    for row_targets in targets:
        row_targets[0] = False
    lengths = tuple(len(row.ids) for row in batch.rows)
    is_weighed = any(row.weights is not None for row in batch.rows)
    weights = np.concatenate([_weights_of(row) for row in batch.rows])[np.concatenate(targets)] if is_weighed else None
    return FlatBatch(
        input_ids=np.concatenate([row.ids for row in batch.rows]),
        position_ids=np.concatenate([np.arange(length) for length in lengths]),
        before_targets=np.flatnonzero(np.concatenate(targets)) - 1,
        lengths=lengths,
        weights=weights,
    )


def pad(batch: Batch, pad_id: int) -> PaddedBatch:
    """Return the batch as arrays, `pad_id` on the right of shorter rows."""
    shape = (len(batch), max(len(row.ids) for row in batch.rows))
    padded = PaddedBatch(
        input_ids=np.full(shape, pad_id, dtype=np.int64),
        attention_mask=np.zeros(shape, dtype=np.int64),
        targets=np.zeros(shape, dtype=np.bool_),
        weights=np.ones(shape, dtype=np.float32) if any(row.weights is not None for row in batch.rows) else None,
    )
    for place, row in enumerate(batch.rows):
        length = len(row.ids)
        padded.input_ids[place, :length] = row.ids
        padded.attention_mask[place, :length] = 1
        padded.targets[place, :length] = row.targets
        if padded.weights is not None:
            padded.weights[place, :length] = _weights_of(row)
    padded.targets[:, 0] = False
    return padded


def _weights_of(row: Row) -> NDArray[np.float32]:
    return np.ones(len(row.ids), dtype=np.float32) if row.weights is None else row.weights
