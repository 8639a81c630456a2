"""The inbox: which files in it are settled, and in which order they are taken.

A file is settled when its writer renamed it into place, or when its size and time have not changed for a while and no
process has it open for writing.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.errors import UsageError
from onward.service.intake.writers import is_being_written
from onward.text import printable

PRIORITIES = {"high": 1, "normal": 0, "low": -1}
"""The ranks of priorities, by the values of `--priority`."""
FOLDERS = {"": 0, "high/": 1, "low/": -1}
"""The folders that are scanned, with the ranks of their files."""
IGNORED = (".part", ".partial", ".tmp", ".temp", ".crdownload", ".filepart", ".swp", "~")
"""Endings under which writers and editors keep unfinished files."""
NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""Errors of listing what is no folder."""

STUCK = "stuck"
"""The ledger's fact with the files that could not be taken out of the inbox: by path, what was seen, why and when."""


def require_priority(name: str) -> None:
    """Refuse an unknown priority.

    Raises:
        UsageError: there is no such priority.
    """
    if name not in PRIORITIES:
        raise UsageError(f"there is no priority {name!r}", where="priority", hint=f"One of: {', '.join(PRIORITIES)}")


def describe_stuck(stuck: dict[str, Any]) -> str | None:
    """Return which files cannot be taken out of the inbox and why, in words; None if there are none."""
    if not stuck:
        return None
    name, known = next(iter(stuck.items()))
    others = f", and {len(stuck) - 1} more" if len(stuck) > 1 else ""
    return printable(f"inbox/{name} cannot be taken out of it: {known['why']}{others}")


@dataclass
class _Sight:
    """What was seen of a file: when it was first seen, and since when it has not changed (monotonic seconds)."""

    order: tuple[int, int, str]
    signature: tuple[int, int, int]
    since: float
    settled: bool


@dataclass(frozen=True)
class Scan:
    """Settled files with their priority, in the order in which to take them; and how many are not settled yet."""

    settled: list[tuple[Path, int]]
    unsettled: int
    strange: list[str]
    """Names of directories that are not a priority."""


class Inbox:
    """Scans `inbox/`, `inbox/high` and `inbox/low`.

    Args:
        settle_seconds: how long a file must stay unchanged.
        clock: seconds since the epoch, like the file system's times.
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

    def scan(self, announced: Collection[str | None] = ()) -> Scan:
        """Look at every file once; those seen in an earlier scan come first, then by time of arrival, then by name.

        Args:
            announced: paths below the inbox that already have their place in the queue; they are skipped.

        Raises:
            OSError: the inbox is gone or cannot be read.
        """
        self._scans += 1
        present: dict[str, _Sight] = {}
        strange: list[str] = []
        found: list[tuple[int, tuple[int, int, str], Path]] = []
        for entry, priority, name in self._entries(strange):
            if name in announced:
                continue
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

    def _entries(self, strange: list[str]) -> list[tuple[os.DirEntry[str], int, str]]:
        """Return all that may be a file, with its priority and its path; note directories that are no priority."""
        result: list[tuple[os.DirEntry[str], int, str]] = []
        for below, priority in FOLDERS.items():
            for entry in self._listed(self.folder / below):
                name = f"{below}{entry.name}"
                is_priority = f"{name}/" in FOLDERS  # it may be a link to a folder elsewhere, as the inbox may be
                if not (Path(entry.path).is_dir() if is_priority else entry.is_dir(follow_symlinks=False)):
                    result.append((entry, priority, name))
                elif not is_priority:
                    strange.append(name)
        return result

    def _listed(self, folder: Path) -> list[os.DirEntry[str]]:
        """Return the entries of a folder that are neither hidden nor unfinished; a priority may have no folder.

        A file that was moved to its name before there was one is a file like others.
        """
        try:
            with os.scandir(folder) as entries:
                return [each for each in entries if not each.name.startswith(".") and not each.name.endswith(IGNORED)]
        except OSError as error:
            if folder == self.folder or error.errno not in NO_FOLDER:
                raise
            return []

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
