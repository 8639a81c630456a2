"""Arrival: a file is read once, recorded, and placed in `archive/` before anything slow begins.

A file given to a command is copied. A file of the inbox is first announced, which gives it its place in the queue
whichever process reads it, then read, recorded and moved. It never overwrites another and is never lost: the ledger
says where it comes from and where it goes before it moves, and the next start finishes what a kill interrupted. A
file that the system does not let go stays in the inbox, and holds up neither the others nor the queue.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from onward.atomic import TEMPORARY_PREFIX, fsync_directory, remove_temporaries
from onward.data.files.containers import check_readable
from onward.data.files.faults import FileError
from onward.data.files.formats import file_format
from onward.digest import sha256_file
from onward.errors import Unreadable
from onward.layout import RunLayout, entries
from onward.service.intake.budget import BudgetSpent, Spending
from onward.service.intake.folders import is_saved_dataset, joined
from onward.service.intake.inbox import STUCK
from onward.service.intake.names import one_name, plain_name, unused_name
from onward.service.intake.reading import Changed, identity, is_regular, look, move_durably, read_whole
from onward.service.intake.refusals import Refusal, keep_refused
from onward.store.ledger import Ledger
from onward.store.rows import FileRow

MANY = 32
"""The number of files above which one flush of all disks is cheaper than one per file."""
TOGETHER = 512
"""How many files of the inbox are announced, or recorded, in one transaction."""
HELD_BACK = (errno.EPERM, errno.EACCES, errno.EBUSY)
"""Errors of moving one file that say nothing about the others: it is immutable, it is a mount, or it belongs to another
user and its folder is sticky."""
AGAIN = 60.0
"""Seconds after which such a file, unchanged, is tried again; until then it is not read."""

Values = dict[str, Any]


class Arrivals:
    """Brings files into the archive of one run. The caller holds the intake lock."""

    def __init__(self, layout: RunLayout, ledger: Ledger) -> None:
        self.layout = layout
        self.ledger = ledger

    # files of a command

    def copy(self, path: Path, spending: Spending) -> tuple[Path, Values]:
        """Copy a file to a temporary name in the archive; return the copy and the values of its row in the ledger.

        Raises:
            FileError: it is not a training file.
            Unreadable: the machine cannot read it now.
        """
        is_folder = is_saved_dataset(path)
        form, name = ("arrow", plain_name(f"{path.absolute().name}.arrow")) if is_folder else _named(path)
        target = unused_name(self.layout.archive, name)
        temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
        try:
            if not is_folder:
                check_readable(path)
            with temporary.open("wb") as writer:
                digest, size = joined(path, writer, spending) if is_folder else _copied(path, writer, spending)
                writer.flush()
                os.fsync(writer.fileno())
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, Changed):
                raise FileError("the file changed while it was read", "add it again when its writer is done") from None
            if isinstance(error, OSError) and error.filename == str(path):
                raise Unreadable.of(error, path) from None
            raise
        values = {"name": name, "sha256": digest, "bytes": size, "format": form}
        return temporary, {**values, "copy": self._below(target)}

    def record(self, arrived: Sequence[Values], intent: int | None = None) -> list[FileRow]:
        """Durably record files as arriving and give them their places; that ends the intent to take them in."""
        with self.ledger.transaction():
            ids = [self.ledger.insert_file(state="arriving", **values) for values in arrived]
            if intent is not None:
                self.ledger.end_intent(intent)
        rows = [self.ledger.file(number) for number in ids]
        self.complete(rows)
        return rows

    # files of the inbox

    def announce(self, found: Sequence[tuple[Path, int]], command: str) -> int:
        """Give settled files of the inbox their places in the queue; return how many are new.

        Nothing is read. Each file gets a command id of its own.

        Args:
            found: settled files with their priority, in the order of the stream.

        Raises:
            OSError: files cannot be taken out of the inbox.
        """
        known = {row.inbox for row in self.ledger.announced()} | self._left_for_now()
        fresh: list[Values] = []
        for path, priority in found:
            name = path.relative_to(self.layout.inbox).as_posix()
            status = look(path)
            if status is None or name in known:
                continue
            self._require_movable(path)
            if not _is_text(name):  # the ledger could not store its path
                error = FileError("its name is not UTF-8", "rename it and put it into the inbox again")
                self._refuse(path, Refusal.of_file(path.name, error))  # if it is stuck, there is no row to forget
                continue
            values = {"name": plain_name(path.name), "sha256": "", "format": "", "copy": "", "inbox": name}
            values |= {"bytes": status.st_size, "seen": identity(status), "priority": priority}
            fresh.append({**values, "command": f"{command}-{len(fresh)}"})
        for start in range(0, len(fresh), TOGETHER):
            with self.ledger.transaction():
                for values in fresh[start : start + TOGETHER]:
                    self.ledger.insert_file(state="arriving", **values)
        return len(fresh)

    def bring_in(self, rows: Sequence[FileRow], spending: Spending) -> list[FileRow]:
        """Read announced files, record and move them, within the budget; return those that arrived.

        A file that changed since it was announced is forgotten: it stays where it was and has to settle again.

        Raises:
            OSError: the inbox cannot be read, or files cannot be taken out of it; the next call continues.
        """
        together = len(rows) > MANY and not spending.is_bounded
        reserved = {one_name(Path(copy).name) for copy in self.ledger.arriving_copies()}
        recorded: list[tuple[int, Values]] = []
        for row in rows:
            try:
                values = self._read_in(row, reserved, spending, flush=not together)
            except BudgetSpent:
                break
            except (Changed, FileNotFoundError):
                self.ledger.forget_arriving(row.id)
                continue
            except FileError as error:
                self.refuse_announced(row, Refusal.of_file(row.name, error))
                continue
            recorded.append((row.id, values))
        if together:
            os.sync()
        with self.ledger.transaction():
            arrived = [number for number, values in recorded if self.ledger.change_arriving(number, **values)]
        self.complete([self.ledger.file(number) for number in arrived])
        return [row for row in map(self.ledger.find, arrived) if row is not None and row.state == "arriving"]

    def refuse_announced(self, row: FileRow, refusal: Refusal) -> None:
        """Move a file that was not read from the inbox into `rejected/`."""
        assert row.inbox is not None
        if self._refuse(self.layout.dropped(row.inbox), refusal):
            self.ledger.change_arriving(row.id, state="rejected", note=refusal.lines()[0])
        else:
            self.ledger.forget_arriving(row.id)

    # both

    def complete(self, rows: Sequence[FileRow]) -> None:
        """Move recorded files to their places in the archive, wherever a kill left them."""
        inboxes: set[Path] = set()
        for row in rows:
            if row.is_announced:
                continue
            copy = self.layout.kept(row.copy)
            if row.inbox is None:
                temporary = copy.with_name(f"{TEMPORARY_PREFIX}{copy.name}")
                if look(temporary) is not None:
                    temporary.replace(copy)
                continue
            source = self.layout.dropped(row.inbox)
            inboxes.add(source.parent)
            self._move(row, source, copy)
        fsync_directory(self.layout.archive)
        for folder in inboxes:
            if folder.is_dir():
                fsync_directory(folder)

    def clean(self) -> None:
        """Finish the arrivals of a process that was killed, and remove copies that were never recorded."""
        self.complete(self.ledger.files("arriving"))
        remove_temporaries(entries(self.layout.archive), is_regular)  # a folder or a link is not a copy

    def _read_in(self, row: FileRow, reserved: set[str], spending: Spending, *, flush: bool) -> Values:
        assert row.inbox is not None
        path = self.layout.dropped(row.inbox)
        status = look(path)
        if status is None or identity(status) != row.seen:
            raise Changed
        if stat.S_ISLNK(status.st_mode):
            raise FileError("is a symbolic link", "put the file itself into the inbox")
        self._require_movable(path)
        form = file_format(path)
        check_readable(path)
        digest, found = read_whole(path, spending, flush=flush)
        if identity(found) != row.seen:
            raise Changed
        target = unused_name(self.layout.archive, row.name, reserved=reserved)
        reserved.add(one_name(target.name))
        return {"sha256": digest, "bytes": found.st_size, "format": form, "copy": self._below(target)}

    def _move(self, row: FileRow, source: Path, copy: Path) -> None:
        there, here = look(copy), look(source)
        if there is not None:
            may_be = here is not None and _may_be_copied(row, here, there) and self._is_as_recorded(row, source)
            if may_be and is_regular(copy) and sha256_file(copy) == row.sha256:
                # copied from another mount and killed before the original was removed: the same file, not a second one
                fsync_directory(copy.parent)
                try:
                    source.unlink()
                except OSError as error:
                    self._leave(source, error)
            return
        if here is None or not self._is_as_recorded(row, source):
            self._let_go(row, "left the inbox before it was taken")
            return
        try:
            is_same_inode = move_durably(source, copy)
        except (Changed, FileNotFoundError):
            self._let_go(row, "changed while it was taken")
            return
        except OSError as error:
            self._leave(source, error)
            self.ledger.forget_arriving(row.id)
            return
        moved = look(copy)
        if is_same_inode and (moved is None or identity(moved) != identity(here)):
            if moved is not None and look(source) is None:
                copy.rename(source)  # swapped at the last moment: whatever it is, it was not checked
            self._let_go(row, "was exchanged while it was taken")

    def _is_as_recorded(self, row: FileRow, source: Path) -> bool:
        found = look(source)
        if found is None or not stat.S_ISREG(found.st_mode):
            return False
        return identity(found) == row.seen or sha256_file(source) == row.sha256

    def _let_go(self, row: FileRow, reason: str) -> None:
        with self.ledger.transaction():
            if self.ledger.change_arriving(row.id, state="rejected", note=f"it {reason}"):
                self.ledger.add_event("warning", f"{row.name} {reason}", kind="rejected")

    def _refuse(self, path: Path, refusal: Refusal) -> bool:
        """Move a file of the inbox into `rejected/`; return False if it is stuck and stays."""
        try:
            keep_refused(self.layout, path, refusal, self.ledger.clock(), move=True)
        except OSError as error:
            self._leave(path, error)
            return False
        self.ledger.add_event("warning", f"rejected: {refusal.lines()[0]}", kind="rejected")
        return True

    def _leave(self, path: Path, error: OSError) -> None:
        """Note that a file of the inbox cannot be taken out of it, or raise what concerns more than this file."""
        status = look(path)
        is_its_own = error.errno in HELD_BACK and error.filename is not None and Path(error.filename) == path
        if status is None or not is_its_own or not os.access(self.layout.archive, os.W_OK):
            raise error
        name = path.relative_to(self.layout.inbox).as_posix()
        found = {"seen": identity(status), "why": error.strerror, "at": self.ledger.clock()}
        with self.ledger.transaction():
            self.ledger.put(**{STUCK: {**self.ledger.get(STUCK, {}), name: found}})

    def _left_for_now(self) -> set[str]:
        """Return the paths of stuck files that are not tried again yet; those that left or changed are forgotten."""
        stuck: dict[str, Any] = self.ledger.get(STUCK, {})
        kept = {name: known for name, known in stuck.items() if _is_as_seen(look(self.layout.inbox / name), known)}
        if kept != stuck:
            self.ledger.put(**{STUCK: kept})
        return {name for name, known in kept.items() if 0 <= self.ledger.clock() - known["at"] < AGAIN}

    def _require_movable(self, path: Path) -> None:
        if path.parent == self.layout.inbox and not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EROFS, "files cannot be taken out of the inbox", str(path.parent))

    def _below(self, target: Path) -> str:
        return target.relative_to(self.layout.root).as_posix()


def _named(path: Path) -> tuple[str, str]:
    return file_format(path), plain_name(path.name)


def _copied(path: Path, writer: BinaryIO, spending: Spending) -> tuple[str, int]:
    digest, found = read_whole(path, spending, writer=writer, links=True)
    return digest, found.st_size


def _may_be_copied(row: FileRow, here: os.stat_result, there: os.stat_result) -> bool:
    """Whether a file in the archive may be a copy of one in the inbox; a bind mount has the same device number."""
    return here.st_dev != there.st_dev or (here.st_ino != there.st_ino and identity(here) == row.seen)


def _is_as_seen(status: os.stat_result | None, known: dict[str, Any]) -> bool:
    return status is not None and identity(status) == known["seen"]


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
