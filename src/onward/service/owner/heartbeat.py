"""The heartbeat: shows others that a process is alive and whether its work progresses.

Written from a background thread, so that a step that hangs is told from a process that is gone. Under systemd it
feeds the watchdog too (protocol: sd_notify(3)), but only while the work moves.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from onward.store.ledger import put_soon

SECONDS = 5.0
"""Seconds between two beats."""
PATIENCE = 1.0
"""Seconds that a beat waits for others who write: the next one says more."""
STEP_SLACK, SHORTEST = 20.0, 60.0
"""A step hangs when it takes 20 times as long as the last one, and a minute at least."""


class Heartbeat:
    """Notes progress on the one side and writes it down on the other.

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
        """Seconds that the step in hand may take; None while no step is in hand."""

    def moved(self) -> None:
        """Note that the work moves, and that what follows may take any time."""
        self._moved = self._monotonic()
        self.limit = None

    def expect_step(self, seconds: float) -> None:
        """Note that a step begins: it is measured against the one before, which took so many seconds."""
        self._moved = self._monotonic()
        self.limit = max(SHORTEST, STEP_SLACK * seconds)

    @property
    def hangs(self) -> bool:
        """Whether the step in hand takes longer than a step could."""
        limit = self.limit  # read once: the work goes on in another thread
        return limit is not None and self._monotonic() - self._moved > limit

    def beat(self) -> None:
        """Write the heartbeat to the ledger, without waiting for the disk."""
        fact = {"at": self._clock(), "quiet": self._monotonic() - self._moved, "hangs": self.hangs, "pid": os.getpid()}
        put_soon(self._path, PATIENCE, heartbeat=fact)
        if not self.hangs:
            tell_systemd("WATCHDOG=1")


def tell_systemd(message: str) -> None:
    """Send a line to systemd, if a service manager listens; this neither waits nor fails."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.setblocking(False)
        channel.sendto(message.encode(), f"\0{address[1:]}" if address.startswith("@") else address)
