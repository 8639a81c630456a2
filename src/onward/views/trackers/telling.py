"""Sends a run to its trackers, each in a thread of its own, so that one that hangs or fails does not hold up others.

It reads the ledger and writes nothing there but how far each tracker is. The owner of a run starts it as a separate
process, at the lowest priority: whatever a tracker's library does, it does not affect training.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from filelock import FileLock, Timeout

from onward.config import Config
from onward.config.keys import SECRET_KEYS
from onward.errors import OnwardError, RunLocked, UsageError, first_line
from onward.layout import RunLayout
from onward.library.making import open_ledger
from onward.service.pauses import pause_after
from onward.service.settings import Settings
from onward.store.ledger import Ledger
from onward.store.waiting import Waiting
from onward.text import printable
from onward.views.trackers.feed import FAILURES, Feed
from onward.views.trackers.registry import find_tracker
from onward.views.trackers.tracker import Factory, TrackedRun, Tracker

SECONDS = 5.0
"""Seconds between two looks at the ledger."""
PATIENCE = 60.0
"""Seconds that the last points may take once the run's owner has ended."""
REASON_LENGTH = 300

Find = Callable[[str], Factory]


class Telling(threading.Thread):
    """Sends a run to one tracker until it is ended; then once more.

    Args:
        name: the tracker's name in the config.
        find: returns the factory of a tracker with that name.
        seconds: time between two looks at the ledger.
    """

    def __init__(self, layout: RunLayout, name: str, *, find: Find, seconds: float) -> None:
        super().__init__(name=f"onward-tracker-{name}", daemon=True)
        self._layout = layout
        self._tracker = name
        self._find = find
        self._seconds = seconds
        self._ended = threading.Event()

    def end(self) -> None:
        """Let it send what is left, once, and end."""
        self._ended.set()

    def run(self) -> None:
        """Send, wait, and send again, until ended."""
        failures = 0
        with open_ledger(self._layout, Waiting(should_end=self._ended.is_set)) as ledger:
            feed = self._feed(ledger)
            while True:
                is_last = self._ended.is_set()
                failures = 0 if tell(feed, ledger) is None else failures + 1
                if is_last:
                    break
                self._ended.wait(pause_after(failures, 2.0 * self._seconds) if failures else self._seconds)
            close(feed, ledger)

    def _feed(self, ledger: Ledger) -> Feed:
        return make_feed(self._layout, ledger, self._tracker, self._find)


def make_feed(layout: RunLayout, ledger: Ledger, name: str, find: Find) -> Feed:
    """Return the feed of a tracker, which connects to it when there is something to send."""

    def reach(known_as: str | None) -> Tracker:
        return find(name)(tracked_run(layout, ledger, name, known_as))

    return Feed(ledger, name, reach)


def tracked_run(layout: RunLayout, ledger: Ledger, tracker: str, known_as: str | None) -> TrackedRun:
    """Return the run as described to a tracker."""
    run_id = str(ledger.get("run"))
    directory = re.sub(r"[^\w.-]", "_", layout.root.absolute().name, flags=re.ASCII)
    config = public_config(Settings(layout.config).current)
    return TrackedRun(run_id, f"{directory}-{run_id[:8]}", layout.trackers / tracker, config, known_as)


def public_config(config: Config) -> dict[str, Any]:
    """Return the config by dotted key, as others may see it."""
    return {key: value for key, value in config.flat().items() if key not in SECRET_KEYS}


def tell(feed: Feed, ledger: Ledger) -> str | None:
    """Send a tracker what it lacks; return why that failed, or None. A failure, and its end, are recorded once."""
    reason = None
    try:
        feed.tell()
    except FAILURES as error:
        reason = _reason(error)
    _note(feed, ledger, reason)
    return reason


def close(feed: Feed, ledger: Ledger) -> str | None:
    """Close a tracker, which may send its last points only now; return why that failed, or None. That is recorded."""
    try:
        feed.close()
    except FAILURES as error:
        reason = _reason(error)
        _note(feed, ledger, reason)
        return reason
    return None


def tell_once(layout: RunLayout, names: list[str], find: Find = find_tracker) -> dict[str, str | None]:
    """Send trackers everything that they lack, now; return for each why that failed, or None.

    Raises:
        RunLocked: another process reports to them.
    """
    results: dict[str, str | None] = {}
    lock = FileLock(layout.track_lock)
    try:
        lock.acquire(timeout=1.0)
    except Timeout:
        hint = "It sends everything there is; onward doctor says how much each one has received."
        raise RunLocked(
            "another process is updating this run's trackers", where=layout.root.absolute(), hint=hint
        ) from None
    with lock, open_ledger(layout) as ledger:
        for name in names:
            feed = make_feed(layout, ledger, name, find)
            failure, late_failure = tell(feed, ledger), close(feed, ledger)
            results[name] = failure or late_failure
    return results


def follow(layout: RunLayout, ended: threading.Event, *, find: Find = find_tracker, seconds: float = SECONDS) -> None:
    """Report to the trackers that the current config names until the event is set; then send what is left."""
    lock = FileLock(layout.track_lock)
    while True:
        try:
            lock.acquire(timeout=0.2)
            break
        except Timeout:  # the process of an earlier owner sends its last points
            if ended.is_set():
                return
    with lock:
        _follow(layout, ended, find, seconds)


def _follow(layout: RunLayout, ended: threading.Event, find: Find, seconds: float) -> None:
    settings = Settings(layout.config)
    telling: dict[str, Telling] = {}
    while True:
        is_last = ended.is_set()
        settings.refresh()
        for name in settings.current.track:
            if name not in telling or not telling[name].is_alive():
                telling[name] = Telling(layout, name, find=find, seconds=seconds)
                telling[name].start()
        for name in telling.keys() - set(settings.current.track):
            telling[name].end()  # kept: named again, it is begun again only once this thread has ended
        if is_last:
            break
        ended.wait(seconds)
    for thread in telling.values():
        thread.end()
    until = time.monotonic() + PATIENCE
    for thread in telling.values():
        thread.join(max(0.0, until - time.monotonic()))


def _note(feed: Feed, ledger: Ledger, reason: str | None) -> None:
    with contextlib.suppress(sqlite3.OperationalError):  # a full disk, say: the next try records how it then is
        if reason is None:
            _note_success(feed, ledger)
        else:
            _note_failure(feed, ledger, reason)


def _note_failure(feed: Feed, ledger: Ledger, reason: str) -> None:
    cursor = feed.cursor
    if cursor.problem is None:
        message = f"tracker {feed.name} cannot be reached, and is tried again; training goes on: {reason}"
        ledger.add_event("warning", message, kind="tracker")
    ledger.keep_tracker(replace(cursor, problem=reason))


def _note_success(feed: Feed, ledger: Ledger) -> None:
    row = ledger.tracker(feed.name)
    if row is not None and row.problem is not None:
        ledger.keep_tracker(replace(row, problem=None))
        ledger.add_event("info", f"tracker {feed.name} is reached again, up to step {row.step}", kind="tracker")


def _reason(error: BaseException) -> str:
    """Return what failed, in one line, without a password that an address may contain."""
    text = f"{error.what}; {error.hint}" if isinstance(error, UsageError) and error.hint else first_line(error)
    if not isinstance(error, OnwardError):
        text = f"{type(error).__name__}: {text}"
    return printable(re.sub(r"//[^/@\s]+@", "//", text))[:REASON_LENGTH]
