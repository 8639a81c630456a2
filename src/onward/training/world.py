"""The processes that train one run together. With one, none of this costs anything.

Rank 0 owns the lock, the ledger and the checkpoints, and tells the others what to do next. What must be the same on
every rank (whether a step counts, whether to stop) is decided through the world.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Message = dict[str, Any]
"""What rank 0 tells the others: JSON values."""


class World(Protocol):
    """All ranks of a run, as one of them sees them."""

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many processes there are."""
        ...

    @property
    def device(self) -> torch.device:
        """The device that this process computes on."""
        ...

    @property
    def is_uniform(self) -> bool:
        """Whether all ranks compute the same bits: equal devices, threads and versions."""
        ...

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank; the answer is the same on every rank."""
        ...

    def require_all(self) -> None:
        """Check that the ranks that this one waits for are alive; called while it waits for something else.

        Raises:
            RankLost: one is gone.
        """
        ...

    def wait_unseen(self) -> None:
        """Note that this rank from now on waits in PyTorch's own collectives, which no check interrupts."""
        ...

    def tell(self, make: Callable[[], Message]) -> None:
        """Tell the other ranks what to do next; called by rank 0.

        Args:
            make: makes the message; not called if there are no other ranks.
        """
        ...

    def share(self, value: Any) -> list[Any]:
        """Return the JSON values of all ranks, by rank; every rank must call this."""
        ...

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy the tensors of rank 0, bit for bit, into the memory of every rank's own; every rank must call this."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """Raise on every rank what the body raises on any rank, once all reached its end; every rank must enter it."""
        ...


@dataclass(frozen=True)
class SingleProcess:
    """A world of one."""

    device: torch.device
    rank: int = 0
    size: int = 1
    is_uniform: bool = True

    def any(self, flag: bool) -> bool:
        """Return the flag: nobody else has one."""
        return flag

    def require_all(self) -> None:
        """Do nothing: there are no other ranks."""

    def wait_unseen(self) -> None:
        """Do nothing: there are no other ranks."""

    def tell(self, make: Callable[[], Message]) -> None:
        """Do nothing: there are no other ranks to tell."""

    def share(self, value: Any) -> list[Any]:
        """Return the value alone."""
        return [value]

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Do nothing: there are no other ranks to copy to."""

    def together(self) -> AbstractContextManager[None]:
        """Do nothing: no other rank can fail."""
        return contextlib.nullcontext()
