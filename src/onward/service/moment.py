"""Whether ledger and model belong together, which every command that changes the run asks first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from onward.digest import state_digest
from onward.errors import DamagedState
from onward.layout import RunLayout, entries, step_of
from onward.stated import origin_of, read_manifest
from onward.store.ledger import Ledger
from onward.text import quoted


def require_same_moment(layout: RunLayout, ledger: Ledger) -> None:
    """Refuse a ledger that is older than the state it should describe, or that is another run's.

    Raises:
        DamagedState: it is; the hint says what to do.
        Unreadable: a manifest cannot be read now.
    """
    for folder in (*layout.checkpoints(), *layout.restore_points()):
        if is_of_another_moment(ledger, folder):
            last = ledger.newest_checkpoint()
            claim = f"ends at step {last.step}" if last else "knows of no checkpoint"
            state = "another state" if last and last.step >= step_of(folder) else "a checkpoint"
            raise DamagedState(
                f"the ledger {claim}, but there is {state} of step {step_of(folder)}: "
                "they are not from the same moment",
                where=folder,
                hint=way_out(ledger, folder),
            )


def require_present(layout: RunLayout, ledger: Ledger) -> None:
    """Refuse a run that has trained and whose state was removed: that may have been meant as a fresh start, or not.

    Raises:
        DamagedState: it was; the hint says what to do.
    """
    claimed = ledger.newest_checkpoint()
    if claimed and claimed.step > int(ledger.get("origin_step", 0)) and not entries(layout.current):
        raise DamagedState(
            f"current_model is gone, but the ledger claims {claimed.step} steps",
            where=layout.current,
            hint="onward rollback --to FILE restores a boundary; onward reset starts over, if you mean it.",
        )


def is_of_another_moment(ledger: Ledger, folder: Path) -> bool:
    """Whether a checkpoint or restore point shows that the ledger is not the one that it was committed to.

    Every step at which the run ever began a checkpoint is in its ledger, with the digest of the state.
    """
    step = step_of(folder)
    stated = read_manifest(folder)
    if ledger.checkpoint_states(step):
        return _is_of_other_steps(ledger, folder, stated or {})
    origin = None if stated is None else origin_of(stated)
    if origin is not None and not ledger.has_checkpoints():
        return True
    last = ledger.newest_checkpoint()
    return origin == (ledger.get("run"), step) and step > (last.step if last else -1)


def _is_of_other_steps(ledger: Ledger, folder: Path, stated: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of the run holds a state that its ledger has no record of, or one that was undone.

    Another process may commit or go back meanwhile.
    """
    step, measured = step_of(folder), stated.get("measurement")
    if origin_of(stated) != (ledger.get("run"), step) or not isinstance(measured, dict):
        return False
    known = state_digest(cast(dict[str, Any], measured)) in ledger.state_digests(step)
    return not known and ledger.get("going_back") is None and read_manifest(folder) == stated


def way_out(ledger: Ledger, folder: Path) -> str:
    """Return what to do about it."""
    restore = (
        "Restore ledger.sqlite3 from a copy of that moment. Without one, this makes a new run: "
        f"onward adopt {quoted(folder)} --run NEW_RUN"
    )
    if not ledger.checkpoint_states(step_of(folder)):
        return restore
    return f"{restore}. To keep the ledger instead, move this directory out of the run, then: onward train"
