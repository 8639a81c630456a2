"""The inbox: which files in it are settled, in which order they are taken, and what wakes a daemon that waits.

A file is settled when its writer renamed it in, or when its size and time stood still for a while and no process
has it open for writing. Scanning again finds everything; file events only make it prompt, and where a file system
sends none (network disks) nothing else changes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PRIORITIES = {"high": 1, "normal": 0, "low": -1}
"""Folders of the inbox, and what `--priority` takes, with their rank."""
IGNORED = (".part", ".partial", ".tmp", ".temp", ".crdownload", ".filepart", ".swp", "~")
"""Endings under which writers and editors keep what is not done."""
POLL_SECONDS = 2.0
"""Seconds between scans where nothing tells of a change."""


@dataclass
class _Sight:
    """What was seen of a file: when first, and since when it stands still (monotonic seconds)."""

    order: tuple[int, int, str]
    signature: tuple[int, int, int]
    since: float
    settled: bool


@dataclass(frozen=True)
class Scan:
    """Settled files with their priority, in the order they are to be taken; and how many are not settled yet."""

    settled: list[tuple[Path, int]]
    unsettled: int
    strange: list[str]
    """Names of directories that no priority belongs to."""


class Inbox:
    """Looks at `inbox/`, `inbox/high` and `inbox/low`.

    Args:
        settle_seconds: time that a file must stand still.
        clock: seconds since the epoch, as the file system's times are.
        monotonic: seconds that never jump.
    """

    def __init__(
        self,
        folder: Path,
        settle_seconds: float,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.settle_seconds = settle_seconds
        self.clock = clock
        self.monotonic = monotonic
        self._sights: dict[str, _Sight] = {}
        self._scans = 0

    def scan(self) -> Scan:
        """Look at every file once; those seen in an earlier scan come first, then by time of arrival, then by name.

        Raises:
            OSError: the inbox is gone or cannot be read.
        """
        self._scans += 1
        present: dict[str, _Sight] = {}
        strange: list[str] = []
        found: list[tuple[int, tuple[int, int, str], Path]] = []
        for entry, priority in self._entries(strange):
            sight = self._look(entry)
            if sight is None:
                continue
            present[entry.path] = sight
            if sight.settled:
                found.append((-priority, sight.order, Path(entry.path)))
        self._sights = present
        found.sort()
        settled = [(path, -priority) for priority, _, path in found]
        return Scan(settled, len(present) - len(settled), strange)

    def forget(self, paths: list[Path]) -> None:
        """Look again at files that were to be taken: those that changed meanwhile have to settle anew."""
        for path in paths:
            self._sights.pop(str(path), None)

    def _entries(self, strange: list[str]) -> list[tuple[os.DirEntry[str], int]]:
        result: list[tuple[os.DirEntry[str], int]] = []
        for folder, priority in ((self.folder, 0), (self.folder / "high", 1), (self.folder / "low", -1)):
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.name.startswith(".") or entry.name.endswith(IGNORED):
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            if folder != self.folder or entry.name not in PRIORITIES:
                                strange.append(entry.name)
                        else:
                            result.append((entry, priority))
            except FileNotFoundError:
                if folder == self.folder:
                    raise
        return result

    def _look(self, entry: os.DirEntry[str]) -> _Sight | None:
        known = self._sights.get(entry.path)
        if known is not None and known.settled:
            return known
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return None
        signature = (status.st_ino, status.st_size, status.st_mtime_ns)
        now = self.monotonic()
        if known is None or known.signature != signature:
            first = known.order if known else (self._scans, status.st_ctime_ns, entry.name)
            known = _Sight(first, signature, now, settled=False)
        waited = now - known.since >= self.settle_seconds
        if waited or self._was_renamed_in(status) or self._is_old(status):
            known.settled = not is_being_written(entry.path)
        return known

    @staticmethod
    def _was_renamed_in(status: os.stat_result) -> bool:
        """A rename (or the copying of times at the end of a copy) changes the inode later than the last write did."""
        return status.st_size > 0 and status.st_ctime_ns > status.st_mtime_ns

    def _is_old(self, status: os.stat_result) -> bool:
        return self.clock() - max(status.st_mtime, status.st_ctime) >= max(self.settle_seconds, 1.0)


def is_being_written(path: str) -> bool:
    """Whether some process has a file open for writing, as far as the kernel tells: it then grants no read lease."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False  # a link, or no permission: refused by name when it is taken
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN  # other answers: this file system knows no leases
    except AttributeError:  # not Linux
        return False
    finally:
        os.close(descriptor)
    return False


class Watcher:
    """Sets `wake` when something changes in a folder; where events cannot be had, only polling is left."""

    def __init__(self, folder: Path, wake: threading.Event) -> None:
        self._folder = folder
        self._wake = wake
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="onward-inbox", daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=POLL_SECONDS)

    def _watch(self) -> None:
        from watchfiles import watch

        while not self._ended.is_set():
            try:
                for _ in watch(
                    self._folder, stop_event=self._ended, step=50, debounce=200, rust_timeout=500,
                    raise_interrupt=False, watch_filter=None,
                ):  # fmt: skip
                    self._wake.set()
            except Exception:  # no such folder, too many watches, a disk without events: scanning goes on
                self._ended.wait(5 * POLL_SECONDS)
