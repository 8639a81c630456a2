"""The state of a run as `status` shows it: the one place where it is written, and what each word means."""

from __future__ import annotations

import contextlib
import sqlite3

from onward.store.ledger import Ledger

IDLE, STOPPED, PAUSED, FAILED = "idle", "stopped", "paused", "failed"
BUSY = ("loading", "tokenizing", "training", "saving", "evaluating")
"""States of a process at work; a run in one of them that no process owns was stopped by force."""


class Shown:
    """Writes state and problem to the ledger when they change. A full disk is no reason to fail."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._last: tuple[str, str | None] | None = None

    @property
    def state(self) -> str:
        """The state shown last; empty before the first."""
        return self._last[0] if self._last else ""

    def set(self, state: str, problem: str | None = None) -> None:
        """Show a state, and a problem with it or none."""
        if (state, problem) == self._last:
            return
        with contextlib.suppress(sqlite3.OperationalError):
            self._ledger.put(state=state, problem=problem)
            self._last = (state, problem)

    def at_rest(self) -> None:
        """Show that no process works on the run: there is something left to train, or not."""
        self.set(STOPPED if self._ledger.next_owed() else IDLE)
