"""The read-only view of a run: what the ledger says, for any observer. Imports neither torch nor pydantic."""

from __future__ import annotations

import shutil
import time
from typing import Any

from onward.atomic import can_be_written, why_less
from onward.layout import RunLayout
from onward.service.holder import beat_of, is_held, read_heartbeat, read_holder
from onward.service.knowledge.table import read_table
from onward.service.shown import BUSY, DOING
from onward.store.database import Values
from onward.store.files import Finished
from onward.store.ledger import Ledger, look_into
from onward.store.rows import EventRow, FileRow, HistoryRow, StepRecord

FULL = 1 << 20
"""Free bytes below which nothing can continue."""
FAILURES = 100
"""How many of the newest events are searched for the last failure."""
PACE = 20
"""Steps over which speed is averaged."""
RECENT = 5
"""How many of the newest events are shown with the status."""


def read_status(layout: RunLayout) -> dict[str, Any]:
    """Return where the run stands, as `onward status --json` prints it.

    `doing` says in words what `state` means here. `problem` is what keeps the run from continuing, or None.
    `lost_tokens` counts the tokens of the file in training that were cut off or left out for length.
    `heartbeat_seconds` is the age of the owner's last sign of life; None if there is no owner, or it gave none yet.
    `hangs` says whether that is long ago, or its step takes far longer than the last one.
    `tokens_per_second` and `eta_seconds` (to the end of the file) are averages of the last steps; None when idle.
    """
    layout.require()
    with look_into(layout.ledger) as ledger:
        held = is_held(layout.lock)
        holder = read_holder(layout.lock) if held else None
        silent = _silent(ledger, holder)
        state, problem = _state(ledger, held=held and silent is None)
        beat = beat_of(holder, ledger.get("heartbeat")) if held else None
        age, stuck = read_heartbeat(beat, time.time())
        hangs, free = stuck is not None, shutil.disk_usage(layout.root).free
        waits = _waits_for_disk(layout, free, is_stuck=hangs) if held else None
        if waits is not None:
            state, stuck, hangs = "paused", waits, False
        checkpoint = ledger.newest_checkpoint()
        current = next(reversed(ledger.files("training")), None)  # an earlier one's boundary is being committed
        committed = checkpoint.step if checkpoint else 0
        is_live = state in BUSY and state != "loading"  # what a dead process trained since is lost
        last = _last_steps(ledger, current, None if is_live or current is None else committed)
        begun = current.first_step if current else committed  # the commit before it may still be being written
        step = (last[0].step if last else begun) if is_live else committed
        return {
            "run": str(layout.root.absolute()),
            "state": state,
            "doing": _doing(ledger, state, silent, held=held),
            "global_step": step,
            "file": current.name if current else None,
            "file_step": last[0].step_in_file if last and current else 0,
            "file_steps": current.planned_steps if current else 0,
            "lost_tokens": current.lost_tokens if current else 0,
            "queue": ledger.queued(),
            "learning_rate": last[0].learning_rate if last else None,
            "loss": last[0].loss if last else None,
            **_pace(last, current, state),
            "checkpoint": f"checkpoint-{checkpoint.step}" if checkpoint else None,
            "disk_free_bytes": free,
            "heartbeat_seconds": age,
            "hangs": hangs,
            "problem": stuck or problem,
        }


def _waits_for_disk(layout: RunLayout, free: int, *, is_stuck: bool) -> str | None:
    """Return why an owner waits that cannot even record that in the ledger; None if it can be written."""
    if free < FULL:
        return f"the disk is full: {free / 1e6:.1f} MB free"
    if is_stuck and not can_be_written(layout.root, FULL):
        return f"{why_less(layout.root)}: nothing can be written, not even the ledger"
    return None


def _silent(ledger: Ledger, holder: dict[str, Any] | None) -> int | None:
    """Return the pid of an owner that did not write the state shown last, such as a command that does not train."""
    return holder["pid"] if holder and ledger.get("shown_by") not in (None, holder["pid"]) else None


