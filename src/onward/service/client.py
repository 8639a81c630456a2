"""The other side of control: a command records what it was given, asks the owner of a run and waits for its answer."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from onward.errors import NoSpace, OnwardError, UsageError
from onward.layout import RunLayout
from onward.ranks import Start
from onward.service.holder import is_held, read_heartbeat, read_holder
from onward.service.shown import PAUSED, Shown
from onward.service.wishes import AFTER_FILE, RELEASE
from onward.store.ledger import Ledger
from onward.store.lookup import find_file
from onward.store.rows import FileRow

POLL_SECONDS = 0.1
EXPIRED = "the process for which it was meant had ended"
"""The answer to what was asked of a process that is gone, given by the next one."""
COMMAND = "command"
"""The ledger's fact of a command that may be started again: which, after which file, whether its files are taken in."""
REMOVABLE = ("arriving", "queued", "training")
"""States of a file that `skip` takes out; a finished one is left out by `rebuild`."""


class Take(Protocol):
    """What takes files in (`Intake.take`)."""

    def __call__(self, paths: Sequence[Path], *, again: bool, intent: int) -> object:
        """Take them in, in order."""
        ...


@dataclass(frozen=True)
class Patience:
    """How long a command waits for its answer.

    Args:
        seconds: a step may take long, and the request stays open after that.
        until_end: the end of the process is what was asked for, answered or not.
    """

    seconds: float
    until_end: bool = False


def pause(layout: RunLayout, ledger: Ledger, patience: Patience, *, release: bool) -> str:
    """Ask the owner to hold still, or note it for the next one; returns the answer."""
    if is_held(layout.lock):
        return request(layout, ledger, patience, "pause", RELEASE if release else None)
    ledger.put(paused={"release": release})
    Shown(ledger).set(PAUSED)
    return "no process owns this run; the next onward watch begins paused"


def resume(layout: RunLayout, ledger: Ledger, patience: Patience) -> str:
    """Ask the owner to go on, or take back a pause that was noted; returns the answer."""
    if is_held(layout.lock):
        return request(layout, ledger, patience, "resume")
    was_paused = ledger.get("paused") is not None
    ledger.put(paused=None)
    Shown(ledger).at_rest()
    return "no longer paused; onward watch goes on" if was_paused else "it was not paused"


def stop(layout: RunLayout, ledger: Ledger, seconds: float, *, after_file: bool) -> str:
    """Ask the owner to end, and wait until it has ended or, with `after_file`, until it has answered."""
    if not is_held(layout.lock):
        return "no process owns this run"
    return request(layout, ledger, Patience(seconds, until_end=True), "stop", AFTER_FILE if after_file else None)


class Given:
    """The files that a command was given, and which files are done since it began.

    Processes that were lost may be started again with the same words. Files that were taken in are not given again
    then, and what is done since is counted from the first start.

    Args:
        start: which start this is; None where nothing would start the command again.
    """

    def __init__(self, ledger: Ledger, start: Start | None, paths: Iterable[Path], *, again: bool) -> None:
        self._ledger, self._again = ledger, again
        self._fact: dict[str, Any] = {
            "command": start.command if start else None,
            "after": ledger.last_done(),
            "taken": False,
        }
        known = ledger.get(COMMAND) if start is not None and start.number else None
        if known is not None and known["command"] == self._fact["command"]:
            self._fact = known
        self._is_kept = start is not None
        self._paths = [] if self._fact["taken"] else list(paths)
        self._intent: int | None = None
        self._keep(taken=self._fact["taken"])

    @contextlib.contextmanager
    def recorded(self) -> Generator[int | None]:
        """Record the files before anything of them is read, and yield the intent; a refused command gave none."""
        if self._paths:
            with self._ledger.transaction():
                self._intent = self._ledger.add_intent(self._paths, again=self._again, priority=0)
                self._keep(taken=True)
        try:
            yield self._intent
        except OnwardError:
            self._take_back()
            raise

    def take(self, take: Take) -> None:
        """Take the files in.

        Raises:
            OnwardError: they were refused.
        """
        if self._intent is not None:
            take(self._paths, again=self._again, intent=self._intent)
            self._intent = None

    def done(self) -> set[int]:
        """Return the positions of the files that are done since the command began."""
        rows = self._ledger.in_stream(self._fact["after"])
        return {row.position for row in rows if row.position is not None and row.state == "done"}

    def _take_back(self) -> None:
        if self._intent is None:  # they are the stream's
            return
        with contextlib.suppress(sqlite3.Error, OnwardError), self._ledger.transaction():  # full disk, no ledger
            self._ledger.end_intent(self._intent)
            self._keep(taken=False)

    def _keep(self, *, taken: bool) -> None:
        self._fact["taken"] = taken
        if self._is_kept:
            self._ledger.put(**{COMMAND: self._fact})


