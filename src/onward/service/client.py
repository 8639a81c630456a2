"""The client side of control: a command records its files, asks the owner of a run and waits for its answer."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from onward.errors import NoSpace, OnwardError, UsageError
from onward.layout import RunLayout
from onward.ranks import Start
from onward.service.holder import beat_of, is_held, is_this_thread, read_heartbeat, read_holder
from onward.service.shown import PAUSED, Shown
from onward.service.wishes import AFTER_FILE, ENDED_FIRST, FAILED_FIRST, RELEASE, Wish
from onward.store.ledger import Ledger
from onward.store.lookup import find_file
from onward.store.rows import FileRow

POLL_SECONDS = 0.1
EXPIRED = "the process for which it was meant had ended"
"""The answer that the next process gives to requests made to one that is gone."""
COMMAND = "command"
"""The ledger's fact about a restartable command: which it is, after which file, and whether its files are taken in."""
REMOVABLE = ("arriving", "queued", "training")
"""States in which `skip` takes a file out; a finished one is removed by `rebuild`."""


class Take(Protocol):
    """What takes files in (`Intake.take`)."""

    def __call__(self, paths: Sequence[Path], *, again: bool, intent: int) -> object:
        """Take files in, in order."""
        ...


class EndedFirst(Exception):
    """A process that was asked for something ended without an answer: it was killed, or its disk is full."""


def pause(layout: RunLayout, ledger: Ledger, patience: float, *, release: bool) -> str:
    """Ask the owner to pause, or record it for the next one; return the answer."""
    answer = ask_owner(layout, ledger, patience, Wish("pause", RELEASE if release else None))
    if answer is not None:
        return answer
    ledger.put(paused={"release": release})
    Shown(ledger).set(PAUSED)
    return "no process owns this run; the next onward watch begins paused"


def resume(layout: RunLayout, ledger: Ledger, patience: float) -> str:
    """Ask the owner to resume, or withdraw a recorded pause; return the answer."""
    answer = ask_owner(layout, ledger, patience, Wish("resume"))
    if answer is not None:
        return answer
    was_paused = ledger.get("paused") is not None
    ledger.put(paused=None)
    Shown(ledger).at_rest()
    return "no longer paused; onward watch continues the run" if was_paused else "it was not paused"


def stop(layout: RunLayout, ledger: Ledger, patience: float, *, after_file: bool) -> str:
    """Ask the owner to end, and wait until it has ended or, with `after_file`, until it has answered."""
    if not is_held(layout.lock):
        return "no process owns this run"
    try:
        return request(layout, ledger, patience, Wish("stop", AFTER_FILE if after_file else None))
    except EndedFirst:
        return f"it ended without an answer; the last commit is step {ledger.committed_step()}"


