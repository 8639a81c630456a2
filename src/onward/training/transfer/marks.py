"""Marks: a checksum of all bits of a state, computed on its device with few launches."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch

ROW = 1 << 16
"""How many words are added up to one sum. The factors of their places take a megabyte."""
PIECE = 1 << 24
"""How many words are processed together; meanwhile each takes another eight bytes."""
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)
"""The odd 64-bit golden ratio, as a signed number: neighbouring places get very different factors."""

Marks = tuple[torch.Tensor, ...]
"""The mark of each device's part of a state, int64 scalars."""


def mark(tensor: torch.Tensor) -> torch.Tensor:
    """Return a checksum of all bits of a tensor and their places (int64 scalar), the same on every device.

    Eight bytes are a word. A word is multiplied by an odd number that belongs to its place in a row of words, and the
    sums of all rows are words again. Integers are added modulo 2^64, so the result does not depend on the order in
    which a device adds, and a change of a single word always changes it. It distinguishes a state that was modified
    from one that was not; it does not protect against someone who wants two states to look equal.
    """
    return folded(row_sums(tensor))[0]


def row_sums(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the sums of all rows of a tensor, in any number of tensors (int64, one dimension)."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.data_ptr() % 8:
        data = data.clone()
    whole = data.numel() // 8 * 8
    pieces = list(data[:whole].view(torch.int64).split(PIECE)) if whole else []
    if whole < data.numel():
        pieces.append(data[whole:].to(torch.int64))
    return [sums for piece in pieces for sums in _rows(piece)]


def folded(sums: Iterable[torch.Tensor]) -> Marks:
    """Return one mark per device, from the sums on that device."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for each in sums:
        by_device.setdefault(each.device, []).append(each)
    return tuple(map(_folded, by_device.values())) or (torch.zeros((), dtype=torch.int64),)


def equal_marks(one: Marks, other: Marks) -> bool:
    """Whether two states have the same marks."""
    return len(one) == len(other) and all(map(torch.equal, one, other))


def _folded(sums: list[torch.Tensor]) -> torch.Tensor:
    while len(words := torch.cat(sums) if len(sums) > 1 else sums[0]) > ROW:
        sums = _rows(words)
    return _sum(words)


def _rows(words: torch.Tensor) -> list[torch.Tensor]:
    """Return the sums of rows of words; the last row may be shorter."""
    whole = len(words) // ROW * ROW
    sums = [_sum(words[:whole].view(-1, ROW))] if whole else []
    return [*sums, _sum(words[None, whole:])] if whole < len(words) else sums


def _sum(words: torch.Tensor) -> torch.Tensor:
    """Return the sums of words, each mixed with its place, over the last dimension."""
    shifted, odd = _factors(words.device)
    length = words.shape[-1]
    return (words ^ shifted[:length]).mul_(odd[:length]).sum(-1)


@cache
def _factors(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two numbers for each place in a row; the second one is odd."""
    factor = torch.arange(1, ROW + 1, device=device) * _ODD
    return factor >> 29, factor | 1
