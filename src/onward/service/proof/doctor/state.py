"""What of the ledger, of the checkpoints and of who may write them would stop a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from onward.layout import MANIFEST, RunLayout, step_of
from onward.service import moment
from onward.service.proof.access import in_words, unwritable, user_name, way_to_write
from onward.service.proof.doctor.finding import Finding
from onward.store.ledger import Ledger
from onward.text import quoted
from onward.training.checkpoints.checkpoint import inspect_checkpoint


def check_ledger(layout: RunLayout) -> Iterator[Finding]:
    """Report whether the ledger is sound and knows its run."""
    with Ledger(layout.ledger, read_only=True) as ledger:
        answer = ledger.quick_check()
        if answer != "ok":
            yield Finding("error", "ledger", answer, "Restore it from a copy")
        elif ledger.get("run") is None:
            empty = layout.empty_ledger()
            yield Finding("error", "ledger", empty.what, empty.hint)
        else:
            yield Finding("ok", "ledger", "sound")


def check_access(layout: RunLayout) -> Iterator[Finding]:
    """Name what this user may not write although training must; whoever looks at another's run is told so."""
    closed, owner = unwritable(layout), layout.root.stat().st_uid
    if closed and owner == os.geteuid():
        yield Finding("error", "access", in_words(layout, closed), way_to_write(layout, closed))
    elif closed:
        hint = f"To train, add or control, be the user who owns the run: {user_name(owner)}"
        yield Finding("warning", "access", in_words(layout, closed), hint)


def check_checkpoints(layout: RunLayout) -> Iterator[Finding]:
    """Check every checkpoint and restore point, and that the newest is there; a process may commit meanwhile."""
    with Ledger(layout.ledger, read_only=True) as ledger:
        for folder in [*layout.checkpoints(), *layout.restore_points()]:
            found = _checkpoint(folder, str(folder.relative_to(layout.root)), ledger)
            if found.level == "ok" or folder.exists():  # else it was removed, whole, while it was read
                yield found
        moment.require_present(layout, ledger)


def _checkpoint(folder: Path, place: str, ledger: Ledger) -> Finding:
    """Check one checkpoint against the ledger."""
    run, step = ledger.get("run"), ledger.committed_step()
    if not (folder / MANIFEST).exists():
        hint = f"Move it out of the run; to continue from it: onward adopt {quoted(folder)} --run NEW_RUN"
        return Finding("warning", place, f"not made by Onward: it has no {MANIFEST}", hint)
    found = inspect_checkpoint(folder)
    manifest = found.verified
    if manifest is None:
        hint = "onward train goes back to the newest restore point that verifies, and trains again from there"
        return Finding("error", place, "; ".join(found.problems), hint)
    if manifest.run != run:
        hint = f"Restore the ledger that it belongs to, or: onward adopt {quoted(folder)} --run NEW_RUN"
        return Finding("error", place, f"belongs to another run than the ledger, which is at step {step}", hint)
    if moment.is_of_another_moment(ledger, folder):
        what = f"the ledger, which is at step {step}, knows nothing of this state: they are not from the same moment"
        return Finding("error", place, what, moment.way_out(ledger, folder))
    if manifest.step != step_of(folder):
        what = f"a copy of step {manifest.step}, not made by this run under this name, and left alone"
        return Finding("warning", place, what, "Move it out of the run")
    if manifest.step > step:
        hint = "onward train brings the ledger up to date; onward verify shows whether something is missing"
        return Finding("warning", place, f"newer than the ledger, which is at step {step}", hint)
    return Finding("ok", place, f"{manifest.size / 1e6:.1f} MB, verifies")
