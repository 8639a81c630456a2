"""What a way from the memory that training changes to main memory is, and that of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from onward.training.transfer.layout import ALIGNMENT, Memory
from onward.training.transfer.marks import Marks

Wait = Callable[[], None]


def at_once() -> None:
    """Wait for nothing: the copy is made."""


@dataclass(frozen=True)
class Copied:
    """A copy in main memory.

    Args:
        tensors: the copies, in the order of what was copied.
        wait: returns when they hold what they are to hold.
        marks: those of what was copied, where a digest of it costs more.
        memory: what another copy may be put into; None where its tensors are all there is.
    """

    tensors: list[torch.Tensor]
    wait: Wait = at_once
    marks: Marks | None = None
    memory: Memory | None = None


class Transfer(Protocol):
    """A way from the memory that training changes to main memory."""

    def copy(self, weights: Sequence[torch.Tensor], rest: Sequence[torch.Tensor], into: Copied | None = None) -> Copied:
        """Begin to copy weights and what an optimizer keeps; the next step changes none of them before.

        Args:
            into: an earlier copy that is no longer needed; its memory is used again where it fits.
        """
        ...

    def marks(self, weights: Sequence[torch.Tensor], rest: Sequence[torch.Tensor]) -> Marks | None:
        """Return marks of all bits, computed where the tensors lie; None where their digest costs no more."""
        ...


class InPlace:
    """The way of a CPU: training's memory is main memory."""

    def copy(self, weights: Sequence[torch.Tensor], rest: Sequence[torch.Tensor], into: Copied | None = None) -> Copied:
        """Copy now."""
        sources = [*weights, *rest]
        targets = [] if into is None else into.tensors
        if [tensor.shape for tensor in targets] != [tensor.shape for tensor in sources]:
            targets = [*(torch.empty_like(weight, device="cpu") for weight in weights), *in_one_storage(rest)]
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        return Copied(targets)

    def marks(self, weights: Sequence[torch.Tensor], rest: Sequence[torch.Tensor]) -> None:
        """Return none: a digest reads the same memory."""
        return


def in_one_storage(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return memory for copies of tensors, one storage for each type, with zeros in the gaps.

    `torch.save` writes one storage at a time and takes Python's lock about four times for each. While another thread
    computes in Python, saving 249 storages took 2.7 s; saving one takes 0.15 s.
    """
    sizes: dict[torch.dtype, list[int]] = {}
    for tensor in tensors:
        sizes.setdefault(tensor.dtype, []).append(-(-tensor.numel() // ALIGNMENT) * ALIGNMENT)
    parts = {dtype: iter(torch.zeros(sum(own), dtype=dtype).split(own)) for dtype, own in sizes.items()}
    return [next(parts[tensor.dtype])[: tensor.numel()].view(tensor.shape) for tensor in tensors]
