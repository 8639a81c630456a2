"""Folders that a process works in; others tell them from what a dead process left by a lock that ends with it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from pathlib import Path

from onward.atomic import remove_tree
from onward.layout import entries


def make_locked(parent: Path, prefix: str = "", *, mode: int = 0o777) -> tuple[Path, int]:
    """Make a folder with a new name and lock it; remove those with the same prefix that nobody has locked any more.

    Nothing is waited for, and `parent` itself is not locked: others may have locked it, or this process.

    Args:
        prefix: the beginning of its name, which only such folders have there.
        mode: as for `Path.mkdir`.

    Returns:
        The folder, and a descriptor: the lock ends when it is closed, or when the process dies.

    Raises:
        OSError: it cannot be made or locked there.
    """
    _remove_left(parent, prefix)
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(6)}"
        folder.mkdir(mode)
        with contextlib.suppress(BlockingIOError, FileNotFoundError):  # taken for a dead one before it was locked
            lock = _locked(folder)
            if folder.exists():
                return folder, lock
            os.close(lock)


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
                try:
                    remove_tree(folder)
                finally:
                    os.close(lock)
