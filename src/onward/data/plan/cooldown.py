"""Cooldown: steps over rows of every file of the stream, for a release that decays the learning rate to zero.

No file's place changes: a cooldown is trained on a branch, so its rows are chosen as replayed ones are, and held-out
rows stay held out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from onward.data.plan.order import RowReference
from onward.data.plan.replay import Pool, Source
from onward.digest import sha256_json


@dataclass(frozen=True)
class CooldownPlan:
    """A plan whose steps go through the rows of all files in one pseudo-random order, again and again.

    Args:
        files: the files of the stream with the rows that are held out; each content once.
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
        """What the cursor of the branch has in place of a file's SHA-256."""
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
        """Return the rows of the 0-based step, in order; no row repeats before every other has come once.

        Raises:
            IndexError: the plan has no such step.
        """
        self.epoch_of(step_in_file)
        first = step_in_file * self.batch_size
        key = f"onward cooldown 1:{self.key}"
        return [self._pool.in_turn(number, key) for number in range(first, first + self.batch_size)]

    @cached_property
    def needed(self) -> set[str]:
        """The files that the steps actually take rows from."""
        return {row.sha256 for step in range(self.steps) for row in self.rows_at(step)}

    @cached_property
    def _pool(self) -> Pool:
        return Pool(self.files)
