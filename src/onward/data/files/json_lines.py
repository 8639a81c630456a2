"""Rows of a `.jsonl` file: one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from onward.data.files.containers import SourceFile
from onward.data.files.faults import TOO_DEEP, FileError
from onward.data.files.formats import ARCHIVE
from onward.data.files.json_rows import TOO_MANY_DIGITS
from onward.data.files.limits import Limits
from onward.data.files.lines import SourceRow, lines_of
from onward.data.strict_json import KEPT, RepeatedKey, parsed
from onward.text import quoted

MARK = "\ufeff"
"""A byte order mark: concatenated files have one in the middle."""


def json_lines(stream: BinaryIO, source: SourceFile, limits: Limits) -> Iterator[SourceRow]:
    """Yield the rows of a file of lines.

    Raises:
        FileError: a row exceeds its limit, or the file is a `.json` file under another name.
    """
    is_first = True
    for line, text in lines_of(stream, limits):
        row = text if isinstance(text, SourceRow) else _parse_line(line, text.removeprefix(MARK), limits)
        if is_first and isinstance(text, str) and _begins_json(row, text.strip()):
            what = "the file is one JSON text across its lines, not one JSON object per line"
            raise FileError(what, _renamed(source.path, is_packed="." in source.form), line)
        is_first = False
        yield row


def _parse_line(line: int, text: str, limits: Limits) -> SourceRow:
    if limits.is_too_large(text):
        raise limits.row_refusal("the line, its values counted,", line)
    try:
        return SourceRow(line, parsed(text))
    except json.JSONDecodeError as error:
        reason, remedy = f"not valid JSON: {error.msg} at column {error.colno}", "write one JSON object per line"
    except RecursionError:
        reason, remedy = TOO_DEEP
    except RepeatedKey as error:
        reason, remedy = str(error), KEPT
    except ValueError:
        reason, remedy = TOO_MANY_DIGITS
    return SourceRow(line, None, reason, remedy)


def _begins_json(row: SourceRow, text: str) -> bool:
    """Whether a first line is the beginning of an array of rows, or of a row that spans several lines."""
    if row.problem is not None:
        return text in ("[", "{") or text.startswith("[{")
    rows = cast(list[Any], row.value) if isinstance(row.value, list) else []
    return bool(rows) and all(isinstance(each, dict) and not _is_turn(cast(dict[str, Any], each)) for each in rows)


def _is_turn(value: dict[str, Any]) -> bool:
    """Whether an object is a message rather than a row: people also write the list of a chat's messages as a line."""
    return "role" in value or "from" in value


def _renamed(path: Path, *, is_packed: bool) -> str:
    if path.suffix.lower() == f".{ARCHIVE}":
        return "give it the ending .json in the archive"
    plain, packed = (path.with_suffix(""), path.suffix) if is_packed else (path, "")
    return f"rename it to {quoted(Path(f'{plain.stem}.json{packed}'))}"
