"""Training files as streams of bytes: opened once, hashed as they are read, decompressed and taken out of archives."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from onward.data.files.archives import member_of
from onward.data.files.compression import DAMAGE, decompressed
from onward.data.files.content import require_content
from onward.data.files.faults import SPECIAL_FILE, FileError, SourceChanged, is_of_machine
from onward.data.files.formats import ARCHIVE, file_format
from onward.data.files.limits import Limits
from onward.text import quoted

BUFFER = 1 << 18

__all__ = ["FileError", "SourceChanged", "SourceFile", "check_readable", "open_bytes"]


def check_readable(path: Path) -> None:
    """Refuse anything but a readable regular file, without opening it (opening a FIFO would wait for a writer).

    Raises:
        FileError: `path` is missing, a directory, a special file, or not readable.
        OSError: the machine cannot tell.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise _refusal(error, path) from None
    _check_kind(mode)
    if not os.access(path, os.R_OK):
        raise _refusal(PermissionError(errno.EACCES, ""), path)


class SourceFile(io.RawIOBase):
    """A training file, opened once; hashes the bytes that are read from it, in order.

    Args:
        path: the file.
        links: whether a symbolic link is followed.
        stop: called for every buffer that is read, packed or unpacked, whether or not it holds rows; may raise.

    Attributes:
        form: its format by its name; once an archive is open, the format of the file in it.
        notes: what the user should know about how it was read.

    Raises:
        FileError: it is missing, a link that is not followed, a directory, a special file, or not readable.
        OSError: the machine cannot open it.
    """

    def __init__(self, path: Path, *, links: bool = False, stop: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.path = path
        self.stop = stop
        self.form = file_format(path)
        self.notes: list[str] = []
        self.taken = 0
        self._digest = hashlib.sha256()
        self._unpacked_digest: Any = None
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # not blocking: a FIFO would wait for a writer
        try:
            descriptor = os.open(path, flags if links else flags | os.O_NOFOLLOW)
        except OSError as error:
            raise _refusal(error, path) from None
        try:
            _check_kind(os.fstat(descriptor).st_mode)
        except FileError:
            os.close(descriptor)
            raise
        self._file = io.FileIO(descriptor)

    def readable(self) -> bool:
        """Return True: it can be read."""
        return True

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._file.fileno()

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self.fileno()).st_size

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes into `buffer` and hash them."""
        self.stop()
        count = self._file.readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:count])
        self.taken += count
        return count

    def close(self) -> None:
        """Close the descriptor."""
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()

    def unpacks_to(self, digest: Any) -> None:
        """Set the digest of what the bytes unpack to, by which compressed copies in the archive are known."""
        self._unpacked_digest = digest

    def check_read(self, sha256: str) -> None:
        """Read the rest and compare everything read with a hash, either of the bytes or of what they unpack to.

        Raises:
            SourceChanged: neither matches.
        """
        memory = bytearray(BUFFER)
        while self.readinto(memory):
            pass
        unpacked = self._unpacked_digest
        if sha256 != self._digest.hexdigest() and (unpacked is None or sha256 != unpacked.hexdigest()):
            raise SourceChanged

    def rewind(self) -> None:
        """Start over: the next byte is the first, and nothing is hashed yet."""
        self._file.seek(0)
        self._digest = hashlib.sha256()
        self.taken = 0


@contextmanager
def open_bytes(source: SourceFile, limits: Limits) -> Generator[BinaryIO]:
    """Open the uncompressed bytes of a file; damage found while the `with` block reads them becomes a `FileError`.

    For an archive, the format of `source` becomes that of the file in it.

    Raises:
        FileError: the content is not what the ending says, is damaged, or exceeds a limit once unpacked.
        OSError: the machine cannot read it.
    """
    raw: Any = io.BufferedReader(source, BUFFER)
    is_archive = source.form == ARCHIVE
    try:
        require_content(raw.peek(16)[:16], source.form, source.fileno(), source.path)
        packed: Any = raw
        if is_archive:
            source.form, packed, notes = member_of(source.fileno())
            source.notes += notes
            require_content(packed.peek(16)[:16], source.form, None, source.path)
        compression = source.form.partition(".")[2] or None
        size = source.size
        count = (lambda: size) if is_archive else (lambda: source.taken) if compression else None
        counted = _Counted(decompressed(packed, compression), source, limits, count)
        yield io.BufferedReader(counted, BUFFER)
    except EOFError:
        raise FileError("the compressed file is cut off", "copy or download it again") from None
    except DAMAGE as error:
        raise _damage(error) from None
    except OSError as error:
        if error.errno is None and source.form.endswith((".bz2", ARCHIVE)):
            raise _damage(error) from None
        raise _refusal(error, source.path) from None
    finally:
        if not raw.closed:
            raw.detach()  # or it would close the source when garbage-collected


def _damage(error: BaseException) -> FileError:
    if "memory usage limit" in str(error).lower():
        return FileError("unpacking it takes more memory than xz -9 does", "unpack it, and compress it with xz -9")
    if "too much memory" in str(error).lower():
        what = "unpacking it takes more memory than zstd does without --long"
        return FileError(what, "unpack it with zstd -d --long=31, and compress it without --long")
    return FileError(f"the compressed file is damaged ({error})", "copy or download it again")


def _check_kind(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise FileError("is a directory", "give the files in it one by one")
    if not stat.S_ISREG(mode):
        raise FileError(*SPECIAL_FILE)


def _refusal(error: OSError, path: Path) -> Exception:
    """Return the refusal that an operating system error means, or the error itself if the machine is at fault."""
    if is_of_machine(error):
        return error
    if error.errno == errno.ENOENT:
        return FileError("no such file", "check the path")
    if error.errno == errno.EACCES:
        return FileError("no permission to read it", f"chmod u+r {quoted(path)}")
    if error.errno == errno.ELOOP:
        return FileError("is a symbolic link", "give the file that it names")
    if error.errno == errno.ENXIO:
        return FileError(*SPECIAL_FILE)
    return FileError(f"cannot be read: {error.strerror or error}", f"check it with: ls -l {quoted(path)}")


class _Counted(io.RawIOBase):
    """Counts the unpacked bytes of a file as they come, and polls for a stop.

    Args:
        packed: returns how many packed bytes have been read so far; None if the file is not packed.
    """

    def __init__(self, inner: Any, source: SourceFile, limits: Limits, packed: Callable[[], int] | None) -> None:
        super().__init__()
        self._inner = inner
        self._limits = limits
        self._stop = source.stop
        self._packed = packed
        self._digest = hashlib.sha256() if packed else None
        self._count = 0
        if self._digest is not None:
            source.unpacks_to(self._digest)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._stop()
        count: int = self._inner.readinto(buffer)
        if self._digest is not None and self._packed is not None:
            self._digest.update(memoryview(buffer)[:count])
            self._count += count
            self._limits.check_unpacked(self._count, self._packed())
        return count
