"""Where and how steps are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from onward.training.world import Message, World


class Placement(Protocol):
    """How a step is taken where no rank holds all weights."""

    @property
    def holds_whole(self) -> bool:
        """Whether every rank has all that is trained."""
        ...

    @property
    def loss(self) -> Any:
        """The `TargetLoss` of the model, made by all ranks together."""
        ...

    def total(
        self,
        shares: Sequence[Sequence[Any]],
        compute: Callable[[Sequence[Any]], torch.Tensor],
        parameters: Iterable[nn.Parameter],
    ) -> torch.Tensor:
        """Compute the gradients of a step, as an `Exchange` of `ranks.exchange` does."""
        ...

    def clip(self, limit: float) -> torch.Tensor:
        """Scale the gradients to a norm of at most `limit`; returns the norm that they had (scalar)."""
        ...

    def stepped(self) -> None:
        """Take note that the optimizer has taken a step."""
        ...


@dataclass(frozen=True)
class Execution:
    """Where and how steps are computed; nothing of it is state.

    Args:
        world: the processes that train, and the device of this one.
        dtype: compute type; below float32 the forward runs under autocast.
        pad_id: token id that shorter rows are padded with, where rows are padded.
        by_length: rows are computed together with rows of equal length only, as the model's admission found.
        model: what other ranks build the same model from, in addition to the config.
        placement: how a step is taken where no rank holds all weights; else None.
    """

    world: World
    dtype: torch.dtype
    pad_id: int = 0
    by_length: bool = False
    model: Message = field(default_factory=Message)
    placement: Placement | None = None
