"""Processes that died: how often in the same place, and what that means for the file in hand."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from onward.service.shown import BUSY
from onward.store.ledger import Ledger
from onward.store.rows import FileRow

LIMIT = 5
"""Times that the process may die in one file without a commit before the file is quarantined."""
PATIENT = 3
"""Times after which the next process waits before it goes on."""


@dataclass(frozen=True)
class Deaths:
    """How many processes died one after another at the same place: after a step, in a file."""

    step: int | None = None
    file: int | None = None
    count: int = 0


@dataclass(frozen=True)
class Crash:
    """How the process before this one ended, if it died: in which state, in which file, and how often in a row."""

    state: str
    row: FileRow | None
    deaths: Deaths

    @property
    def gives_up(self) -> bool:
        """Whether the file in hand is to be quarantined."""
        return self.row is not None and self.deaths.count >= LIMIT and self.state in ("training", "saving")

    @property
    def waits(self) -> float:
        """Seconds to wait before going on, before any bound."""
        return 2.0 ** (self.deaths.count - 2) if self.deaths.count >= PATIENT else 0.0


def find_crash(ledger: Ledger) -> Crash | None:
    """Count a death of the previous process; a commit in between is progress, and so is another file.

    The count is kept by the process after, so that it needs no handler in the one that dies.
    """
    state = str(ledger.get("state"))
    if state not in BUSY:
        ledger.put(died=None)
        return None
    known: dict[str, Any] = ledger.get("died") or {}
    before = Deaths(**known)
    row = next(reversed(ledger.files("training")), None)
    step, file_id = ledger.committed_step(), row.id if row else None
    same = before.step == step and before.file == file_id
    deaths = Deaths(step, file_id, before.count + 1 if same else 1)
    with ledger.transaction():
        ledger.put(died=asdict(deaths))
        ledger.add_event("warning", f"the process before this one died while it was {state}, after step {step}")
    return Crash(state, row, deaths)
