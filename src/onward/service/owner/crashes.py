"""Processes that died: how often in the same place, and what that means for the current file."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from onward.service.pauses import pause_after
from onward.service.shown import BUSY
from onward.store.ledger import Ledger
from onward.store.rows import FileRow

DIED = "died"
"""The ledger's fact with the last deaths (`Deaths`); None after a process that ended in order."""
LIMIT = 5
"""How often the process may die in one file without a commit before the file is quarantined."""
PATIENT = 3
"""How many deaths there must be before the next process waits before it continues."""


@dataclass(frozen=True)
class Deaths:
    """How many processes in a row died in the same place: after a step, in a file."""

    step: int | None = None
    file: int | None = None
    count: int = 0

    @classmethod
    def of(cls, ledger: Ledger) -> Deaths:
        """Return the last deaths that the ledger has; none after a process that ended in order."""
        return cls(**(ledger.get(DIED) or {}))


@dataclass(frozen=True)
class Crash:
    """How the previous process died: in which state, in which file, and how often in a row."""

    state: str
    row: FileRow | None
    deaths: Deaths

    @property
    def gives_up(self) -> bool:
        """Whether the current file should be quarantined."""
        return self.row is not None and self.deaths.count >= LIMIT and self.state in ("training", "saving")

    @property
    def waits(self) -> float:
        """Seconds to wait before continuing."""
        return pause_after(self.deaths.count - PATIENT + 1, 2.0) if self.deaths.count >= PATIENT else 0.0


def find_crash(ledger: Ledger) -> Crash | None:
    """Count a death of the previous process; a commit since the last one is progress, and so is another file.

    The next process keeps the count, so that the one that dies needs no handler.
    """
    state = str(ledger.get("state"))
    if state not in BUSY:
        ledger.put(**{DIED: None})
        return None
    before = Deaths.of(ledger)
    row = next(reversed(ledger.files("training")), None)
    step, file_id = ledger.committed_step(), row.id if row else None
    same = before.step == step and before.file == file_id
    deaths = Deaths(step, file_id, before.count + 1 if same else 1)
    with ledger.transaction():
        ledger.put(**{DIED: asdict(deaths)})
        ledger.add_event("warning", f"the process before this one died while it was {state}, after step {step}")
    return Crash(state, row, deaths)
