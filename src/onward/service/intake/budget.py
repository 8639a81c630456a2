"""What may be read before the reading of files ends early: a budget is spent, or a stop is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

SELDOM = 0.2
"""Seconds between two calls of a check that costs more than reading the clock."""


class BudgetSpent(Exception):
    """The current work would exceed its budget; it is left as if it had not been begun."""


@dataclass(frozen=True)
class Budget:
    """How much may be done between two steps of training.

    Args:
        size: bytes that may be read.
        rows: rows that may be checked.
        seconds: how long it may take.
    """

    size: int = 4 << 20
    rows: int = 2_000
    seconds: float = 0.1


class Spending:
    """What is left of a budget while files are read; told of every row and buffer, it raises to end the work.

    Args:
        stop: raises if a stop was asked for.
        budget: None if the work may take any time.
        monotonic: seconds that never jump.
    """

    def __init__(
        self,
        stop: Callable[[], None] = lambda: None,
        budget: Budget | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.is_bounded = budget is not None
        self._stop = stop
        self._monotonic = monotonic
        self._rows_left = budget.rows if budget else 0
        self._bytes_left = budget.size if budget else 0
        self._ends = monotonic() + budget.seconds if budget else float("inf")

    def spend_row(self) -> None:
        """Account for one row or buffer.

        Raises:
            BudgetSpent: there is no time or no row left.
        """
        self._stop()
        if not self.is_bounded:
            return
        self._rows_left -= 1
        if self._rows_left < 0 or self._monotonic() >= self._ends:
            raise BudgetSpent

    def spend_bytes(self, count: int) -> None:
        """Account for bytes before they are read.

        Raises:
            BudgetSpent: not that many bytes are left, or no time.
        """
        self._stop()
        if not self.is_bounded:
            return
        if count > self._bytes_left or self._monotonic() >= self._ends:
            raise BudgetSpent
        self._bytes_left -= count


def at_intervals(*checks: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls checks at most every `SELDOM` seconds, however often it is called itself."""
    due = time.monotonic()

    def call() -> None:
        nonlocal due
        now = time.monotonic()
        if now >= due:
            due = now + SELDOM
            for check in checks:
                check()

    return call
