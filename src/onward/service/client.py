"""The other side of control: a command asks the process that owns a run for something and waits for its answer."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass

from onward.errors import NoSpace, OnwardError, UsageError
from onward.layout import RunLayout
from onward.service.holder import is_held, read_heartbeat, read_holder
from onward.store.ledger import Ledger

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Patience:
    """How long a command waits for its answer.

    Args:
        seconds: a step may take long, and the request stays open after that.
        until: what else ends the waiting, with success.
    """

    seconds: float
    until: Callable[[], bool] = lambda: False


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
        row = ledger.request(number)
        if row is not None and row.acknowledged is not None:
            return str(row.answer)
        if patience.until():
            return _last_answer(ledger, number)
        if not is_held(layout.lock):
            ledger.acknowledge(number, "the process ended first")
            raise OnwardError("the process ended before it answered", where=layout.root, hint="onward status")
        _require_life(layout, ledger)
        time.sleep(POLL_SECONDS)
    return f"asked; not yet answered after {patience.seconds:.0f} s. onward status shows when it is"


def _last_answer(ledger: Ledger, number: int) -> str:
    """Return what a process that ended meanwhile answered last, and promise nothing where it did not."""
    row = ledger.request(number)
    if row is not None and row.acknowledged is not None:
        return str(row.answer)
    return f"the process ended without an answer; step {ledger.committed_step()} is committed"


def _record(layout: RunLayout, ledger: Ledger, kind: str, argument: str | None, file_id: int | None) -> int:
    try:
        return ledger.add_request(kind, argument, file_id)
    except sqlite3.OperationalError as error:
        holder = read_holder(layout.lock)
        pid = holder["pid"] if holder else "PID"
        raise NoSpace(
            f"the request cannot be recorded: {error}",
            where=layout.ledger,
            hint=f"kill -TERM {pid} stops the process, committed, without the ledger.",
        ) from None


def _require_life(layout: RunLayout, ledger: Ledger) -> None:
    """Say at once what waiting would not change: a process that is frozen or hangs does not answer."""
    holder, fact = read_holder(layout.lock), ledger.get("heartbeat")
    if holder is None or fact is None or fact["pid"] != holder["pid"]:  # it has just started
        return
    _, stuck = read_heartbeat(fact, time.time())
    if stuck:
        pid = holder["pid"]
        raise OnwardError(
            f"asked, but {stuck}",
            where=layout.root,
            hint=f"The request stays open. kill -CONT {pid} wakes a frozen process; kill -KILL {pid} ends it and loses "
            "at most the steps since the last commit.",
        )


def expire_requests(ledger: Ledger, last: int) -> None:
    """Close what was asked of a process that is gone: requests up to the one with the id `last`."""
    for row in ledger.open_requests():
        if row.id > last:
            return
        ledger.acknowledge(row.id, "the process it was meant for had ended")
