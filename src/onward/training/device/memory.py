"""The memory of the computing device: how much there is, who holds it, how much this process can use."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

CROWDED = 0.25
"""The share of a GPU's memory held by other processes from which a lack of memory is their fault and not a file's. A
desktop's windows take less."""
_CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Memory limits of a container, in both versions of control groups."""


@dataclass(frozen=True)
class Usage:
    """A device's memory, in bytes.

    Args:
        total: all of it.
        free: what no process holds.
        own: what this process holds.
    """

    total: int
    free: int
    own: int

    @property
    def others(self) -> int:
        """What other processes hold."""
        return max(0, self.total - self.free - self.own)

    @property
    def available(self) -> int:
        """What this process holds or could get."""
        return self.free + self.own

    @property
    def is_crowded(self) -> bool:
        """Whether others hold so much that this process may run short."""
        return self.others >= CROWDED * self.total


ReadUsage = Callable[[torch.device], Usage | None]
"""Returns the current memory usage of a device; None if unknown."""


def read_usage(device: torch.device) -> Usage | None:
    """Return the current memory usage of a device; None if unknown. Does not initialize a device."""
    try:
        return _of_gpu(device) if device.type == "cuda" else _of_host() if device.type == "cpu" else None
    except (OSError, RuntimeError, ValueError):
        return None


def gpu_is_crowded(device: torch.device, read: ReadUsage = read_usage) -> bool:
    """Return whether other processes hold so much of a GPU's memory that this one may run short."""
    usage = read(device) if device.type == "cuda" else None
    return usage is not None and usage.is_crowded


def _of_gpu(device: torch.device) -> Usage:
    free, total = torch.cuda.mem_get_info(device)  # CUDA's own context counts as others'; it is far below `CROWDED`
    return Usage(total, free, torch.cuda.memory_reserved(device))


def _of_host() -> Usage:
    """Return main memory, or the limit of the process's container."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(meminfo[key].split()[0]) << 10 for key in ("MemTotal", "MemAvailable"))
    own = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    limits = [int(text) for path in _CGROUPS if path.is_file() and (text := path.read_text().strip()).isdigit()]
    limit = min([total, *limits])
    return Usage(limit, max(0, min(free, limit - own)), own)
