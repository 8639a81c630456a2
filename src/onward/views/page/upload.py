"""A file that a browser sends into the inbox: streamed under a temporary name, in place only when complete.

While it grows, it has a name that the inbox ignores, and a lock by which a later page recognizes abandoned ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import secrets
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from anyio import to_thread

from onward.atomic import move_to_free_name
from onward.errors import NoSpace, NotMadeHere, UsageError, is_out_of_space
from onward.service.intake.inbox import IGNORED, PRIORITIES
from onward.text import printable

CHUNK = 4 << 20
"""Bytes that are written at once; between two writes the disk is checked again."""
NAME_BYTES = 255
UNFINISHED = re.compile(r"upload-[0-9a-f]{16}\.part")


class BadName(UsageError):
    """A name is impossible for a file of the inbox."""


def require_name(name: str) -> str:
    """Return a name if the inbox accepts it.

    Raises:
        BadName: it leads elsewhere, or the inbox would ignore the file forever.
    """
    hint = "Send it under a plain name, such as data.jsonl."
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise BadName("this is not a plain file name", where=printable(name), hint=hint)
    if not name.isprintable():
        raise BadName("the name has characters that cannot be printed", where=printable(name), hint=hint)
    if name.startswith(".") or name.lower().endswith(IGNORED):
        raise BadName("the inbox ignores files with such a name as unfinished", where=name, hint=hint)
    if name in PRIORITIES:
        raise BadName("this is the name of a folder of the inbox", where=name, hint=hint)
    if len(name.encode()) > NAME_BYTES:
        raise BadName(f"the name is longer than {NAME_BYTES} bytes", where=f"{name[:40]}...", hint=hint)
    return name


class Upload:
    """One file on its way into the inbox.

    Args:
        inbox: the folder.
        name: the file's name, accepted by `require_name`.
        reserve: bytes that must stay free on the disk.
    """

    def __init__(self, inbox: Path, name: str, reserve: int) -> None:
        self._target = inbox / name
        self._part = inbox / f"upload-{secrets.token_hex(8)}.part"
        self._reserve = reserve

    async def receive(self, chunks: AsyncIterator[bytes], size: int | None) -> int:
        """Receive all chunks and put the file in place; return its size.

        Args:
            size: the announced bytes; None if no size is announced.

        Raises:
            NotMadeHere: a file of that name waits already.
            NoSpace: the disk has no room for it.
        """
        self._require_free_name()
        self._require_room(size or 0)
        writer = await to_thread.run_sync(self._open)
        held = os.open(self._part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)  # keeps the lock until after the writing
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            written = await self._copy(chunks, writer)
            await to_thread.run_sync(self._finish, writer)
        except OSError as error:  # some disks say only at the end that they are full
            if not is_out_of_space(error):
                raise
            raise self._full(size or 0) from None
        finally:  # even if the browser went away: no partial file stays
            writer.close()
            os.close(held)
            self._part.unlink(missing_ok=True)
        return written

    async def _copy(self, chunks: AsyncIterator[bytes], writer: io.FileIO) -> int:
        written, buffer = 0, bytearray()
        async for chunk in chunks:
            buffer += chunk
            if len(buffer) >= CHUNK:
                await to_thread.run_sync(self._write, writer, bytes(buffer))
                written += len(buffer)
                buffer.clear()
        await to_thread.run_sync(self._write, writer, bytes(buffer))
        return written + len(buffer)

    def _open(self) -> io.FileIO:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return io.FileIO(os.open(self._part, flags, 0o644), "wb")

    def _write(self, writer: io.FileIO, data: bytes) -> None:
        self._require_room(len(data))
        view = memoryview(data)
        while view:
            view = view[writer.write(view) :]

    def _finish(self, writer: io.FileIO) -> None:
        """Force the bytes to the disk, close the file and name it, unless another one got the name meanwhile."""
        os.fsync(writer.fileno())
        writer.close()
        try:
            move_to_free_name(self._part, self._target)
        except FileExistsError:
            raise self._taken() from None

    def _require_free_name(self) -> None:
        if os.path.lexists(self._target):
            raise self._taken()

    def _taken(self) -> NotMadeHere:
        hint = "Wait until it has been taken in, or send this one under another name."
        return NotMadeHere("a file of this name is already waiting in the inbox", where=self._target.name, hint=hint)

    def _require_room(self, size: int) -> None:
        if shutil.disk_usage(self._part.parent).free - size < self._reserve:
            raise self._full(size)

    def _full(self, size: int) -> NoSpace:
        free = shutil.disk_usage(self._part.parent).free
        what = f"the disk has no room for it: {free / 1e6:.0f} MB free, {(self._reserve + size) / 1e6:.0f} MB needed"
        return NoSpace(what, where=self._target.name, hint="Make room, then send it again. None of it was kept.")


def remove_dead_parts(inbox: Path) -> None:
    """Remove partial files of pages that were killed; parts that still grow are locked."""
    for path in inbox.glob("upload-*.part"):
        if not UNFINISHED.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)
