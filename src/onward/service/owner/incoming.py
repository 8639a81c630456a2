"""Takes in files that arrive while a daemon works: small ones between its steps, others in a second process.

Between two steps only a limited amount of work is done. A file that needs more is left untouched, and a process of its
own reads, moves and checks it; it got its place in the queue when it was first seen.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Generator

from onward.data.files.formats import PACKED
from onward.errors import is_out_of_space
from onward.service.intake.arrivals import TOGETHER
from onward.service.intake.budget import Budget
from onward.service.intake.checking import Intake
from onward.service.intake.inbox import STUCK, Inbox, describe_stuck
from onward.service.intake.watcher import POLL_SECONDS, Watcher
from onward.service.owner.alongside.checker import Checker
from onward.service.owner.owned import Owned
from onward.store.rows import FileRow
from onward.text import printable

SMALL_FILE = 1 << 20
"""The most bytes of a file that may be checked between two steps; a larger one is left to a process of its own."""
SECONDS = 1.0
"""Time for checking files between two files that are trained."""
SOON, AT_ONCE = 0.5, 0.05
"""The fewest seconds between scans: while a file in the inbox is not settled, and after a change."""
SHARE = 20.0
"""The distance between scans in durations of a scan, so that scanning takes a twentieth of the time."""


class Incoming:
    """Takes care of the inbox of one daemon.

    Args:
        inbox: None if nothing is watched; then all files that arrived are checked in this process.
        start_checker: starts a process that checks what arrived.
    """

    def __init__(
        self,
        owned: Owned,
        intake: Intake,
        inbox: Inbox | None,
        start_checker: Callable[[], subprocess.Popen[bytes]],
    ) -> None:
        self.unsettled = 0
        """How many files of the inbox were still being written when last looked at."""
        self._owned = owned
        self._ledger = owned.ledger
        self._intake = intake
        self._inbox = inbox
        self._checker = Checker(owned.ledger, start_checker)
        self._changed = threading.Event()
        self._inbox_problem: str | None = None
        self._scanned = float("-inf")
        self._scan_took = 0.0
        self._strange: set[str] = set()
        self._too_much: set[int] = set()
        self._told: str | None = None
        self._has_taken_intents = False

    @property
    def is_watching(self) -> bool:
        """Whether there is an inbox to watch."""
        return self._inbox is not None

    @property
    def problem(self) -> str | None:
        """Why files cannot be taken in, if they cannot."""
        return self._inbox_problem or describe_stuck(self._ledger.get(STUCK, {})) or self._checker.problem

    @contextlib.contextmanager
    def watching(self) -> Generator[None]:
        """Receive changes of the inbox in the body, and leave no process behind."""
        if self._inbox is None:
            yield
            return
        try:
            with Watcher(self._inbox.folder, self._changed.set):
                yield
        finally:
            self._checker.end()

    @property
    def knows_all(self) -> bool:
        """Whether the inbox could be looked at, and no file in it was still being written."""
        return not self.unsettled and self._inbox_problem is None

    def has_changed(self) -> bool:
        """Whether something changed in the inbox since it was last looked at."""
        return self._changed.is_set()

    def is_due(self) -> bool:
        """Whether to scan the inbox now: something changed or is settling, or the last scan was long ago."""
        if self._inbox is None:
            return False
        pause = AT_ONCE if self._changed.is_set() else SOON if self.unsettled else POLL_SECONDS
        return self.seconds_since_scan() >= max(pause, SHARE * self._scan_took)

    def seconds_since_scan(self) -> float:
        """Return the seconds since the inbox was last looked at."""
        return time.monotonic() - self._scanned

    def is_checking(self) -> bool:
        """Whether a second process checks files."""
        return self._checker.is_running()

    def take_in(self, *, between_steps: bool = False, all_or_none: bool = False) -> None:
        """Look at the inbox if it is due, take in what is small, and leave the rest to a second process.

        Args:
            between_steps: keep to a budget, because a step waits.
            all_or_none: take nothing until no file is being written, so that the order depends on priority and not on
                luck.
        """
        self._checker.is_running()
        self._take_intents(between_steps)
        self._scan(between_steps, all_or_none)
        budget = Budget() if between_steps else None
        if self._inbox is not None and self._inbox_problem is None:
            self._bring_in(budget)
        self._report(self.problem)
        if self._ledger.next_arriving() is None:
            return
        seconds = Budget.seconds if between_steps else SECONDS
        row = self._intake.check_ahead(seconds=seconds, budget=budget, leaves=self._is_too_much)
        self._owned.heartbeat.moved()
        if row is None or self._inbox is None:
            return
        self._too_much.add(row.id)
        self._checker.start()
        self._report(self.problem)

    def _take_intents(self, between_steps: bool) -> None:
        """Take in files of commands that were killed before they had read them; done once."""
        if self._inbox is None or between_steps or self._has_taken_intents:
            return
        self._intake.take_intents()  # refusals become events
        self._has_taken_intents = True

    def _is_too_much(self, row: FileRow) -> bool:
        if self._inbox is None:
            return False
        return row.bytes > SMALL_FILE or row.name.lower().endswith(PACKED) or row.id in self._too_much

    def _scan(self, between_steps: bool, all_or_none: bool) -> None:
        """Give settled files of the inbox their places in the queue."""
        if self._inbox is None or not self.is_due():
            return
        self._changed.clear()
        begun = time.monotonic()
        with self._reporting():
            self._inbox.settle_seconds = self._owned.settings.current.settle_seconds
            scan = self._inbox.scan({row.inbox for row in self._ledger.announced()})
            self.unsettled = scan.unsettled
            settled = [] if all_or_none and scan.unsettled else scan.settled
            self._intake.announce(settled[:TOGETHER] if between_steps else settled)
            self._warn_of_strange(scan.strange)
            self._inbox_problem = None
        self._scanned = time.monotonic()
        self._scan_took = self._scanned - begun

    def _bring_in(self, budget: Budget | None) -> None:
        with self._reporting():
            while self._intake.bring_in(budget, self._is_too_much) and budget is None:
                self._owned.heartbeat.moved()
                if self._owned.wishes:
                    return

    @contextlib.contextmanager
    def _reporting(self) -> Generator[None]:
        """Record what keeps the inbox from being used; it is tried again later."""
        try:
            yield
        except OSError as error:
            if is_out_of_space(error):
                raise
            self._inbox_problem = printable(f"the inbox cannot be used: {error}")

    def _report(self, problem: str | None) -> None:
        self._owned.shown.stand("inbox", problem)
        if problem == self._told:
            return
        if problem is not None:
            self._ledger.add_event("error", problem, kind="failed")
        else:
            self._ledger.add_event("info", "files can be taken in again")
        self._told = problem

    def _warn_of_strange(self, names: list[str]) -> None:
        for name in sorted(set(names) - self._strange):
            message = (
                f"inbox/{name} is a directory and is ignored: put its files into inbox/, inbox/high/ or inbox/low/"
            )
            self._ledger.add_event("warning", printable(message), kind="left_alone")
        self._strange |= set(names)
