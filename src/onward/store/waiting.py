"""How a process waits for others that hold the ledger: in short tries, and only for a moment once it should end."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE = 30.0
"""Seconds that one access to the ledger waits for others."""
LAST = 5.0
"""Seconds that all accesses of a process together still wait once it was asked to end."""
TRY = 0.2
"""Seconds of one try in SQLite, after which a signal that came meanwhile is noticed."""

Result = TypeVar("Result")


def _never() -> bool:
    return False


class Waiting:
    """What all connections of a process share: how long they wait, and what is left of that once it should end.

    Args:
        seconds: how long one access waits.
        should_end: whether the process was asked to end; called after every try, in the thread that waits.
        monotonic: seconds that never jump.
    """

    def __init__(
        self,
        seconds: float = PATIENCE,
        *,
        should_end: Callable[[], bool] = _never,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._should_end = should_end
        self._monotonic = monotonic
        self._left = LAST

    def for_others(self, attempt: Callable[[], Result]) -> Result:
        """Return what an access returns; it is tried again while others hold the ledger.

        Time that was spent with anything but waiting counts for nothing: a commit that takes long after a stop still
        waits for another process that writes.

        Raises:
            sqlite3.OperationalError: others held it for too long, or the machine fails.
        """
        began = begins = self._monotonic()
        while True:
            try:
                return attempt()
            except sqlite3.OperationalError as error:
                now = self._monotonic()
                if not is_held_by_others(error) or now - began >= self._seconds:
                    raise
                if self._should_end():
                    self._left -= now - begins
                    if self._left <= 0.0:
                        raise
                begins = now


def is_held_by_others(error: sqlite3.Error) -> bool:
    """Whether SQLite says that somebody else holds the file."""
    return code_of(error) == sqlite3.SQLITE_BUSY


def code_of(error: BaseException) -> int:
    """Return SQLite's primary code of an error; 0 if it has none, as one of the sqlite3 module itself."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
