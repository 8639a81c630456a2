"""Permutations of any size in constant memory, equal on every machine.

A permutation of any size comes from a Feistel network on the next power of two with cycle walking: apply it again
until the value falls inside the range (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The rounds
are xxh3, whose values are fixed by its specification; the streams of numpy and torch generators are not.
"""

from __future__ import annotations

import struct
from hashlib import blake2b

import xxhash

ROUNDS = 8
TABLE_SIZE = 64  # below this a Feistel network has too few bits to mix well; a sorted table is small and unbiased


class Permutation:
    """A pseudo-random bijection of `range(size)` in constant memory.

    Args:
        size: the number of elements, at least 0.
        key: selects the permutation; equal keys always give equal permutations, on every machine.
    """

    def __init__(self, size: int, key: bytes) -> None:
        assert size >= 0, size
        self._size = size
        digest = blake2b(key, digest_size=8 * ROUNDS).digest()
        self._round_keys: tuple[int, ...] = struct.unpack(f"<{ROUNDS}Q", digest)
        bits = max(size - 1, 1).bit_length()
        self._low_bits = bits // 2
        self._low_mask = (1 << self._low_bits) - 1
        self._high_mask = (1 << (bits - self._low_bits)) - 1
        self._table = self._sorted_table() if size <= TABLE_SIZE else None

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        """Return the element at `index`.

        Raises:
            IndexError: `index` is outside `range(size)`; negative indices are not supported.
        """
        if not 0 <= index < self._size:
            raise IndexError(index)
        if self._table is not None:
            return self._table[index]
        value = self._network(index)
        while value >= self._size:
            value = self._network(value)
        return value

    def _network(self, value: int) -> int:
        low, high = value & self._low_mask, value >> self._low_bits
        for turn, round_key in enumerate(self._round_keys):
            if turn % 2:
                high ^= _hash(low, round_key) & self._high_mask
            else:
                low ^= _hash(high, round_key) & self._low_mask
        return high << self._low_bits | low

    def _sorted_table(self) -> list[int]:
        return sorted(range(self._size), key=lambda value: (_hash(value, self._round_keys[0]), value))


def _hash(value: int, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(value.to_bytes(8, "little"), seed=seed)
