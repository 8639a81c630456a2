"""Arrival: a file is hashed and recorded, and lies in `archive/`, before anything slow begins.

A file of a command is copied; a file of the inbox is moved, never copied over another and never lost: the ledger
says first where it comes from and where it goes, and a start finishes what a kill interrupted.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from onward.atomic import TEMPORARY_PREFIX, fsync_directory, fsync_file, remove_temporaries
from onward.data.containers import FileError, check_readable
from onward.data.sources import file_format
from onward.digest import CHUNK, sha256_file
from onward.layout import RunLayout
from onward.service.intake.names import plain_name, unused_name
from onward.service.intake.refusals import Refusal, keep_refused
from onward.service.wishes import Stopped
from onward.store.ledger import Ledger
from onward.store.rows import FileRow

MANY = 32
"""Files above which one flush of all disks is cheaper than one per file."""

Values = dict[str, Any]


class Changed(Exception):
    """The file changed while it was read: its writer is not done."""


class Arrivals:
    """Brings files into the archive of one run. The caller holds the intake lock.

    Args:
        stop: polled while a file is read; raises to leave it as if it had not been looked at.
    """

    def __init__(self, layout: RunLayout, ledger: Ledger, stop: Callable[[], None] = lambda: None) -> None:
        self.layout = layout
        self.ledger = ledger
        self.stop = stop
        self._hashed: dict[Path, tuple[int, int, int]] = {}

    def copy(self, path: Path) -> tuple[Path, Values]:
        """Copy a file beside its place in the archive; returns the copy and what the ledger will say of it.

        Raises:
            FileError: it cannot be read, or is no training file.
        """
        check_readable(path)
        form, name = file_format(path), plain_name(path.name)
        target = unused_name(self.layout.archive, name)
        temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
        try:
            with temporary.open("wb") as writer:
                digest, size = _read_whole(path, self.stop, writer)
                writer.flush()
                os.fsync(writer.fileno())
        except (OSError, Changed, Stopped) as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, Stopped):
                raise
            raise _unreadable(error) from None
        return temporary, self._values(name, digest, size, form, target)

    def record(self, arrived: Sequence[Values]) -> list[FileRow]:
        """Record files as arriving, durably, and give them their places."""
        with self.ledger.transaction():
            ids = [self.ledger.insert_file(state="arriving", **values) for values in arrived]
        rows = [self.ledger.file(number) for number in ids]
        self.complete(rows)
        return rows

    def move_in(self, found: Sequence[tuple[Path, int]], command: str) -> list[FileRow]:
        """Take files of the inbox: hash them, record them, move them; what is no training file goes to `rejected/`.

        Args:
            found: settled files with their priority, in the order of the stream.
            command: prefix of the id that each of them gets for itself.

        Returns:
            The rows of those that arrived. A file that changed meanwhile is left where it is.

        Raises:
            OSError: the inbox cannot be read, or files cannot be taken out of it; the next call goes on.
        """
        for folder in {path.parent for path, _ in found}:
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EROFS, "files cannot be taken out of the inbox", str(folder))
        self._hashed.clear()
        reserved: set[str] = set()
        arrived: list[Values] = []
        for number, (path, priority) in enumerate(found):
            try:
                values = self._read_in(path, reserved)
            except (Changed, FileNotFoundError):
                continue
            except FileError as error:
                self._refuse_unread(path, error)
                continue
            arrived.append({**values, "command": f"{command}-{number}", "priority": priority})
        _flush([path for path, _ in found if path.exists()])
        return self.record(arrived) if arrived else []

    def complete(self, rows: Sequence[FileRow]) -> None:
        """Bring recorded files to their places in the archive, wherever a kill left them."""
        inboxes: set[Path] = set()
        for row in rows:
            copy = self.layout.root / row.copy
            temporary = copy.with_name(f"{TEMPORARY_PREFIX}{copy.name}")
            source = self.layout.inbox / row.inbox if row.inbox else None
            if temporary.exists() and source is None:
                temporary.replace(copy)
            elif source is not None:
                inboxes.add(source.parent)
                self._move(row, source, copy)
        fsync_directory(self.layout.archive)
        for folder in inboxes:
            if folder.is_dir():
                fsync_directory(folder)

    def clean(self) -> None:
        """Finish the arrivals of a process that was killed, and remove copies that were never recorded."""
        self.complete(self.ledger.files("arriving"))
        remove_temporaries(self.layout.archive)

    def _move(self, row: FileRow, source: Path, copy: Path) -> None:
        there = copy.exists()
        if not there and source.is_file() and self._is_as_hashed(source, row):
            _rename_or_copy(source, copy)
        elif there and source.is_file() and source.stat().st_dev != copy.stat().st_dev:
            # copied from another disk and killed before the original went: the same file, not a second one
            if sha256_file(source) == row.sha256:
                source.unlink()
        elif not there:
            self.ledger.move_file(row.id, "rejected", note="it left the inbox before it was taken")
            self.ledger.add_event("warning", f"{row.name} left the inbox before it was taken", kind="rejected")

    def _is_as_hashed(self, source: Path, row: FileRow) -> bool:
        known = self._hashed.get(source)
        return _signature(source) == known if known else sha256_file(source) == row.sha256

    def _read_in(self, path: Path, reserved: set[str]) -> Values:
        if path.is_symlink():
            raise FileError("is a symbolic link", "put the file itself into the inbox")
        if not _is_text(path.name):  # the ledger could not say where it lies
            raise FileError("its name is not UTF-8", "rename it and put it into the inbox again")
        check_readable(path)
        form, name = file_format(path), plain_name(path.name)
        digest, size = _read_whole(path, self.stop)
        self._hashed[path] = _signature(path)
        target = unused_name(self.layout.archive, name, reserved=reserved)
        reserved.add(target.name)
        values = self._values(name, digest, size, form, target)
        return {**values, "inbox": path.relative_to(self.layout.inbox).as_posix()}

    def _values(self, name: str, digest: str, size: int, form: str, target: Path) -> Values:
        copy = target.relative_to(self.layout.root).as_posix()
        return {"name": name, "sha256": digest, "bytes": size, "format": form, "copy": copy}

    def _refuse_unread(self, path: Path, error: FileError) -> None:
        refusal = Refusal.of_file(path.name, error)
        keep_refused(self.layout, path, refusal, self.ledger.clock(), move=True)
        self.ledger.add_event("warning", f"{refusal.name} rejected: {refusal.lines()[0]}", kind="rejected")


def _read_whole(path: Path, stop: Callable[[], None], writer: BinaryIO | None = None) -> tuple[str, int]:
    """Hash a file, and write it along; returns digest and size.

    Raises:
        Changed: its size or time moved meanwhile.
    """
    digest = hashlib.sha256()
    before = path.stat()
    with path.open("rb") as reader:
        while chunk := reader.read(CHUNK):
            stop()
            digest.update(chunk)
            if writer is not None:
                writer.write(chunk)
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise Changed
    return digest.hexdigest(), after.st_size


def _signature(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unreadable(error: Exception) -> FileError:
    if isinstance(error, Changed):
        return FileError("the file changed while it was read", "add it when its writer is done")
    reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
    return FileError(f"the file cannot be copied: {reason}", "mend that, then add it")


def _flush(paths: Sequence[Path]) -> None:
    """Force the bytes of files that somebody else wrote to the disk, before the ledger promises to have them."""
    if len(paths) > MANY:
        os.sync()
        return
    for path in paths:
        fsync_file(path)


def _rename_or_copy(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:  # else the inbox is another disk
            raise
        temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
        shutil.copyfile(source, temporary)
        fsync_file(temporary)
        temporary.replace(target)
        source.unlink()
