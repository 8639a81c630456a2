"""Where and how steps are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from onward.training.world import Message, World


class Placement(Protocol):
    """How a step is taken if no rank holds all weights."""

    @property
    def holds_whole(self) -> bool:
        """Whether every rank has everything that is trained."""
        ...

    @property
    def loss(self) -> Any:
        """The `TargetLoss` of the model, computed by all ranks together."""
        ...

    def total(
        self,
        shares: Sequence[Sequence[Any]],
        compute: Callable[[Sequence[Any]], torch.Tensor],
        parameters: Iterable[nn.Parameter],
    ) -> torch.Tensor:
        """Compute the gradients of a step, like an `Exchange` of `ranks.exchange`."""
        ...

    def clip(self, limit: float) -> torch.Tensor:
        """Scale the gradients to a norm of at most `limit`; return the norm that they had (scalar)."""
        ...

    def stepped(self) -> None:
        """Note that the optimizer has taken a step."""
        ...


@dataclass(frozen=True)
class Execution:
    """Where and how steps are computed; none of this is state.

    Args:
        world: the processes that train, and the device of this one.
        dtype: compute type; below float32, the forward pass runs under autocast.
        pad_id: token id that shorter rows are padded with, if rows are padded.
        by_length: whether rows are computed only with others of the same length, as the model's admission found.
        model: what other ranks need, in addition to the config, to build the same model.
        placement: how a step is taken if no rank holds all weights; otherwise None.
    """

    world: World
    dtype: torch.dtype
    pad_id: int = 0
    by_length: bool = False
    model: Message = field(default_factory=Message)
    placement: Placement | None = None
