"""Rows of an Arrow file (`.arrow`): the IPC file format and the stream format, which `datasets` writes.

Both are a sequence of messages. Each is checked before Arrow unpacks it: a record batch states how large it will be.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from onward.data.files.columnar.arrow_values import (
    batch_rows,
    batch_values,
    require_sound,
    row_sizes,
    rows_of_arrow,
    unknown_type,
)
from onward.data.files.containers import SourceFile
from onward.data.files.faults import FileError, refuse_twice
from onward.data.files.limits import VALUE_BYTES, Limits, in_mib
from onward.text import printable

FILE_MARK = b"ARROW1\0\0"
CONTINUES = b"\xff\xff\xff\xff"
END = CONTINUES + bytes(4)
"""What a stream ends with."""
FOOTER = struct.Struct("<I6s")
"""The end of the file format: the size of the footer before it, and the mark with which the file began."""
PADDING = 64
"""The most bytes by which the footer may be aligned."""
PART = 1 << 20
SCHEMA, DICTIONARY, BATCH = 1, 2, 3
"""Kinds of messages, by their number."""
ROWS_OF_BATCH = 32
"""How many rows of the largest size a batch may equal in memory: Arrow unpacks a batch as a whole."""


def arrow_rows(stream: BinaryIO, source: SourceFile, limits: Limits) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow file; columns are keys.

    Raises:
        FileError: pyarrow is missing, the file is damaged, or it or a row exceeds a limit.
        OSError: the machine cannot read the file.
    """
    return rows_of_arrow("arrow", lambda: _rows(stream, source, limits))


def _rows(stream: BinaryIO, source: SourceFile, limits: Limits) -> Iterator[dict[str, Any]]:
    from pyarrow import ipc

    reader: Any = ipc.open_stream(io.BufferedReader(_Checked(stream, source.size, limits)))
    names = _names(reader.schema)
    rows = unpacked = 0
    for batch in reader:
        require_sound(batch)
        sizes = row_sizes(batch)
        over = np.flatnonzero(sizes > limits.row_bytes)
        if len(over):
            raise limits.row_refusal("the row", rows + int(over[0]) + 1)
        unpacked += int(sizes.sum())
        limits.check_unpacked(unpacked, source.size)
        for values in _batch(batch, sizes):
            yield dict(zip(names, values, strict=True))
        rows += len(sizes)


def messages_of(stream: BinaryIO) -> Iterator[Message]:
    """Yield the messages of an Arrow file.

    Raises:
        FileError: it is not an Arrow file, it is truncated, or something else follows.
    """
    start = stream.read(len(FILE_MARK))
    is_stream = start != FILE_MARK
    if not is_stream:
        start = stream.read(len(FILE_MARK))
    while start != END and (start or not is_stream):  # a stream may also end without a mark
        if len(start) < len(END):
            raise _cut_off()
        if not start.startswith(CONTINUES):
            raise FileError("not a readable arrow file", "write or download it again")
        (size,) = struct.unpack("<i", start[4:])
        yield Message.read(start, b"".join(_read(stream, size)), stream)
        start = stream.read(len(FILE_MARK))
    _require_end(stream, is_stream=is_stream)


def _require_end(stream: BinaryIO, *, is_stream: bool) -> None:
    """Refuse a file in which more follows the last message than the footer that only the file format has."""
    size, tail = 0, b""
    while part := stream.read(PART):
        size += len(part)
        tail = (tail + part)[-FOOTER.size :]
    stated = 0
    if not is_stream:
        if len(tail) < FOOTER.size or not FILE_MARK.startswith(tail[4:]):
            raise _cut_off()
        stated = FOOTER.unpack(tail)[0] + FOOTER.size
    if size > stated + (0 if is_stream else PADDING):
        raise FileError("more follows after the last row, as where files were joined", "add the files one by one")


def _cut_off() -> FileError:
    return FileError("the arrow file is cut off", "copy or download it again")


