"""The memory of the computing device: how much there is, who holds it, how much this process can use."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from onward.training.device.control_groups import read_limits

CROWDED = 0.25
"""The share of a GPU's memory held by other processes from which a lack of memory is their fault and not a file's. A
desktop's windows take less."""


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


PAGE = os.sysconf("SC_PAGE_SIZE")
ReadUsage = Callable[[torch.device], Usage | None]
"""Returns the current memory usage of a device; None if unknown."""


def read_usage(device: torch.device) -> Usage | None:
    """Return the current memory usage of a device; None if unknown. Does not initialize a device."""
    try:
        return _of_gpu(device) if device.type == "cuda" else _of_host() if device.type == "cpu" else None
    except (OSError, RuntimeError, LookupError, ValueError):
        return None


def read_total(device: torch.device) -> int | None:
    """Return the bytes of memory that a device has, or that this process may use of them; None if unknown."""
    usage = read_usage(device)
    if usage is not None:
        return usage.total
    return None if device.type == "cuda" else _installed()  # macOS says no more


def gpu_is_crowded(device: torch.device, read: ReadUsage = read_usage) -> bool:
    """Return whether other processes hold so much of a GPU's memory that this one may run short."""
    usage = read(device) if device.type == "cuda" else None
    return usage is not None and usage.is_crowded


def _of_gpu(device: torch.device) -> Usage:
    free, total = torch.cuda.mem_get_info(device)  # CUDA's own context counts as others'; it is far below `CROWDED`
    return Usage(total, free, torch.cuda.memory_reserved(device))


def _of_host() -> Usage:
    """Return main memory, or what a control group leaves of it."""
    free = int(re.findall(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.M)[0]) << 10
    _, resident, shared, *_ = (int(text) for text in Path("/proc/self/statm").read_text().split())
    limits = read_limits()
    available = min([free, *(limit.total - limit.used for limit in limits)])
    total = min([_installed(), *(limit.total for limit in limits)])
    # pages of files are free as well: the kernel takes them back
    return Usage(total, max(0, available), (resident - shared) * PAGE)


def _installed() -> int:
    return PAGE * os.sysconf("SC_PHYS_PAGES")
