"""Adds the gradients of a step's parts in the order of the parts, whatever the number of ranks.

In each round, as many parts are computed as there are ranks, one by each. FSDP2's own reduce-scatter would add them in
an order that depends on that number. Here gradients only move (all-to-all), and each rank adds what belongs to its
shards in the order of the parts, across rounds: the parts of a share to each other, and the shares to each other, as
autograd adds them on one device. That parts, not devices, make up a step is the idea of EasyScale (Li et al., SC'23).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True)
class Place:
    """The place of a part in its share.

    Args:
        begins, ends: whether it is the first, and the last one.
    """

    begins: bool = True
    ends: bool = True


class PartSum:
    """The sum of parts of a step, for numbers that belong to this rank."""

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None
        self._share: torch.Tensor | None = None

    def begin(self) -> None:
        """Begin a step: nothing is summed yet."""
        self._total = self._share = None

    def add(self, parts: Iterable[torch.Tensor], places: Sequence[Place], out: torch.Tensor) -> None:
        """Add the parts of a round; at the end of a share, `out` is the sum of all shares so far.

        Args:
            parts: the numbers of each part, in order. Parts without a place are left out.
            out: memory for the sum, that of no earlier round.
        """
        for part, place in zip(parts, places, strict=False):
            if place.begins and place.ends:
                self._add_share(part, out)
                continue
            self._share = part.clone() if self._share is None else self._share.add_(part)
            if place.ends:
                self._add_share(self._share, out)
                self._share = None

    def _add_share(self, share: torch.Tensor, out: torch.Tensor) -> None:
        if self._total is None:
            out.copy_(share)
        else:
            torch.add(self._total, share, out=out)
        self._total = out


class Exchange:
    """The sums of a step's gradients on this rank's shards, in the place of FSDP2's reduce-scatter.

    Args:
        root: holds all layers. It and each of them was given to `fully_shard`.
    """

    def __init__(self, root: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.places: Sequence[Place] = ()
        """Where the parts of this round stand, by rank; what further ranks compute is left out."""
        self._sums = [_ReduceScatter(self) for _ in (*layers, root)]
        for unit, total in zip((*layers, root), self._sums, strict=True):
            cast(FSDPModule, unit).set_custom_reduce_scatter(cast(Any, total))
        # A weight that one part leaves out (of an expert) gets zeros from it. Left out on one device, the sum may
        # differ in the sign of a zero, which reaches neither moments nor weights.
        cast(FSDPModule, root).set_reduce_scatter_unused_params(True)

    def begin(self) -> None:
        """Begin a step: nothing is summed yet."""
        for total in self._sums:
            total.sum.begin()


class _ReduceScatter:
    """What FSDP2 calls with the gradients of one unit (`_fsdp_api.ReduceScatter`)."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.sum = PartSum()

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return memory for what is sent or summed."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        """Put the sum of all parts so far into the output.

        Args:
            output_tensor: this rank's shards, shape (numbers,).
            input_tensor: the gradients of this rank's part, shape (ranks * numbers,), cut for each rank.
            op: how FSDP2 would reduce; parts are added, for their losses were divided before.
        """
        del op, async_op
        self.sum.add(exchanged(input_tensor, group), self._exchange.places, output_tensor)


def exchanged(sent: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return this rank's piece of what each rank sends, shape (ranks, numbers).

    Args:
        sent: one piece for each rank, flat.
    """
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.view(group.size(), -1)


class WholeExchange:
    """The sum of a step's gradients of weights that every rank has whole (adapters), on every rank.

    Args:
        weights: the weights by name, in an order that is the same on every rank.
        group: the ranks.
    """

    holds_whole = True

    def __init__(self, weights: Mapping[str, nn.Parameter], group: dist.ProcessGroup) -> None:
        self._names, self._weights = list(weights), list(weights.values())
        self._group = group
        self._sum = PartSum()
        numbers = sum(weight.numel() for weight in self._weights)
        self._piece = -(-numbers // group.size())
        self._own: torch.Tensor | None = None

    def begin(self) -> None:
        """Begin a step: nothing is summed yet, and no weight has a gradient."""
        self._sum.begin()
        for weight in self._weights:
            weight.grad = None

    def add(self, places: Sequence[Place]) -> None:
        """After the backward pass of a round: take the gradients away, and add this rank's piece of them."""
        like = self._weights[0]
        sent = torch.zeros(self._piece * self._group.size(), dtype=like.dtype, device=like.device)
        for weight, place in self._spans(sent):
            if weight.grad is not None:
                place.copy_(weight.grad)
            weight.grad = None
        self._own = torch.empty_like(sent[: self._piece])
        self._sum.add(exchanged(sent, self._group), places, self._own)

    def give(self) -> None:
        """After the last round: give every weight the sum."""
        assert self._own is not None
        whole = self._own.new_empty(self._piece * self._group.size())
        dist.all_gather(list(whole.view(self._group.size(), -1)), self._own, group=self._group)
        self._own = None
        for weight, place in self._spans(whole):
            weight.grad = place.clone()

    def clip(self, limit: float) -> torch.Tensor:
        """Scale the sums to a norm of at most `limit`; return the norm that they had (scalar)."""
        return nn.utils.clip_grad_norm_(self._weights, limit)

    def stepped(self) -> None:
        """After the optimizer's step: the model has the same weights."""

    def wholes(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the sums by name, on the first rank alone."""
        if self._group.rank() == 0:
            for name, weight in zip(self._names, self._weights, strict=True):
                yield name, cast(torch.Tensor, weight.grad)

    def _spans(self, flat: torch.Tensor) -> Iterable[tuple[nn.Parameter, torch.Tensor]]:
        pieces = flat[: sum(weight.numel() for weight in self._weights)].split([w.numel() for w in self._weights])
        return [(weight, piece.view(weight.shape)) for weight, piece in zip(self._weights, pieces, strict=True)]
