"""The processes that train one run together. Today there is one, for which none of this costs anything.

Rank 0 owns the lock, the ledger and the checkpoints; others would follow it. What must be the same on every rank
(whether a step counts, whether to stop) is decided through the world.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


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

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; the same answer on every rank."""
        ...

    def gather(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return whole tensors, by name, where each rank holds a part of them."""
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...


@dataclass(frozen=True)
class SingleProcess:
    """A world of one."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def any(self, flag: bool) -> bool:
        """Return the flag: nobody else has one."""
        return flag

    def gather(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors: they are whole."""
        return tensors

    def barrier(self) -> None:
        """Return at once: everybody is here."""
