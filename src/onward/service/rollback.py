"""Going back: to the boundary after a file, or to nothing. The ledger keeps what is undone, marked so."""

from __future__ import annotations

from typing import Any

from onward.config import read_config
from onward.errors import DamagedState, UsageError
from onward.layout import RunLayout, step_of
from onward.service.commits import TO_NOTHING, Commits
from onward.store.ledger import HELD, Ledger
from onward.training.checkpoint import Manifest, inspect_checkpoint

KEPT = (
    "command",
    "name",
    "sha256",
    "bytes",
    "format",
    "copy",
    "rows",
    "tokens",
    "target_tokens",
    "truncated",
    "dropped",
)


def rollback(layout: RunLayout, ledger: Ledger, to: str, *, requeue: bool) -> dict[str, Any]:
    """Make the boundary after a file, or at a step, the current state.

    Args:
        to: a file's name, position or hash prefix; or `step-N`, or a number that is no position but a step.
        requeue: put the undone files in the queue again, in their order.

    Returns:
        `global_step` and the names `undone`.

    Raises:
        UsageError: no such file, or no restore point for it.
        DamagedState: the restore point does not verify.
    """
    keep = read_config(layout.config).keep_boundaries
    step = find_step(layout, ledger, to)
    manifest = _restore_point(layout, step)
    undone = undo_after(ledger, step, manifest.cursor.position, requeue=requeue)
    Commits(layout, ledger).finish_going_back(keep=keep)
    return {"global_step": step, "undone": undone}


def reset(layout: RunLayout, ledger: Ledger) -> dict[str, Any]:
    """Forget all progress: state and restore points go, every begun file is marked undone, the queue stays.

    Returns:
        `global_step` (0) and the names `undone`.
    """
    undone = undo_after(ledger, TO_NOTHING, 0, requeue=False)
    Commits(layout, ledger).finish_going_back(keep=0)
    return {"global_step": 0, "undone": undone}


def undo_after(ledger: Ledger, step: int, position: int, *, requeue: bool) -> list[str]:
    """Move the ledger back in one transaction, which also says where the directories have to follow.

    Returns:
        The names of the files behind `position`, now undone.
    """
    undone = [row for row in ledger.files(*HELD) if (row["position"] or 0) > position]
    names = [row["name"] for row in undone]
    with ledger.transaction():
        for row in undone:
            ledger.move_file(row["id"], "undone")
            if requeue:
                kept = {key: row[key] for key in KEPT}
                ledger.insert_file(**kept, state="queued", again=1, priority=row["priority"])
        ledger.trim(step, [], "undone")
        if step == TO_NOTHING:
            ledger.put(identity=None, origin_step=0)
        ledger.put(state="idle", problem=None, going_back=step)
        where = "to the start" if step == TO_NOTHING else f"to step {step}"
        ledger.add_event("warning", f"went back {where}; undone: {', '.join(names) or 'nothing'}", max(step, 0))
    return names


def find_step(layout: RunLayout, ledger: Ledger, to: str) -> int:
    """Return the step of the boundary that `to` names.

    Raises:
        UsageError: it names no file and no boundary of this run.
    """
    done = ledger.files("done")
    matches = [row for row in done if to in (row["name"], str(row["position"]))]
    if not matches and len(to) >= 4:
        matches = [row for row in done if row["sha256"].startswith(to.lower())]
    if len(matches) > 1:
        places = ", ".join(str(row["position"]) for row in matches)
        raise UsageError(f"{to!r} names several files, at positions {places}", where="--to", hint="Give the position.")
    if matches:
        return int(matches[0]["start_step"] + matches[0]["planned_steps"])
    steps = [step_of(point) for point in layout.restore_points()]
    number = to.removeprefix("step-")
    if number.isdigit() and int(number) in steps:
        return int(number)
    files = ", ".join(f"{row['position']} {row['name']}" for row in done) or "none"
    raise UsageError(
        f"{to!r} is no finished file and no boundary's step",
        where="--to",
        hint=f"Finished files: {files}. Restore points at steps: {', '.join(map(str, sorted(steps)))}.",
    )


def _restore_point(layout: RunLayout, step: int) -> Manifest:
    folder = layout.boundary(step)
    if not folder.is_dir():
        kept = ", ".join(str(step_of(point)) for point in reversed(layout.restore_points()))
        raise UsageError(
            f"the restore point of step {step} is no longer kept",
            where=folder,
            hint=f"Restore points at steps: {kept}. keep_boundaries in the config keeps more.",
        )
    manifest, problems = inspect_checkpoint(folder)
    if manifest is None or problems:
        raise DamagedState(f"the restore point does not verify: {'; '.join(problems)}", where=folder)
    return manifest
