"""Reads the model of a run that is being trained: all files of one step, in a directory of the reader's own.

The files in `current_model/` itself are replaced one after another; a checkpoint directory never changes, but it is
removed when the next one is in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from onward.atomic import TEMPORARY_PREFIX, link_or_copy, publish_directory, remove_tree
from onward.errors import DamagedState, UsageError
from onward.layout import MANIFEST, RunLayout, entries
from onward.service.moment import require_present
from onward.stated import stated_origin
from onward.store.ledger import Ledger
from onward.text import quoted
from onward.training.checkpoints.checkpoint import Inspection, Manifest, inspect_checkpoint

ATTEMPTS = 10
"""How often reading is tried: a checkpoint may be replaced while it is read."""
REPAIR = "onward verify says what is wrong; onward train repairs it."


def snapshot(layout: RunLayout, target: Path, between: Callable[[str], None] = lambda _: None) -> Manifest:
    """Make `target` a directory with the newest committed checkpoint, verified, while training continues.

    Its files are hard links where the file system allows, and copies elsewhere. Linked files are those of the
    checkpoint: read them, but do not change them.

    Args:
        between: called with a file's name before it is linked.

    Raises:
        UsageError: `target` exists already, or nothing was committed yet.
        DamagedState: the newest checkpoint is missing, or is not what was committed.
        Unreadable: something cannot be read now.
    """
    if target.exists():
        raise UsageError("something of this name already exists", where=target, hint="Name another directory.")
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    try:
        manifest = link_newest(layout, temporary, between=between)
        publish_directory(temporary, target)
    finally:
        remove_tree(temporary)
    return manifest


def link_newest(
    layout: RunLayout,
    target: Path,
    *,
    left_out: Collection[str] = (),
    between: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Link the files of the newest committed checkpoint into `target`, which is emptied first, and verify them.

    Args:
        left_out: names of files that are neither linked nor checked.
        between: called with a file's name before it is linked.

    Raises:
        UsageError: nothing has been committed yet.
        DamagedState: the newest checkpoint is missing, or is not what was committed.
        Unreadable: something cannot be read now.
    """
    problems: list[str] = []
    for _ in range(ATTEMPTS):
        found = link_checkpoint(newest_checkpoint(layout), target, left_out=left_out, between=between)
        if found is not None and found.verified is not None:
            return found.verified
        if found is not None and found.problems == problems:  # damage: each look reads every byte
            break
        problems = ["it was replaced while it was read"] if found is None else found.problems
    raise DamagedState(f"the newest checkpoint is damaged: {'; '.join(problems)}", where=layout.current, hint=REPAIR)


def link_checkpoint(
    folder: Path,
    target: Path,
    *,
    left_out: Collection[str],
    between: Callable[[str], None] = lambda _: None,
) -> Inspection | None:
    """Link the files of a checkpoint into `target`, which is emptied first, and inspect what was linked.

    Returns:
        The result of the inspection; None if the checkpoint was removed meanwhile.
    """
    remove_tree(target)
    target.mkdir(parents=True)
    try:
        for path in entries(folder):
            if path.name not in left_out:
                between(path.name)
                link_or_copy(path, target / path.name)
    except FileNotFoundError:
        return None
    return inspect_checkpoint(target, left_out)


def verified_point(folder: Path, hint: str = "Restore its files from a copy; onward verify looks closer.") -> Manifest:
    """Return the manifest of a restore point whose files are all as it states.

    Raises:
        DamagedState: they are not, with this hint.
    """
    found = inspect_checkpoint(folder)
    if found.verified is None:
        raise DamagedState(f"the restore point does not verify: {'; '.join(found.problems)}", where=folder, hint=hint)
    return found.verified


def as_written(folder: Path, left_out: Collection[str]) -> Manifest | None:
    """Return the manifest of a checkpoint that Onward wrote, wherever it is now; None for a folder without one.

    Args:
        left_out: names of files that are not checked.

    Raises:
        DamagedState: the manifest, or a file that is checked, is not as Onward wrote it.
        Unreadable: something cannot be read now.
    """
    if not (folder / MANIFEST).exists():
        return None
    found = inspect_checkpoint(folder, left_out)
    if found.problems:
        raise DamagedState(
            f"Onward wrote this checkpoint, and it has changed since: {'; '.join(found.problems)}",
            where=folder,
            hint="Name another checkpoint of the run. To take this one as any tool's, whatever it holds now: "
            f"rm {quoted(folder / MANIFEST)}",
        )
    return found.manifest


def newest_checkpoint(layout: RunLayout) -> Path:
    """Return the folder of the newest checkpoint that a run made.

    Raises:
        UsageError: nothing was committed yet.
        DamagedState: there is none, although the ledger has one.
    """
    with Ledger(layout.ledger, read_only=True) as ledger:
        run = ledger.get("run")
        newest = find_newest(layout, run) or find_newest(layout, run)  # it may have been replaced during the first look
        if newest is not None:
            return newest
        require_present(layout, ledger)
        claimed = ledger.newest_checkpoint()
    if claimed is None:
        raise UsageError("nothing has been committed yet", where=layout.current, hint="onward train FILE")
    raise DamagedState(f"the checkpoint of step {claimed.step} is missing", where=layout.current, hint=REPAIR)


def find_newest(layout: RunLayout, run: str) -> Path | None:
    """Return the folder of the newest checkpoint that a run made; None if there is none."""
    own = ((folder, stated_origin(folder)) for folder in layout.checkpoints())
    return next((folder for folder, origin in own if origin is not None and origin[0] == run), None)
