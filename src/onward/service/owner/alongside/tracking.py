"""The process that reports to trackers, as the owner of a run sees it: started while there are trackers, and never
waited for while files are trained.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable

from onward.service.pauses import pause_after

PATIENCE = 20.0
"""Seconds that it may take to report the rest once the owner is done; longer than it gives its trackers."""


class Tracking:
    """Starts the process if the config names trackers, and lets it end.

    Args:
        start: starts the process with a pipe as standard input; when that is closed, it reports the rest and ends.
        is_wanted: returns whether the config names trackers now.
    """

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]], is_wanted: Callable[[], bool]) -> None:
        self._start = start
        self._is_wanted = is_wanted
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._not_before = float("-inf")

    def look(self) -> None:
        """Start the process if there is a tracker; if it ends by itself, it is restarted after ever longer pauses."""
        runs = self._process is not None and self._process.poll() is None
        if runs or not self._is_wanted() or time.monotonic() < self._not_before:
            return
        self._starts += 1
        self._not_before = time.monotonic() + pause_after(self._starts, 2.0)
        self._process = self._start()

    def end(self) -> bool:
        """Let it report the rest; return False if it takes too long and is left to itself."""
        process, self._process = self._process, None
        if process is None:
            return True
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return False
        return True
