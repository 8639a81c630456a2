"""What others can see of the process that owns a run: whether there is one, which it is, and whether it is alive."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

SILENCE = 30.0
"""Seconds without a beat after which a process that holds the lock counts as stuck."""


def read_holder(lock: Path) -> dict[str, Any] | None:
    """Return the pid, host and start time that the last holder of a lock wrote, or None if that cannot be read.

    `thread` is the thread that took the lock; None if an earlier release did.
    """
    try:
        holder = json.loads(lock.with_name(f"{lock.name}.holder").read_text())
        found = {"pid": int(holder["pid"]), "host": str(holder["host"]), "started": float(holder["started"])}
        return {**found, "thread": holder.get("thread")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_this_thread(holder: dict[str, Any] | None) -> bool:
    """Return whether a holder is the thread that asks, as in an observer: who waits for it waits for itself."""
    here = {"pid": os.getpid(), "host": socket.gethostname(), "thread": threading.get_ident()}
    return holder is not None and here.items() <= holder.items()


def is_held(lock: Path) -> bool:
    """Return whether some process holds the lock now; any user who may read the file can ask.

    Raises:
        OSError: the lock cannot be opened.
    """
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # shared, so that two observers do not take each other for an owner; an owner that starts just now retries
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # some file systems raise the second
        return True
    finally:
        os.close(descriptor)
    return False


def beat_of(holder: dict[str, Any] | None, fact: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the last heartbeat if it may be the holder's; an earlier process's says nothing about one that has just
    started, or whose work is too short for heartbeats.
    """
    if holder is None or fact is None:
        return fact
    return fact if fact["pid"] == holder["pid"] and fact["at"] >= holder["started"] else None


def read_heartbeat(fact: dict[str, Any] | None, now: float) -> tuple[float | None, str | None]:
    """Return the seconds since the last beat and what is wrong, if anything; 0 if the clock was set back."""
    if fact is None:
        return None, None
    age = max(0.0, now - fact["at"])
    if age > SILENCE:
        return age, f"no heartbeat for {age:.0f} s: the process (pid {fact['pid']}) is stuck or frozen"
    if fact["hangs"]:
        return age, f"the current step hangs: no progress for {fact['quiet'] + age:.0f} s"
    return age, None
