"""The processes that train one run together. With one, none of this costs anything.

Rank 0 owns the lock, the ledger and the checkpoints, and tells the others what is done next; they follow it. What must
be the same on every rank (whether a step counts, whether to stop) is decided through the world.
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
    """All ranks of a run, as one of them sees it."""

    @property
    def rank(self) -> int:
        """This process, from 0."""
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
        """Whether the flag is set on any rank; the same answer on every rank."""
        ...

    def gather(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return whole tensors, by name, where each rank holds a part of them."""
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...

    def wait_unseen(self) -> None:
        """Note that this rank waits in PyTorch's own collectives from now on, which no look interrupts."""
        ...

    def tell(self, make: Callable[[], Message]) -> None:
        """Tell the other ranks what is done next; called by rank 0.

        Args:
            make: makes the message; not called where there is nobody to tell.
        """
        ...

    def share(self, value: Any) -> list[Any]:
        """Return the JSON values of all ranks, by rank; every rank calls it."""
        ...

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give every rank the tensors of rank 0, bit for bit, in the memory of its own; every rank calls it."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """Raise what the body raises on any rank on every rank, once all are at its end; every rank enters it."""
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

    def gather(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors: they are whole."""
        return tensors

    def barrier(self) -> None:
        """Return at once: everybody is here."""

    def wait_unseen(self) -> None:
        """Wait for nobody."""

    def tell(self, make: Callable[[], Message]) -> None:
        """Tell nobody."""

    def share(self, value: Any) -> list[Any]:
        """Return the value alone."""
        return [value]

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give them to nobody."""

    def together(self) -> AbstractContextManager[None]:
        """Do nothing: nobody else can fail."""
        return contextlib.nullcontext()
