"""Shards of weights as plain tensors: which rows a rank holds, their gradients, and what the optimizer gets.

An optimizer's kernel on a CPU computes the last few numbers of a tensor one by one, and those may get other last bits
than numbers computed together. So that a shard gets the bits of the whole tensor, it is laid out with room for its
neighbours around it unless it begins and ends where the kernel would split (`span`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from onward.training.optimizers import OptimizerMethod
from onward.training.sharding.exchange import Place
from onward.training.sharding.gathering import norms, rows_of, wholes
from onward.training.sharding.model import ShardedModel

UNIT = 16
"""float32 numbers in the widest register of a processor (AVX-512); narrower ones divide it."""


def span(first: int, last: int, total: int) -> tuple[int, int]:
    """Return the range in a flat tensor of `total` numbers that is computed with the numbers from `first` up to `last`.

    It begins at a whole unit, and ends at one or, if the numbers reach into the rest after the last whole unit, at the
    end of the tensor. Each number is then computed as in the tensor itself.
    """
    if first == last:
        return first, last
    end = total if last > total - total % UNIT else -(-last // UNIT) * UNIT
    return first - first % UNIT, end


@dataclass(frozen=True)
class Shard:
    """The rows of one weight that this rank holds.

    Args:
        weight: FSDP2's weight between computations.
        held: what the optimizer gets: the rows in the weight's own memory, or a flat copy with room around them.
        start: index in the flat whole weight at which `held` begins.
        before: numbers before the rows in `held` if it is a copy; otherwise None.
    """

    weight: DTensor
    held: nn.Parameter
    start: int
    before: int | None

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole weight."""
        return self.weight.shape

    @property
    def local(self) -> torch.Tensor:
        """The rows in the weight's own memory."""
        return self.weight.to_local().detach()

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows in a tensor with the layout of `held` (one of the moments), shape (rows, ...)."""
        if self.before is None:
            return tensor
        local = self.weight.to_local()
        return tensor[self.before : self.before + local.numel()].view(local.shape)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Return a copy of this rank's part of a whole tensor of the weight's shape, in the layout of `held`."""
        flat = whole.reshape(-1)[self.start : self.start + self.held.numel()]
        return torch.empty_like(self.held).copy_(flat.view(self.held.shape))

    def take_gradient(self) -> None:
        """Move the gradient of all parts so far from the weight to `held`."""
        gradient = cast(DTensor | None, self.weight.grad)
        self.weight.grad = self.held.grad = None
        if gradient is None:
            return
        if self.before is None:
            self.held.grad = gradient.to_local()
            return
        self.held.grad = torch.zeros_like(self.held)
        self.rows(self.held.grad).copy_(gradient.to_local())

    def give_back(self) -> None:
        """Copy the rows from the optimizer back into the weight's own memory."""
        if self.before is not None:
            self.local.copy_(self.rows(self.held.detach()))

    def take(self) -> None:
        """Copy the rows from the weight's own memory to the optimizer."""
        if self.before is not None:
            self.rows(self.held.detach()).copy_(self.local)


class Shards(Mapping[str, Shard]):
    """This rank's shards of all trained weights by name, in the order of `optimizer.pt`.

    Args:
        sharded: a sharded model, including all that is trained, between two computations.
        method: how it is trained.
    """

    holds_whole = False

    def __init__(self, sharded: ShardedModel, method: OptimizerMethod) -> None:
        self.mesh = sharded.mesh
        weights = {name: cast(DTensor, weight) for name, weight in sharded.model.named_parameters()}
        trained = [name for group in method.groups(sharded.model) for name, _ in group]
        self._shards = {name: _shard(weights[name], self.mesh) for name in trained}
        self.frozen = {name: weight for name, weight in weights.items() if name not in self._shards}
        """What is not trained; it is sharded too, and never changes."""

    def __getitem__(self, name: str) -> Shard:
        return self._shards[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def describe(self) -> dict[str, list[Any]]:
        """Return `{name: [shape, type]}` of the whole weights, in the optimizer's order."""
        kinds = {name: str(shard.held.dtype).removeprefix("torch.") for name, shard in self.items()}
        return {name: [list(shard.shape), kinds[name]] for name, shard in self.items()}

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that hold the shards."""
        return self.mesh.get_group()

    def begin(self) -> None:
        """Begin a step: no shard has a gradient."""
        for shard in self._shards.values():
            shard.weight.grad = shard.held.grad = None

    def add(self, places: Sequence[Place]) -> None:
        """After the backward pass of a round, move the sums so far to what the optimizer gets."""
        del places
        for shard in self._shards.values():
            shard.take_gradient()

    def give(self) -> None:
        """Do nothing after the last round: the sums are already in place."""

    def clip(self, limit: float) -> torch.Tensor:
        """Scale the gradients to a norm of at most `limit`; return the norm that they had (scalar).

        The result equals that of `torch.nn.utils.clip_grad_norm_` with whole gradients, to the last bit.
        """
        gradients = [shard.rows(cast(torch.Tensor, shard.held.grad)) for shard in self.values()]
        each = norms(self.mesh, [shard.shape for shard in self.values()], gradients)
        total = torch.linalg.vector_norm(each, 2.0)
        nn.utils.clip_grads_with_norm_([shard.held for shard in self.values()], limit, total)
        return total

    def wholes(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the whole gradients by name, each on one rank; every rank must exhaust this."""
        names, shapes = list(self), [shard.shape for shard in self.values()]
        gradients = [shard.rows(cast(torch.Tensor, shard.held.grad)) for shard in self.values()]
        return ((names[place], whole) for place, whole in wholes(self.mesh, shapes, gradients))

    def stepped(self) -> None:
        """After the optimizer's step, put what it changed where the model reads it."""
        for shard in self._shards.values():
            shard.give_back()


def _shard(weight: DTensor, mesh: DeviceMesh) -> Shard:
    local = weight.to_local().detach()
    numbers = weight.shape[1:].numel()
    begin, _ = rows_of(weight.shape[0], mesh.get_local_rank(), mesh.size())
    first, total = begin * numbers, weight.numel()
    last = first + local.numel()
    start, end = span(first, last, total)
    if (start, end) == (first, last):
        return Shard(weight, nn.Parameter(local), start, None)
    shard = Shard(weight, nn.Parameter(local.new_zeros(end - start)), start, first - start)
    shard.take()
    return shard
