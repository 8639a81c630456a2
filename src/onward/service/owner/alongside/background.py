"""What runs in one thread alongside the work: polling for requests, the heartbeat, the log, notifications."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence

Job = tuple[float, Callable[[], None]]
TICK = 0.1


class Background:
    """Calls jobs, given as `(seconds, job)`, at their intervals; one that fails is tried again and disturbs nothing."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="onward-background", daemon=True)

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=5.0)
        if self._thread.is_alive():  # a job hangs: it must not be called again now
            return
        for _seconds, job in self._jobs:  # call each job one last time
            _attempt(job)

    def _run(self) -> None:
        due: dict[int, float] = {}
        while not self._ended.wait(TICK):
            now = time.monotonic()
            for number, (seconds, job) in enumerate(self._jobs):
                if now >= due.get(number, 0.0):
                    due[number] = now + seconds
                    _attempt(job)


def _attempt(job: Callable[[], None]) -> None:
    with contextlib.suppress(Exception):
        job()
