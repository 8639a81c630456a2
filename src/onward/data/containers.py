"""Training files as streams of bytes: opened once, hashed as they are read, gzip and zstandard taken off."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import stat
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from onward.data.faults import FileError, SourceChanged, is_of_machine
from onward.data.limits import Limits
from onward.text import quoted

COMPRESSIONS = ("gz", "zst")
MAGIC = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"PAR1": "parquet", b"PK\x03\x04": "zip"}
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
ZSTD_INPUT = 1024  # compressed bytes at a time: bounds what one read can unpack to
BUFFER = 1 << 18

__all__ = ["COMPRESSIONS", "FileError", "SourceChanged", "SourceFile", "check_readable", "open_bytes"]


def check_readable(path: Path) -> None:
    """Refuse anything but a readable regular file, without opening it (opening a fifo would wait for a writer).

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

    Raises:
        FileError: it is missing, a link that is not followed, a directory, a special file, or not readable.
        OSError: the machine cannot open it.
    """

    def __init__(self, path: Path, *, links: bool = False) -> None:
        super().__init__()
        self.path = path
        self.taken = 0
        self._digest = hashlib.sha256()
        self._unpacked_digest: Any = None
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # not blocking: a fifo would wait for a writer
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
        """Say that it can be read."""
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
        """Name the digest of what the bytes unpack to: the archive's compressed copies are known by that one."""
        self._unpacked_digest = digest

    def check_read(self, sha256: str, stop: Callable[[], None]) -> None:
        """Read the rest and compare all that was read with a hash: that of the bytes, or of what they unpack to.

        Raises:
            SourceChanged: it is neither.
        """
        memory = bytearray(BUFFER)
        while self.readinto(memory):
            stop()
        unpacked = self._unpacked_digest
        if sha256 != self._digest.hexdigest() and (unpacked is None or sha256 != unpacked.hexdigest()):
            raise SourceChanged

    def rewind(self) -> None:
        """Begin again: the next byte is the first, and nothing is hashed yet."""
        self._file.seek(0)
        self._digest = hashlib.sha256()
        self.taken = 0


@contextmanager
def open_bytes(
    source: SourceFile, compression: str | None, limits: Limits, stop: Callable[[], None]
) -> Generator[BinaryIO]:
    """Open the uncompressed bytes of a text file; damage found while the block reads them becomes a `FileError`.

    Args:
        stop: called for every buffer that is read; may raise.

    Raises:
        FileError: the content is not what the ending says, is UTF-16, is damaged, or exceeds a limit once unpacked.
        OSError: the machine cannot read it.
    """
    raw = io.BufferedReader(source, BUFFER)
    try:
        _check_compression(raw, compression)
        unpacked = _decompressed(raw, compression)
        stream: BinaryIO = io.BufferedReader(_Counted(unpacked, source, limits, stop, compression), BUFFER)
        _check_text(stream, source.path)
        yield stream
    except EOFError:
        raise FileError("the compressed file is cut off", "copy or download it again") from None
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise FileError(f"the compressed file is damaged ({error})", "copy or download it again") from None
    except OSError as error:
        raise _refusal(error, source.path) from None
    finally:
        if not raw.closed:
            raw.detach()  # otherwise it closes the source when it is collected


def _check_kind(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise FileError("is a directory", "give the files inside it one by one")
    if not stat.S_ISREG(mode):
        raise FileError("is a special file (fifo, socket or device)", "copy its content to a regular file")


def _refusal(error: OSError, path: Path) -> Exception:
    """Return the refusal that an error of the operating system stands for, or the error where it is the machine's."""
    if is_of_machine(error):
        return error
    if error.errno == errno.ENOENT:
        return FileError("no such file", "check the path")
    if error.errno == errno.EACCES:
        return FileError("no permission to read it", f"chmod u+r {quoted(path)}")
    if error.errno == errno.ELOOP:
        return FileError("is a symbolic link", "give the file that it names")
    if error.errno == errno.ENXIO:
        return FileError("is a special file (fifo, socket or device)", "copy its content to a regular file")
    return FileError(f"cannot be read: {error.strerror or error}", f"check it with: ls -l {quoted(path)}")


def _check_compression(raw: Any, compression: str | None) -> None:
    head = raw.peek(4)[:4]
    found = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
    if found is not None and found != compression:
        raise FileError(f"the content is {found}, but the name does not say so", f"rename it to end in .{found}")
    if compression is not None and found is None and head:
        raise FileError(f"the content is not {compression}, but the name says so", f"rename it without .{compression}")


def _check_text(stream: Any, path: Path) -> None:
    head = stream.peek(64)[:64]
    if head.startswith(UTF16_MARKS) or b"\x00" in head:
        raise FileError(
            "the text is not UTF-8 (it looks like UTF-16 or a binary file)",
            f"convert to UTF-8: iconv -f UTF-16 -t UTF-8 {quoted(Path(path.name))} > new-file",
            line=1,
        )


def _decompressed(raw: Any, compression: str | None) -> Any:
    if compression == "gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == "zst":
        return _ZstdStream(raw)
    return raw


class _Counted(io.RawIOBase):
    """Counts what a file unpacks to, while it does, and polls for a stop."""

    def __init__(
        self, inner: Any, source: SourceFile, limits: Limits, stop: Callable[[], None], compression: str | None
    ) -> None:
        super().__init__()
        self._inner = inner
        self._source = source
        self._limits = limits
        self._stop = stop
        self._digest = hashlib.sha256() if compression else None
        self._count = 0
        if self._digest is not None:
            source.unpacks_to(self._digest)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._stop()
        count: int = self._inner.readinto(buffer)
        if self._digest is not None:
            self._digest.update(memoryview(buffer)[:count])
            self._count += count
            self._limits.check_unpacked(self._count, self._source.taken)
        return count


class _ZstdStream(io.RawIOBase):
    """The content of one or more zstandard frames; unlike `zstandard.stream_reader` it notices a missing end."""

    def __init__(self, raw: Any) -> None:
        super().__init__()
        self._raw = raw
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._advance():
                return 0
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _advance(self) -> bool:
        data = self._input or self._raw.read(ZSTD_INPUT)
        if not data:
            if self._frame is not None:
                raise EOFError
            return False
        self._frame = self._frame or self._new_frame()
        self._output = memoryview(self._frame.decompress(data))
        self._input = b""
        if self._frame.eof:
            self._input = self._frame.unused_data
            self._frame = None
        return True
