"""What PyTorch keeps while a GPU records, without a GPU: as its releases up to 2.11 do, where an end stops halfway.

Stands in for `torch.cuda`. A recording that fails on the device (`Graphs.fail`) makes `capture_end` raise before the
allocators and the generator are told.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

Pool = tuple[int, int]


class Allocator:
    """The memory of recordings: which pools exist, how many graphs use each, and for which one memory is taken."""

    def __init__(self) -> None:
        self.users: dict[Pool, int] = {}
        self.underway: list[Pool] = []

    def begin(self, pool: Pool) -> None:
        """Take memory for a pool."""
        if self.users.get(pool) == 0 or pool in self.underway:
            raise RuntimeError("already recording to mempool_id, or nobody uses it any more")
        self.users[pool] = self.users.get(pool, 0) + 1
        self.underway.append(pool)

    def end(self, pool: Pool) -> None:
        """Take no more memory for a pool."""
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, pool: Pool) -> None:
        """Let one user of a pool go."""
        assert self.users[pool] > 0
        self.users[pool] -= 1


class State:
    """What random numbers follow from."""

    def __init__(self) -> None:
        self.is_recording = False


class Numbers:
    """A generator of random numbers."""

    def __init__(self) -> None:
        self.state = State()

    def clone_state(self) -> State:
        """Return a state that draws the same numbers."""
        return State()

    def graphsafe_set_state(self, state: State) -> None:
        """Draw from another state."""
        self.state = state

    def draw(self) -> None:
        """Draw outside of a recording."""
        if self.state.is_recording:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")


class Graph:
    """A graph of `Graphs`."""

    def __init__(self, cuda: Graphs) -> None:
        self._cuda, self._state = cuda, cuda.default_generators[0].state
        self._pool: Pool = (0, 0)
        self._is_complete = False

    def capture_begin(self, pool: Pool, capture_error_mode: str) -> None:
        """Begin to record."""
        assert "thread_local" == capture_error_mode
        self._pool, self._state.is_recording = pool, True
        self._cuda.device.begin(pool)
        self._cuda.pinned.begin(pool)
        self._cuda.records = True

    def capture_end(self) -> None:
        """End, unless the recording failed."""
        records, self._cuda.records = self._cuda.records, False
        if not records or self._cuda.has_failed:
            self._cuda.has_failed = False
            raise RuntimeError("operation failed due to a previous error during capture")
        self._cuda.device.end(self._pool)
        self._cuda.pinned.end(self._pool)
        self._state.is_recording = False
        self._is_complete = True
        if self._cuda.lacks_memory:
            raise RuntimeError("out of memory")

    def reset(self) -> None:
        """Let go of memory."""
        if self._is_complete:
            self._cuda.device.release(self._pool)
            self._cuda.pinned.release(self._pool)
        self._is_complete = False

    def replay(self) -> None:
        """Compute nothing."""
        assert self._is_complete


class Stream:
    """A stream."""

    device_index = 0

    def wait_stream(self, _: object) -> None:
        """Wait for nothing."""


class Graphs:
    """Stands in for `torch.cuda`.

    Args:
        lacks_memory: whether there is no memory for what is recorded to become a graph.
    """

    def __init__(self, *, lacks_memory: bool = False) -> None:
        self.device, self.pinned = Allocator(), Allocator()
        self.default_generators = [Numbers()]
        self.records = self.has_failed = False
        self.lacks_memory = lacks_memory
        self.memory = self
        self._pools = 0

    def fail(self) -> None:
        """Do what a recording does not allow."""
        self.has_failed = True
        raise RuntimeError("operation not permitted when stream is capturing")

    def Stream(self, _: object) -> Stream:
        """Return a stream."""
        return Stream()

    def CUDAGraph(self) -> Graph:
        """Return an empty graph."""
        return Graph(self)

    def current_stream(self, _: object) -> Stream:
        """Return a stream."""
        return Stream()

    @contextlib.contextmanager
    def stream(self, _: Any) -> Generator[None]:
        """Compute the body on a stream."""
        yield

    def graph_pool_handle(self) -> Pool:
        """Return a new pool."""
        self._pools += 1
        return (0, self._pools)

    def _cuda_endAllocateToPool(self, _: int, pool: Pool) -> None:
        self.device.end(pool)

    def _cuda_releasePool(self, _: int, pool: Pool) -> None:
        self.device.release(pool)
