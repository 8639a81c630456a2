"""Faults: what a daemon does with a file that cannot be trained, and which errors are the machine's fault.

The file is taken back to its boundary and tried again (if memory ran out, with the same optimizer steps in smaller
parts), and then quarantined with a report; the run is as if it had never begun the file.
"""

from __future__ import annotations

import sqlite3
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.atomic import TEMPORARY_PREFIX
from onward.config import Config, stored_config
from onward.config.text import read_config
from onward.errors import END_OTHERS, DeviceLost, GuardRejected, NothingTrained, OnwardError, TrainingError, first_line
from onward.layout import RunLayout
from onward.service.client import skip_queued
from onward.service.intake.archive import take_out_original
from onward.service.intake.names import unused_name
from onward.service.intake.refusals import Refusal, is_free, keep_refused
from onward.service.owner.training.steps import StepFailed
from onward.service.state.retention import Retention
from onward.service.state.rollback import Move, go_back
from onward.service.state.settle import Settlement
from onward.store.ledger import Ledger
from onward.store.lookup import typed
from onward.store.rows import FileRow
from onward.training.device.errors import is_device_lost, is_out_of_memory

FIX = "fix it, then add it again; its content stays in archive/"
"""What to do about a file that cannot be trained."""
BLAMED = "blamed"
"""The ledger's fact with how many files in a row were quarantined, and the step after which that was."""
IN_A_ROW = 3
"""How many files may be quarantined with none trained between them: of one more, something else is the cause."""


@dataclass(frozen=True)
class Failure:
    """What is kept of an error; an exception's traceback would keep the model in memory.

    `reason` is for the user, `out_of_memory` says whether smaller parts may help, `rejected` what the guard found.
    """

    reason: str
    out_of_memory: bool
    rejected: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Return the description of an error."""
        cause = cause_of(error)
        rejected = tuple(cause.problems) if isinstance(cause, GuardRejected) else ()
        return cls(describe(cause), is_out_of_memory(cause), rejected)


def cause_of(error: Exception) -> Exception:
    """Return what made a step fail, or the error itself if it is not about a step."""
    return error.cause if isinstance(error, StepFailed) else error


def for_person(error: Exception, row: FileRow | None) -> Exception:
    """Return what to raise for an error that may end the process: explained in words, whatever it is.

    Args:
        row: the current file.
    """
    cause = cause_of(error)
    if is_device_lost(cause):
        return DeviceLost(
            f"the GPU was lost to this process: {first_line(cause)}",
            hint="Start another process; it goes on from the last commit. onward doctor checks the machine.",
        )
    if isinstance(cause, OnwardError | OSError | sqlite3.Error) and not is_out_of_memory(cause):
        return cause
    if blames_file(error) and row is not None:
        what, way_out = f"{row.name} cannot be trained", f"onward skip {_named(row)} takes the file out."
        if is_out_of_memory(cause):
            what = f"memory ran out in a step of {row.name}"
            way_out = f"{END_OTHERS}, then: onward train. onward watch --once tries it in smaller parts."
        return TrainingError(
            f"{what}: {describe(cause)}",
            where=f"file {row.position}" if row.position else None,
            hint=f"Nothing after the last commit was kept. {way_out}",
        )
    hint = "What was committed is safe. onward doctor looks for the cause; onward train tries again."
    if is_out_of_memory(cause):
        hint = f"What was committed is safe. {END_OTHERS}, then: onward train"
    return OnwardError(f"training cannot go on: {describe(cause)}", where=_place(cause), hint=hint)


def _named(row: FileRow) -> str:
    return f"file:{row.position}" if row.position else typed(row.name)


def _place(error: BaseException) -> str | None:
    """Return the line of code that raised an error, so that a report says where to look."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else None


def describe(error: BaseException) -> str:
    """Return what went wrong, in one line."""
    if isinstance(error, OnwardError):
        return error.what
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def blames_file(error: Exception) -> bool:
    """Whether an error is the current file's fault, so that the queue can continue without it.

    A file is to blame for what its rows cause after its first step began; the config for what it does not allow; and
    the machine for everything else: disk, ledger, GPU, memory that ran out while the model was loaded, checked or
    committed, or while other processes held GPU memory.
    """
    cause = cause_of(error)
    if isinstance(cause, TrainingError):
        return True
    elsewhere = isinstance(cause, OnwardError | OSError | sqlite3.Error) or is_device_lost(cause)
    if not isinstance(error, StepFailed) or elsewhere:
        return False
    return not (error.crowded and is_out_of_memory(cause))


def handle(layout: RunLayout, ledger: Ledger, row: FileRow, failure: Failure, config: Config) -> None:
    """Take a file back to its boundary after a failure, and queue it again or quarantine it.

    Args:
        config: the config in force, which says how often a file is tried again.

    Raises:
        NothingTrained: it is queued again, since the files before it failed, too.
    """
    row = _as_committed(layout, ledger, row)
    reason = failure.reason
    if failure.rejected:  # training it again would give the same result
        _quarantine(layout, ledger, row, reason, failure.rejected)
        return
    again = _another_try(row, failure, ledger, config)
    doubt = doubt_of(ledger, row) if again is None else None
    if again is None and doubt is None:
        _quarantine(layout, ledger, row, reason)
        return
    values, decision = again or ({"failures": row.failures + 1, "parts": row.parts}, "")
    values |= {"config": None, "token_digest": None, "position": row.position}
    _take_back(layout, ledger, row, Move(row, "queued", values), f"{row.name} failed: {reason}")
    if doubt is not None:
        way_out = f"onward doctor looks for the cause; onward skip {_named(row)} takes the file out."
        raise NothingTrained(f"{row.name} cannot be trained: {reason}; {doubt}", hint=way_out)
    ledger.add_event("warning", f"{row.name} failed and is {decision}: {reason}", kind="retried")


