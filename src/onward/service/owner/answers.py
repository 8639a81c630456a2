"""Answers: the outcome of each wish, recorded in the ledger once, together with what it changed."""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable

from onward.service.wishes import ENDED_FIRST, FAILED_FIRST, Wish, Wishes
from onward.store.ledger import Ledger


class Answers:
    """Answers wishes in their order. Answers that do not fit a full disk are written later."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._unwritten: deque[Callable[[], None]] = deque()

    def give(self, wish: Wish, answer: str, note: Callable[[], None] = lambda: None) -> None:
        """Answer a wish, in one transaction with `note`, which writes to the ledger what changed.

        Nobody waits for the answer to a wish that came by signal or from a caller of the library.
        """

        def write() -> None:
            note()
            if wish.request is not None:
                self._ledger.acknowledge(wish.request, answer)

        self._unwritten.append(write)
        self.write()

    def write(self) -> None:
        """Write the answers that are not written yet, as far as the disk has room."""
        while self._unwritten:
            try:
                with self._ledger.transaction():
                    self._unwritten[0]()
            except sqlite3.OperationalError:
                return
            self._unwritten.popleft()

    def close(self, wishes: Wishes, failure: str | None) -> None:
        """Answer all open wishes when the process ends: the stop that ended it, and everything after it.

        Args:
            failure: why the process ends, unless it was asked to or has nothing left to do.
        """
        self.write()
        at = f"at step {self._ledger.committed_step()}"
        while (wish := wishes.take()) is not None:
            if failure is not None:
                self.give(wish, f"{FAILED_FIRST}, {at}: {failure}")
            elif wish.kind == "stop":
                self.give(wish, f"stopped {at}")
            else:
                self.give(wish, f"{ENDED_FIRST}, {at}")
