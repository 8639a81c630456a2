"""Rows of `.csv` and `.tsv` files, whose first line names the columns (RFC 4180).

Python's csv module refuses a field of more than 131,072 characters unless a process-wide setting is changed, and
training texts are longer. Fields are read here as that module reads them, except where it guesses: text after the
closing quote of a field, and a quote after white space, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

from onward.data.files.faults import FileError, refuse_twice
from onward.data.files.limits import VALUE_BYTES, Limits, in_mib
from onward.data.files.lines import SourceRow, decoded, raw_lines

DELIMITERS = (",", ";", "\t", "|")
_QUOTED = re.compile(r'((?:[^"]|"")*+)("?)')
_QUOTED_LATE = re.compile(r'\s+".*"\s*', re.DOTALL)
"""A field that is meant to be quoted, but has white space before its quote."""


def table_rows(stream: BinaryIO, form: str, limits: Limits) -> Iterator[SourceRow]:
    """Yield the rows of a table as objects of strings, each with the number of its first line; blank lines are skipped.

    The separator of a `.csv` file is whichever of comma, semicolon, tab and bar is most frequent in its first line. A
    column without a name, such as an index that pandas wrote, is left out. A row that repeats the first line is bad.

    Raises:
        FileError: two columns have the same name, a field is not quoted correctly, or a row exceeds its limit.
    """
    delimiter = "\t" if form == "tsv" else ""
    names: list[str] | None = None
    for line, fields in _records(stream, delimiter, limits):
        if isinstance(fields, SourceRow):
            if names is None:
                raise FileError(fields.problem or "", fields.remedy or "", fields.line)
            yield fields
        elif names is None:
            names = _header(fields, line, form)
        elif fields[-1].strip() == names[-1] and _names(fields) == names:
            yield SourceRow(line, None, "the row repeats the names of the columns", "remove it: tables were joined")
        elif len(fields) != len(names):
            counts = f"{len(fields)} {'field' if len(fields) == 1 else 'fields'}, the first line names {len(names)}"
            remedy = "put double quotes around a field that contains the separator or a line end"
            yield SourceRow(line, None, f"the row has {counts}", remedy)
        else:
            yield SourceRow(line, {name: field for name, field in zip(names, fields, strict=True) if name})


def _header(fields: list[str], line: int, form: str) -> list[str]:
    if fields[0].lower().startswith("sep=") and not any(fields[1:]):
        raise FileError("the first line gives the separator (sep=), not the columns", "remove it", line)
    names = _names(fields)
    if form == "tsv" and len(names) == 1 and _separator(names[0]) in names[0]:
        raise FileError("the first line of a .tsv has no tab", "if it uses another separator, name it .csv", line)
    refuse_twice(filter(None, names), line)
    return names


def _names(fields: list[str]) -> list[str]:
    """Return the fields of a first line as names; that of a table which was joined to another may have a mark."""
    return [field.strip() for field in (fields[0].removeprefix("\ufeff"), *fields[1:])]


def _records(stream: BinaryIO, delimiter: str, limits: Limits) -> Iterator[tuple[int, list[str] | SourceRow]]:
    """Yield the first line number and the fields of every record; without a delimiter, the first record decides it.

    A record with bytes that are not UTF-8 becomes a row with that problem, once it has ended: a quoted field may go on
    after such a line, and what follows is no record of its own.
    """
    record: _Record | None = None
    problem: SourceRow | None = None
    first = size = 0
    for line, raw in raw_lines(stream, limits):
        text = decoded(raw, line)
        if isinstance(text, SourceRow):
            problem, text = problem or text, raw.decode(errors="replace")
        if record is None:
            if not text.strip("\r\n"):
                continue
            delimiter = delimiter or _separator(text)
            record, first, size = _Record(delimiter), line, 0
        size += len(raw) + VALUE_BYTES * text.count(delimiter)
        if size > limits.row_bytes:
            what = "the quoted field without an end" if record.is_open else "the row, its fields counted,"
            raise FileError(f"{what} is larger than {in_mib(limits.row_bytes)}", "end it, or raise max_row_mb", first)
        if record.feed(text):
            if record.fault:
                raise FileError(*record.fault, line)
            yield first, problem or record.fields
            record = problem = None
    if record is not None:
        raise FileError("a quoted field has no end", 'write a double quote inside a field as ""', first)


def _separator(header: str) -> str:
    outside = re.sub(r'"[^"]*"', "", header)
    return max(DELIMITERS, key=outside.count)


class _Record:
    """The fields of one record, which spans several lines if a quoted field does."""

    def __init__(self, delimiter: str) -> None:
        self.fields: list[str] = []
        self.fault: tuple[str, str] | None = None
        """What is wrong with its quotes, and the remedy."""
        self._delimiter = delimiter
        self._open: list[str] | None = None

    @property
    def is_open(self) -> bool:
        """Whether a quoted field continues on the next line."""
        return self._open is not None

    def feed(self, line: str) -> bool:
        """Add a line with its line ending; return whether the record ends with it."""
        at, end = 0, len(line)
        while True:
            value: str | None = None
            if self._open is None and line.startswith('"', at):
                self._open, at = [], at + 1
            if self._open is not None:
                match = _QUOTED.match(line, at)
                assert match is not None
                self._open.append(match[1])
                if not match[2]:
                    return False
                value, self._open, at = "".join(self._open).replace('""', '"'), None, match.end()
            stop = line.find(self._delimiter, at)
            if stop < 0:
                self._end(value, line[at:end].removesuffix("\n").removesuffix("\r"))
                return True
            self._end(value, line[at:stop])
            at = stop + 1

    def _end(self, quoted: str | None, rest: str) -> None:
        """Add a field: its quoted text (None if it is not quoted), and what follows up to the separator."""
        if quoted is not None and rest.strip():
            reason = "a quoted field continues after its closing quote"
            self.fault = reason, 'write a double quote inside a field as "", not as \\"'
        elif quoted is None and _QUOTED_LATE.fullmatch(rest):
            self.fault = "a quoted field begins with white space", "remove the white space before the quote"
        self.fields.append((quoted or "") + rest)
