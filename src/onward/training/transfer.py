"""Copies of a state to main memory: at once on a CPU; from a GPU behind training, which does not wait for them.

On a GPU the copy goes into pinned memory on a stream of its own. The stream that computes waits for it before the next
step changes a weight; the process does not wait at all, and whoever reads the copy waits for its event.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Wait = Callable[[], None]
CHUNK = 1 << 24
"""Words that are marked at a time; a mark takes eight bytes for each while it is made."""
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)
"""The golden ratio of 64 bits, odd, as a signed number: neighbouring places get very different factors."""


def at_once() -> None:
    """Wait for nothing: the copy is made."""


class Transfer(Protocol):
    """A way from the memory that training changes to main memory."""

    @property
    def pins(self) -> bool:
        """Whether copies lie in memory that the device reads by itself."""
        ...

    def copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> Wait:
        """Begin to copy, and return what waits until it is done; the next step changes no source before."""
        ...

    def marks(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Return marks of all bits, computed where the tensors lie; None where their digest costs no more."""
        ...


class InPlace:
    """The way of a CPU: training's memory is main memory."""

    pins = False

    def copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> Wait:
        """Copy now."""
        torch._foreach_copy_(list(targets), list(sources))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        return at_once

    def marks(self, tensors: Sequence[torch.Tensor]) -> None:
        """Return none: a digest reads the same memory."""
        return


class Overlapped:
    """The way of a GPU.

    Args:
        streams: `torch.cuda`, or what stands in for it.
        pins: whether copies are pinned.
    """

    def __init__(self, streams: Any = torch.cuda, *, pins: bool = True) -> None:
        self._streams = streams
        self._side: Any = None
        self.pins = pins

    def copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> Wait:
        """Copy on a stream of its own, after what was computed and before what will be."""
        computing = self._streams.current_stream()
        self._side = self._side or self._streams.Stream()
        self._side.wait_stream(computing)
        with self._streams.stream(self._side):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            done = self._streams.Event()
            done.record(self._side)
        computing.wait_event(done)
        return done.synchronize

    def marks(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return one number of 64 bits for each tensor, shape (tensors,)."""
        return torch.stack([mark(tensor).to(tensors[0].device) for tensor in tensors])  # counters may lie elsewhere


def mark(tensor: torch.Tensor) -> torch.Tensor:
    """Return a number of all bits of a tensor and of their places (int64 scalar), the same on every device.

    Integers are added modulo 2^64, so it does not depend on the order in which a device adds. It tells a state that was
    touched from one that was not; it is no protection against somebody who wants two states to look equal.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    words = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.full((), words.numel(), dtype=torch.int64, device=words.device)
    for first in range(0, words.numel(), CHUNK):
        part = words[first : first + CHUNK].to(torch.int64)
        place = torch.arange(first + 1, first + 1 + len(part), device=words.device)
        factor = place * _ODD
        total += ((part ^ (factor >> 29)) * (factor | 1)).sum()
    return total


def transfer_of(device: torch.device) -> Transfer:
    """Return the way from a device."""
    return Overlapped() if device.type == "cuda" else InPlace()
