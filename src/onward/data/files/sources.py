"""Rows of a training file, one after another, in memory that does not grow with the file.

A problem of one row is reported with that row and reading continues; what makes the rest of the file unreadable is a
`FileError`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from onward.data.files.beginning import require_text
from onward.data.files.columnar.arrow_ipc import arrow_rows
from onward.data.files.columnar.parquet import parquet_rows
from onward.data.files.containers import SourceFile, open_bytes
from onward.data.files.content import require_content
from onward.data.files.documents import document_rows
from onward.data.files.faults import FileError
from onward.data.files.formats import file_format
from onward.data.files.json_lines import json_lines
from onward.data.files.json_rows import json_values
from onward.data.files.lines import SourceRow
from onward.data.files.reading import Reading
from onward.data.files.table import table_rows

__all__ = ["FileError", "SourceRow", "file_format", "read_rows", "rows_of"]


def read_rows(path: Path | str, reading: Reading | None = None) -> Iterator[SourceRow]:
    """Yield the rows of a file in order; blank lines are skipped.

    Raises:
        FileError: the file cannot be opened, is damaged, or is not what its ending says.
        OSError: the machine cannot read it.
    """
    with SourceFile(Path(path)) as source:
        yield from rows_of(source, reading or Reading())


def rows_of(source: SourceFile, reading: Reading) -> Iterator[SourceRow]:
    """Yield the rows of an open file in order; see `read_rows`."""
    limits = reading.limits
    if source.form == "parquet":
        require_content(os.pread(source.fileno(), 16, 0), source.form, source.fileno(), source.path)
        yield from _numbered(parquet_rows(source, limits))
        return
    with open_bytes(source, limits) as stream:
        name = source.form.partition(".")[0]
        if name == "arrow":
            yield from _numbered(arrow_rows(stream, source, limits))
            return
        require_text(stream, source.path, name)
        if name == "json":
            yield from _numbered(json_values(stream, limits))
        elif name == "txt":
            yield from document_rows(stream, source, reading)
        elif name in ("csv", "tsv"):
            yield from table_rows(stream, name, limits)
        else:
            yield from json_lines(stream, source, limits)


def _numbered(values: Iterable[Any]) -> Iterator[SourceRow]:
    return (SourceRow(row, value) for row, value in enumerate(values, start=1))
