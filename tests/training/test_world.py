"""A step is cut into parts by a pure function, and parts, not processes, have seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onward.config import MICRO_BATCH_TOKENS, Config
from onward.data.loader import Batch
from onward.data.order import RowReference
from onward.data.tokenized import Row
from onward.training.parts import parts_of
from onward.training.seeds import fold
from onward.training.world import SingleProcess

LENGTHS = (7, 300, 20, MICRO_BATCH_TOKENS, 5)


def make_batch() -> Batch:
    """Return a batch of rows of some lengths."""
    rows = [Row(np.arange(length), np.ones(length, dtype=bool)) for length in LENGTHS]
    return Batch(rows, [RowReference("00", place) for place in range(len(rows))], list(range(len(rows))))


@pytest.mark.parametrize("cut", ["auto", 1, 2, 9])
def test_parts_are_a_function_of_batch_config_and_step(cut: object) -> None:
    """All rows once, in order; the seed of a part is that which earlier releases gave the part of the first rank."""
    config = Config.model_validate({"gradient_accumulation": cut, "seed": 3})
    parts = parts_of(make_batch(), config, step=11)
    assert list(range(len(LENGTHS))) == [row for part in parts for _, row in part.batch.references]
    assert [fold(3, "step", 11, number, 0) for number in range(len(parts))] == [part.seed for part in parts]
    assert [part.seed for part in parts] == [part.seed for part in parts_of(make_batch(), config, step=11)]


def test_one_process_is_a_world_without_others() -> None:
    """It is rank 0 of 1, its flags are those of all ranks, its tensors are whole, and it waits for nothing."""
    world = SingleProcess(torch.device("cpu"))
    tensors = {"weight": torch.ones(2)}
    assert (0, 1) == (world.rank, world.size)
    assert (True, False) == (world.any(True), world.any(False))
    assert tensors is world.gather(tensors)
    world.barrier()
