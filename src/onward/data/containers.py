"""Training files as streams of bytes: what may be opened, and gzip and zstandard taken off."""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

COMPRESSIONS = ("gz", "zst")
MAGIC = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"PAR1": "parquet", b"PK\x03\x04": "zip"}
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
ZSTD_INPUT = 1024  # compressed bytes at a time: what one block can blow up to stays bounded


class FileError(Exception):
    """A training file that cannot be read to its end.

    Args:
        reason: what is wrong with the file.
        remedy: what to change.
        line: where it was noticed, 1-based, if known.
    """

    def __init__(self, reason: str, remedy: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy
        self.line = line


def check_readable(path: Path) -> None:
    """Refuse what is no readable regular file, without opening it (opening a fifo would wait for a writer).

    Raises:
        FileError: `path` is missing, a directory, a special file, or not readable.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileError("no such file", "check the path") from None
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}", f"check it with: ls -l '{path}'") from None
    if stat.S_ISDIR(mode):
        raise FileError("is a directory", "give the files inside it one by one")
    if not stat.S_ISREG(mode):
        raise FileError("is a special file (fifo, socket or device)", "copy its content to a regular file")
    if not os.access(path, os.R_OK):
        raise FileError("no permission to read it", f"chmod u+r '{path}'")


@contextmanager
def open_bytes(path: Path, compression: str | None) -> Generator[BinaryIO]:
    """Open the uncompressed bytes of a text file; damage found while the block reads them becomes a `FileError`.

    Raises:
        FileError: the content is not what the ending says, is UTF-16, or is damaged.
    """
    try:
        with path.open("rb") as raw:
            _check_compression(raw, compression)
            with _decompressed(raw, compression) as stream:
                _check_text(stream, path)
                yield stream
    except EOFError:
        raise FileError("the compressed file is cut off", "copy or download it again") from None
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise FileError(f"the compressed file is damaged ({error})", "copy or download it again") from None
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror or error}", f"check it with: ls -l '{path}'") from None


def _check_compression(raw: BinaryIO, compression: str | None) -> None:
    head = raw.read(4)
    raw.seek(0)
    found = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
    if found is not None and found != compression:
        raise FileError(f"the content is {found}, but the name does not say so", f"rename it to end in .{found}")
    if compression is not None and found is None and head:
        raise FileError(f"the content is not {compression}, but the name says so", f"rename it without .{compression}")


def _check_text(stream: BinaryIO, path: Path) -> None:
    head = cast(io.BufferedReader, stream).peek(64)[:64]
    if head.startswith(UTF16_MARKS) or b"\x00" in head:
        raise FileError(
            "the text is not UTF-8 (it looks like UTF-16 or a binary file)",
            f"convert to UTF-8: iconv -f UTF-16 -t UTF-8 '{path.name}' > new-file",
            line=1,
        )


def _decompressed(raw: BinaryIO, compression: str | None) -> BinaryIO:
    if compression == "gz":
        return cast(BinaryIO, io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=raw)), 1 << 18))
    if compression == "zst":
        return io.BufferedReader(_ZstdStream(raw), 1 << 18)
    return raw


class _ZstdStream(io.RawIOBase):
    """The content of one or more zstandard frames; unlike `zstandard.stream_reader` it notices a missing end."""

    def __init__(self, raw: BinaryIO) -> None:
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
