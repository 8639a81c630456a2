"""What goes on behind training: copies on a stream of their own, digests that are not taken twice, the next batch."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from rows import batch, tiny_model

from onward.config import Config
from onward.data.plan.loader import Batch
from onward.training.loss_scale import LossScale
from onward.training.state import TrainState
from onward.training.steps.ahead import Ahead
from onward.training.transfer import InPlace, Overlapped, Sizes, mark, transfer_of
from onward.training.transfer.marks import PIECE, ROW

CPU = torch.device("cpu")


class Streams:
    """Stands in for `torch.cuda`: work is queued on streams and done when somebody waits for it."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.main = self._stream("main")

    def _stream(self, name: str) -> Any:
        streams = self

        class Stream:
            def wait_stream(self, other: Any) -> None:
                streams.told.append(f"{name} waits for {other}")

            def wait_event(self, event: Any) -> None:
                streams.told.append(f"{name} waits for the copy")

            def __str__(self) -> str:
                return name

        return Stream()

    def current_stream(self) -> Any:
        return self.main

    def Stream(self) -> Any:
        return self._stream("side")

    def stream(self, stream: Any) -> Any:
        streams = self

        class On:
            def __enter__(self) -> None:
                streams.told.append(f"on {stream}")

            def __exit__(self, *_: object) -> None:
                streams.told.append("off")

        return On()

    def Event(self) -> Any:
        streams = self

        class Event:
            def record(self, stream: Any) -> None:
                streams.told.append(f"recorded on {stream}")

            def synchronize(self) -> None:
                streams.told.append("waited for")

        return Event()


def state_of() -> TrainState:
    """Return a state with moments."""
    config = Config.model_validate({"method": "full"})
    state = TrainState.start(tiny_model("llama", "sdpa"), config)
    for parameter in state.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    return state


def test_a_copy_leaves_training_alone() -> None:
    """It begins after what was computed, on its own stream; the next step waits for large tensors, for small ones not
    even that."""
    state, streams = state_of(), Streams()
    state.transfer = Overlapped(streams, pins=False, sizes=Sizes(small=1 << 12))
    copy = state.snapshot()
    each = ["side waits for main", "on side", "recorded on side", "off"]
    order = [*each, *each, "main waits for the copy"]
    assert order == streams.told
    assert state.view().digest() == copy.digest()
    assert [*order, "waited for"] == streams.told


def test_a_copy_is_proven_by_every_bit_of_its_state() -> None:
    """It was made of the state as it is now only as long as no bit, not the learning rate, and no scale changes."""
    state = state_of()
    state.transfer = Overlapped(Streams(), pins=False)
    copy = state.snapshot()
    assert state.is_proven(copy)
    place = state.parameters[sorted(state.parameters)[0]].detach().view(-1)[3:4].view(torch.int32)
    for bit in range(32):
        place ^= 1 << bit if bit < 31 else -(1 << 31)
        assert not state.is_proven(copy)
        place ^= 1 << bit if bit < 31 else -(1 << 31)
    (group, *_) = state.optimizer.param_groups
    group["lr"] *= 2
    assert not state.is_proven(copy)
    group["lr"] /= 2
    state.scale = LossScale()
    assert not state.is_proven(copy)
    state.scale = None
    assert state.is_proven(copy)


def test_on_a_cpu_nothing_is_proven_without_looking() -> None:
    """There a digest costs what a mark would: the state is read."""
    state = state_of()
    assert not state.is_proven(state.snapshot())
    assert isinstance(transfer_of(CPU), InPlace)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool])
def test_a_mark_sees_every_bit_and_its_place(dtype: torch.dtype) -> None:
    """A value that changes, two that change places, one more at the end: each gives another mark."""
    tensor = (torch.arange(1, 301) % 7 + 1).to(dtype)
    others = [tensor.clone() for _ in range(3)]
    others[0][17] = 0
    others[1][[3, 4]] = others[1][[4, 3]]
    others[2] = torch.cat([tensor, tensor[:1]])
    marks = {int(mark(each)) for each in (tensor, *(others if dtype is not torch.bool else [others[0], others[2]]))}
    assert (4 if dtype is not torch.bool else 3) == len(marks)
    assert int(mark(tensor)) == int(mark(tensor.clone()))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 8 * ROW - 1, 8 * ROW, 8 * ROW + 9, 8 * PIECE + 8 * ROW + 3])
def test_a_mark_sees_the_ends_of_rows_and_pieces(size: int) -> None:
    """Whatever the size, the first and the last byte count, and bytes at the same place of two rows do not cancel."""
    tensor = torch.zeros(size + 1, dtype=torch.uint8)[:size]
    marks = [int(mark(tensor))]
    for place in sorted({place for place in (0, 8 * ROW, 8 * PIECE, size - 1) if 0 <= place < size}):
        tensor[place] += 1
        marks.append(int(mark(tensor)))
    assert len(set(marks)) == len(marks)
    moved = torch.zeros(size + 1, dtype=torch.uint8)[1:]  # at an odd address
    moved.copy_(tensor)
    assert marks[-1] == int(mark(moved))


def test_the_next_batch_is_made_while_a_gpu_computes() -> None:
    """Each step has its own batch, whoever made it; on a CPU the thread that computes makes them all."""
    made: list[tuple[int, bool]] = []

    def make(step: int) -> Batch:
        made.append((step, threading.current_thread() is threading.main_thread()))
        return batch(step + 2)

    with Ahead(make, 4, torch.device("cuda", 0)) as batches:
        lengths = [len(batches.at(step).rows[0].ids) for step in (0, 1, 3)]
    assert [2, 3, 5] == lengths
    asked_for = sorted(each for each in made if each[0] != 2)  # which may have been begun, and was not wanted
    assert [(0, True), (1, False), (3, True)] == asked_for
    made.clear()
    with Ahead(make, 2, torch.device("cuda", 0)) as batches:
        assert [2, 3] == [len(batches.at(step).rows[0].ids) for step in range(2)]
    assert [(0, True), (1, False)] == made
    assert not any(thread.name.startswith("onward-batches") for thread in threading.enumerate())
    made.clear()
    with Ahead(make, 4, CPU) as batches:
        assert np.array_equal(batches.at(2).rows[0].ids, batch(4).rows[0].ids)
    assert [(2, True)] == made
