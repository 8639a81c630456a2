"""Rows of a training file, one after another, in memory that does not grow with the file.

A problem of one row is reported with that row and reading goes on; what makes the rest of the file unreadable is a
`FileError`.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from onward.data.containers import COMPRESSIONS, FileError, SourceFile, open_bytes
from onward.data.limits import DEFAULT_LIMITS, Limits
from onward.data.parquet import parquet_rows
from onward.text import printable

TEXT_FORMATS = ("jsonl", "ndjson", "json", "txt")
ENDINGS = tuple(f".{name}" for name in (*TEXT_FORMATS, "parquet"))
TOO_MANY_DIGITS = ("not usable JSON: a number has more digits than can be read", "write the number as a string")
"""What is said of an integer that Python refuses to convert."""
JSON_CHUNK = 1 << 16

__all__ = ["FileError", "SourceRow", "file_format", "read_rows", "row_unit", "rows_of"]


def _never_stop() -> None:
    pass


@dataclass(frozen=True)
class SourceRow:
    """One row as it stands in the file.

    Args:
        line: 1-based line number, or row number in .json and .parquet files.
        value: the parsed JSON value; None where there is a problem.
        problem: why the row could not be parsed.
        remedy: what to do about it.
    """

    line: int
    value: Any = None
    problem: str | None = None
    remedy: str | None = None


def file_format(path: Path | str) -> str:
    """Return the format that the name's ending stands for, for example "jsonl", "json.gz" or "parquet".

    Raises:
        FileError: Onward does not read files with this ending.
    """
    endings = [suffix[1:].lower() for suffix in Path(path).suffixes]
    if endings and endings[-1] in COMPRESSIONS and len(endings) > 1 and endings[-2] in TEXT_FORMATS:
        return f"{endings[-2]}.{endings[-1]}"
    if endings and endings[-1] in (*TEXT_FORMATS, "parquet"):
        return endings[-1]
    raise FileError(
        f"the ending of {printable(Path(path).name)} is not one that Onward reads",
        f"rename or convert it: {', '.join(ENDINGS)}, the text formats also with .gz or .zst",
    )


def row_unit(path: Path | str) -> str:
    """Return what `SourceRow.line` counts in this file: "line" or "row"."""
    return "row" if file_format(path).startswith(("json.", "parquet")) or file_format(path) == "json" else "line"


def read_rows(path: Path | str, limits: Limits = DEFAULT_LIMITS) -> Iterator[SourceRow]:
    """Yield the rows of a file in order; blank lines are skipped.

    Raises:
        FileError: the file cannot be opened, is damaged, or is not what its ending says.
        OSError: the machine cannot read it.
    """
    path = Path(path)
    file_format(path)
    with SourceFile(path) as source:
        yield from rows_of(source, limits)


def rows_of(source: SourceFile, limits: Limits, stop: Callable[[], None] = _never_stop) -> Iterator[SourceRow]:
    """Yield the rows of an open file in order; see `read_rows`.

    Args:
        stop: called for every buffer that is read from a text file, whether or not it holds rows; may raise.
    """
    name, _, compression = file_format(source.path).partition(".")
    if name == "parquet":
        for row, value in enumerate(parquet_rows(source, limits), start=1):
            yield SourceRow(row, value)
        return
    with open_bytes(source, compression or None, limits, stop) as stream:
        if name == "json":
            yield from _json_rows(stream, limits)
        else:
            for line, text in _lines(stream, limits):
                yield text if isinstance(text, SourceRow) else _parse_line(line, text, limits, plain=name == "txt")


def _lines(stream: BinaryIO, limits: Limits) -> Iterator[tuple[int, str | SourceRow]]:
    line = 0
    while raw := stream.readline(limits.row_bytes + 1):
        line += 1
        if len(raw) > limits.row_bytes:
            raise limits.row_refusal("the line", line)
        try:
            text = raw.rstrip(b"\r\n").decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            yield line, SourceRow(line, None, f"byte 0x{byte:02x} is not UTF-8", "export the file again as UTF-8")
            continue
        if text and not text.isspace():
            yield line, text


def _parse_line(line: int, text: str, limits: Limits, *, plain: bool) -> SourceRow:
    if plain:
        return SourceRow(line, {"text": text})
    if limits.is_too_large(text):
        raise limits.row_refusal("the line, its values counted,", line)
    try:
        return SourceRow(line, json.loads(text))
    except json.JSONDecodeError as error:
        reason, remedy = f"not valid JSON: {error.msg} at column {error.colno}", "write one JSON object per line"
    except RecursionError:
        reason, remedy = "the JSON is nested too deeply", "flatten the row"
    except ValueError:
        reason, remedy = TOO_MANY_DIGITS
    return SourceRow(line, None, reason, remedy)


def _json_rows(stream: BinaryIO, limits: Limits) -> Iterator[SourceRow]:
    row = 1
    try:
        for value in _JsonReader(stream, limits).values():
            yield SourceRow(row, value)
            row += 1
    except FileError as error:
        raise FileError(error.reason, error.remedy, row) from None
    except json.JSONDecodeError as error:
        raise FileError(f"not valid JSON: {error.msg}", "repair the file, or write it as .jsonl", row) from None
    except UnicodeDecodeError as error:
        raise FileError(f"not UTF-8: {error.reason}", "export the file again as UTF-8", row) from None
    except RecursionError:
        raise FileError("the JSON is nested too deeply", "flatten the row", row) from None
    except ValueError:
        raise FileError(*TOO_MANY_DIGITS, row) from None


class _JsonReader:
    """Values of a top-level array, or values written one after another, with at most one of them in memory.

    ijson was tried for this: its C backend silently turns half a surrogate pair into "?" and takes memory
    quadratic in the depth of nesting.
    """

    _space = re.compile(r"[ \t\r\n]*")
    _decode = json.JSONDecoder().raw_decode

    def __init__(self, stream: BinaryIO, limits: Limits) -> None:
        self._text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        self._limits = limits
        self._buffer = ""
        self._at = 0

    def values(self) -> Iterator[Any]:
        first = self._peek()
        if first == "[":
            yield from self._array()
        elif first == "{":
            while self._peek():
                yield self._value()
        elif first:
            self._fail("expected [ or { at the beginning")

    def _array(self) -> Iterator[Any]:
        self._at += 1
        if self._peek() != "]":
            yield self._value()
            while self._peek() == ",":
                self._at += 1
                self._peek()
                yield self._value()
        if self._peek() != "]":
            self._fail("expected , or ] after a row" if self._peek() else "the array has no end")
        self._at += 1
        if self._peek():
            self._fail("text after the end of the array")

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                if not self._may_be_cut(error) or not self._more():
                    raise
            else:
                if end < len(self._buffer) or not self._more():
                    self._at = end
                    return value

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Say whether the error may only mean that the buffer ends inside the value."""
        longest_literal = len("-Infinity")
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._buffer) - longest_literal

    def _peek(self) -> str:
        """Skip white space; return the next character, "" at the end of the file."""
        while True:
            match = self._space.match(self._buffer, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def _more(self) -> bool:
        rest = self._buffer[self._at :]
        room = self._limits.row_bytes - len(rest)
        if room < 0 or self._limits.is_too_large(rest):
            raise self._limits.row_refusal("the row")
        # doubling: a long row is parsed a few times, not many
        chunk = self._text.read(min(max(JSON_CHUNK, len(rest)), room + 1))
        self._buffer, self._at = rest + chunk, 0
        return bool(chunk)

    def _fail(self, message: str) -> None:
        raise json.JSONDecodeError(message, "", 0)
