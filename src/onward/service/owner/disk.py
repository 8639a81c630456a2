"""Waits for room on the disk; what was trained stays in memory until there is."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import time
from collections.abc import Callable

from onward.atomic import can_be_written, why_less
from onward.errors import is_out_of_space
from onward.service.owner.owned import Owned
from onward.service.shown import IDLE, PAUSED

TICK = 0.1
"""Seconds between two checks of the disk."""
TRIALS = 2.0
"""Seconds between two trial files on a disk that refused to be written."""
ENTRY = 1 << 16
"""Bytes of a trial file that stands for an entry in the ledger."""


class DiskRoom:
    """Pauses training while the disk has no room for the next checkpoint and the margin of the config.

    Args:
        patient: False for a process that does not wait: the write itself then fails with an explanation.
        obey: called while it waits, to do what is possible without leaving the file; may raise `Stopped`.
    """

    def __init__(
        self,
        owned: Owned,
        patient: bool,
        obey: Callable[[], None],
    ) -> None:
        self._owned = owned
        self._patient = patient
        self._obey = obey
        self._tries_at: float | None = None

    def refused(self, error: Exception) -> bool:
        """Return whether an error says that the disk takes no more. Then it is believed to have room after a trial.

        SQLite calls a quota that is used up an error of the disk.
        """
        unclear, root = isinstance(error, sqlite3.OperationalError), self._owned.layout.root
        if not (is_out_of_space(error) or (unclear and not can_be_written(root, ENTRY))):
            return False
        self._tries_at = time.monotonic()
        return True

    def wait(self, needed: int) -> None:
        """Wait until `needed` bytes and the margin are free, or the current file has to be left."""
        if not self._patient or self._has(needed):
            return
        owned, before = self._owned, self._owned.shown.state
        free, wanted = self._free(), self._with_margin(needed)
        less = f", but less can be written: {why_less(owned.layout.root)}" if free >= wanted else ""
        problem = (
            f"the disk is too full: {free / 1e6:.0f} MB free{less}, {wanted / 1e6:.0f} MB needed; goes on by itself"
        )
        owned.shown.set(PAUSED, problem)
        owned.record("warning", problem, "paused")
        while not (has_room := self._has(needed)) and not owned.wishes:
            owned.while_waiting()
            owned.ledger.require_own_release()
            owned.look_at_config()
            self._obey()
            time.sleep(TICK)
        owned.shown.set(before or IDLE)
        if has_room:
            with contextlib.suppress(sqlite3.OperationalError):
                owned.ledger.add_event("info", "the disk has room again")

    def _free(self) -> int:
        return shutil.disk_usage(self._owned.layout.root).free

    def _with_margin(self, needed: int) -> int:
        return needed + (self._owned.settings.current.disk_margin_mb << 20)

    def _has(self, needed: int) -> bool:
        if self._free() < self._with_margin(needed):
            return False
        if self._tries_at is not None and time.monotonic() >= self._tries_at:
            took = can_be_written(self._owned.layout.root, max(ENTRY, needed))
            self._tries_at = None if took else time.monotonic() + TRIALS
        return self._tries_at is None
