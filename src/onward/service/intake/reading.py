"""Reads and moves files that others may still write: by one descriptor, and checked before and after to be the same."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

from onward.atomic import TEMPORARY_PREFIX, fsync_directory
from onward.data.files.faults import SPECIAL_FILE, FileError
from onward.service.intake.budget import Spending

CHUNK = 1 << 20
"""Bytes read at once; a stop or a spent budget is noticed between two chunks."""


class Changed(Exception):
    """The file is not the one that was seen: its writer is not done, or it was replaced."""


def look(path: Path) -> os.stat_result | None:
    """Return the status of a path, of a link itself and not its target; None if there is nothing.

    Raises:
        OSError: the machine cannot tell.
    """
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_regular(path: Path) -> bool:
    """Whether a regular file lies at a path, and no link to one.

    Raises:
        OSError: the machine cannot tell.
    """
    found = look(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def identity(status: os.stat_result) -> str:
    """Return device, inode, size and modification time, in which any change of a file shows."""
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def read_whole(
    path: Path, spending: Spending, *, writer: BinaryIO | None = None, links: bool = False, flush: bool = False
) -> tuple[str, os.stat_result]:
    """Read a file through one descriptor; return its SHA-256 and its status.

    Args:
        writer: receives the bytes.
        links: whether a symbolic link is followed.
        flush: force the bytes, which another process wrote, to the disk.

    Raises:
        Changed: it changed while it was read, or the path no longer leads to it.
        FileError: it is not a regular file.
        OSError: the machine cannot read it.
    """
    digest = hashlib.sha256()
    descriptor = _open(path, links)
    try:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise FileError(*SPECIAL_FILE)
        memory = memoryview(bytearray(min(CHUNK, max(1, before.st_size))))
        spending.spend_bytes(before.st_size)
        while count := _read(descriptor, memory, path):
            spending.spend_bytes(0)
            digest.update(memory[:count])
            if writer is not None:
                writer.write(memory[:count])
        if flush:
            os.fsync(descriptor)
        after = os.fstat(descriptor)
        now = path.stat() if links else look(path)
    finally:
        os.close(descriptor)
    if now is None or not identity(before) == identity(after) == identity(now):
        raise Changed
    return digest.hexdigest(), after


def _read(descriptor: int, memory: memoryview, path: Path) -> int:
    try:
        return os.readv(descriptor, [memory])
    except OSError as error:  # the kernel does not accept the name
        raise OSError(error.errno, error.strerror, str(path)) from None


def _open(path: Path, links: bool) -> int:
    """Open a file without waiting for the writer of a FIFO; a link is followed only with `links`."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags if links else flags | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOENT, errno.ENOTDIR):  # it was a file a moment ago
            raise Changed from None
        raise


def move_durably(source: Path, target: Path) -> bool:
    """Move a file; between mounts, by a copy that is durable before the source is removed.

    A link is moved as a link. Any other special file has no content: between mounts it is only removed.

    Returns:
        Whether the target is the same file, and not a copy.

    Raises:
        Changed: it changed while it was copied; it stays, and no copy is left.
        OSError: the machine cannot move it; the source stays, and no copy is left.
    """
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy_over(source, target)
        try:
            fsync_directory(target.parent)
            source.unlink()
        except OSError:
            target.unlink(missing_ok=True)
            raise
        return False
    fsync_directory(target.parent)
    return True


def _copy_over(source: Path, target: Path) -> None:
    mode = source.lstat().st_mode
    if stat.S_ISLNK(mode):
        target.symlink_to(source.readlink())
    if not stat.S_ISREG(mode):
        return
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    try:
        with temporary.open("wb") as writer:
            read_whole(source, Spending(), writer=writer)
            writer.flush()
            os.fsync(writer.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
