"""The intake lock: a process that takes files in holds it, file by file, and those that wait get their turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator

from filelock import FileLock, Timeout

from onward.layout import RunLayout

TRY = 0.2
"""Seconds of one try, after which the waiting process checks whether it was asked to stop."""
LOOK = 0.02
"""Seconds between two checks of a lock that others hold."""


class IntakeLock:
    """A lock between processes, taken in turn.

    A process that holds the lock file by file would get it again and again before one that only checks every now and
    then. Therefore the next process holds a second lock, the turn, while it waits; everybody takes that one first.
    """

    def __init__(self, layout: RunLayout) -> None:
        path = layout.intake_lock
        self._turn = FileLock(path.with_name(f"{path.name}.turn"))
        self._lock = FileLock(path)

    @contextlib.contextmanager
    def held(self, stop: Callable[[], None], *, wait: bool) -> Generator[bool]:
        """Hold the lock; yield False if others hold it and `wait` is not set.

        Args:
            stop: called between tries; may raise.
        """
        try:
            self._acquire(self._turn, stop, wait)
            try:
                self._acquire(self._lock, stop, wait)
            finally:
                self._turn.release()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            self._lock.release()

    @staticmethod
    def _acquire(lock: FileLock, stop: Callable[[], None], wait: bool) -> None:
        while True:
            stop()
            try:
                lock.acquire(timeout=TRY if wait else 0, poll_interval=LOOK)
            except Timeout:
                if not wait:
                    raise
            else:
                return
