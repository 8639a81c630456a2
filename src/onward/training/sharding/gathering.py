"""Gathers whole tensors from shards: each on one rank, one at a time, so that no rank holds more than one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def rows_of(rows: int, rank: int, size: int) -> tuple[int, int]:
    """Return the first row of a rank's shard and the one after its last; the last ranks may have fewer, or none."""
    each = -(-rows // size)
    return min(rank * each, rows), min((rank + 1) * each, rows)


def wholes(
    mesh: DeviceMesh, shapes: Sequence[torch.Size], tensors: Sequence[torch.Tensor]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield whole tensors with their index; tensor i on rank i modulo N. All ranks must call and exhaust this.

    Each rank sends its rows once, so the traffic is that of a reduce-scatter.

    Args:
        shapes: the shapes of the whole tensors.
        tensors: this rank's rows of them.
    """
    rank, size = mesh.get_local_rank(), mesh.size()
    for first in range(0, len(tensors), size):
        sent = [tensor.reshape(-1) for tensor in tensors[first : first + size]]
        own = first + rank
        shape = shapes[own] if own < len(tensors) else torch.Size([0])
        spans = [rows_of(shape[0], other, size) for other in range(size)]
        wanted = [(end - begin) * shape[1:].numel() for begin, end in spans]
        received = tensors[0].new_empty(sum(wanted))
        lengths = [len(each) for each in sent] + [0] * (size - len(sent))
        dist.all_to_all_single(received, torch.cat(sent), wanted, lengths, group=mesh.get_group())
        if own < len(tensors):
            yield own, received.view(shape)


def norms(mesh: DeviceMesh, shapes: Sequence[torch.Size], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the norm of each whole tensor, shape (tensors,), on every rank, with the bits that one device gets.

    A sum over shards would depend on where they are split, so each tensor is gathered once, on one rank.
    """
    size = mesh.size()
    each = -(-len(tensors) // size)
    own = torch.zeros(each, device=tensors[0].device)
    for place, whole in wholes(mesh, shapes, tensors):
        own[place // size] = torch._foreach_norm([whole], 2.0)[0]  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    found = own.new_empty(size * each)
    dist.all_gather(list(found.view(size, -1)), own, group=mesh.get_group())
    return found.view(size, each).T.reshape(-1)[: len(tensors)].contiguous()


def first_gets(mesh: DeviceMesh, shape: torch.Size, rows: torch.Tensor) -> torch.Tensor | None:
    """Return a tensor whole on the first rank, and None on the others. All ranks call this.

    Args:
        shape: the shape of the whole tensor.
        rows: this rank's rows of it.
    """
    size, group = mesh.size(), mesh.get_group()
    each = -(-shape[0] // size)
    padded = rows.new_zeros((each, *shape[1:]))
    padded[: len(rows)].copy_(rows)
    if mesh.get_local_rank():
        dist.gather(padded, group=group, group_dst=0)
        return None
    found = rows.new_empty((size, *padded.shape))
    dist.gather(padded, list(found), group=group, group_dst=0)
    return found.flatten(0, 1)[: shape[0]]
