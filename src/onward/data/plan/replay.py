"""Replay: rows of earlier files in the steps of a new one, chosen by a pure function of seed, stream and step.

Experience replay is the oldest remedy for forgetting, and small shares do most of the work: 1 % in Scialom et al.
("Fine-tuned Language Models are Continual Learners", 2022), 1-5 % for a weak shift of the data and up to 50 % for a
strong one in Ibrahim et al. ("Simple and Scalable Strategies to Continually Pre-train Large Language Models", 2024).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from typing import TypeAlias

import xxhash

from onward.data.plan.holdout import exact
from onward.data.plan.order import FilePlan, RowReference, nth_left
from onward.data.plan.permutation import Permutation


@dataclass(frozen=True)
class Source:
    """An earlier file of the stream.

    Args:
        rows: rows in the file.
        held_out: indices of the rows that are never trained, in rising order.
        weight: how often its rows are drawn: the share of this file is its weight over the sum of all weights.
    """

    sha256: str
    rows: int
    held_out: tuple[int, ...] = ()
    weight: float = 1.0

    @property
    def trained_rows(self) -> int:
        """Rows that may be replayed."""
        return self.rows - len(self.held_out)


@dataclass(frozen=True)
class Pool:
    """The trainable rows of several files, as one sequence.

    Args:
        files: each content once, with the rows that are held out.
    """

    files: tuple[Source, ...]

    @cached_property
    def ends(self) -> Sequence[int]:
        """The index after the last row of each file."""
        return list(accumulate(source.trained_rows for source in self.files))

    def row(self, index: int) -> RowReference:
        """Return the row at an index."""
        place = bisect_right(self.ends, index)
        source = self.files[place]
        within = index - (self.ends[place - 1] if place else 0)
        return RowReference(source.sha256, nth_left(within, source.held_out))

    def in_turn(self, number: int, key: str) -> RowReference:
        """Return a row by number in the order that a key selects; no row repeats before every other has come once."""
        turn, place = divmod(number, self.ends[-1])
        return self.row(Permutation(self.ends[-1], f"{key}:{turn}".encode())[place])


@dataclass(frozen=True)
class ReplayPlan:
    """The plan of a file whose steps have rows of earlier files in addition to their own.

    Up to each step there are `share` times as many replayed rows as rows of the file, rounded down: 0.05 of batches
    of 8 rows is one row in every second or third step.

    Args:
        own: the plan of the file alone; its steps stay as they are.
        earlier: the files of the stream before it, in their order, each content once.
        share: replayed rows per row of the file, above 0.
        weighted: draw files by weight, with replacement; otherwise go through all rows of all files in an order of
            their own, so that no row repeats before every other has come once.
        key: what the choice depends on in addition to the step: the seed and the stream up to and including the file.
    """

    own: FilePlan
    earlier: tuple[Source, ...]
    share: float
    weighted: bool
    key: str

    @property
    def sha256(self) -> str:
        """Identity of the file whose position in the stream the steps belong to."""
        return self.own.sha256

    @property
    def rows(self) -> int:
        """Rows of the file."""
        return self.own.rows

    @property
    def trained_rows(self) -> int:
        """Rows of the file that every epoch visits."""
        return self.own.trained_rows

    @property
    def held_out(self) -> tuple[int, ...]:
        """Rows of the file that are never trained."""
        return self.own.held_out

    @property
    def epochs(self) -> int:
        """Passes over the file."""
        return self.own.epochs

    @property
    def sources(self) -> tuple[str, ...]:
        """The file itself and every file that rows may come from."""
        return self._sources

    @property
    def steps(self) -> int:
        """Optimizer steps; as many as without replay."""
        return self.own.steps

    def epoch_of(self, step_in_file: int) -> int:
        """Return the 0-based epoch of the 0-based step.

        Raises:
            IndexError: the plan has no such step.
        """
        return self.own.epoch_of(step_in_file)

    def rows_at(self, step_in_file: int) -> list[RowReference]:
        """Return the rows of the 0-based step: those of the file in their order, then the replayed ones.

        Raises:
            IndexError: the plan has no such step.
        """
        return [*self.own.rows_at(step_in_file), *self.replayed_at(step_in_file)]

    def replayed_at(self, step_in_file: int) -> list[RowReference]:
        """Return the replayed rows of the 0-based step.

        Raises:
            IndexError: the plan has no such step.
        """
        first, last = self._replayed_before(step_in_file), self._replayed_before(step_in_file + 1)
        return [self._drawn(number) for number in range(first, last)]

    def needed(self, first_step: int = 0) -> set[str]:
        """Return those of `sources` that the steps from `first_step` on actually take rows from."""
        replayed = (self.replayed_at(step) for step in range(first_step, self.steps))
        return {self.sha256, *(row.sha256 for rows in replayed for row in rows)}

    def _replayed_before(self, step: int) -> int:
        """Return how many rows are replayed before `step`."""
        epochs, within = divmod(step, self.own.steps_per_epoch)
        rows = epochs * self.trained_rows + min(within * self.own.batch_size, self.trained_rows)
        return int(rows * self._exact_share)

    @cached_property
    def _sources(self) -> tuple[str, ...]:
        return (self.sha256, *(source.sha256 for source in self.earlier))

    @cached_property
    def _exact_share(self) -> Fraction:
        return exact(self.share)

    def _drawn(self, number: int) -> RowReference:
        if not self.weighted:
            return self._pool.in_turn(number, self.key)
        shares = self._shares
        at = _hash(f"{self.key}:{number}:file") / 2**64 * shares[-1]
        source = min(bisect_right(shares, at), len(shares) - 1)
        within = _hash(f"{self.key}:{number}:row") % self.earlier[source].trained_rows
        return self._pool.row((self._pool.ends[source - 1] if source else 0) + within)

    @cached_property
    def _pool(self) -> Pool:
        return Pool(self.earlier)

    @cached_property
    def _shares(self) -> Sequence[float]:
        return list(accumulate(source.weight for source in self.earlier))


StreamPlan: TypeAlias = FilePlan | ReplayPlan
"""The plan of a file of the stream."""


def replayed_of(plan: StreamPlan, step_in_file: int) -> list[RowReference]:
    """Return the replayed rows of the 0-based step of any plan."""
    return plan.replayed_at(step_in_file) if isinstance(plan, ReplayPlan) else []


def needed_by(plan: StreamPlan, first_step: int = 0) -> set[str]:
    """Return the files that the steps of any plan take rows from, from `first_step` on."""
    return plan.needed(first_step) if isinstance(plan, ReplayPlan) else {plan.sha256}


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())
