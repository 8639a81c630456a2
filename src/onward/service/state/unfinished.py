"""A run in the making: until it is whole, its ledger has a temporary name and records what else was made.

A command that makes a run (`init`, `adopt`) and fails, or is killed, can so be given again as it was: what it had made
is removed first. Whatever was there before, or was changed since, stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from onward.atomic import TEMPORARY_PREFIX, remove_temporaries, remove_tree, replace_file, replace_files
from onward.errors import DamagedState, OnwardError, cannot_write
from onward.layout import RunLayout, entries
from onward.store.ledger import Ledger, ledger_in_making, remove_unfinished
from onward.training.model.base import OWN_ADAPTER, OWN_BASE

_FILES, _FOLDERS = "files made", "folders made"
"""Facts of a new ledger: by name, the digest of each file and what it replaced; folders that were not there before."""
_WHOLE = (OWN_BASE, OWN_ADAPTER, "tokenizer", "cache")
"""Folders that hold nothing but what the making of a run writes."""
_EMPTY = ("inbox", "archive", "rejected", "boundaries", "current_model")
"""Folders that are removed only where they are empty: others may have put something there."""


@dataclass(frozen=True)
class Unfinished:
    """A run in the making; its ledger gets the facts of the run, too."""

    ledger: Ledger

    def write(self, files: Mapping[Path, bytes]) -> None:
        """Write files of the run's directory, once it is recorded what they replace."""
        records = {path.name: (_digest(data), _text_of(path)) for path, data in files.items()}
        self.ledger.put(**{_FILES: {**self.ledger.get(_FILES), **records}})
        replace_files(files)


@contextlib.contextmanager
def in_making(layout: RunLayout) -> Generator[Unfinished]:
    """Make a run in the body: its directory is one when the body is done, and is as it was if that fails.

    Raises:
        OnwardError: its folders cannot be made.
    """
    free = [name for name in (*_WHOLE, *_EMPTY) if not os.path.lexists(layout.root / name)]
    try:
        _make_folders(layout)
        with ledger_in_making(layout.ledger) as ledger:
            ledger.put(**{_FOLDERS: free, _FILES: {}})
            yield Unfinished(ledger)
    except BaseException:
        with contextlib.suppress(OSError, sqlite3.Error, OnwardError):  # the next attempt does it
            remove_unfinished_run(layout)
            if not layout.ledger.exists():
                _remove_folders(layout, free)
        raise
    with contextlib.suppress(sqlite3.Error, OnwardError), Ledger(layout.ledger) as made:  # the run is made in any case
        made.put(**{_FOLDERS: None, _FILES: None})


def cannot_be_made(layout: RunLayout, error: OSError) -> OnwardError:
    """Return what to raise where the system refuses a directory for a run."""
    return cannot_write(error, layout.root.absolute(), "the run cannot be made")


def remove_unfinished_run(layout: RunLayout) -> None:
    """Remove what an interrupted making of a run left, as its ledger shows.

    Raises:
        OSError, sqlite3.OperationalError: the machine fails; the rest is removed at the next attempt.
    """
    if layout.ledger.exists() or not layout.unfinished_ledger.exists():
        return
    with contextlib.suppress(DamagedState), Ledger(layout.unfinished_ledger) as begun:  # else it records nothing yet
        _remove_state(layout, begun)
        for name, (digest, before) in (begun.get(_FILES) or {}).items():
            _put_back(layout.root / name, digest, before)
        _remove_folders(layout, begun.get(_FOLDERS) or ())
    remove_unfinished(layout.ledger)


def _remove_state(layout: RunLayout, begun: Ledger) -> None:
    """Remove the state that was committed before the run was whole, with its links in `current_model/`."""
    unfinished_writes = [entry for entry in layout.temporaries() if entry.parent != layout.root]
    if not (layout.checkpoints() or unfinished_writes):
        return
    from onward.service.state.ownership import Ownership

    ownership = Ownership(layout, begun)
    for folder in ownership.checkpoints():
        for path in entries(folder):
            link = layout.current / path.name
            if link.exists() and link.samefile(path):
                link.unlink()
    for folder in (*ownership.restore_points(), *ownership.checkpoints()):
        ownership.remove(folder)
    remove_temporaries(unfinished_writes, ownership.left)


def _put_back(path: Path, digest: str, before: str | None) -> None:
    """Give a file that was written, and not changed since, the text that it had; None if it was not there."""
    path.with_name(f"{TEMPORARY_PREFIX}{path.name}").unlink(missing_ok=True)
    if not path.is_file() or _digest(path.read_bytes()) != digest:
        return
    if before is None:
        path.unlink()
    else:
        replace_file(path, before.encode(errors="surrogateescape"))


def _make_folders(layout: RunLayout) -> None:
    try:
        layout.make()
    except OSError as error:
        raise cannot_be_made(layout, error) from None


def _remove_folders(layout: RunLayout, names: Iterable[str]) -> None:
    for name in names:
        folder = layout.root / name
        if name in _WHOLE:
            remove_tree(folder.with_name(f"{TEMPORARY_PREFIX}{name}"))
            remove_tree(folder)
        elif folder.is_dir() and not entries(folder):
            folder.rmdir()


def _text_of(path: Path) -> str | None:
    return path.read_bytes().decode(errors="surrogateescape") if path.is_file() else None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
