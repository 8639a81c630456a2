"""What arrives while a daemon works: the inbox is scanned, files are moved out of it, large ones checked beside."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Generator

from onward.service.intake.checking import Intake
from onward.service.intake.inbox import POLL_SECONDS, Inbox, Watcher
from onward.service.owner import faults
from onward.service.owner.owned import Owned

MOVED_AT_ONCE = 512
"""Files of the inbox that are taken in one transaction."""
SMALL_FILE = 1 << 20
"""Bytes of a file whose rows may be checked between two steps; larger ones are checked in a process of their own."""
SOON = 0.5
"""Seconds between scans while the inbox is known to hold something."""


class Incoming:
    """Looks after the inbox of one daemon.

    Args:
        inbox: None where nothing is watched; then all of this does nothing.
        start_checker: starts a process that checks what arrived.
    """

    def __init__(
        self,
        owned: Owned,
        intake: Intake,
        inbox: Inbox | None,
        start_checker: Callable[[], subprocess.Popen[bytes]],
    ) -> None:
        self.is_watching = inbox is not None
        self.unsettled = 0
        """Files of the inbox that were still being written when it was last looked at."""
        self.problem: str | None = None
        """Why the inbox cannot be used."""
        self.wake = threading.Event()
        """Set when something changes in the inbox."""
        self._owned = owned
        self._ledger = owned.ledger
        self._intake = intake
        self._inbox = inbox
        self._start_checker = start_checker
        self._checker: subprocess.Popen[bytes] | None = None
        self._scanned = float("-inf")
        self._strange: set[str] = set()

    @contextlib.contextmanager
    def watching(self) -> Generator[None]:
        """Be told of changes in the inbox, and leave no process behind."""
        if self._inbox is None:
            yield
            return
        try:
            with Watcher(self._inbox.folder, self.wake):
                yield
        finally:
            if self._checker is not None:
                self._checker.kill()  # what it had not finished is checked again by the next process
                self._checker.wait()

    def is_due(self) -> bool:
        """Whether the inbox wants to be looked at: something changed or settles, or the last look was long ago."""
        soon = SOON if self.unsettled or self.wake.is_set() else POLL_SECONDS
        return self._inbox is not None and self.seconds_since_scan() >= soon

    def scan(self, *, all_or_none: bool = False) -> None:
        """Move settled files out of the inbox, if it is due.

        Args:
            all_or_none: wait until no file is written any more, so that priority decides and not luck.
        """
        if self._inbox is None or not self.is_due():
            return
        self.wake.clear()
        try:
            self._inbox.settle_seconds = self._owned.settings.current.settle_seconds
            scan = self._inbox.scan()
            self.unsettled = scan.unsettled
            settled = [] if all_or_none and scan.unsettled else scan.settled
            for start in range(0, len(settled), MOVED_AT_ONCE):
                taken = settled[start : start + MOVED_AT_ONCE]
                self._intake.take_inbox(taken)
                self._inbox.forget([path for path, _ in taken])
                self._owned.heartbeat.moved()
                if self._owned.wishes:
                    break
        except OSError as error:
            if faults.is_out_of_space(error):
                raise
            self._report(f"the inbox cannot be used: {error}")
        else:
            self._report(None)
            self._warn_of_strange(scan.strange)
        self._scanned = time.monotonic()

    def seconds_since_scan(self) -> float:
        """Return the seconds since the inbox was last looked at."""
        return time.monotonic() - self._scanned

    def check_beside(self) -> None:
        """Let a large file that arrived be checked in another process while this one trains."""
        if self._inbox is None:
            return
        row = self._ledger.next_arriving()
        if row is not None and row.bytes > SMALL_FILE and not self.is_checking():
            self._checker = self._start_checker()

    def is_checking(self) -> bool:
        """Whether a process checks files beside this one."""
        return self._checker is not None and self._checker.poll() is None

    def _report(self, problem: str | None) -> None:
        if problem == self.problem:
            return
        if problem is not None:
            self._ledger.add_event("error", problem, kind="failed")
        else:
            self._ledger.add_event("info", "the inbox can be used again")
        self.problem = problem

    def _warn_of_strange(self, names: list[str]) -> None:
        for name in sorted(set(names) - self._strange):
            self._ledger.add_event("warning", f"inbox/{name} is left alone: only high/ and low/ are looked into")
        self._strange |= set(names)
