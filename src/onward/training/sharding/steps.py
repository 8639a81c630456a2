"""The gradients of a step of a sharded model: which part each rank computes, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from onward.errors import RankLost, first_line
from onward.training.sharding.exchange import Place
from onward.training.sharding.model import ShardedModel
from onward.training.steps.loss import TargetLoss

Part = TypeVar("Part")


class Gradients(Protocol):
    """Where the gradients of a step go."""

    @property
    def holds_whole(self) -> bool:
        """Whether every rank has everything that is trained."""
        ...

    def begin(self) -> None:
        """Begin a step."""
        ...

    def add(self, places: Sequence[Place]) -> None:
        """Take those of a round, after its backward pass."""
        ...

    def give(self) -> None:
        """Leave the sums where the optimizer looks for them."""
        ...

    def clip(self, limit: float) -> torch.Tensor:
        """Scale them to a norm of at most `limit`; return the norm that they had (scalar)."""
        ...

    def stepped(self) -> None:
        """Give the model what the optimizer left."""
        ...

    def wholes(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the whole gradients by name, each on one rank; every rank must exhaust this."""
        ...


def loss_in_shards(
    sharded: ShardedModel, device: torch.device, dtype: torch.dtype, pad_id: int = 0, *, by_length: bool = False
) -> TargetLoss:
    """Return the loss of a sharded model; every rank must call this. The arguments are those of `TargetLoss`."""
    loss = sharded.compute(partial(TargetLoss, sharded.model, device, dtype, pad_id, by_length=by_length))
    loss.through = sharded.compute
    return loss


class InShards(Generic[Part]):
    """All ranks compute the parts of a step in turn, one each in a round: every layer is made whole for all at once.

    A `Placement` of the trainer. The sums are those of one device that computes all shares.

    Args:
        gradients: the shards of what is trained (`Shards`), or what every rank has whole (`WholeExchange`).
        loss: that of the model (`loss_in_shards`).
    """

    def __init__(self, sharded: ShardedModel, gradients: Gradients, loss: TargetLoss) -> None:
        self._sharded = sharded
        self._gradients = gradients
        self.loss = loss

    @property
    def holds_whole(self) -> bool:
        """Whether every rank has everything that is trained."""
        return self._gradients.holds_whole

    def clip(self, limit: float) -> torch.Tensor:
        """Scale the gradients to a norm of at most `limit`; return the norm that they had (scalar)."""
        return self._gradients.clip(limit)

    def stepped(self) -> None:
        """After the optimizer's step: the model reads what it left."""
        self._gradients.stepped()

    def total(
        self,
        shares: Sequence[Sequence[Part]],
        compute: Callable[[Sequence[Part]], torch.Tensor],
        parameters: Iterable[nn.Parameter] = (),
    ) -> torch.Tensor:
        """Leave the gradients of all shares with the optimizer, and return their loss: the bits of one device.

        In a last round with fewer parts than ranks the others compute one of them again, which is left out.

        Args:
            shares: the parts of each share, the same on every rank.
            compute: computes the loss of one part by `loss`, and its backward pass.
            parameters: not looked at: `gradients` knows them.

        Raises:
            RankLost: a rank failed. The others may wait for it inside of a layer, where nothing can be told any more,
                so every rank raises this, and its process has to end.
        """
        del parameters
        try:
            return self._total(shares, compute)
        except Exception as error:
            rank = self._sharded.mesh.get_local_rank()
            raise RankLost(
                f"rank {rank} failed while all ranks computed together: {first_line(error)}",
                where="devices",
                hint="What was committed is kept. onward train goes on from there.",
            ) from error

    def _total(
        self, shares: Sequence[Sequence[Part]], compute: Callable[[Sequence[Part]], torch.Tensor]
    ) -> torch.Tensor:
        rank, size = self._sharded.mesh.get_local_rank(), self._sharded.mesh.size()
        parts = [part for share in shares for part in share]
        places = [Place(n == 0, n == len(share) - 1) for share in shares for n in range(len(share))]
        self._sharded.exchange.begin()
        self._gradients.begin()
        own: list[torch.Tensor] = []
        for first in range(0, len(parts), size):
            now = places[first : first + size]
            self._sharded.exchange.places = now
            own.append(compute([parts[first + min(rank, len(now) - 1)]]).detach())
            self._gradients.add(now)
        self._gradients.give()
        return self._loss(torch.stack(own), [len(share) for share in shares])

    def _loss(self, own: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Return the loss of a step, added as one device adds it.

        Args:
            own: those of this rank's parts, shape (rounds,).
            lengths: parts of each share.
        """
        mesh = self._sharded.mesh
        every = own.new_empty(mesh.size() * len(own))
        dist.all_gather(list(every.view(mesh.size(), -1)), own, group=mesh.get_group())
        losses = every.view(mesh.size(), -1).T.reshape(-1)[: sum(lengths)]
        total: torch.Tensor | None = None
        for share in losses.split(list(lengths)):
            of_share = torch.zeros_like(own[0])
            for loss in share:
                of_share += loss
            total = of_share if total is None else total + of_share
        assert total is not None
        return total
