"""Decompression, a buffer at a time: gzip, zstandard, xz and bzip2."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any

import zstandard

ZSTD_INPUT = 1024  # compressed bytes at a time: bounds what one read can unpack to
INPUT = 1 << 16
XZ_MEMORY = 256 << 20
"""Memory that the dictionary of an .xz file may ask for: `xz -9` asks for 65 MiB."""
DAMAGE = (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, lzma.LZMAError)
"""What damaged files raise, besides an `EOFError` if the end is missing; bzip2 raises an `OSError` without an errno."""


def decompressed(raw: Any, compression: str | None) -> Any:
    """Return a raw stream of a buffered stream's decompressed bytes, or of its own bytes without a compression."""
    if compression == "gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == "zst":
        return _ZstdStream(raw)
    if compression == "xz":
        return _Stream(raw, lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY), padded=True)
    if compression == "bz2":
        return _Stream(raw, bz2.BZ2Decompressor)
    return raw


class _Stream(io.RawIOBase):
    """The content of one or more streams of a decompressor that bounds its output; notices a missing end.

    Args:
        new: makes a decompressor with `decompress(data, max_length)`, `needs_input`, `eof` and `unused_data`.
        padded: whether zero bytes may stand between and after streams, as in .xz files.
    """

    def __init__(self, raw: Any, new: Callable[[], Any], *, padded: bool = False) -> None:
        super().__init__()
        self._raw = raw
        self._new = new
        self._padded = padded
        self._inner: Any = None
        self._input = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._inner is None and not self._begin():
                return 0
            inner: Any = self._inner
            if inner.needs_input and not self._input:
                self._input = self._raw.read(INPUT)
                if not self._input:
                    raise EOFError
            data: bytes = inner.decompress(self._input, len(buffer))
            self._input = b""
            if inner.eof:
                self._input, self._inner = inner.unused_data, None
            if data:
                buffer[: len(data)] = data
                return len(data)

    def _begin(self) -> bool:
        """Begin the next stream; False at the end of the file."""
        while True:
            if self._padded:
                self._input = self._input.lstrip(b"\0")
            self._input = self._input or self._raw.read(INPUT)
            if not self._input:
                return False
            if not self._padded or self._input.strip(b"\0"):
                break
        self._input = self._input.lstrip(b"\0") if self._padded else self._input
        self._inner = self._new()
        return True


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
