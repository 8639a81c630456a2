"""Makes the next batch while the device computes the previous one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import torch

from onward.data.plan.loader import Batch

Make = Callable[[int], Batch]


class Ahead:
    """Batches by step, one of them made in advance on a GPU; a CPU has no time to spare for it.

    This does not affect which batch a step has: batches are requested by step.

    Args:
        make: makes the batch of a step.
        steps: the number of steps.
        device: the device that computes the steps.
    """

    def __init__(self, make: Make, steps: int, device: torch.device) -> None:
        self._make = make
        self._steps = steps
        self._thread = ThreadPoolExecutor(1, "onward-batches") if device.type == "cuda" else None
        self._next: tuple[int, Future[Batch]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def at(self, step: int) -> Batch:
        """Return the batch of a step, and begin to make the one after it."""
        if self._thread is None:
            return self._make(step)
        made = self._next[1].result() if self._next is not None and self._next[0] == step else self._make(step)
        self._next = (step + 1, self._thread.submit(self._make, step + 1)) if step + 1 < self._steps else None
        return made
