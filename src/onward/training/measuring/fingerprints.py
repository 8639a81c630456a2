"""Digests of gradients, computed where they are: only a few numbers of each leave a GPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch

from onward.training.state import digest_tensors
from onward.training.transfer import fetch_later

PIECE = 1 << 24
"""How many elements of gradients are mixed at a time on a GPU."""
ROW = 1 << 12
"""How many elements of a gradient are added up together if many are mixed at once."""
_MIXERS = (-7046029254386353131, -4417276706812531889)
"""Odd 64-bit factors (golden ratio, and a prime of xxHash's)."""


class Fingerprints:
    """Computes `fingerprint` for a series of gradients with few launches and waits on a GPU.

    There, small gradients are kept until it pays to mix them together, and the process waits for the device only when
    it asks for the results. If all of this is recorded and replayed, the results are those of the last replay.

    Args:
        home: the type of device whose tensors are digested immediately.
    """

    def __init__(self, home: str = "cpu") -> None:
        self._home = home
        self._found: dict[str, str] = {}
        self._waiting: dict[str, torch.Tensor] = {}
        self._kind: tuple[torch.dtype, torch.device] | None = None
        self._rows = 0
        self._sums: list[tuple[dict[str, int], torch.Tensor]] = []
        """Names with the number of sums of each, and these sums."""

    def add(self, name: str, gradient: torch.Tensor) -> None:
        """Add a gradient, which must not be written to any more."""
        if gradient.device.type == self._home:
            self._found[name] = fingerprint(gradient)
            return
        bits = _integers(gradient)
        if len(bits) > PIECE // 4:
            self._sums.append(({name: 1}, _mixed_sum(bits).reshape(1)))
            return
        kind = bits.dtype, bits.device
        if kind != self._kind or (self._rows + _rows(bits)) * ROW > PIECE:
            self.mix()
        self._waiting[name], self._kind, self._rows = bits, kind, self._rows + _rows(bits)

    def by_name(self) -> dict[str, str]:
        """Return the fingerprints of all gradients."""
        return self.later()()

    def later(self) -> Callable[[], dict[str, str]]:
        """Return a function that waits for the fingerprints and returns them, in any thread, even after a replay."""
        self.mix()
        found, named = dict(self._found), [counts for counts, _ in self._sums]
        read = fetch_later([sums for _, sums in self._sums])

        def by_name() -> dict[str, str]:
            by_now = dict(found)
            for counts, sums in zip(named, read(), strict=True):
                left = iter(sums.tolist())
                by_now |= {name: f"{sum(islice(left, count)) % (1 << 64):016x}" for name, count in counts.items()}
            return by_now

        return by_name

    def mix(self) -> None:
        """Mix the waiting gradients, each in rows of its own, filled up with zeros, which add nothing."""
        bits, counts = list(self._waiting.values()), {name: _rows(each) for name, each in self._waiting.items()}
        if not bits:
            return
        laid_out = bits[0].new_zeros(self._rows * ROW)
        places = laid_out.split([count * ROW for count in counts.values()])
        parts = [place[: len(each)] for place, each in zip(places, bits, strict=True)]
        torch._foreach_copy_(parts, bits)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        self._sums.append((counts, _mixed(laid_out).view(-1, ROW).sum(1)))
        self._waiting, self._rows = {}, 0


def fingerprint(gradient: torch.Tensor) -> str:
    """Return a digest of a tensor's bits, computed on its device: only one number leaves a GPU.

    On a GPU, elements are mixed one by one and added up as integers, whose sum does not depend on the order.
    """
    if gradient.device.type == "cpu":
        return digest_tensors([("", gradient)])
    return f"{mixed_sum(_integers(gradient)):016x}"


def mixed_sum(bits: torch.Tensor) -> int:
    """Return the sum (modulo 2**64) of integers, each mixed so that several changes do not cancel out."""
    return int(_mixed_sum(bits)) % (1 << 64)


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits of a tensor's elements as integers of their size, one dimension."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().reshape(-1).view(width)


def _rows(bits: torch.Tensor) -> int:
    return -(-len(bits) // ROW)


def _mixed_sum(bits: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for piece in bits.split(PIECE):
        total += _mixed(piece).sum()
    return total


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    """Return integers mixed one by one; 0 stays 0."""
    mixed = bits.to(torch.int64) * _MIXERS[0]
    mixed ^= mixed >> 29
    mixed *= _MIXERS[1]
    mixed ^= mixed >> 32
    return mixed
