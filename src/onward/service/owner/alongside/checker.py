"""The second process of a daemon, as the daemon sees it: started when needed, and after failures only with pauses."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

from onward.service.intake.checker import FACT
from onward.service.pauses import pause_after
from onward.store.ledger import Ledger

PATIENCE = 5.0
"""Seconds that it may take to end when asked to."""


class Checker:
    """Starts the process that checks files, one at a time.

    Args:
        start: starts the process.
        monotonic: seconds that never jump.
    """

    def __init__(
        self,
        ledger: Ledger,
        start: Callable[[], subprocess.Popen[bytes]],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.problem: str | None = None
        """Why the last process could not be started or did not finish."""
        self._ledger = ledger
        self._start = start
        self._monotonic = monotonic
        self._process: subprocess.Popen[bytes] | None = None
        self._failures = 0
        self._not_before = float("-inf")

    def is_running(self) -> bool:
        """Return whether it is running; if it has ended, record how."""
        if self._process is None:
            return False
        status = self._process.poll()
        if status is None:
            return True
        self._process = None
        if status == 0:
            self._failures, self.problem = 0, None
        else:
            reason = self._ledger.get(FACT)
            self._fail(reason or f"the process that checks files {_ended(status)}")
        return False

    def start(self) -> None:
        """Start it, unless it is running or has to wait after a failure."""
        if self.is_running() or self._monotonic() < self._not_before:
            return
        try:
            self._process = self._start()
        except OSError as error:
            self._fail(f"the process that checks files cannot be started: {error.strerror or error}")

    def end(self) -> None:
        """Ask it to end, and kill it if it does not; the next one checks again what it had not finished."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            row = self._ledger.next_arriving()
            if row is not None and row.attempts:
                self._ledger.count_attempt(row.id, -1)  # the file is not to blame for this

    def _fail(self, what: str) -> None:
        self._failures += 1
        seconds = pause_after(self._failures, 2.0)
        self._not_before = self._monotonic() + seconds
        self.problem = f"{what}; tried again in {seconds:.0f} s (failure {self._failures} in a row)"


def _ended(status: int) -> str:
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
