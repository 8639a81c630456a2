"""Copies behind training: whatever the sizes and however late a stream copies, they are the state at that time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from late_copies import Late
from rows import CPU
from torch.utils._python_dispatch import TorchDispatchMode

from onward.training.state import digest_tensors
from onward.training.transfer import (
    Copied,
    Overlapped,
    Sizes,
    equal_marks,
    in_main_memory,
)
from onward.training.transfer.layout import Form, Layout
from onward.training.transfer.staging import stages_of

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.float64]


class Counted(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def scramble(tensors: Sequence[torch.Tensor], seed: int) -> None:
    """Give tensors other bits; those of a bool stay 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.detach().copy_(torch.randint(0, 200, tensor.shape, generator=generator).to(tensor.dtype) + seed % 2)


def tensors_of(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return weights and moments of random shapes and types, some of them empty, scalar or transposed."""
    draw = random.Random(seed)

    def one() -> torch.Tensor:
        dtype = draw.choice(DTYPES)
        kind = draw.random()
        if kind < 0.2:
            return torch.zeros((), dtype=dtype)
        if kind < 0.3:
            return torch.zeros(draw.randint(2, 9), draw.randint(2, 9), dtype=dtype).T
        return torch.zeros(draw.randint(0, 9), draw.randint(1, 70), dtype=dtype)

    weights, rest = [one() for _ in range(draw.randint(1, 20))], [one() for _ in range(draw.randint(0, 40))]
    return [torch.nn.Parameter(w) if w.is_floating_point() else w for w in weights], rest


@pytest.mark.parametrize("seed", range(16))
def test_a_copy_is_the_state_as_it_was(seed: int) -> None:
    """It holds the bits of its time, though the state changes right after it and streams copy as late as they may."""
    draw = random.Random(seed)
    sizes = Sizes(draw.choice([0, 60, 256, 4096]), draw.choice([0, 1000, 4096, 1 << 20]), draw.randint(1, 3))
    way, (weights, rest) = Overlapped(Late(), pins=False, sizes=sizes), tensors_of(seed)
    copied: Copied | None = None
    for turn in range(4):
        scramble([*weights, *rest], turn)
        expected = [bits(tensor).clone() for tensor in (*weights, *rest)]
        before, copied = copied, way.copy(weights, rest, copied)
        scramble([*weights, *rest], turn + 1)
        way.marks(weights, rest)  # which gathers them again
        copied.wait()
        assert all(map(torch.equal, expected, map(bits, copied.tensors)))
        assert [tensor.shape for tensor in (*weights, *rest)] == [tensor.shape for tensor in copied.tensors]
        assert before is None or before.memory is copied.memory


@pytest.mark.parametrize("seed", range(8))
def test_what_is_written_beside_the_tensors_is_zero(seed: int) -> None:
    """Gaps of a storage are zeros, also where slots were filled by others before; weights lie apart from moments."""
    sizes = Sizes(small=random.Random(seed).choice([100, 4096]), slot=600, slots=2)
    way, (weights, rest) = Overlapped(Late(), pins=False, sizes=sizes), tensors_of(seed)
    copied = None
    for turn in (1, 3):
        scramble([*weights, *rest], turn)
        copied = way.copy(weights, rest, copied)
        copied.wait()
    assert copied is not None
    for tensor in copied.tensors:
        tensor.zero_()
    own, held = ([tensor for tensor in each if tensor.numel()] for each in _parted(copied.tensors, len(weights)))
    for tensor in (*own, *held):
        whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # pyright: ignore
        assert not whole.any()
    apart, together = ({tensor.untyped_storage().data_ptr() for tensor in each} for each in (own, held))
    assert not apart & together
    assert len({tensor.dtype for tensor in held}) == len(together)


def _parted(tensors: list[torch.Tensor], count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return tensors[:count], tensors[count:]


@pytest.mark.parametrize("seed", range(8))
def test_equal_bits_have_equal_marks(seed: int) -> None:
    """The mark of a copy is that of the state until one bit of it changes, whichever; another process has the same."""
    sizes = Sizes(small=random.Random(seed).choice([0, 100, 4096]), slot=1000, slots=2)
    way, (weights, rest) = Overlapped(Late(), pins=False, sizes=sizes), tensors_of(seed)
    scramble([*weights, *rest], seed)
    copied = way.copy(weights, rest)
    assert copied.marks is not None
    other = Overlapped(Late(), pins=False, sizes=sizes)
    assert equal_marks(copied.marks, other.marks([w.clone() for w in weights], [r.clone() for r in rest]))
    for tensor in (*weights, *rest):
        if not tensor.numel():
            continue
        flat = tensor.detach().T if not tensor.is_contiguous() else tensor.detach()
        place = bits(flat)[random.Random(seed).randrange(bits(flat).numel())]
        place ^= 1
        assert not equal_marks(copied.marks, way.marks(weights, rest))
        place ^= 1
        assert equal_marks(copied.marks, way.marks(weights, rest))


@pytest.mark.parametrize("seed", range(8))
def test_every_tensor_has_a_place_of_its_own(seed: int) -> None:
    """What travels at once lies on one device and fits its slot, in as few copies as types and slots allow."""
    draw = random.Random(seed)
    sizes, devices = Sizes(small=4096, slot=draw.choice([1, 10_000, 1 << 20])), [torch.device("cuda", 0), CPU]
    forms: list[Form] = []
    for _ in range(draw.randint(1, 200)):
        shape = (draw.choice([0, 1, 3, 200, 2000]),)
        forms.append(Form(torch.Size(shape), (1,), draw.choice(DTYPES), draw.choice(devices), draw.random() < 0.9))
    weights = draw.randint(0, len(forms))
    layout = Layout(forms, weights, sizes)
    taken = dict[tuple[str, str], list[tuple[int, int]]]()
    for number, form in enumerate(forms):
        key, first = layout.places[number]
        assert (form.dtype, 0) == (layout.storages[key][0], first % 64)
        taken.setdefault(key, []).append((first, first + form.room))
    for key, spans in taken.items():
        ends = [0, *(end for _, end in sorted(spans))]
        assert ends == [*(first for first, _ in sorted(spans)), layout.storages[key][1]]
    gathered = [number for chunk in layout.chunks for segment in chunk.segments for number in segment.members]
    assert list(range(len(forms))) == sorted([*gathered, *layout.apart])
    for chunk in layout.chunks:
        assert {chunk.device} == {forms[number].device for each in chunk.segments for number in each.members}
        assert chunk.size <= sizes.slot or 1 == sum(len(each.members) for each in chunk.segments)
        assert chunk.size == sum(each.count * layout.storages[each.key][0].itemsize for each in chunk.segments)
        for each in chunk.segments:
            assert each.count == sum(forms[number].room for number in each.members)
            assert each.first == min(layout.places[number][1] for number in each.members)
            assert 0 == each.offset % 64
    kinds = len({(forms[n].device, n < weights, forms[n].dtype) for n in gathered})
    assert sum(len(chunk.segments) for chunk in layout.chunks) < kinds + len(layout.chunks)


def test_slots_are_few_and_filled_in_turn() -> None:
    """However much is gathered, it takes as many slots of the device's memory as allowed; one is copied out while the
    next is filled."""
    layout = Layout([Form.of(torch.zeros(64)) for _ in range(5)], 2, Sizes(slot=1, slots=2))
    slots = [id(stage.slot) for stage in stages_of(layout, None)]
    assert [slots[0], slots[1]] * 2 + [slots[0]] == slots
    assert slots[0] != slots[1]


def test_the_number_of_launches_does_not_grow_with_that_of_tensors() -> None:
    """Ten times as many small tensors take as many operations, to copy and to mark."""
    counts = set[int]()
    for tensors in (30, 300):
        way = Overlapped(Late(), pins=False)
        weights = [torch.nn.Parameter(torch.zeros(3, 4)) for _ in range(tensors)]
        rest = [torch.zeros(shape) for _ in weights for shape in ((3, 4), (3, 4), ())]
        copied = way.copy(weights, rest)
        with Counted() as counted:
            way.copy(weights, rest, copied)
            way.marks(weights, rest)
        counts.add(counted.count)
    assert 1 == len(counts)
    assert counts.pop() < 30


def test_nothing_is_kept_alive() -> None:
    """The way does not hold what an optimizer let go; a state of other tensors gets a layout of its own."""
    way, weights = Overlapped(Late(), pins=False), [torch.nn.Parameter(torch.ones(5))]
    rest = [torch.ones(5), torch.ones(())]
    copied = way.copy(weights, rest)
    rest = [torch.full((5,), 2.0), torch.ones(())]  # of the same forms
    again = way.copy(weights, rest, copied)
    assert again.memory is copied.memory
    alone = way.copy(weights, [], again)
    longer = way.copy(weights, [torch.full((6,), 3.0), torch.ones(())], again)
    assert again.memory not in (alone.memory, longer.memory)
    again.wait()
    alone.wait()
    longer.wait()
    assert [3.0] * 6 == longer.tensors[1].tolist()
    assert [[1.0] * 5, [2.0] * 5, 1.0] == [tensor.tolist() for tensor in again.tensors]
    assert [[1.0] * 5] == [tensor.tolist() for tensor in alone.tensors]


def test_a_digest_of_what_lies_elsewhere_is_that_of_main_memory() -> None:
    """Fetched many at a time or one by one, in the order given, tensors have the same digest."""
    weights, rest = tensors_of(5)
    scramble([*weights, *rest], 5)
    named = [(str(place), tensor) for place, tensor in enumerate((*weights, *rest))]
    assert digest_tensors(named) == digest_tensors(in_main_memory(named, home="cuda"))
