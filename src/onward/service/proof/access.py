"""What this user may not write although training must, and the command that changes that."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from onward.layout import LEDGER, RunLayout
from onward.text import printable, quoted

FILES = (LEDGER, f"{LEDGER}-wal", f"{LEDGER}-shm", ".lock", ".intake.lock", ".intake.lock.turn", "logs/onward.log")
REMOUNT = "Its disk is mounted read-only: mount it for writing"
SHOWN = 5
"""How many of them are named."""


def unwritable(layout: RunLayout) -> list[Path]:
    """Return the folders and files that exist, that training writes, and that this user may not write."""
    places = [layout.archive, layout.cache, layout.current, layout.boundaries, layout.rejected, layout.log.parent]
    below = [folder for place in (layout.cache, layout.current, layout.boundaries) for folder in _folders(place)]
    folders = [path for path in (layout.root, *places, *below) if path.is_dir()]
    files = [path for name in FILES if (path := layout.root / name).is_file()]
    closed = [folder for folder in folders if not os.access(folder, os.R_OK | os.W_OK | os.X_OK)]
    return closed + [path for path in files if not os.access(path, os.R_OK | os.W_OK)]


def in_words(layout: RunLayout, closed: list[Path]) -> str:
    """Return a sentence that names what may not be written."""
    own = layout.root
    words = ["its folder" if path == own else printable(str(path.relative_to(own))) for path in closed[:SHOWN]]
    more = f" and {len(closed) - SHOWN} more" if len(closed) > SHOWN else ""
    return f"this user may not write {', '.join(words)}{more}"


def way_to_write(layout: RunLayout, closed: list[Path]) -> str:
    """Return what lets this user write there."""
    if is_read_only(layout.root):
        return REMOUNT
    if any(path.stat().st_uid != os.geteuid() for path in closed):
        return f"sudo chown -R {user_name(os.geteuid())} {quoted(layout.root)}"
    return f"chmod -R u+rwX {quoted(layout.root)}"


def is_read_only(path: Path) -> bool:
    """Whether the disk of a path is mounted read-only."""
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def user_name(uid: int) -> str:
    """Return the name of a user; the number if the system has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _folders(place: Path) -> list[Path]:
    try:
        return sorted(path for path in place.iterdir() if path.is_dir())
    except OSError:  # not there, or not to be read, which is found anyway
        return []
