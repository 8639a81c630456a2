"""How the gradients of a step's shares become one gradient, on one device or on several, with the same bits.

Each share has a gradient of its own: the sum over its parts. They are added in the order of the shares. On several
devices, rank r computes shares r, r + N, ...; their gradients are only moved: each rank gets its slice of all of them
(all-to-all), adds them in that order, and gives the sum to all (all-gather). So the sum does not depend on N, and as
much is moved as by a plain all-reduce. EasyScale (SC '23) fixes the order of a sum for elastic training in the same
way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import distributed, nn

from onward.training.ranks.group import Group
from onward.training.steps.gradients import added, put, taken
from onward.training.world import World

BUCKET = 1 << 24
"""How many numbers of a gradient are moved at a time: 64 MiB of float32."""

Part = TypeVar("Part")
Compute = Callable[[Sequence[Part]], torch.Tensor]
"""Adds the gradients of parts to those of the parameters, and returns their loss (scalar)."""


class Exchange(Protocol):
    """A way to compute the shares of a step and to add them up."""

    def total(
        self, shares: Sequence[Sequence[Part]], compute: Compute[Part], parameters: Iterable[nn.Parameter]
    ) -> torch.Tensor:
        """Compute every share once, on any rank; leave the sum in the parameters' gradients, and return the summed
        loss.

        Gradients are None before; afterwards they are None for weights that no row of the step reached.

        Raises:
            Exception: what a rank's `compute` raised, on every rank.
        """
        ...


class InTurn:
    """One device computes all shares, one after another."""

    def total(
        self, shares: Sequence[Sequence[Part]], compute: Compute[Part], parameters: Iterable[nn.Parameter]
    ) -> torch.Tensor:
        """Add each share to the previous ones; the backward pass itself adds a share with a single part."""
        weights = list(parameters)
        loss = compute(shares[0])
        for share in shares[1:]:
            if len(share) == 1:
                loss = loss + compute(share)
                continue
            before = taken(weights)
            loss = loss + compute(share)
            put(weights, added(before, taken(weights)))
        return loss


class InAnyOrder:
    """Several devices, whose gradients are added in any order the transport chooses: a plain all-reduce."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._own = InTurn()

    def total(
        self, shares: Sequence[Sequence[Part]], compute: Compute[Part], parameters: Iterable[nn.Parameter]
    ) -> torch.Tensor:
        """Compute this rank's shares, then add those of all ranks."""
        group, weights = self._group, list(parameters)
        own = shares[group.rank :: group.size]
        loss = torch.zeros((), device=group.device)
        with group.together():
            if own:
                loss = self._own.total(own, compute, weights)
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        with group.in_step():
            for bucket in buckets_of(weights, 1, BUCKET):
                whole = bucket.taken(weights)
                group.moved(distributed.all_reduce(whole, async_op=True))
                bucket.put(whole, weights)
            group.moved(distributed.all_reduce(loss, async_op=True))
            group.settle()
        return loss


class InOrder:
    """Several devices, whose gradients are added in the order of the shares.

    Args:
        bucket: how many numbers are moved at a time.
    """

    def __init__(self, group: Group, bucket: int = BUCKET) -> None:
        self._group, self._bucket = group, bucket

    def total(
        self, shares: Sequence[Sequence[Part]], compute: Compute[Part], parameters: Iterable[nn.Parameter]
    ) -> torch.Tensor:
        """Go through the shares in rounds, with one share per rank in a round."""
        group, weights = self._group, list(parameters)
        sums = [_Sum(group, bucket) for bucket in buckets_of(weights, group.size, self._bucket)]
        reached = [False] * len(weights)
        losses: list[torch.Tensor] = []
        for first in range(0, len(shares), group.size):
            count = min(group.size, len(shares) - first)
            loss, found = self._computed(shares[first : first + count], compute, weights)
            with group.in_step():
                for each in sums:
                    each.add(weights, found[:count], reached)
                losses += self._losses(loss)[:count]
            reached = [known or any(has) for known, has in zip(reached, zip(*found[:count], strict=True), strict=True)]
            taken(weights)
        with group.in_step():
            for weight, known in zip(weights, reached, strict=True):
                weight.grad = torch.empty_like(weight) if known else None
            for each in sums:
                each.spread(weights)
            group.settle()
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        return total

    def _computed(
        self, shares: Sequence[Sequence[Part]], compute: Compute[Part], weights: Sequence[nn.Parameter]
    ) -> tuple[torch.Tensor, list[list[bool]]]:
        """Compute this rank's share of a round, if any; return its loss, and which weights each rank reached."""
        group, failure = self._group, None
        loss = torch.zeros((), device=group.device)
        with group.in_step():
            try:
                if group.rank < len(shares):
                    loss = compute(shares[group.rank])
            except Exception as error:
                failure = error
        has = bytes(weight.grad is not None for weight in weights)
        return loss, [list(map(bool, found)) for found in group.meet(failure, has)]

    def _losses(self, own: torch.Tensor) -> list[torch.Tensor]:
        found = torch.empty(self._group.size, device=own.device, dtype=own.dtype)
        self._group.gather_into(found, own.reshape(1))
        return list(found)