def _read(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield `size` bytes in parts: a size that a damaged file states is not allocated before the bytes have come."""
    while size > 0:
        part = stream.read(min(size, PART))
        if not part:
            raise _cut_off()
        size -= len(part)
        yield part


@dataclass(frozen=True)
class Message:
    """One message: its bytes, its kind, and the bytes and rows that it unpacks to.

    `metadata` is a flatbuffer. That of a record batch lists the buffers; a compressed buffer begins with its full
    length.
    """

    start: bytes
    metadata: bytes
    body_bytes: int
    stream: BinaryIO

    @classmethod
    def read(cls, start: bytes, metadata: bytes, stream: BinaryIO) -> Message:
        """Return the message that begins with these bytes; its body is read later."""
        table = _Table(metadata, _u32(metadata, 0))
        return cls(start, metadata, table.int64(3), stream)

    @property
    def kind(self) -> int:
        """The number of its kind."""
        return _Table(self.metadata, _u32(self.metadata, 0)).byte(1)

    def parts(self) -> Iterator[bytes]:
        """Read its body, once, in parts."""
        return _read(self.stream, self.body_bytes)

    def body(self) -> bytes:
        """Read its body, once."""
        return b"".join(self.parts())

    def unpacked(self, body: bytes) -> int:
        """Return the bytes that a record batch or a dictionary takes in memory, including the overhead of its rows."""
        if self.kind not in (DICTIONARY, BATCH):
            return 0
        batch = _Table(self.metadata, _u32(self.metadata, 0)).table(2)
        if self.kind == DICTIONARY:
            batch = batch.table(1)
        size = VALUE_BYTES * batch.int64(0)
        for offset, length in batch.pairs(2):
            stated = length
            if batch.has(3) and length >= 8:
                (stated,) = struct.unpack_from("<q", body, offset)
            size += length if stated < 0 else stated
        return size


class _Checked(io.RawIOBase):
    """The messages of an Arrow file as a stream, each checked against the limits before it is passed on."""

    def __init__(self, stream: BinaryIO, size: int, limits: Limits) -> None:
        super().__init__()
        self._messages = messages_of(stream)
        self._size = size
        self._limits = limits
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            self._left = memoryview(self._next())
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def _next(self) -> bytes:
        message = next(self._messages, None)
        if message is None:
            return b""
        self._require_room(message.body_bytes)
        body = message.body()
        self._require_room(message.unpacked(body))
        return message.start + message.metadata + body

    def _require_room(self, size: int) -> None:
        self._limits.check_unpacked(size, self._size)
        most = ROWS_OF_BATCH * self._limits.row_bytes
        if size > most:
            raise FileError(
                f"a batch of rows takes more than {in_mib(most)}", "write it in smaller batches, or raise max_row_mb"
            )


@dataclass(frozen=True)
class _Table:
    """A table of a flatbuffer."""

    data: bytes
    at: int

    def _place(self, field: int) -> int:
        names = self.at - struct.unpack_from("<i", self.data, self.at)[0]
        if 4 + 2 * field >= struct.unpack_from("<H", self.data, names)[0]:
            return 0
        offset: int = struct.unpack_from("<H", self.data, names + 4 + 2 * field)[0]
        return self.at + offset if offset else 0

    def has(self, field: int) -> bool:
        return self._place(field) != 0

    def byte(self, field: int) -> int:
        place = self._place(field)
        return self.data[place] if place else 0

    def int64(self, field: int) -> int:
        place = self._place(field)
        value: int = struct.unpack_from("<q", self.data, place)[0] if place else 0
        return max(value, 0)

    def table(self, field: int) -> _Table:
        place = self._place(field)
        return _Table(self.data, place + _u32(self.data, place))

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        place = self._place(field)
        if not place:
            return
        place += _u32(self.data, place)
        for number in range(_u32(self.data, place)):
            yield struct.unpack_from("<qq", self.data, place + 4 + 16 * number)


def _u32(data: bytes, at: int) -> int:
    value: int = struct.unpack_from("<I", data, at)[0]
    return value


def _names(schema: Any) -> list[str]:
    names: list[str] = list(schema.names)
    refuse_twice(names)
    strange = next((field for field in schema if unknown_type(field.type)), None)
    if strange is not None:
        raise FileError(f"the column {printable(strange.name)} has the type {strange.type}", "write the rows as .jsonl")
    return names


def _batch(batch: Any, sizes: NDArray[np.int64]) -> Iterator[tuple[Any, ...]]:
    """Yield the values of a batch's rows, converting only a few rows to Python values at a time."""
    step = batch_rows(sizes)
    for start in range(0, len(sizes), step):
        yield from batch_values(batch.slice(start, step))
