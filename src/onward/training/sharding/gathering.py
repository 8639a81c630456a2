"""Whole tensors out of shards: each on one rank, one at a time, so that no rank ever holds more than one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.distributed as dist

from onward.training.sharding.shards import Shards, rows_of


def wholes(shards: Shards, tensors: Sequence[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield tensors whole, with their place; tensor i on rank i modulo N. All ranks call this and take all of it.

    Each rank sends its rows once, so the traffic is that of a reduce-scatter.

    Args:
        tensors: this rank's rows of one tensor for each shard, in the order of the shards.
    """
    rank, size = shards.mesh.get_local_rank(), shards.mesh.size()
    shapes = [shard.shape for shard in shards.values()]
    for first in range(0, len(tensors), size):
        sent = [tensor.reshape(-1) for tensor in tensors[first : first + size]]
        own = first + rank
        shape = shapes[own] if own < len(tensors) else torch.Size([0])
        spans = [rows_of(shape[0], other, size) for other in range(size)]
        wanted = [(end - begin) * shape[1:].numel() for begin, end in spans]
        received = tensors[0].new_empty(sum(wanted))
        lengths = [len(each) for each in sent] + [0] * (size - len(sent))
        dist.all_to_all_single(received, torch.cat(sent), wanted, lengths, group=shards.group)
        if own < len(tensors):
            yield own, received.view(shape)


def norms(shards: Shards, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the norm of each whole tensor, shape (tensors,): the bits that one device gets, on every rank."""
    size = shards.mesh.size()
    each = -(-len(tensors) // size)
    own = torch.zeros(each, device=tensors[0].device)
    for place, whole in wholes(shards, tensors):
        own[place // size] = torch._foreach_norm([whole], 2.0)[0]  # pyright: ignore[reportPrivateUsage]
    found = own.new_empty(size * each)
    dist.all_gather(list(found.view(size, -1)), own, group=shards.group)
    return found.view(size, each).T.reshape(-1)[: len(tensors)].contiguous()


def clip(shards: Shards, limit: float) -> torch.Tensor:
    """Scale the gradients of all shards to a norm of at most `limit`, and return the norm that they had.

    As `torch.nn.utils.clip_grad_norm_` of whole gradients does, to the last bit: a norm of shards would depend on where
    they are cut, so each tensor is made whole once, on one rank.
    """
    gradients = [shard.rows(cast(torch.Tensor, shard.held.grad)) for shard in shards.values()]
    total = torch.linalg.vector_norm(norms(shards, gradients), 2.0)
    torch.nn.utils.clip_grads_with_norm_([shard.held for shard in shards.values()], limit, total)
    return total
