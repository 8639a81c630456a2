"""The state of a run as `status` shows it: the one place where it is written, and what each word means."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import Literal, TypeAlias

from onward.store.ledger import Ledger

RunState: TypeAlias = Literal[
    "idle", "loading", "tokenizing", "training", "saving", "evaluating", "paused", "failed", "stopped"
]
"""What the ledger's fact `state` may say of a run."""

BUSY: tuple[RunState, ...] = ("loading", "tokenizing", "training", "saving", "evaluating")
"""States that only a living process can be in: found without one, its process died."""

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
"""What a process in a state does, for a person to read."""

IDLE, STOPPED, PAUSED, FAILED = "idle", "stopped", "paused", "failed"


class Shown:
    """Writes state and problem to the ledger when they change. A full disk is no reason to fail."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._last: tuple[str, str | None] | None = None
        self._problem: str | None = None
        self._standing: dict[str, str] = {}
        self.state = ""
        """The state shown last; empty before the first."""

    def set(self, state: str, problem: str | None = None) -> None:
        """Show a state, and a problem with it or none."""
        self.state, self._problem = state, problem
        self._write()

    def stand(self, subject: str, problem: str | None) -> None:
        """Show a problem alongside every state that has none of its own, until its subject has none any more."""
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
            self._ledger.put(state=shown[0], problem=shown[1])
            self._last = shown

    def at_rest(self) -> None:
        """Show that no process works on the run: there is something left to train, or not."""
        self.set(STOPPED if self._ledger.next_owed() else IDLE)