def find_removable(layout: RunLayout, ledger: Ledger, file: str | None) -> FileRow:
    """Return the file that a person means to skip; without a name the one in hand.

    Raises:
        UsageError: there is none.
    """
    row = find_file(ledger, file, *REMOVABLE) if file else next(reversed(ledger.files("training")), None)
    if row is None:
        hint = "onward skip FILE takes out a waiting file, onward rebuild --without FILE a finished one."
        raise UsageError("no file is being trained", where=layout.root.absolute(), hint=hint)
    return row


def skip_queued(ledger: Ledger, row: FileRow, reason: str) -> str:
    """Take a file that waits out of the stream; returns what was done, for a person.

    Nothing of it was trained: no state has to go back, and torch is not needed.
    """
    with ledger.transaction():
        ledger.move_file(row.id, "skipped", note=reason, position=None)
        ledger.add_event("warning", f"skipped {row.name}: {reason}")
    return f"skipped {row.name}"


def request(
    layout: RunLayout, ledger: Ledger, patience: Patience, kind: str, argument: str | None = None,
    file_id: int | None = None,
) -> str:  # fmt: skip
    """Ask the process that owns a run for something and wait for its answer.

    Returns:
        The answer, for a person to read.

    Raises:
        UsageError: no process owns the run.
        NoSpace: the disk is too full to record the request.
        OnwardError: the process ended without an answer, or shows no sign of life.
    """
    if not is_held(layout.lock):
        hint = "onward watch starts one; onward status shows the run."
        raise UsageError("no process trains or watches this run", where=layout.root.absolute(), hint=hint)
    number = _record(layout, ledger, kind, argument, file_id)
    ends = time.monotonic() + patience.seconds
    while time.monotonic() < ends:
        held = is_held(layout.lock)  # asked first: the last thing that a process does is to answer
        row = ledger.request(number)
        if row is not None and row.acknowledged is not None and row.answer != EXPIRED:
            return str(row.answer)
        if not held or (row is not None and row.answer == EXPIRED):
            return _end_of(layout, ledger, number, patience)
        _require_life(layout, ledger)
        time.sleep(POLL_SECONDS)
    return f"the request is not yet acknowledged after {patience.seconds:.0f} s; onward status shows when it is"


def _end_of(layout: RunLayout, ledger: Ledger, number: int, patience: Patience) -> str:
    """Say what is known of a process that ended without an answer: it was killed, or its disk is full."""
    with contextlib.suppress(sqlite3.OperationalError):  # the next process closes it
        ledger.acknowledge(number, "the process ended first")
    known = f"the last commit is step {ledger.committed_step()}"
    if patience.until_end:
        return f"it ended without an answer; {known}"
    raise OnwardError(f"the process ended before it answered; {known}", where=layout.root, hint="onward status")


def _record(layout: RunLayout, ledger: Ledger, kind: str, argument: str | None, file_id: int | None) -> int:
    try:
        return ledger.add_request(kind, argument, file_id)
    except sqlite3.OperationalError as error:
        holder = read_holder(layout.lock)
        pid = holder["pid"] if holder else "PID"
        raise NoSpace(
            f"the request cannot be recorded: {error}",
            where=layout.ledger,
            hint=f"kill -TERM {pid} stops the process without a request.",
        ) from None


def _require_life(layout: RunLayout, ledger: Ledger) -> None:
    """Say at once what waiting would not change: a process that is frozen or hangs does not answer."""
    holder, fact = read_holder(layout.lock), ledger.get("heartbeat")
    if holder is None or fact is None or fact["pid"] != holder["pid"] or fact["at"] < holder["started"]:
        return  # it has just started
    _, stuck = read_heartbeat(fact, time.time())
    if stuck:
        pid = holder["pid"]
        raise OnwardError(
            f"the request was made, but {stuck}",
            where=layout.root,
            hint=f"The request stays open. kill -CONT {pid} wakes a frozen process; kill -KILL {pid} ends it and loses "
            "at most the steps since the last commit.",
        )


def expire_requests(ledger: Ledger, last: int) -> None:
    """Close what was asked of a process that is gone: requests up to the one with the id `last`."""
    with contextlib.suppress(sqlite3.OperationalError):  # the disk may be full
        for row in ledger.open_requests():
            if row.id <= last:
                ledger.acknowledge(row.id, EXPIRED)
