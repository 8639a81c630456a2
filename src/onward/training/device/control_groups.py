"""The limits of a process's control groups: those of its container, its job of Slurm, its unit of systemd.

A limit may be set on any group above the process, and both versions of control groups are in use, at times at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GROUPS = Path("/proc/self/cgroup")
"""The kernel's list of this process's groups, one line each: `number:controllers:path`."""
TREES = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limit:
    """The memory that the processes of a group may use together, in bytes.

    Args:
        total: the limit.
        used: what they use, without pages of files, which the kernel takes back when there is need.
    """

    total: int
    used: int


@dataclass(frozen=True)
class _Version:
    limits: tuple[str, ...]
    usage: str
    file_pages: tuple[str, ...]


_ONE = _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
_TWO = _Version(("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file"))
"""Above `memory.high`, systemd's MemoryHigh, the kernel slows processes until they hardly move."""


def read_limits(groups: Path = GROUPS, trees: Path = TREES) -> list[Limit]:
    """Return the memory limits that hold for this process; none where there are no control groups."""
    folders = _folders("memory", groups, trees)
    limits = [_memory(folder, _ONE if is_first else _TWO) for folder, is_first in folders]
    return [limit for limit in limits if limit is not None]


def read_processors(groups: Path = GROUPS, trees: Path = TREES) -> float | None:
    """Return how many processors' time the threads of this process get; None where no group limits it.

    Which processors they may run on is another matter, which the system tells PyTorch.
    """
    shares = [_processors(folder, is_first) for folder, is_first in _folders("cpu", groups, trees)]
    return min((share for share in shares if share is not None), default=None)


def _folders(controller: str, groups: Path, trees: Path) -> Iterator[tuple[Path, bool]]:
    """Yield each group of this process that may have a limit, and every group above it, with whether it is of the
    first version.

    A container may not see the path that the kernel names: then its own group is the tree's root.
    """
    lines = os.fsdecode(groups.read_bytes()).splitlines() if groups.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and controller not in controllers.split(","):
            continue
        tree = trees / controller if controllers else trees
        if not controllers and not (trees / "cgroup.controllers").is_file():
            tree = trees / "unified"
        within = Path(path.lstrip("/"))
        for part in (within, *within.parents):
            if ".." not in part.parts:
                yield tree / part, bool(controllers)


def _memory(folder: Path, version: _Version) -> Limit | None:
    limits = [limit for limit in (_bytes(folder / name) for name in version.limits) if limit is not None]
    if not limits:  # the rest is read only for a limit
        return None
    try:
        used = int((folder / version.usage).read_text())
        stat = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # it went away
        return None
    pages = sum(int(stat.get(name, 0)) for name in version.file_pages)
    return Limit(min(limits), max(0, used - pages))


def _bytes(file: Path) -> int | None:
    """Return the number in a file; None for "max", and without the file."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _processors(folder: Path, is_first: bool) -> float | None:
    """Return the time that a group's threads get in a period, in periods; None without a limit of its own."""
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if is_first else ("cpu.max",)
    try:
        quota, period = (int(word) for name in names for word in (folder / name).read_text().split())
    except (OSError, ValueError):  # the second version writes "max"
        return None
    return quota / period if quota > 0 else None
