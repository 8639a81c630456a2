"""Accepts a quarantined file: it is queued again, and the guard lets it pass."""

from __future__ import annotations

from onward.errors import DamagedState, UsageError
from onward.layout import RunLayout
from onward.store.ledger import Ledger
from onward.store.lookup import find_file


def accept(layout: RunLayout, ledger: Ledger, name: str) -> str:
    """Put a quarantined file at the end of the queue, exempt from the guard; return its name.

    Args:
        name: the file's name or a prefix of its hash.

    Raises:
        UsageError: no such file is quarantined, or the stream has its content meanwhile.
        DamagedState: its original is gone from the archive.
    """
    row = find_file(ledger, name, "quarantined")
    original = layout.kept(row.copy)
    if not original.is_file():
        raise DamagedState(f"the original of {row.name} is gone", where=original, hint="Add the file again.")
    with ledger.transaction():
        twin = ledger.holding(row.sha256)
        if twin is not None and twin.id != row.id:
            place = f"file {twin.position}" if twin.position else twin.state
            raise UsageError(f"the content of {row.name} is already in the stream", where=f"{twin.name} ({place})")
        values = row.kept() | {"accepted": 1, "again": 1, "occurrence": ledger.next_occurrence(row.sha256)}
        ledger.insert_file(**values, state="queued")
        ledger.move_file(row.id, "undone", note="accepted by an operator")
        ledger.add_event("info", f"{row.name} accepted: it is queued again, and the guard lets it pass")
    return row.name
