"""The state of a run as `status` shows it; it is written only here, with what each word means."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from typing import Literal, TypeAlias

from onward.store.ledger import Ledger

RunState: TypeAlias = Literal[
    "idle", "loading", "tokenizing", "training", "saving", "evaluating", "paused", "failed", "stopped"
]
"""The values of the ledger's fact `state`."""

BUSY: tuple[RunState, ...] = ("loading", "tokenizing", "training", "saving", "evaluating")
"""States that only a living process can be in: if there is none, its process died."""

DOING: dict[str, str] = {
    "idle": "waiting for files",
    "loading": "loading the model and the state",
    "tokenizing": "checking and tokenizing files",
    "training": "training",
    "saving": "committing a checkpoint",
    "evaluating": "measuring the model",
    "paused": "paused",
    "failed": "waiting to try again",
    "stopped": "stopped with files left to train",
}
"""What a process in each state does, in words."""

IDLE, STOPPED, PAUSED, FAILED = "idle", "stopped", "paused", "failed"


class Shown:
    """Writes state and problem to the ledger when they change. It does not fail on a full disk."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._last: tuple[str, str | None] | None = None
        self._problem: str | None = None
        self._standing: dict[str, str] = {}
        self.state = ""
        """The state shown last; empty before the first."""

    def set(self, state: str, problem: str | None = None) -> None:
        """Show a state, with a problem or none."""
        self.state, self._problem = state, problem
        self._write()

    def stand(self, subject: str, problem: str | None) -> None:
        """Show a problem with every state that has none of its own, until the subject no longer has one."""
        self._standing = {key: other for key, other in self._standing.items() if key != subject}
        if problem is not None:
            self._standing[subject] = problem
        if self.state:
            self._write()

    def _write(self) -> None:
        shown = (self.state, self._problem or next(iter(self._standing.values()), None))
        if shown == self._last:
            return
        with contextlib.suppress(sqlite3.OperationalError), self._ledger.without_waiting():
            self._ledger.put(state=shown[0], problem=shown[1], shown_by=os.getpid())
            self._last = shown

    def at_rest(self) -> None:
        """Show that no process works on the run, and whether something is left to train."""
        self.set(STOPPED if self._ledger.next_owed() else IDLE)
