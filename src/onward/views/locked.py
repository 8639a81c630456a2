"""Folders that a process works in, and that others tell from what a dead one left by a lock that lives with it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from pathlib import Path

from onward.atomic import remove_tree
from onward.layout import entries


def make_locked(parent: Path, prefix: str = "", *, mode: int = 0o777) -> tuple[Path, int]:
    """Make a folder of a new name and lock it; those whose names begin alike and that nobody locks any more go.

    Args:
        prefix: of its name, which only such folders have there.
        mode: as for `Path.mkdir`.

    Returns:
        The folder, and a descriptor: the lock ends when it is closed, also by the process' death.

    Raises:
        OSError: it cannot be made or locked there.
    """
    gate = os.open(parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)  # nobody takes a folder that is not locked yet for one of a dead process
        _remove_left(parent, prefix)
        folder = parent / f"{prefix}{secrets.token_hex(6)}"
        folder.mkdir(mode)
        return folder, _locked(folder)
    finally:
        os.close(gate)


def _locked(folder: Path) -> int:
    """Lock a folder, without waiting.

    Raises:
        OSError: another process has it, or it is no folder.
    """
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _remove_left(parent: Path, prefix: str) -> None:
    for folder in entries(parent):
        if folder.name.startswith(prefix):
            with contextlib.suppress(OSError):
                lock = _locked(folder)
                remove_tree(folder)
                os.close(lock)
