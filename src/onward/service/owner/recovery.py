"""Waits after a failure of the machine, of the config, or of the previous process."""

from __future__ import annotations

import sqlite3
import time

from onward.errors import OnwardError
from onward.service.owner import faults
from onward.service.owner.crashes import DIED, LIMIT, Crash
from onward.service.owner.owned import Owned
from onward.service.pauses import pause_after
from onward.service.shown import FAILED, PAUSED

TICK = 0.05
"""Seconds between two checks of what may end the wait."""
FULL_DISK = 2.0
"""Seconds between two tries while the disk is full."""


class Recovery:
    """Counts failures in a row and waits longer after each.

    While a disk is full, the next one comes after two seconds, for a night perhaps: `status` shows each, but events,
    log and notifications have only the first of its kind, the 2nd, 4th, 8th and so on.

    Args:
        crash: how the previous process died, if it did.
    """

    def __init__(self, owned: Owned, crash: Crash | None) -> None:
        self._owned, self._crash = owned, crash
        self._failures = 0
        self._told: set[tuple[type[Exception], int | None]] = set()

    def succeeded(self) -> None:
        """Note that something succeeded: the next failure counts as the first one again."""
        self._failures = 0
        self._told.clear()

    def outlive(self, error: Exception, *, full: bool) -> None:
        """Report what failed and wait; a repaired config or a wish ends the wait.

        Args:
            full: whether it failed because the disk takes no more.
        """
        self._failures += 1
        seconds = FULL_DISK if full else pause_after(self._failures)
        place = f" [{error.where}]" if isinstance(error, OnwardError) and error.where else ""
        again = f"tried again in {seconds:.0f} s (failure {self._failures} in a row)"
        what = faults.describe(error)
        if full and isinstance(error, sqlite3.OperationalError):
            what = "the ledger cannot be written: the disk is full, or a quota is used up"
        problem = f"{what}{place}; {again}"
        self._owned.shown.set(PAUSED if full else FAILED, problem)
        kind = (type(error), getattr(error, "errno", None))
        is_power_of_two = self._failures & (self._failures - 1) == 0
        if is_power_of_two or kind not in self._told:
            self._told.add(kind)
            self._owned.record("error", problem, "failed")
        self._rest(seconds)

    def after_death(self) -> None:
        """Wait longer after each death in the same place, then give up the current file; once in a process."""
        crash = self._crash
        if crash is None:
            return
        owned, deaths = self._owned, crash.deaths
        row = owned.ledger.file(crash.row.id) if crash.row else None
        given_up = (
            row if crash.gives_up and row is not None and row.state == "training" else None
        )  # unless skipped since
        doubt = faults.doubt_of(owned.ledger, given_up) if given_up is not None else None
        if given_up is not None and doubt is None:
            reason = f"the process died {deaths.count} times in this file without getting past step {deaths.step}"
            faults.quarantine(owned.layout, owned.ledger, given_up, reason)
            owned.ledger.put(**{DIED: None})
        elif crash.waits:
            problem = f"the process died {deaths.count} times after step {deaths.step}; goes on in {crash.waits:.0f} s"
            if doubt is not None:
                problem = f"{problem}; {doubt}"
                if deaths.count == LIMIT:
                    owned.record("error", problem, "failed")
            owned.shown.set(FAILED, problem)
            self._rest(crash.waits)
        self._crash = None

    def _rest(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and not self._owned.wishes.pending:
            self._owned.while_waiting()
            self._owned.ledger.require_own_release()
            if self._owned.look_at_config():
                return
            time.sleep(TICK)
