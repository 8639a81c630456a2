"""Reporting: the ledger's events as lines of a rotating log, as notifications, and as notes for observers.

It reads the ledger like any observer. A notification that fails adds a line to the log and does nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Any

from onward.config import NotifyConfig
from onward.events import Note
from onward.layout import RunLayout
from onward.store.ledger import Ledger
from onward.store.rows import EventRow
from onward.text import printable

LOG_BYTES, LOG_PARTS = 5 << 20, 3
PATIENCE = 4.0
"""Seconds that a notification may take."""
REST = 30.0
"""Seconds after a failed notification during which none is sent: they wait, so that a stop need not."""
DUE = 1000
"""The most notifications that wait; the oldest are dropped first."""
NOTED = (
    "accepted", "left_out", "left_alone", "rejected", "quarantined", "retried", "failed", "paused", "resumed", "config",
    "tracker",
)  # fmt: skip
"""Kinds of events that a user watching a process should read; others are shown in another way, or only logged."""
LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def _kind_told(event: EventRow) -> str | None:
    """Return the name of an event's kind in `notify.events`: a quarantined file is a failure."""
    return "failed" if event.kind == "quarantined" else event.kind


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


class _Log(RotatingFileHandler):
    def emit(self, record: logging.LogRecord) -> None:
        stream: IO[str] | None = self.stream
        if stream is not None and not _is_at(stream, Path(self.baseFilename)):  # others removed or rotated it
            self.close()
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # a full disk must not fill the terminal too
        del record

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what did not fit a full disk is tried once more here
            super().close()


class Reporter:
    """Writes events since its creation to `logs/onward.log`, and sends notifications.

    Args:
        notify: returns the current config of whom to notify of which kinds of event.
        monotonic: seconds that never jump.
    """

    def __init__(
        self, layout: RunLayout, notify: Callable[[], NotifyConfig], *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._layout = layout
        self.notify = notify
        self._monotonic = monotonic
        self._due: deque[EventRow] = deque(maxlen=DUE)
        self._rests_until = float("-inf")
        self._ledger: Ledger | None = None
        with Ledger(layout.ledger, read_only=True) as ledger:
            self._last = ledger.last_event()
        layout.log.parent.mkdir(exist_ok=True)
        self._log = _Log(layout.log, maxBytes=LOG_BYTES, backupCount=LOG_PARTS, encoding="utf-8", delay=True)
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))

    def report(self) -> None:
        """Report what happened since the last call."""
        if self._ledger is None:
            self._ledger = Ledger(self._layout.ledger, read_only=True)
        for event in self._ledger.events_after(self._last):
            self._last = event.id
            self.write(event.level, event.message, event.created)
            if _kind_told(event) in self.notify().events:
                self._due.append(event)
        while self._due and self._monotonic() >= self._rests_until:
            if not self._tell(self._due.popleft()):
                self._rests_until = self._monotonic() + REST

    def write(self, level: str, message: str, created: float | None = None) -> None:
        """Write a line to the log."""
        record = logging.LogRecord("onward", LEVELS[level], "", 0, printable(message), None, None)
        if created is not None:
            record.created = created
        self._log.handle(record)

    def close(self) -> None:
        """Close log and ledger."""
        self._log.close()
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def _tell(self, event: EventRow) -> bool:
        """Send the notifications of an event; return False if one could not be sent."""
        message = {
            "run": str(self._layout.root.absolute()),
            **{key: getattr(event, key) for key in ("kind", "level", "message", "step", "created")},
        }
        told = True
        for name, send in (("command", _send_to_command), ("url", _send_to_url)):
            target = getattr(self.notify(), name)
            if not target:
                continue
            try:
                send(target, message)
            except Exception as error:
                self.write("warning", f"notify.{name} failed: {_reason(error)}")
                told = False
        return told


class NewNotes:
    """Returns the ledger's events since the last call as notes: what happened besides steps.

    Args:
        ledger: read in the calling thread; events from before are left out.
        kinds: the kinds of events to return.
    """

    def __init__(self, ledger: Ledger, kinds: Iterable[str] = NOTED) -> None:
        self._ledger = ledger
        self._kinds = frozenset(kinds)
        self._last = ledger.last_event()

    def __call__(self) -> list[Note]:
        """Return the new notes, oldest first."""
        notes: list[Note] = []
        for event in self._ledger.events_after(self._last):
            self._last = event.id
            if event.kind in self._kinds:
                notes.append(Note(event.message))
        return notes


def _reason(error: Exception) -> str:
    """Return why a notification failed, without the command or the address, which may contain a password."""
    if isinstance(error, subprocess.CalledProcessError):
        return f"exit status {error.returncode}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no answer in {error.timeout:g} s"
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return type(reason).__name__


def _send_to_command(command: str, message: dict[str, Any]) -> None:
    subprocess.run(  # no pipes: a process that the command leaves behind would keep them open
        shlex.split(command), input=json.dumps(message).encode(), check=True, timeout=PATIENCE,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _send_to_url(url: str, message: dict[str, Any]) -> None:
    request = urllib.request.Request(
        url, json.dumps(message).encode(), {"Content-Type": "application/json", "User-Agent": "onward"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE):
        pass