def _another_try(row: FileRow, failure: Failure, ledger: Ledger, config: Config) -> tuple[dict[str, Any], str] | None:
    """Return what to note with a file that is tried again, and how in words; None if it was tried often enough."""
    if failure.out_of_memory:
        parts = _smaller_parts(row, ledger, config)
        return (
            None
            if parts is None
            else ({"failures": row.failures, "parts": parts}, f"tried again with each step in {parts} parts")
        )
    failures = row.failures + 1
    if failures > config.retries:
        return None
    return {"failures": failures, "parts": row.parts}, f"tried again ({failures} of {config.retries})"


def doubt_of(ledger: Ledger, row: FileRow) -> str | None:
    """Return why a file is not quarantined though it failed, in words: those before it failed, too."""
    _, files = _blamed_before(ledger, row)
    if files < IN_A_ROW:
        return None
    return (
        f"the {files} files before it were quarantined with none trained between them, so the cause is rather the "
        "machine, the libraries or the config"
    )


def _blamed_before(ledger: Ledger, row: FileRow) -> tuple[int, int]:
    """Return the step after which a file begins, and how many were quarantined there before it."""
    step = ledger.committed_step() if row.start_step is None else row.start_step
    blamed = ledger.get(BLAMED) or {}
    return step, blamed["files"] if blamed.get("step") == step else 0


def quarantine(layout: RunLayout, ledger: Ledger, row: FileRow, reason: str) -> None:
    """Take a file in which processes died out of the stream, with the run back at its boundary and a report.

    Nothing is done if it turns out to be complete and committed.
    """
    row = _as_committed(layout, ledger, row)
    if row.state != "done":
        accept = f"onward accept {typed(row.name)}"
        remedy = f"if the kernel killed it for lack of memory, as dmesg tells, give it more, then: {accept}; else {FIX}"
        _quarantine(layout, ledger, row, reason, remedy=remedy)


def _quarantine(
    layout: RunLayout,
    ledger: Ledger,
    row: FileRow,
    reason: str,
    found: Sequence[dict[str, Any]] = (),
    *,
    remedy: str = FIX,
) -> None:
    """Move a file to quarantine, with a report in `rejected/`; the archive keeps it.

    Args:
        found: what the guard found, and the rows to look at.
    """
    refusal = Refusal.of_training(row.name, reason, remedy)
    if found:
        way = f"onward accept {typed(row.name)} trains it anyway"
        refusal = Refusal.of_guard(row.name, found, way)
    report = keep_refused(layout, _original(layout, row), refusal, ledger.clock(), move=True).relative_to(layout.root)
    move = Move(row, "quarantined", {"note": reason, "position": None, "failures": row.failures + 1})
    if not found:
        step, files = _blamed_before(ledger, row)
        ledger.put(**{BLAMED: {"step": step, "files": files + 1}})
    _take_back(layout, ledger, row, move, f"{row.name} quarantined")
    ledger.add_event("error", f"{row.name} quarantined ({report}): {reason}", kind="quarantined")


def skip(layout: RunLayout, ledger: Ledger, row: FileRow, reason: str) -> str:
    """Take a file out of the stream, with the run back at its boundary, because an operator asked for it.

    Returns:
        What was done, in words.
    """
    row = _as_committed(layout, ledger, row)
    if row.state == "done":
        return f"{row.name} is done; onward rebuild --without file:{row.position} leaves it out"
    if row.state == "queued":
        return skip_queued(ledger, row, reason)
    if row.state != "training":
        return f"{row.name} is already {row.state}"
    move = Move(row, "skipped", {"note": reason, "position": None})
    _take_back(layout, ledger, row, move, f"skipped {row.name}: {reason}")
    where = f", back at step {row.start_step}" if row.start_step is not None else ""
    return f"skipped {row.name}{where}"


def _as_committed(layout: RunLayout, ledger: Ledger, row: FileRow) -> FileRow:
    """Return a file as the newest commit has it: one that was begun may have begun at a boundary that is lost."""
    if row.state != "training":
        return row
    Settlement(layout, ledger, Retention.of(read_config(layout.config))).settle()
    return ledger.file(row.id)


def _take_back(layout: RunLayout, ledger: Ledger, row: FileRow, move: Move, what: str) -> None:
    if row.state in ("training", "done"):
        go_back(layout, ledger, row.first_step, [move], what)
        return
    with ledger.transaction():
        if move.state == "queued":
            ledger.set_file(row.id, **move.values)
        else:
            ledger.move_file(row.id, move.state, **move.values)
        ledger.add_event("warning", what)


def _smaller_parts(row: FileRow, ledger: Ledger, config: Config) -> int | None:
    """Return about twice as many parts as the file was tried with, or None if each part was a single row already."""
    used = stored_config(ledger.config_of(row)) if row.config else config
    tried = row.parts or used.most_parts
    if row.parts is None and used.gradient_accumulation == "auto":  # short rows share parts, however long others may be
        tried = min(tried, used.batch_size - 1)
    return min(2 * tried, used.batch_size) if 0 < tried < used.batch_size else None


def _original(layout: RunLayout, row: FileRow) -> Path:
    """Return the path of a second copy of the archived original, to be moved to `rejected/`; none if that is gone."""
    layout.rejected.mkdir(exist_ok=True)
    name = f"{TEMPORARY_PREFIX}{layout.kept(row.copy).name}"
    path = layout.rejected / name if is_free(layout.rejected / name) else unused_name(layout.rejected, name)
    path.unlink(missing_ok=True)
    take_out_original(layout, row, path)
    return path
