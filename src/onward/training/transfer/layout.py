"""Where the tensors of a state are placed in main memory, and which of them are copied together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch

ALIGNMENT = 64
"""A tensor in a shared storage begins at a multiple of this many elements."""

Key = tuple[str, str]
"""The name of a storage: what it holds, and its type."""


@dataclass(frozen=True)
class Sizes:
    """What is gathered, and how much device memory that takes, in bytes.

    Args:
        small: the largest tensor that is gathered; copying a larger one takes longer than its launch.
        slot: the bytes that are copied at once.
        slots: the most slots on the device. If there is more to gather, a slot is refilled once it was copied.
    """

    small: int = 1 << 22
    slot: int = 1 << 27
    slots: int = 2


@dataclass(frozen=True)
class Form:
    """The properties of a tensor apart from its numbers."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_contiguous: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """Return the form of a tensor."""
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_contiguous())

    @property
    def count(self) -> int:
        """The number of its elements."""
        return self.shape.numel()

    @property
    def room(self) -> int:
        """The number of elements that it occupies in a storage, up to the next tensor."""
        return -(-self.count // ALIGNMENT) * ALIGNMENT


@dataclass
class Segment:
    """Neighbours in one storage that are copied together.

    Args:
        key: the storage.
        first: where they begin in it, in elements.
        offset: where they begin in the slot, in bytes.
        count: elements of all of them and of the gaps between them.
        members: the tensors' numbers.
    """

    key: Key
    first: int
    offset: int
    count: int = 0
    members: list[int] = field(default_factory=list[int])


@dataclass
class Chunk:
    """What is copied at once: segments of one device that fill a slot of `size` bytes."""

    device: torch.device
    segments: list[Segment] = field(default_factory=list[Segment])
    size: int = 0


class Layout:
    """The placement of a state's tensors, as a function of their forms.

    Weights and moments never share a storage, because `torch.save` writes whole storages. Small tensors of one type are
    neighbours, so that a few copies suffice for any number of them.

    Args:
        forms: the forms of all tensors, weights first.
        weights: how many of them are weights.
    """

    def __init__(self, forms: Sequence[Form], weights: int, sizes: Sizes) -> None:
        self.forms, self.weights, self.sizes = tuple(forms), weights, sizes
        self.places: dict[int, tuple[Key, int]] = {}
        """Storage of each tensor, and the element at which it begins there."""
        self.storages: dict[Key, tuple[torch.dtype, int]] = {}
        """Type and elements of each storage."""
        small = [number for number, form in enumerate(forms) if self._is_gathered(form)]
        self.apart = sorted(set(range(len(forms))) - set(small))
        """Tensors that are copied one by one."""
        small.sort(key=lambda number: (str(forms[number].device), self._kind(number), str(forms[number].dtype)))
        for number in [*small, *self.apart]:
            self._place(number)
        self.chunks: list[Chunk] = []
        for number in small:
            self._add(number)

    def _is_gathered(self, form: Form) -> bool:
        return form.is_contiguous and form.count * form.dtype.itemsize <= self.sizes.small

    def _kind(self, number: int) -> str:
        return "weights" if number < self.weights else "moments"

    def _place(self, number: int) -> None:
        """Place a tensor: moments share a storage with all others of their type, large weights with none."""
        form, kind = self.forms[number], self._kind(number)
        is_alone = kind == "weights" and not self._is_gathered(form)
        key = (f"weight {number}" if is_alone else kind, str(form.dtype))
        filled = self.storages.get(key, (form.dtype, 0))[1]
        self.places[number] = key, filled
        self.storages[key] = form.dtype, filled + form.room

    def _add(self, number: int) -> None:
        """Add a tensor to the current slot, as long as that has room."""
        form, (key, first) = self.forms[number], self.places[number]
        size = form.room * form.dtype.itemsize
        last = self.chunks[-1] if self.chunks else None
        if last is None or last.device != form.device or last.size + size > self.sizes.slot:
            last = Chunk(form.device)
            self.chunks.append(last)
        if not last.segments or last.segments[-1].key != key:
            last.segments.append(Segment(key, first, last.size))
        segment = last.segments[-1]
        segment.members.append(number)
        segment.count += form.room
        last.size += size


class Memory:
    """Main memory for a copy of a state, with zeros in the gaps.

    Args:
        pins: whether the memory is pinned, so that the device accesses it directly.
    """

    def __init__(self, layout: Layout, *, pins: bool) -> None:
        self.layout = layout
        storages = {
            key: torch.zeros(count, dtype=dtype, pin_memory=pins) for key, (dtype, count) in layout.storages.items()
        }
        self.tensors: list[torch.Tensor] = []
        for number, form in enumerate(layout.forms):
            key, first = layout.places[number]
            self.tensors.append(storages[key][first : first + form.count].view(form.shape))
        self.pieces = [
            [storages[each.key][each.first : each.first + each.count] for each in chunk.segments]
            for chunk in layout.chunks
        ]
        """The targets of each chunk, segment by segment."""
