"""Waits for room on the disk; what was trained stays in memory until there is."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import time
from collections.abc import Callable

from onward.service.owner.owned import Owned
from onward.service.shown import IDLE, PAUSED

TICK = 0.1
"""Seconds between two checks of the disk."""


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

    def wait(self, needed: int) -> None:
        """Wait until `needed` bytes and the margin are free, or the current file has to be left."""
        if not self._patient or self._has(needed):
            return
        owned, before = self._owned, self._owned.shown.state
        problem = (
            f"the disk is too full: {self._free() / 1e6:.0f} MB free, {self._with_margin(needed) / 1e6:.0f} MB needed; "
            "goes on by itself"
        )
        owned.shown.set(PAUSED, problem)
        owned.record("warning", problem, "paused")
        while not self._has(needed) and not owned.wishes:
            owned.heartbeat.moved()
            owned.ledger.require_in_place()
            owned.look_at_config()
            self._obey()
            time.sleep(TICK)
        owned.shown.set(before or IDLE)
        with contextlib.suppress(sqlite3.OperationalError):
            owned.ledger.add_event("info", "the disk has room again")

    def _free(self) -> int:
        return shutil.disk_usage(self._owned.layout.root).free

    def _with_margin(self, needed: int) -> int:
        return needed + (self._owned.settings.current.disk_margin_mb << 20)

    def _has(self, needed: int) -> bool:
        return self._free() >= self._with_margin(needed)
