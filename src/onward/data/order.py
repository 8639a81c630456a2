"""The order of rows as a pure function of (seed, file, epoch): nothing to save or to lose, O(1) to seek.

A permutation of any size comes from a Feistel network on the next power of two with cycle walking: apply it again
until the value falls inside the range (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The rounds
are xxh3, whose values are fixed by its specification; the streams of numpy and torch generators are not.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple, Protocol

import xxhash

if TYPE_CHECKING:
    from onward.config import Config

ROUNDS = 8
TABLE_SIZE = 64  # below this a Feistel network has too few bits to mix well; a sorted table is small and unbiased


class Permutation:
    """A pseudo-random bijection of `range(size)` in constant memory.

    Args:
        size: the number of elements, at least 0.
        key: what selects the permutation; equal keys always give equal permutations, on every machine.
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


@lru_cache(maxsize=16)
def row_order(seed: int, sha256: str, epoch: int, rows: int, occurrence: int = 0) -> Permutation:
    """Return the order in which epoch `epoch` (0-based) of the file with hash `sha256` visits its `rows` rows.

    A file that is trained again (`occurrence` 1 and up) is visited in another order; 0 is the first training.
    """
    if occurrence == 0:
        return Permutation(rows, f"onward row order 1:{seed}:{sha256}:{epoch}".encode())
    return Permutation(rows, f"onward row order 2:{seed}:{sha256}:{epoch}:{occurrence}".encode())


class RowReference(NamedTuple):
    """One row of the stream: the SHA-256 of its file and its 0-based index among the file's tokenized rows."""

    sha256: str
    row: int


class Plan(Protocol):
    """Which rows each step trains on, from one file or from several.

    Whoever keeps tokens, trains, rebuilds or verifies asks the plan; it is a pure function of what it was made from.
    """

    @property
    def sha256(self) -> str:
        """Identity of the file whose position in the stream the steps belong to."""
        ...

    @property
    def sources(self) -> tuple[str, ...]:
        """The SHA-256 of every file that a step may take rows from, each once."""
        ...

    @property
    def steps(self) -> int:
        """Optimizer steps that the plan takes."""
        ...

    def epoch_of(self, step_in_file: int) -> int:
        """Return the 0-based epoch that the 0-based step belongs to.

        Raises:
            IndexError: the plan has no such step.
        """
        ...

    def rows_at(self, step_in_file: int) -> list[RowReference]:
        """Return the rows of the 0-based step, in order; costs the same for every step.

        Raises:
            IndexError: the plan has no such step.
        """
        ...


@dataclass(frozen=True)
class FilePlan:
    """The plan of one file alone.

    Every epoch visits every row once. The last batch of an epoch may be smaller, and batches never span two epochs.

    Args:
        sha256: identity of the file.
        rows: rows in the file, at least 1.
        batch_size: rows per optimizer step, at least 1.
        epochs: passes over the file, at least 1.
        seed: the run's seed.
        occurrence: how often the stream had the same content before; each time has an order of its own.
    """

    sha256: str
    rows: int
    batch_size: int
    epochs: int
    seed: int
    occurrence: int = 0

    def __post_init__(self) -> None:
        assert self.rows >= 1, self.rows
        assert self.batch_size >= 1, self.batch_size
        assert self.epochs >= 1, self.epochs
        assert self.occurrence >= 0, self.occurrence

    @property
    def sources(self) -> tuple[str, ...]:
        """The file itself."""
        return (self.sha256,)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the last one may have fewer rows."""
        return -(-self.rows // self.batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps that the whole file takes."""
        return self.steps_per_epoch * self.epochs

    def epoch_of(self, step_in_file: int) -> int:
        """Return the 0-based epoch that the 0-based step belongs to.

        Raises:
            IndexError: the file has no such step.
        """
        if not 0 <= step_in_file < self.steps:
            raise IndexError(step_in_file)
        return step_in_file // self.steps_per_epoch

    def rows_at(self, step_in_file: int) -> list[RowReference]:
        """Return the rows of the 0-based step, in order; costs the same for every step.

        Raises:
            IndexError: the file has no such step.
        """
        order = row_order(self.seed, self.sha256, self.epoch_of(step_in_file), self.rows, self.occurrence)
        first = step_in_file % self.steps_per_epoch * self.batch_size
        last = min(first + self.batch_size, self.rows)
        return [RowReference(self.sha256, order[index]) for index in range(first, last)]


def make_plan(sha256: str, rows: int, config: Config, occurrence: int = 0) -> FilePlan:
    """Return which rows each step of a file trains under a config."""
    return FilePlan(sha256, rows, config.batch_size, config.epochs, config.seed, occurrence)


def rows_digest(rows: Sequence[RowReference], sources: Sequence[str]) -> str:
    """Return 16 hex digits that stand for the rows of a step in their order, as the ledger records them.

    Args:
        rows: the rows.
        sources: the sources of their plan. If there is only one, the digest is the xxh3-64 of the indices as
            little-endian int64; if there are several, each index is preceded by the hash of its file.
    """
    if len(sources) == 1:
        return xxhash.xxh3_64_hexdigest(struct.pack(f"<{len(rows)}q", *(row.row for row in rows)))
    digest = xxhash.xxh3_64()
    for row in rows:
        digest.update(f"{row.sha256}:".encode() + struct.pack("<q", row.row))
    return digest.hexdigest()
