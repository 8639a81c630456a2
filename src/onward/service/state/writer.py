"""Commits behind training: a copy of the state is written while the next steps are trained, one copy at a time."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TypeAlias

from onward.errors import first_line
from onward.layout import RunLayout
from onward.service.state.commits import Commit, Commits, Written
from onward.store.ledger import Ledger
from onward.training.checkpoints.checkpoint import Manifest
from onward.training.measuring.handover import Measurement

NICENESS = 19
AfterCommit: TypeAlias = Callable[[Path, Manifest], None]
"""Called with the folder and the manifest of a new checkpoint. The folder stays until the next commit."""


class Writer:
    """Commits in a thread of its own, on a connection of its own.

    If a process ends without waiting, it leaves what a kill would leave.

    Args:
        ledger: the owner's ledger; a commit to any other would not count.
        after_commit: called in this thread after the ledger moved, each independently: a failure becomes an event in
            the ledger, and the function is called again after the next commit.
    """

    def __init__(self, layout: RunLayout, ledger: Ledger, after_commit: Sequence[AfterCommit] = ()) -> None:
        self._layout = layout
        self._ledger = ledger
        self._thread: threading.Thread | None = None
        self._after_commit = tuple(after_commit)
        self._written: Future[Written] = Future()
        self._measured: Future[Measurement] = Future()

    def submit(self, commit: Commit, *, is_awaited: bool) -> None:
        """Begin a commit; the previous one must have been collected.

        Args:
            is_awaited: whether nothing is trained until it is done, so that it need not give way to training.
        """
        assert self._thread is None
        self._written, self._measured = Future(), Future()
        run = partial(self._run, commit, give_way=(lambda: None) if is_awaited else _give_way)
        self._thread = threading.Thread(target=run, name="onward-writer", daemon=True)
        self._thread.start()

    def collect(self, *, wait: bool) -> Written | None:
        """Return what a finished commit did, once; None if there is none or it is still running.

        Raises:
            OnwardError, OSError: the commit failed; nothing of it remains.
        """
        if self._thread is None or (self._thread.is_alive() and not wait):
            return None
        self.join()
        self._thread = None
        return self._written.result()

    @property
    def is_writing(self) -> bool:
        """Whether a commit was begun that was not collected yet."""
        return self._thread is not None

    def measured(self) -> Measurement | None:
        """Wait for and return the measurement of the state that is being committed; None if none is.

        Raises:
            OnwardError, OSError: the commit failed.
        """
        return None if self._thread is None else self._measured.result()

    def join(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, commit: Commit, give_way: Callable[[], None]) -> None:
        def measured(measurement: Measurement) -> None:
            self._measured.set_result(measurement)
            give_way()

        if not commit.is_waited_for:
            give_way()
        try:
            written = self._commit(commit, measured)
        except BaseException as error:  # raised when the commit is collected
            self._written.set_exception(error)
            if not self._measured.done():
                self._measured.set_exception(error)
        else:
            self._written.set_result(written)

    def _commit(self, commit: Commit, measured: Callable[[Measurement], None]) -> Written:
        own = self._ledger
        own.require_in_place()
        with Ledger(own.path, clock=own.clock, waiting=own.waiting) as ledger:
            written = Commits(self._layout, ledger).commit(commit, measured)
            own.require_in_place()  # if it was removed, records would be lost
            self._call_after_commit(ledger, written.manifest)
        return written

    def _call_after_commit(self, ledger: Ledger, manifest: Manifest) -> None:
        for call in self._after_commit:
            try:
                call(self._layout.checkpoint(manifest.step), manifest)
            except Exception as error:
                name = getattr(call, "__name__", type(call).__name__)
                what = f"{name} failed after the commit of step {manifest.step}: {first_line(error)}"
                with contextlib.suppress(sqlite3.Error):  # the commit itself is complete
                    ledger.add_event("warning", f"{what}; it is tried again after the next commit", manifest.step)


def _give_way() -> None:
    """Let training go first if both want a core; on Linux, a priority belongs to a thread."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
