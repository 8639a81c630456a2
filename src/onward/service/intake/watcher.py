"""File events of the inbox. They only save time: scans find everything anyway.

On file systems that send none (network disks), nothing else changes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

POLL_SECONDS = 2.0
"""Seconds between scans if there are no events."""


class Watcher:
    """Calls `changed` when something changes in a folder; without events only polling is left."""

    def __init__(self, folder: Path, changed: Callable[[], None]) -> None:
        self._folder = folder
        self._changed = changed
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
                    self._changed()
            except Exception:  # no such folder, too many watches, a disk without events: scanning continues
                self._ended.wait(5 * POLL_SECONDS)
