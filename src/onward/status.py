"""The read-only view of a run: what the ledger says, for anyone, at any time. Imports neither torch nor pydantic."""

from __future__ import annotations

import shutil
import time
from typing import Any

from onward.layout import RunLayout
from onward.service.holder import is_held, read_heartbeat
from onward.store.ledger import Ledger
from onward.store.rows import EventRow, FileRow, HistoryRow, StepRecord

BUSY = ("loading", "tokenizing", "training", "saving", "evaluating")
FULL = 1 << 20
"""Free bytes below which nothing goes on."""
PACE = 20
"""Steps over which speed is averaged."""


def read_status(layout: RunLayout) -> dict[str, Any]:
    """Return where the run stands, as `onward status --json` prints it.

    `heartbeat_seconds` is the age of the owner's last sign of life, None where no process owns the run.
    `tokens_per_second` and `eta_seconds` (to the end of the file) are averages of the last steps; None when idle.
    """
    layout.require()
    with Ledger(layout.ledger, read_only=True) as ledger:
        state = str(ledger.get("state", "idle"))
        held = is_held(layout.lock)
        if state in BUSY and not held:
            state = "stopped"
        age, stuck = read_heartbeat(ledger.get("heartbeat") if held else None, time.time())
        free = shutil.disk_usage(layout.root).free
        if held and free < FULL:  # its owner waits, and cannot even say so in the ledger
            state, stuck = "paused", f"the disk is full: {free} bytes free"
        checkpoint = ledger.newest_checkpoint()
        current = next(reversed(ledger.files("training")), None)  # of two the other one's boundary is being committed
        last = _last_steps(ledger, current)
        live = last if current else []
        step = last[0].step if last and state in BUSY else (checkpoint.step if checkpoint else 0)
        file_step = live[0].step_in_file if live else 0
        return {
            "run": str(layout.root.absolute()),
            "state": state,
            "global_step": step,
            "file": current.name if current else None,
            "file_step": file_step,
            "file_steps": current.planned_steps if current else 0,
            "queue": ledger.queued(),
            "learning_rate": last[0].learning_rate if last else None,
            "loss": last[0].loss if last else None,
            **_pace(live, current, file_step, state),
            "checkpoint": f"checkpoint-{checkpoint.step}" if checkpoint else None,
            "disk_free_bytes": free,
            "heartbeat_seconds": age,
            "problem": stuck or ledger.get("problem"),
        }


def _last_steps(ledger: Ledger, current: FileRow | None) -> list[StepRecord]:
    """Return the newest step records of the file in training, or else of the last finished one."""
    row = current or ledger.at_position(ledger.last_position())
    if row is None:
        return []
    return ledger.last_steps(row.id, PACE)


def _pace(live: list[StepRecord], current: FileRow | None, file_step: int, state: str) -> dict[str, Any]:
    seconds = sum(row.seconds for row in live)
    if state not in BUSY or not current or not seconds:
        return {"tokens_per_second": None, "eta_seconds": None}
    left = (current.planned_steps or 0) - file_step
    return {
        "tokens_per_second": sum(row.tokens for row in live) / seconds,
        "eta_seconds": left * seconds / len(live),
    }


def recent_events(layout: RunLayout, limit: int = 5) -> list[EventRow]:
    """Return the newest events, oldest first."""
    layout.require()
    with Ledger(layout.ledger, read_only=True) as ledger:
        return ledger.events(limit)


def read_history(layout: RunLayout) -> list[dict[str, Any]]:
    """Return one entry per file of the stream, in stream order, as `onward history --json` prints it.

    `handover` is the class that held when the file began: the state was that of the boundary before it.
    """
    layout.require()
    with Ledger(layout.ledger, read_only=True) as ledger:
        rows = ledger.history()
    return [_entry(row, place) for place, row in enumerate(rows, start=1)]


def _entry(row: HistoryRow, place: int) -> dict[str, Any]:
    return {
        "position": row.position or place,
        "name": row.name,
        "state": row.state,
        "sha256": row.sha256,
        "rows": row.rows,
        "rows_trained": row.trained or 0,
        "truncated": row.truncated,
        "dropped": row.dropped,
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
