"""Rolls a run back to the boundary after or before a file, or to nothing. The ledger keeps what is undone."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onward.config.text import read_config
from onward.errors import UsageError
from onward.layout import RunLayout, step_of
from onward.service.state.ownership import Ownership
from onward.service.state.reading import verified_point
from onward.service.state.retention import Retention
from onward.service.state.settle import TO_NOTHING, Settlement
from onward.store.files import HELD
from onward.store.ledger import Ledger
from onward.store.lookup import find_file, find_step
from onward.store.rows import FileRow
from onward.training.checkpoints.checkpoint import Manifest, inspect_checkpoint

LEFT_OUT = "left out by rebuild"
"""The note of a file that a rebuild took out."""
FURTHER = "Restore its files from a copy, or go back further: onward rollback --to FILE"
"""What to do about a restore point that cannot be gone back to."""


@dataclass(frozen=True)
class Move:
    """What becomes of a file in a rollback: its new state, the columns set with it, and the columns of a successor."""

    row: FileRow
    state: str
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    successor: Mapping[str, Any] | None = None


def rollback(layout: RunLayout, ledger: Ledger, to: str, *, requeue: bool) -> dict[str, Any]:
    """Make the boundary after a file, or at a step, the current state.

    Args:
        to: a file's name, position or hash prefix, or a step; `file:X` or `step:N` where a number could be either.
        requeue: put the undone files in the queue again, in their order.

    Returns:
        `global_step` and the names `undone`.

    Raises:
        UsageError: there is no such file, or no restore point for it.
        DamagedState: the restore point does not verify.
    """
    step = find_step(ledger, to, Ownership(layout, ledger).restore_steps())
    position = _restore_point(layout, step).cursor.position
    later = ledger.in_stream(after=position)
    what = f"went back to step {step}; undone: {_names(later)}"
    go_back(layout, ledger, step, undone(later, queued_after=position if requeue else None), what)
    return {"global_step": step, "undone": [row.name for row in later]}


def reset(layout: RunLayout, ledger: Ledger) -> dict[str, Any]:
    """Forget all progress: every file with a place in the stream, also one that waits for it again, is marked undone.

    The rest of the queue stays. A run made from a base model then has no state; an adopted one is back at the
    adopted step.

    Returns:
        `global_step` (0, or the adopted step) and the names `undone`.

    Raises:
        UsageError: the adopted state is no longer kept.
        DamagedState: it does not verify.
    """
    begun = ledger.in_stream(after=0)
    origin = int(ledger.get("origin_step", 0))
    if origin > 0:
        _require_origin(layout, ledger, origin)
    where = f"back at the adopted step {origin}" if origin > 0 else "went back to the start"
    what = f"{where}; undone: {_names(begun)}"
    go_back(layout, ledger, origin if origin > 0 else TO_NOTHING, undone(begun), what)
    return {"global_step": origin, "undone": [row.name for row in begun]}


def _require_origin(layout: RunLayout, ledger: Ledger, origin: int) -> None:
    kept = sorted(Ownership(layout, ledger).restore_steps())
    if origin not in kept:
        back = f"onward rollback --to step:{kept[0]} goes back as far as possible. " if kept else ""
        raise UsageError(
            f"the adopted state, step {origin}, is no longer kept",
            where=layout.boundary(origin),
            hint=f"{back}To begin from the adopted checkpoint again: onward adopt CHECKPOINT --run NEW_RUN",
        )
    _restore_point(layout, origin)


def leave_out(layout: RunLayout, ledger: Ledger, name: str) -> dict[str, Any]:
    """Go back to before a file and queue the later ones again without it, in their order and under their configs.

    If the boundary before the file is no longer kept, an older one is used, or else the start; the files in between are
    then queued again too. A file that only waits is taken out of the queue. Where this was done before, and files that
    were queued again still wait, nothing is changed: training goes on with them.

    Returns:
        `global_step`, the name `without`, and the names `queued` again.

    Raises:
        UsageError: there is no such file.
    """
    waiting = [row.name for row in ledger.in_stream(after=0) if row.again and row.state in ("queued", "training")]
    before = _left_out_before(ledger, name) if waiting else None
    if before is not None:
        return {"global_step": ledger.committed_step(), "without": before.name, "queued": waiting}
    row = find_file(ledger, name, *HELD)
    if row.start_step is None:
        ledger.move_file(row.id, "skipped", position=None, note="left out")
        ledger.add_event("warning", f"{row.name} left out of the queue")
        step = ledger.committed_step()
        return {"global_step": step, "without": row.name, "queued": []}
    step, position = _boundary_before(layout, ledger, row)
    begun = ledger.in_stream(after=position)
    others = [other for other in begun if other.id != row.id]
    moves = undone(others, queued_after=position, with_config=True)
    moves.append(Move(row, "skipped", {"note": LEFT_OUT, "position": None}))
    go_back(layout, ledger, step, moves, f"rebuild without {row.name}; queued again: {_names(others)}")
    return {
        "global_step": max(step, 0),
        "without": row.name,
        "queued": [other.name for other in others],
    }


def _left_out_before(ledger: Ledger, name: str) -> FileRow | None:
    """Return the file that a name meant when an earlier rebuild left it out; None if it means one that is held."""
    with contextlib.suppress(UsageError):
        find_file(ledger, name, *HELD)
        return None
    with contextlib.suppress(UsageError):
        row = find_file(ledger, name, "skipped")
        return row if row.note == LEFT_OUT else None
    return None


def undone(rows: Sequence[FileRow], *, queued_after: int | None = None, with_config: bool = False) -> list[Move]:
    """Return moves that mark files undone.

    Args:
        queued_after: the position after which they are queued again in their order, before all that waits; None if they
            are not.
        with_config: whether each keeps the config that it was trained under.
    """
    if queued_after is None:
        return [Move(row, "undone") for row in rows]
    moves: list[Move] = []
    for place, row in enumerate(rows, start=queued_after + 1):
        kept = {"config": row.config, "parts": row.parts} if with_config else {}
        moves.append(Move(row, "undone", successor={**row.kept(), "again": 1, "position": place, **kept}))
    return moves


def go_back(layout: RunLayout, ledger: Ledger, step: int, moves: Sequence[Move], what: str) -> None:
    """Move the ledger back, then the directories; after a kill in between, the next start finishes.

    Args:
        step: the step of a restore point, or `TO_NOTHING`.
        what: what was done, for the event.

    Raises:
        DamagedState: the restore point does not verify; nothing was changed.
    """
    point = None if step == TO_NOTHING else verified_point(layout.boundary(step), FURTHER)
    retention = Retention(0, 0) if point is None else Retention.of(read_config(layout.config))
    move_ledger_back(ledger, step, moves, what)
    Settlement(layout, ledger, retention).go_to(point)


def move_ledger_back(ledger: Ledger, step: int, moves: Sequence[Move], what: str) -> None:
    """Move the ledger back in one transaction, which also records where the directories have to follow."""
    with ledger.transaction():
        for move in moves:
            ledger.move_file(move.row.id, move.state, **move.values)
        for move in moves:
            if move.successor is not None:
                ledger.insert_file(**move.successor, state="queued")
        ledger.trim(step, [move.row.id for move in moves if move.state == "queued"], "undone")
        if step == TO_NOTHING:
            ledger.put(identity=None, origin_step=0)
        ledger.put(state="idle", problem=None, going_back=step)
        ledger.add_event("warning", what, max(step, 0))


def _names(rows: Sequence[FileRow]) -> str:
    return ", ".join(row.name for row in rows) or "nothing"


def _boundary_before(layout: RunLayout, ledger: Ledger, row: FileRow) -> tuple[int, int]:
    """Return step and position of the newest restore point at or before a file's beginning that verifies."""
    for point in Ownership(layout, ledger).restore_points():
        if step_of(point) <= row.first_step:
            manifest = inspect_checkpoint(point).verified
            if manifest is not None and manifest.cursor.position < row.place:
                return manifest.step, manifest.cursor.position
    if ledger.get("origin_step", 0) > 0:
        hint = "The run began from an adopted checkpoint: adopt it into a new run, and train the other files there."
        raise UsageError(f"no restore point before {row.name} is kept", where=layout.boundaries, hint=hint)
    return TO_NOTHING, 0


def _restore_point(layout: RunLayout, step: int) -> Manifest:
    folder = layout.boundary(step)
    if not folder.is_dir():
        kept = ", ".join(str(step_of(point)) for point in reversed(layout.restore_points()))
        raise UsageError(
            f"the restore point of step {step} is no longer kept",
            where=folder,
            hint=f"Restore points at steps: {kept or 'none'}. keep_boundaries in the config keeps more.",
        )
    return verified_point(folder, FURTHER)
