"""Cooldown: steps over rows of every file of the stream, for a release that decays the learning rate to zero.

No file's place is changed: a cooldown is trained on a branch, so its rows are chosen as replayed ones are, and held-out
rows stay held out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from onward.data.order import RowReference, nth_left
from onward.data.permutation import Permutation
from onward.data.replay import Source
from onward.digest import sha256_json


@dataclass(frozen=True)
class CooldownPlan:
    """A plan whose steps go through the rows of all files in one pseudo-random order, again and again.

    Args:
        files: the files of the stream, each content once, with the rows that are held out.
        batch_size: rows of a step.
        steps: optimizer steps.
        key: what the order depends on.
    """

    files: tuple[Source, ...]
    batch_size: int
    steps: int
    key: str

    @property
    def sha256(self) -> str:
        """What stands for the identity of a file in the cursor of the branch."""
        return sha256_json([self.key, [source.sha256 for source in self.files], self.batch_size, self.steps])

    @property
    def sources(self) -> tuple[str, ...]:
        """Every file of the stream."""
        return tuple(source.sha256 for source in self.files)

    def epoch_of(self, step_in_file: int) -> int:
        """Return 0: a cooldown is one pass.

        Raises:
            IndexError: the plan has no such step.
        """
        if not 0 <= step_in_file < self.steps:
            raise IndexError(step_in_file)
        return 0

    def rows_at(self, step_in_file: int) -> list[RowReference]:
        """Return the rows of the 0-based step, in order; no row comes twice before every other came once.

        Raises:
            IndexError: the plan has no such step.
        """
        self.epoch_of(step_in_file)
        first = step_in_file * self.batch_size
        return [self._row(number) for number in range(first, first + self.batch_size)]

    @cached_property
    def needed(self) -> set[str]:
        """The files whose rows the steps really take."""
        return {row.sha256 for step in range(self.steps) for row in self.rows_at(step)}

    def _row(self, number: int) -> RowReference:
        total = self._ends[-1]
        turn, place = divmod(number, total)
        index = Permutation(total, f"onward cooldown 1:{self.key}:{turn}".encode())[place]
        at = bisect_right(self._ends, index)
        source = self.files[at]
        within = index - (self._ends[at - 1] if at else 0)
        return RowReference(source.sha256, nth_left(within, source.held_out))

    @cached_property
    def _ends(self) -> Sequence[int]:
        return list(accumulate(source.trained_rows for source in self.files))
