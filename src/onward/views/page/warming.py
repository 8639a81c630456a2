"""Adds up long runs once in the background when the page starts, so that its first visitor need not wait."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Sequence

from onward.errors import OnwardError
from onward.views.page.reading import RunReader


class Warming:
    """One thread that goes through the runs."""

    def __init__(self, readers: Sequence[RunReader]) -> None:
        self._readers = readers
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="onward-page-warming", daemon=True)

    def start(self) -> None:
        """Start."""
        self._thread.start()

    def end(self) -> None:
        """Begin no further run."""
        self._ended.set()

    def _work(self) -> None:
        for reader in self._readers:
            if self._ended.is_set():
                return
            with contextlib.suppress(OnwardError, sqlite3.Error, OSError):  # shown to those who open the page
                reader.warm()
