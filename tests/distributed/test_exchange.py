"""Gradients of a step's shares, added on several ranks: the same bits as on one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import call_on_ranks
from torch import nn

from onward.ranks import place_here
from onward.training.ranks.exchange import Exchange, InAnyOrder, InOrder, InTurn, buckets_of, exchange_of
from onward.training.ranks.forming import form

SHAPES = ((3, 5), (7,), (2, 2), (1,), (11,))
DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.float32)
SHARES = ((0, 1), (2,), (3, 4, 5), (6, 7), (8,))
"""Parts of five shares: more than ranks, and no multiple of their number."""
LOST = {(1, 2), (0, 3), *((share, 1) for share in (2, 3, 4)), *((share, 4) for share in range(5))}
"""Shares and weights that they do not reach: one weight is reached by the first shares alone, the last one by none."""


def weights() -> list[nn.Parameter]:
    """Return some weights."""
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in zip(SHAPES, DTYPES, strict=True)]


def gradient(part: int, index: int) -> torch.Tensor:
    """Return the gradient of a part for a weight: numbers of very different size, and negative zeros, some of them
    in the same place of all parts, so that the sum is one too."""
    source = torch.Generator().manual_seed(100 * part + index)
    found = torch.randn(SHAPES[index], generator=source) * 10.0 ** torch.randint(-6, 7, SHAPES[index], generator=source)
    found.view(-1)[::3] = -0.0
    return torch.where(torch.rand(SHAPES[index], generator=source) < 0.2, -0.0, found).to(DTYPES[index])


def total(exchange: Exchange, shares: Sequence[Sequence[int]] = SHARES) -> list[torch.Tensor | None]:
    """Return the loss and the gradients of a step by an exchange."""
    own = weights()

    def compute(parts: Sequence[int]) -> torch.Tensor:
        loss = torch.zeros(())
        share = next(place for place, each in enumerate(SHARES) if parts[0] in each)
        for part in parts:
            for index, weight in enumerate(own):
                if (share, index) not in LOST:
                    (weight * gradient(part, index)).sum().backward()
            loss = loss + 0.1 * (part + 1)
        return loss

    loss = exchange.total(shares, compute, own)
    return [loss, *(weight.grad for weight in own)]


def met(exchange: Exchange, rank: int) -> str:
    """Return the error of a step in which rank 1 fails, as a rank meets it."""

    def compute(parts: Sequence[int]) -> torch.Tensor:
        if rank == 1:
            raise ValueError(f"part {parts[0]} failed")
        return torch.zeros(())

    try:
        exchange.total(SHARES, compute, weights())
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def bits(found: Sequence[torch.Tensor | None]) -> list[Any]:
    """Return tensors as integers, so that zeros of either sign differ."""
    return [None if each is None else each.reshape(-1).view(torch.uint8).tolist() for each in found]


def compare(folder: Path) -> None:
    """On each rank: leave what the exchanges give."""
    place = place_here()
    assert place is not None
    group = form(place, 60.0, print)
    exact, fast = exchange_of(group, "exact"), exchange_of(group, "fast")
    assert (InOrder, InAnyOrder) == (type(exact), type(fast))
    for bucket in (1 << 24, 4, 10):
        torch.save(bits(total(InOrder(group, bucket))), folder / f"exact-{bucket}-{place.rank}")
    torch.save(bits(total(exact, SHARES[:1])), folder / f"first-{place.rank}")
    torch.save([total(fast, some) for some in (SHARES, SHARES[:1])], folder / f"fast-{place.rank}")
    failed = [met(exchange, place.rank) for exchange in (exact, fast)]
    torch.save(failed, folder / f"failed-{place.rank}")
    group.end()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_the_sum_does_not_know_the_number_of_ranks(size: int, tmp_path: Path) -> None:
    """Loss and gradients of any number of ranks are those of one, bit for bit, also in small buckets; `fast` ones are
    close. An error of one rank reaches all."""
    assert [0] * size == call_on_ranks(compare, size, tmp_path)
    near = [total(InTurn(), some) for some in (SHARES, SHARES[:1])]
    expected, first = map(bits, near)
    for rank in range(size):
        for bucket in (1 << 24, 4, 10):
            assert expected == torch.load(tmp_path / f"exact-{bucket}-{rank}"), (rank, bucket)
        assert first == torch.load(tmp_path / f"first-{rank}")
        fast = torch.load(tmp_path / f"fast-{rank}")
        for here, there in zip(chain(*near), chain(*fast), strict=True):
            torch.testing.assert_close(torch.zeros_like(there) if here is None else here, there, rtol=1e-4, atol=1e-2)
        words = ["part 2 failed" if rank == 1 else "rank 1: ValueError: part 2 failed"]
        assert words * 2 == torch.load(tmp_path / f"failed-{rank}")


def test_one_process_adds_share_by_share() -> None:
    """Each share is added up on its own, then to those before; a weight that no share reaches gets no gradient."""
    loss, *grads = total(InTurn())
    assert loss is not None
    for index in range(len(SHAPES)):
        sums: list[torch.Tensor] = []
        for share, parts in enumerate(SHARES):
            if (share, index) not in LOST:
                own = gradient(parts[0], index)
                for part in parts[1:]:
                    own = own + gradient(part, index)
                sums.append(own)
        added = sums[0] if sums else None
        for own in sums[1:]:
            assert added is not None
            added = added + own
        assert bits([added]) == bits([grads[index]]), index


@given(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from([torch.float32, torch.float64])), max_size=9),
    st.integers(1, 4),
    st.integers(1, 15),
)
def test_buckets_have_all_numbers_once(kinds: list[tuple[int, torch.dtype]], ranks: int, size: int) -> None:
    """In order, of one type in a bucket, at most as many as asked for, and as many as fit; each rank has a slice of
    every bucket, and the slices have all of it."""
    weights = [nn.Parameter(torch.zeros(count, dtype=dtype)) for count, dtype in kinds]
    buckets = buckets_of(weights, ranks, size)
    numbers = [(index, place) for index, weight in enumerate(weights) for place in range(weight.numel())]
    assert numbers == [(n, place) for each in buckets for n, begin, end in each.pieces for place in range(begin, end)]
    filled = [sum(end - begin for _, begin, end in each.pieces) for each in buckets]
    for each, count in zip(buckets, filled, strict=True):
        assert {each.dtype} == {weights[index].dtype for index, _, _ in each.pieces}
        assert (0, True) == (each.length % ranks, 0 <= each.length - count < ranks)
        width = each.length // ranks
        spans = [each.spans(rank * width, (rank + 1) * width) for rank in range(ranks)]
        own = [index for index, begin, end in each.pieces for _ in range(begin, end)]
        assert own == [index for slices in spans for index, begin, end in slices for _ in range(begin, end)]
        assert all(0 <= begin < end <= width for slices in spans for _, begin, end in slices)
    assert all(count <= size for count in filled)
    for one, other, count in zip(buckets, buckets[1:], filled, strict=False):
        assert one.dtype != other.dtype or count == size
