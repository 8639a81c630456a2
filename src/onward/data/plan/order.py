"""The order of rows as a pure function of (seed, file, epoch): nothing to save or to lose, O(1) to seek."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

import xxhash

from onward.data.plan.holdout import count_held_out, held_out_rows
from onward.data.plan.permutation import Permutation

if TYPE_CHECKING:
    from onward.config import Config


@lru_cache(maxsize=16)
def row_order(seed: int, sha256: str, epoch: int, rows: int, occurrence: int = 0) -> Permutation:
    """Return the order in which epoch `epoch` (0-based) of the file with hash `sha256` visits its `rows` rows.

    A file that is trained again (`occurrence` 1 and up) gets another order; 0 is the first training.
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

    Everything that keeps tokens, trains, rebuilds or verifies asks the plan, a pure function of what it was made from.
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

    Every epoch visits every row that is not held out once. The last batch of an epoch may be smaller, and no batch
    spans two epochs.

    Args:
        sha256: identity of the file.
        rows: rows in the file, at least 1.
        batch_size: rows per optimizer step, at least 1.
        epochs: passes over the file, at least 1.
        seed: the run's seed.
        occurrence: how often the stream had the same content before; each occurrence has an order of its own.
        held_out: indices of the rows that are never trained, in rising order.
    """

    sha256: str
    rows: int
    batch_size: int
    epochs: int
    seed: int
    occurrence: int = 0
    held_out: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert self.trained_rows >= 1, (self.rows, self.held_out)
        assert self.batch_size >= 1, self.batch_size
        assert self.epochs >= 1, self.epochs
        assert self.occurrence >= 0, self.occurrence

    @property
    def sources(self) -> tuple[str, ...]:
        """The file itself."""
        return (self.sha256,)

    @property
    def trained_rows(self) -> int:
        """Rows that every epoch visits."""
        return self.rows - len(self.held_out)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the last one may have fewer rows."""
        return -(-self.trained_rows // self.batch_size)

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
        order = row_order(self.seed, self.sha256, self.epoch_of(step_in_file), self.trained_rows, self.occurrence)
        first = step_in_file % self.steps_per_epoch * self.batch_size
        last = min(first + self.batch_size, self.trained_rows)
        return [RowReference(self.sha256, nth_left(order[index], self.held_out)) for index in range(first, last)]


def nth_left(index: int, held_out: Sequence[int]) -> int:
    """Return the row at an index among those that are not held out; `held_out` is in rising order."""
    return index + bisect_right(range(len(held_out)), index, key=lambda place: held_out[place] - place)


def make_plan(sha256: str, rows: int, config: Config, occurrence: int = 0) -> FilePlan:
    """Return the plan of a file under a config, with rows from this file alone."""
    held_out = held_out_rows(config.seed, sha256, rows, count_held_out(rows, config.holdout))
    return FilePlan(sha256, rows, config.batch_size, config.epochs, config.seed, occurrence, held_out)


def rows_digest(rows: Sequence[RowReference], sources: Sequence[str]) -> str:
    """Return 16 hex digits that identify the rows of a step in their order, as the ledger records them.

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
