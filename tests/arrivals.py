"""What tests of the inbox put into it."""

from __future__ import annotations

from pathlib import Path

from onward.service.intake.inbox import Inbox

NOW = 1_700_000_000.0
"""A moment, in seconds since the epoch."""


def write(path: Path, text: str = '{"text": "a"}\n') -> Path:
    """Write a file as a writer in place does: its inode changes when its content does."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    status = path.stat()
    while status.st_ctime_ns != status.st_mtime_ns:  # only where the file system's clock ticked in between
        path.write_text(text)
        status = path.stat()
    return path


def taken(inbox: Inbox) -> list[str]:
    """Names of the settled files of a scan, in order."""
    return [path.name for path, _ in inbox.scan().settled]