def exchange_of(world: World, kind: str) -> Exchange:
    """Return the exchange of a world: `exact` or `fast`, which are the same with one rank."""
    if not isinstance(world, Group):
        return InTurn()
    return InAnyOrder(world) if kind == "fast" else InOrder(world)


@dataclass(frozen=True)
class Bucket:
    """Pieces of gradients that are moved as one tensor of `length` numbers, the last ones of which may be unused.

    Args:
        pieces: index of the weight, and its first and last number, in the order of the bucket.
    """

    pieces: tuple[tuple[int, int, int], ...]
    length: int
    dtype: torch.dtype
    device: torch.device

    def taken(self, weights: Sequence[nn.Parameter]) -> torch.Tensor:
        """Return the gradients of the pieces, zeros where there are none."""
        whole = torch.zeros(self.length, dtype=self.dtype, device=self.device)
        place = 0
        for index, first, last in self.pieces:
            grad = weights[index].grad
            if grad is not None:
                whole[place : place + last - first] = grad.detach().reshape(-1)[first:last]
            place += last - first
        return whole

    def put(self, whole: torch.Tensor, weights: Sequence[nn.Parameter]) -> None:
        """Write the pieces back into those gradients that exist."""
        place = 0
        for index, first, last in self.pieces:
            grad = weights[index].grad
            if grad is not None:
                grad.view(-1)[first:last] = whole[place : place + last - first]
            place += last - first

    def spans(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Return the weights in a slice of the bucket: index, and the range of the slice that belongs to each."""
        found: list[tuple[int, int, int]] = []
        place = 0
        for index, begin, end in self.pieces:
            own = max(place, first), min(place + end - begin, last)
            if own[0] < own[1]:
                found.append((index, own[0] - first, own[1] - first))
            place += end - begin
        return found


class _Sum:
    """The sum of one rank's slice of a bucket, over the shares of all ranks."""

    def __init__(self, group: Group, bucket: Bucket) -> None:
        self._group, self._bucket = group, bucket
        self._width = bucket.length // group.size
        self._sum = torch.zeros(self._width, dtype=bucket.dtype, device=bucket.device)
        self._spans = bucket.spans(group.rank * self._width, (group.rank + 1) * self._width)

    def add(self, weights: Sequence[nn.Parameter], found: Sequence[Sequence[bool]], reached: Sequence[bool]) -> None:
        """Add the slices of a round, in the order of the ranks.

        Args:
            found: which weights each share of the round reached.
            reached: which weights a share of an earlier round reached.
        """
        sent = self._bucket.taken(weights)
        slices = torch.empty_like(sent)
        self._group.moved(distributed.all_to_all_single(slices, sent, async_op=True))
        known = {index: reached[index] for index, _, _ in self._spans}
        for piece, has in zip(slices.view(self._group.size, self._width), found, strict=False):
            if all(has[index] for index in known) and all(known.values()):
                self._sum += piece
                continue
            for index, first, last in self._spans:
                if has[index] and known[index]:
                    self._sum[first:last] += piece[first:last]
                elif has[index]:
                    self._sum[first:last] = piece[first:last]
            known = {index: known[index] or has[index] for index in known}

    def spread(self, weights: Sequence[nn.Parameter]) -> None:
        """Give the sum to all ranks, into those gradients that exist."""
        whole = torch.empty(self._bucket.length, dtype=self._bucket.dtype, device=self._bucket.device)
        self._group.gather_into(whole, self._sum)
        self._bucket.put(whole, weights)


def buckets_of(weights: Sequence[nn.Parameter], multiple: int, size: int) -> list[Bucket]:
    """Split gradients into buckets of one type and device, with at most `size` numbers each.

    Args:
        multiple: the lengths of buckets are multiples of it, for which a few unused numbers may be added.
    """
    buckets: list[Bucket] = []
    pieces: list[tuple[int, int, int]] = []
    filled = 0

    def close(like: nn.Parameter) -> None:
        nonlocal pieces, filled
        length = -(-filled // multiple) * multiple
        buckets.append(Bucket(tuple(pieces), length, like.dtype, like.device))
        pieces, filled = [], 0

    for index, weight in enumerate(weights):
        last = weights[pieces[-1][0]] if pieces else weight
        if (weight.dtype, weight.device) != (last.dtype, last.device):
            close(last)
        done = 0
        while done < weight.numel():
            taken = min(size - filled, weight.numel() - done)
            pieces.append((index, done, done + taken))
            done, filled = done + taken, filled + taken
            if filled == size:
                close(weight)
    if pieces:
        close(weights[pieces[-1][0]])
    return buckets
