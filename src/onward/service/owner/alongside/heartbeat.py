"""The heartbeat: shows others that a process is alive and whether its work makes progress.

It is written from a background thread, so that a step that hangs can be distinguished from a process that is gone.
Under systemd it also feeds the watchdog (protocol: sd_notify(3)), but only while the work makes progress.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from onward.store.ledger import put_soon
from onward.store.waiting import Waiting

SECONDS = 5.0
"""Seconds between two beats."""
PATIENCE = 1.0
"""Seconds that a beat waits for other writers; the next beat is newer anyway."""
STEP_SLACK, SHORTEST = 20.0, 60.0
"""A step hangs if it takes 20 times as long as the last one, and at least a minute."""


class Heartbeat:
    """Takes note of progress in one thread and writes it to the ledger in another.

    Args:
        path: the ledger's file.
        clock: seconds since the epoch.
        monotonic: seconds that never jump.
    """

    def __init__(
        self, path: Path, *, clock: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._clock = clock
        self._monotonic = monotonic
        self._moved = monotonic()
        self.limit: float | None = None
        """Seconds that the current step may take; None outside of steps."""

    def moved(self) -> None:
        """Note progress, and that what follows may take any time."""
        self._moved = self._monotonic()
        self.limit = None

    def expect_step(self, seconds: float) -> None:
        """Note that a step begins, whose time limit follows from the previous one, which took `seconds`."""
        self._moved = self._monotonic()
        self.limit = max(SHORTEST, STEP_SLACK * seconds)

    @property
    def hangs(self) -> bool:
        """Whether the current step has taken too long to be alive."""
        limit = self.limit  # read once: another thread may change it
        return limit is not None and self._monotonic() - self._moved > limit

    def beat(self) -> None:
        """Write the heartbeat to the ledger, without waiting for the disk.

        systemd is told first: where the disk is full or others hold the ledger, the process waits and is alive.
        """
        hangs = self.hangs
        if not hangs:
            tell_systemd("WATCHDOG=1")
        fact = {"at": self._clock(), "quiet": self._monotonic() - self._moved, "hangs": hangs, "pid": os.getpid()}
        put_soon(self._path, Waiting(PATIENCE), heartbeat=fact)


def tell_systemd(message: str) -> None:
    """Send a line to systemd, if a service manager listens; neither wait nor fail."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.setblocking(False)
        channel.sendto(message.encode(), f"\0{address[1:]}" if address.startswith("@") else address)
