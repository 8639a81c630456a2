"""Rows as they are in a file, and the lines of a text file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from onward.data.files.limits import Limits

ZEROS = (
    "it contains zero bytes, which are no text",
    "copy or write the file again; if the rest is whole, remove them: tr -d '\\000'",
)
"""The reason and the remedy for what a crash or a broken copy leaves."""


@dataclass(frozen=True)
class SourceRow:
    """One row as it is in the file.

    Args:
        line: 1-based line number, or row number in .json, .parquet and .arrow files.
        value: the parsed JSON value; None if there is a problem.
        problem: why the row could not be parsed.
        remedy: what to do about it.
    """

    line: int
    value: Any = None
    problem: str | None = None
    remedy: str | None = None


def raw_lines(stream: BinaryIO, limits: Limits) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of every line, including its line ending.

    Raises:
        FileError: a line exceeds the limit of a row.
    """
    line = 0
    while raw := stream.readline(limits.row_bytes + 1):
        line += 1
        if len(raw) > limits.row_bytes:
            raise limits.row_refusal("the line", line)
        yield line, raw


def lines_of(stream: BinaryIO, limits: Limits) -> Iterator[tuple[int, str | SourceRow]]:
    """Yield every line that is not blank, without its line ending; a line that is no text becomes a bad row.

    Raises:
        FileError: a line exceeds the limit of a row.
    """
    for line, raw in raw_lines(stream, limits):
        text = decoded(raw.rstrip(b"\r\n"), line)
        if isinstance(text, SourceRow) or (text and not text.isspace()):
            yield line, text


def decoded(data: bytes, line: int) -> str | SourceRow:
    """Return bytes that begin at `line` as text, or a row with the problem that they are none, at its line.

    Zero bytes are no text, although UTF-8 has them: they stand for what was not on the disk when a machine stopped.
    """
    if b"\0" in data:
        return SourceRow(line + data.count(b"\n", 0, data.index(b"\0")), None, *ZEROS)
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return _not_utf8(line, error)


def not_utf8(byte: int) -> tuple[str, str]:
    """Return the reason and the remedy for a byte that is not UTF-8."""
    return f"byte 0x{byte:02x} is not UTF-8", "export the file again as UTF-8"


def _not_utf8(line: int, error: UnicodeDecodeError) -> SourceRow:
    return SourceRow(line + error.object.count(b"\n", 0, error.start), None, *not_utf8(error.object[error.start]))
