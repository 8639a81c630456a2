"""Reading the model of a run that is being trained: all files of one step, in a directory of the reader's own.

The files in `current_model/` itself are replaced one after another; a checkpoint directory never changes, but it goes
when the next one is in place.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from onward.atomic import TEMPORARY_PREFIX, link_or_copy, publish_directory, remove_tree
from onward.errors import DamagedState, UsageError
from onward.layout import RunLayout, entries
from onward.store.ledger import Ledger
from onward.training.checkpoint import Manifest, inspect_checkpoint, stated_origin

ATTEMPTS = 10
"""How often it is tried: a checkpoint may be replaced while it is read."""


def snapshot(layout: RunLayout, target: Path, between: Callable[[str], None] = lambda _: None) -> Manifest:
    """Make `target` a directory with the newest committed checkpoint, verified, while training goes on.

    Its files are hard links where the file system allows, and copies elsewhere. Linked files are those of the
    checkpoint: they are to be read, not changed.

    Args:
        between: called with a file's name before it is linked.

    Raises:
        UsageError: `target` is there already, or nothing was committed yet.
        DamagedState: the newest checkpoint is not what was committed.
        Unreadable: something cannot be read now.
    """
    if target.exists():
        raise UsageError("there is something under this name already", where=target, hint="Name another directory.")
    with Ledger(layout.ledger, read_only=True) as ledger:
        run = ledger.get("run")
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    problems = ["it was replaced while it was read"]
    try:
        for _ in range(ATTEMPTS):
            if not _link(_newest(layout, run), temporary, between):
                continue
            found = inspect_checkpoint(temporary)
            if found.verified is not None:
                publish_directory(temporary, target)
                return found.verified
            problems = found.problems
    finally:
        remove_tree(temporary)
    hint = "onward verify says what is wrong; onward train repairs it."
    raise DamagedState(f"the newest checkpoint is damaged: {'; '.join(problems)}", where=layout.current, hint=hint)


def _newest(layout: RunLayout, run: str) -> Path:
    own = ((folder, stated_origin(folder)) for folder in layout.checkpoints())
    newest = next((folder for folder, origin in own if origin is not None and origin[0] == run), None)
    if newest is None:
        raise UsageError("nothing was committed yet", where=layout.current, hint="onward train FILE")
    return newest


def _link(folder: Path, temporary: Path, between: Callable[[str], None]) -> bool:
    """Link the files of a checkpoint into an empty directory; False if it was removed in between."""
    remove_tree(temporary)
    temporary.mkdir(parents=True)
    try:
        for path in entries(folder):
            between(path.name)
            link_or_copy(path, temporary / path.name)
    except FileNotFoundError:
        return False
    return True
