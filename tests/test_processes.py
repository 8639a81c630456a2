"""What tests and the GPU's checks start beside each other: every process has its own exit status."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from processes import apart

THREADS, EACH = 8, 12


def _end(status: int) -> None:
    os._exit(status)


def test_threads_that_start_processes_get_their_exit_statuses() -> None:
    """Although each start asks of all other processes whether they have ended."""
    with ThreadPoolExecutor(THREADS) as together:
        found = list(together.map(lambda status: apart(_end, status), range(THREADS * EACH)))
    assert list(range(THREADS * EACH)) == found
