"""Failures: what a daemon does with a file that cannot be trained, and which errors are of the machine.

The file is taken back to its boundary, tried again, after lack of memory in smaller parts of the same optimizer
step, and then quarantined with a report; the run is as if it had never begun.
"""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

import torch

from onward.atomic import link_or_copy
from onward.config import Config, read_config, stored_config
from onward.errors import FileRejected, NoSpace, OnwardError, TrainingError
from onward.layout import RunLayout
from onward.service.intake.refusals import Refusal, keep_refused
from onward.service.state.rollback import Move, go_back
from onward.store.ledger import Ledger
from onward.store.rows import FileRow

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in the process."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)


def is_out_of_space(error: BaseException) -> bool:
    """Whether an error says that a disk is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, NoSpace) or (isinstance(error, sqlite3.OperationalError) and "full" in str(error))


def blames_file(error: BaseException) -> bool:
    """Whether an error is about the file in hand, so that the queue can go on without it."""
    return isinstance(error, TrainingError | FileRejected) or is_out_of_memory(error)


def handle(layout: RunLayout, ledger: Ledger, row: FileRow, error: BaseException) -> str:
    """Take a file back to its boundary after a failure, and queue it again or quarantine it.

    Returns:
        What was done, for a person.
    """
    config = read_config(layout.config)
    reason = error.what if isinstance(error, OnwardError) else str(error)
    failures = row.failures + 1
    parts = _smaller_parts(row, ledger, config) if is_out_of_memory(error) else row.parts
    if is_out_of_memory(error) and parts is not None:
        values = {"failures": row.failures, "parts": parts}
        decision = f"tried again with each step in {parts} parts"
    elif not is_out_of_memory(error) and failures <= config.retries:
        values = {"failures": failures, "parts": row.parts}
        decision = f"tried again ({failures} of {config.retries})"
    else:
        return quarantine(layout, ledger, row, reason)
    values |= {"config": None, "position": row.position}
    _take_back(layout, ledger, row, Move(row, "queued", values), f"{row.name} failed: {reason}")
    ledger.add_event("warning", f"{row.name} {decision}")
    return f"{row.name} failed and is {decision}: {reason}"


def quarantine(layout: RunLayout, ledger: Ledger, row: FileRow, reason: str) -> str:
    """Take a file out of the stream, back at its boundary, with a report in `rejected/`; the archive keeps it.

    Returns:
        What was done, for a person.
    """
    refusal = Refusal.of_training(row.name, reason, "mend it, then add it again; its content stays in archive/")
    keep_refused(layout, _link(layout, row), refusal, ledger.clock(), move=True)
    move = Move(row, "quarantined", {"note": reason, "position": None, "failures": row.failures + 1})
    _take_back(layout, ledger, row, move, f"{row.name} quarantined")
    ledger.add_event("error", f"{row.name} quarantined: {reason}", kind="failed")
    return f"{row.name} quarantined (rejected/{row.name}.report.json): {reason}"


def skip(layout: RunLayout, ledger: Ledger, row: FileRow, reason: str) -> str:
    """Take a file out of the stream, back at its boundary, because an operator said so.

    Returns:
        What was done, for a person.
    """
    _take_back(layout, ledger, row, Move(row, "skipped", {"note": reason, "position": None}), f"skip: {reason}")
    step = row.start_step if row.state == "training" else None
    where = f", back at step {step}" if step is not None else ""
    return f"skipped {row.name}{where}"


def _take_back(layout: RunLayout, ledger: Ledger, row: FileRow, move: Move, what: str) -> None:
    if row.state == "training":
        go_back(layout, ledger, row.first_step, [move], what)
        return
    with ledger.transaction():
        if move.state == "queued":
            ledger.set_file(row.id, **move.values)
        else:
            ledger.move_file(row.id, move.state, **move.values)
        ledger.add_event("warning", f"{what}: {row.name}")


def _smaller_parts(row: FileRow, ledger: Ledger, config: Config) -> int | None:
    """Return twice as many parts as the file was tried with, or None where a part was one row already."""
    used = stored_config(ledger.config_of(row)) if row.config else config
    tried = row.parts or used.most_parts
    return min(2 * tried, used.batch_size) if tried < used.batch_size else None


def _link(layout: RunLayout, row: FileRow) -> Path:
    """Return a second name of the archived original, to be moved to `rejected/`."""
    copy = layout.kept(row.copy)
    link = layout.rejected / f".tmp-{copy.name}"
    link.unlink(missing_ok=True)
    if copy.is_file():
        link_or_copy(copy, link)
    return link
