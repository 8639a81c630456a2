"""A step is cut into parts by a pure function, and parts, not processes, have seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onward.config import Config
from onward.config.keys import MICRO_BATCH_TOKENS
from onward.data.plan.loader import Batch
from onward.data.plan.order import RowReference
from onward.data.tokenized import Row
from onward.training.seeds import fold
from onward.training.steps.parts import RowLayout, parts_of
from onward.training.world import SingleProcess

LENGTHS = (7, 300, 20, MICRO_BATCH_TOKENS, 5)


def make_batch(lengths: Sequence[int] = LENGTHS) -> Batch:
    """Return a batch of rows of some lengths."""
    rows = [Row(np.arange(length), np.ones(length, dtype=bool)) for length in lengths]
    return Batch(rows, [RowReference("00", place) for place in range(len(rows))], list(range(len(rows))))


@pytest.mark.parametrize("cut", ["auto", 1, 2, 9])
def test_parts_are_a_function_of_batch_config_and_step(cut: object) -> None:
    """All rows once, in order; the seed of a part is that which earlier releases gave the part of the first rank."""
    config = Config.model_validate({"gradient_accumulation": cut, "seed": 3})
    parts = parts_of(make_batch(), config, step=11)
    assert list(range(len(LENGTHS))) == [row for part in parts for _, row in part.batch.references]
    assert [fold(3, "step", 11, number, 0) for number in range(len(parts))] == [part.seed for part in parts]
    assert [part.seed for part in parts] == [part.seed for part in parts_of(make_batch(), config, step=11)]


@given(st.lists(st.integers(2, 2 * MICRO_BATCH_TOKENS), min_size=1, max_size=80))
def test_padded_parts_are_bounded(lengths: list[int]) -> None:
    """Padded rows: rows times the longest are bounded or one row, no two neighbours fit together, all rows once."""
    parts = parts_of(make_batch(lengths), Config(), 0, RowLayout(padded=True))
    shapes = [(len(part.batch), max(len(row.ids) for row in part.batch.rows)) for part in parts]
    assert all(rows == 1 or rows * longest <= MICRO_BATCH_TOKENS for rows, longest in shapes)
    assert all((rows + 1) * longest > MICRO_BATCH_TOKENS for rows, longest in shapes[:-1])
    assert list(range(len(lengths))) == sorted(row for part in parts for _, row in part.batch.references)
    assert [part.seed for part in parts] == [fold(0, "step", 0, number, 0) for number in range(len(parts))]


def test_padded_rows_of_like_length_are_together() -> None:
    """One long row does not widen short ones, at `auto` and at a number of parts; equal lengths keep their order."""
    rows = make_batch([32] * 31 + [4096] + [32] * 32)
    parts = parts_of(rows, Config(), 0, RowLayout(padded=True))
    assert [(2, 4096), (62, 32)] == [(len(p.batch), max(len(row.ids) for row in p.batch.rows)) for p in parts]
    halves = parts_of(rows, Config.model_validate({"gradient_accumulation": 2}), 0, RowLayout(padded=True))
    assert [31, *range(31), *range(32, 64)] == [row for part in halves for _, row in part.batch.references]
    equal = make_batch([300] * 40)
    padded, plain = parts_of(equal, Config(), 0, RowLayout(padded=True)), parts_of(equal, Config(), 0)
    assert [part.batch.references for part in plain] == [part.batch.references for part in padded]


def test_one_process_is_a_world_without_others() -> None:
    """It is rank 0 of 1, and its flags are those of all ranks."""
    world = SingleProcess(torch.device("cpu"))
    assert (0, 1) == (world.rank, world.size)
    assert (True, False) == (world.any(True), world.any(False))