def _state(ledger: Ledger, *, held: bool) -> tuple[str, str | None]:
    """Return the current state and problem: the ledger's, corrected for what a process that died could not write.

    Args:
        held: whether the process that wrote them owns the run.
    """
    state = str(ledger.get("state", "idle"))
    problem: str | None = ledger.get("problem")
    if state in BUSY and not held:
        return "stopped", problem or f"the process that owned the run died ({state})"
    if state == "failed" and problem is None:  # between two tries
        failures = (event for event in reversed(ledger.events(FAILURES)) if event.kind == "failed")
        problem = next((event.message for event in failures), "the last attempt failed; logs/onward.log has the reason")
    return state, problem


def _doing(ledger: Ledger, state: str, silent: int | None, *, held: bool) -> str:
    """Return what a state means here, with the command that continues if nothing continues by itself."""
    if silent is not None:
        return f"pid {silent} owns the run"
    if held:
        return DOING[state]
    if ledger.get("paused") is not None:
        return "paused, and no process owns the run; onward watch begins paused, onward resume cancels the pause"
    if ledger.next_owed() is not None or state in ("stopped", "failed"):
        return "no process owns the run; onward train or onward watch continues it"
    return "no process owns the run, and no file is waiting"


def _last_steps(ledger: Ledger, current: FileRow | None, up_to: int | None) -> list[StepRecord]:
    """Return the newest step records (up to a step) of the file in training, or else of the last finished one."""
    row = current or ledger.at_position(ledger.last_begun())
    if row is None:
        return []
    return ledger.last_steps(row.id, PACE, up_to)


def _pace(live: list[StepRecord], current: FileRow | None, state: str) -> dict[str, Any]:
    seconds = sum(row.seconds for row in live)
    if state not in BUSY or not current or not seconds:
        return {"tokens_per_second": None, "eta_seconds": None}
    left = (current.planned_steps or 0) - live[0].step_in_file
    return {
        "tokens_per_second": sum(row.tokens for row in live) / seconds,
        "eta_seconds": left * seconds / len(live),
    }


def recent_events(layout: RunLayout) -> list[EventRow]:
    """Return the newest events, oldest first."""
    layout.require()
    with look_into(layout.ledger) as ledger:
        return ledger.events(RECENT)


def read_history(layout: RunLayout, known: dict[Finished, Values] | None = None) -> list[dict[str, Any]]:
    """Return one entry per file of the stream, in stream order, as `onward history --json` prints it.

    `position` of a file that waits is the place that it gets if nothing is put before it; a file that was taken out of
    the stream has none. `handover` is the class of the handover when the file began: how the state equals that of the
    boundary before it. An observer that asks repeatedly passes the same `known`: see `Files.history`.
    """
    layout.require()
    with look_into(layout.ledger) as ledger:
        rows = ledger.history(known)
    return [_entry(row) for row in rows]


def read_grid(layout: RunLayout) -> dict[str, Any]:
    """Return what was measured in a run, as `onward grid --json` prints it.

    Raises:
        UsageError: there is no run.
    """
    layout.require()
    with look_into(layout.ledger) as ledger:
        return read_table(ledger).to_dict()


def _entry(row: HistoryRow) -> dict[str, Any]:
    return {
        "position": row.expected,
        "name": row.name,
        "state": row.state,
        "sha256": row.sha256,
        "rows": row.rows,
        "rows_trained": row.trained or 0,
        "rows_held_out": row.held_out,
        "rows_replayed": row.replayed or 0,
        "truncated": row.truncated,
        "dropped": row.dropped,
        "split": row.split,
        "tokens": row.tokens,
        "lost_tokens": row.lost_tokens,
        "bad_rows": row.bad_rows,
        "steps": row.steps or 0,
        "first_step": row.step_from,
        "last_step": row.step_to,
        "first_loss": row.first_loss,
        "last_loss": row.last_loss,
        "first_learning_rate": row.first_learning_rate,
        "last_learning_rate": row.last_learning_rate,
        "handover": row.handover,
        "note": row.note,
        "seconds": row.seconds or 0.0,
    }
