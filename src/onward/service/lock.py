"""The lock by which one process owns a run: it ends with its holder and says who holds it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path

from filelock import FileLock, Timeout

from onward.errors import RunLocked
from onward.service.holder import read_holder
from onward.store.disks import require_locks

PATIENCE = 0.3
"""Seconds to wait for the lock: an observer holds it in shared mode for an instant while checking it."""


class RunLock:
    """An exclusive lock on the file `path`; who holds it (pid, host, thread) and since when is in a file next to it.

    Raises:
        RunLocked: on entering, when another process holds it.
        UsageError: on entering, if the disk has no locks: any substitute would outlive its holder.
    """

    def __init__(self, path: Path, *, patience: float = PATIENCE) -> None:
        self._path = path
        self._lock = FileLock(path, timeout=patience)
        self._holder = path.with_name(f"{path.name}.holder")

    def __enter__(self) -> RunLock:
        self._require_locks()
        try:
            self._lock.acquire()
        except Timeout:
            raise RunLocked(
                f"another process owns this run: {self._describe_holder()}",
                where=self._holder.parent,
                hint="onward status shows what it is doing, onward add gives it more files, onward stop ends it.",
            ) from None
        here = {"pid": os.getpid(), "host": socket.gethostname(), "thread": threading.get_ident()}
        holder = {**here, "started": time.time()}
        with contextlib.suppress(OSError):  # the lock also works on a full disk
            self._holder.write_text(json.dumps(holder))
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a name that is left says no more than one of a process that was killed
            self._holder.unlink(missing_ok=True)
        self._lock.release()

    def _require_locks(self) -> None:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            return  # taking the lock will say why
        try:
            require_locks(descriptor, self._path.parent)
        finally:
            os.close(descriptor)

    def _describe_holder(self) -> str:
        """Return who holds the lock, as far as it is known."""
        holder = read_holder(self._path)
        if holder is None:
            return "its name is not recorded"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["started"]))
        is_here = (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
        return f"pid {holder['pid']}{' (this process itself)' if is_here else ''} on {holder['host']}, since {since}"
