"""What of the process that owns a run, of the files that wait for it and of the trackers would stop it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from onward.config.text import read_config
from onward.layout import RunLayout
from onward.service.holder import beat_of, is_held, read_heartbeat, read_holder
from onward.service.intake.inbox import STUCK, describe_stuck
from onward.service.proof.access import REMOUNT, is_read_only
from onward.service.proof.doctor.finding import Finding
from onward.store.ledger import Ledger
from onward.store.lookup import typed
from onward.text import how_many, printable, quoted


def check_owner(layout: RunLayout) -> Iterator[Finding]:
    """Report who owns the run, whether it makes progress, and what keeps it from continuing."""
    with Ledger(layout.ledger, read_only=True) as ledger:
        state, problem, paused = ledger.get("state"), ledger.get("problem"), ledger.get("paused")
        fact = ledger.get("heartbeat")
    if paused is not None:
        yield Finding("ok", "paused", "paused by an operator", "onward resume goes on")
    elif problem and state == "failed":
        yield Finding("warning", "last failure", problem, "onward train tries again, from the last commit")
    elif problem:
        yield Finding("warning", str(state), problem)
    holder = read_holder(layout.lock)
    if is_held(layout.lock):
        yield Finding("ok", "lock", f"held by pid {holder['pid']} on {holder['host']}" if holder else "held")
        _, stuck = read_heartbeat(beat_of(holder, fact), time.time())
        if stuck:
            hint = "onward stop; if that does not help, kill it: what was committed is safe"
            yield Finding("error", "heartbeat", stuck, hint)


def check_inbox(layout: RunLayout) -> Iterator[Finding]:
    """Report whether files can be taken out of the inbox."""
    if not layout.inbox.is_dir():
        yield Finding("warning", "inbox", "there is none", f"mkdir {quoted(layout.inbox)}, or mount it again")
    elif os.access(layout.inbox, os.W_OK):
        with Ledger(layout.ledger, read_only=True) as ledger:
            stuck = describe_stuck(ledger.get(STUCK, {}))
        if stuck is not None:
            hint = "Look at its owner and attributes, and whether its folder is sticky or it is a mount."
            yield Finding("warning", "inbox", stuck, hint)
            return
        yield Finding("ok", "inbox", "files can be taken out of it")
    elif layout.root.stat().st_uid != os.geteuid():
        yield Finding("ok", "inbox", "belongs to another user; whether its owner can take files out was not tested")
    else:
        hint = REMOUNT if is_read_only(layout.inbox) else f"chmod u+rwx {quoted(layout.inbox)}"
        yield Finding("error", "inbox", "files cannot be taken out of it", hint)


def check_queue(layout: RunLayout) -> Iterator[Finding]:
    """Name the files at which a process ended before it could say what is wrong with them; one may be checked now."""
    with Ledger(layout.ledger, read_only=True) as ledger:
        stuck = [row for row in ledger.files("arriving", "queued") if row.attempts > 0]
    now = int(bool(stuck) and is_held(layout.intake_lock))
    for row in (row for row in stuck if row.attempts > now):
        message = f"checking {printable(row.name)} was begun {how_many(row.attempts - now, 'time')} and never finished"
        yield Finding("warning", "queue", message, f"onward skip {typed(row.name)} takes it out")


def check_trackers(layout: RunLayout) -> Iterator[Finding]:
    """Report how far each tracker has got; one that fails delays nothing."""
    names = read_config(layout.config).track
    if not names:
        return
    with Ledger(layout.ledger, read_only=True) as ledger:
        rows = {row.name: row for row in ledger.trackers()}
        behind = {name: rows[name].problem for name in names if name in rows and rows[name].problem}
    for name, problem in behind.items():
        yield Finding("warning", f"tracker {name}", str(problem), "onward track tries again and says what fails")
    told = [f"{name}: step {max(rows[name].step, 0)}" if name in rows else f"{name}: nothing yet" for name in names]
    yield Finding("ok", "trackers", f"sent so far: {', '.join(told)}")
