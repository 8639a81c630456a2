"""Device memory in which the small tensors of a state are gathered, to be copied out in a few copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from onward.training.transfer.layout import Chunk, Layout
from onward.training.transfer.marks import ROW


class Slot:
    """Memory in which chunks are gathered, one after another.

    Args:
        size: bytes.
        side: the stream that reads it.
    """

    def __init__(self, size: int, device: torch.device, side: Any) -> None:
        self.memory = torch.zeros(_in_rows(size), dtype=torch.uint8, device=device)
        self.left: Any = None
        """The event after which it may be refilled."""
        if device.type != "cpu":
            self.memory.record_stream(side)


class Stage:
    """A chunk's place in a slot, with a view for each tensor, made once.

    A view has the strides of its tensor, even for dimensions of one element: only then is a whole list of tensors
    copied in a few launches.
    """

    def __init__(self, layout: Layout, chunk: Chunk, slot: Slot) -> None:
        self.slot = slot
        self.filled = slot.memory[: _in_rows(chunk.size)]
        """Everything gathered, as bytes, up to the end of a row of words that are marked together."""
        self.segments: list[torch.Tensor] = []
        """Memory that is copied out in one copy each."""
        self._gathers: dict[torch.dtype, tuple[list[torch.Tensor], list[int]]] = {}
        """Views of one type, and the numbers of the tensors that are copied there."""
        for segment in chunk.segments:
            dtype = layout.storages[segment.key][0]
            end = segment.offset + segment.count * dtype.itemsize
            flat = slot.memory[segment.offset : end].view(dtype)
            self.segments.append(flat)
            parts, members = self._gathers.setdefault(dtype, ([], []))
            for number in segment.members:
                form, first = layout.forms[number], layout.places[number][1] - segment.first
                parts.append(flat.as_strided(form.shape, form.strides, flat.storage_offset() + first))
            members += segment.members

    def gather(self, tensors: Sequence[torch.Tensor], computing: Any) -> None:
        """Copy tensors into the slot on the computing stream, once its previous content was copied out."""
        if self.slot.left is not None:
            computing.wait_event(self.slot.left)
        self.filled.zero_()  # another chunk has its gaps elsewhere
        for parts, members in self._gathers.values():
            sources = [tensors[number] for number in members]
            torch._foreach_copy_(parts, sources)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def _in_rows(size: int) -> int:
    """Return bytes rounded up to whole rows: a remainder would take launches of its own to mark."""
    return -(-size // (8 * ROW)) * 8 * ROW


def stages_of(layout: Layout, side: Any) -> list[Stage]:
    """Return a stage for each chunk of a layout; those of one device share its slots in turn.

    Args:
        side: the stream on which chunks are copied out.
    """
    turns: dict[tuple[torch.device, int], list[int]] = {}
    counts: dict[torch.device, int] = {}
    for place, chunk in enumerate(layout.chunks):
        number = counts[chunk.device] = counts.get(chunk.device, -1) + 1
        turns.setdefault((chunk.device, number % layout.sizes.slots), []).append(place)
    stages: dict[int, Stage] = {}
    for (device, _), places in turns.items():
        slot = Slot(max(layout.chunks[place].size for place in places), device, side)
        stages.update((place, Stage(layout, layout.chunks[place], slot)) for place in places)
    return [stages[place] for place in range(len(layout.chunks))]
