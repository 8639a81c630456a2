"""The process that tells trackers, as the owner of a run sees it: started while there are trackers, never waited for
while files are trained.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable

LONGEST_PAUSE = 300.0
"""Seconds that pass at most before it is started again after it ended."""
PATIENCE = 20.0
"""Seconds that it may take, once the owner is done, to tell what is left; longer than it gives its trackers."""


class Tracking:
    """Starts the process where the config names trackers, and lets it end.

    Args:
        start: starts it, with a pipe as standard input: when that is closed, it tells what is left and ends.
        is_wanted: whether the config names trackers now.
        monotonic: seconds that never jump.
    """

    def __init__(
        self,
        start: Callable[[], subprocess.Popen[bytes]],
        is_wanted: Callable[[], bool],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start = start
        self._is_wanted = is_wanted
        self._monotonic = monotonic
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._not_before = float("-inf")

    def look(self) -> None:
        """Start it where there is a tracker; if it ends by itself it is started again, ever later."""
        runs = self._process is not None and self._process.poll() is None
        if runs or not self._is_wanted() or self._monotonic() < self._not_before:
            return
        self._starts += 1
        self._not_before = self._monotonic() + min(2.0**self._starts, LONGEST_PAUSE)
        self._process = self._start()

    def end(self) -> bool:
        """Let it tell what is left; False where it takes too long, and is left to itself."""
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