class Given:
    """The files that a command was given, and the files done since it began.

    Processes that were lost may be started again with the same arguments. Files that were already taken in are then not
    taken in again, and what is done is counted from the first start.

    Args:
        start: which start this is; None if nothing would start the command again.
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
        """Record the files before any is read, and yield the id of the intent; a refused command leaves none."""
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
        if self._intent is None:  # the files are in the stream
            return
        with contextlib.suppress(sqlite3.Error, OnwardError), self._ledger.transaction():  # disk full, ledger gone
            self._ledger.end_intent(self._intent)
            self._keep(taken=False)

    def _keep(self, *, taken: bool) -> None:
        self._fact["taken"] = taken
        if self._is_kept:
            self._ledger.put(**{COMMAND: self._fact})


def find_removable(layout: RunLayout, ledger: Ledger, file: str | None) -> FileRow:
    """Return the file that the user means to skip; without a name, the current one.

    Raises:
        UsageError: there is none.
    """
    row = find_file(ledger, file, *REMOVABLE) if file is not None else next(reversed(ledger.files("training")), None)
    if row is None:
        hint = "onward skip FILE takes out a waiting file, onward rebuild --without FILE a finished one."
        raise UsageError("no file is being trained", where=layout.root.absolute(), hint=hint)
    return row


def skip_queued(ledger: Ledger, row: FileRow, reason: str) -> str:
    """Take a file that waits out of the stream; return what was done, in words.

    Nothing of it was trained: no state has to be rolled back, and torch is not needed.
    """
    with ledger.transaction():
        ledger.move_file(row.id, "skipped", note=reason, position=None)
        ledger.add_event("warning", f"skipped {row.name}: {reason}")
    return f"skipped {row.name}"


def ask_owner(layout: RunLayout, ledger: Ledger, patience: float, wish: Wish) -> str | None:
    """Ask the process that owns a run for something and, if it ends first, the next one.

    Returns:
        The answer, in words; None if no process owns the run, so that it can be done here.

    Raises:
        NoSpace: the disk is too full to record the request.
        OnwardError: the process shows no sign of life.
    """
    while is_held(layout.lock):
        with contextlib.suppress(EndedFirst):
            answer = request(layout, ledger, patience, wish)
            if not answer.startswith((ENDED_FIRST, FAILED_FIRST)):
                return answer
    return None


def request(layout: RunLayout, ledger: Ledger, patience: float, wish: Wish) -> str:
    """Record a request to the process that owns a run, wait for its answer, and return that, in words.

    Args:
        patience: seconds to wait; a step may take longer, and the request stays open after that. The thread that trains
            the run does not wait: it asks itself, in an observer.

    Raises:
        EndedFirst: it ended without an answer.
        NoSpace: the disk is too full to record the request.
        OnwardError: the process shows no sign of life.
    """
    number = _record(layout, ledger, wish)
    if is_this_thread(read_holder(layout.lock)):
        return "the request is made; this thread trains the run, and comes to it after the current step"
    ends = time.monotonic() + patience
    while time.monotonic() < ends:
        held = is_held(layout.lock)  # checked first: a process may answer last of all
        row = ledger.request(number)
        if row is not None and row.acknowledged is not None and row.answer != EXPIRED:
            return str(row.answer)
        if not held or (row is not None and row.answer == EXPIRED):
            with contextlib.suppress(sqlite3.OperationalError):  # the next process closes the request
                ledger.acknowledge(number, ENDED_FIRST)
            raise EndedFirst
        _require_life(layout, ledger)
        time.sleep(POLL_SECONDS)
    return f"the request is not yet acknowledged after {patience:.0f} s; onward status shows when it is"


def _record(layout: RunLayout, ledger: Ledger, wish: Wish) -> int:
    try:
        return ledger.add_request(wish.kind, wish.argument, wish.file)
    except sqlite3.OperationalError as error:
        holder = read_holder(layout.lock)
        pid = holder["pid"] if holder else "PID"
        raise NoSpace(
            f"the request cannot be recorded: {error}",
            where=layout.ledger,
            hint=f"kill -TERM {pid} stops the process without a request.",
        ) from None


def _require_life(layout: RunLayout, ledger: Ledger) -> None:
    """Raise at once if waiting is pointless: a process that is frozen or hangs does not answer."""
    holder = read_holder(layout.lock)
    _, stuck = read_heartbeat(beat_of(holder, ledger.get("heartbeat")), time.time())
    if holder is not None and stuck:
        pid = holder["pid"]
        raise OnwardError(
            f"the request was made, but {stuck}",
            where=layout.root,
            hint=f"The request stays open. kill -CONT {pid} wakes a frozen process; kill -KILL {pid} ends it and loses "
            "at most the steps since the last commit.",
        )


def expire_requests(ledger: Ledger, last: int) -> None:
    """Close requests to a process that is gone, up to the one with the id `last`."""
    with contextlib.suppress(sqlite3.OperationalError):  # the disk may be full
        for row in ledger.open_requests():
            if row.id <= last:
                ledger.acknowledge(row.id, EXPIRED)
