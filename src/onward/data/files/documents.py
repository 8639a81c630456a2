"""The rows of a `.txt` file: a document is a line, the lines between two blank ones, or the whole file."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from onward.data.files.containers import SourceFile
from onward.data.files.faults import FileError
from onward.data.files.limits import Limits, in_mib
from onward.data.files.lines import SourceRow, decoded, lines_of, raw_lines
from onward.data.files.reading import Documents, Reading
from onward.text import quoted

SAMPLE = 1 << 18
"""Bytes at the beginning of a file by which `auto` decides."""
SAMPLE_LINES = 20
"""How many lines must all be JSON before a file is taken for JSON lines."""
LINES_OF_GROUP = 32
"""Mean lines per group above which blank lines do not separate documents."""
LITERAL = len("-Infinity")
SAID = {"line": "line", "blank": "group of lines between blank ones", "file": "file"}

_JSON_BEGINS = re.compile(r'\s*(\[\s*)?\{\s*"[^"\n]*"\s*:')


def document_rows(stream: BinaryIO, source: SourceFile, reading: Reading) -> Iterator[SourceRow]:
    """Yield the documents of a `.txt` file as `text` rows, and note on `source` what one document is.

    Raises:
        FileError: its lines are JSON objects, or a document exceeds the limit for a row.
    """
    documents = reading.documents
    if documents == "auto" or not reading.is_accepted:
        head = stream.read(SAMPLE)
        stream = io.BufferedReader(_Rejoined(head, stream), SAMPLE)
        lines = _sample(head)
        if not reading.is_accepted:
            _refuse_json(lines, source.path, is_cut=len(head) == SAMPLE)
        if documents == "auto":
            documents = detected(lines)
            source.notes.append(f"each {SAID[documents]} is a document (text.documents: {documents})")
    if documents == "line":
        for line, text in lines_of(stream, reading.limits):
            yield text if isinstance(text, SourceRow) else SourceRow(line, {"text": text})
    else:
        yield from _grouped(stream, reading.limits, documents)


def detected(lines: list[str]) -> Documents:
    """Decide what one document of a file is, by its first lines.

    If blank lines separate groups of several lines, each group is a document. If not, and most lines begin in lower
    case or with white space, so that each runs on into the next, the file is one document. Otherwise each line is one.
    """
    groups: list[int] = []
    before = ""
    runs_on = breaks = 0
    for line in lines:
        if not line.strip():
            before = ""
            continue
        if before:
            groups[-1] += 1
            breaks += 1
            runs_on += line[0].islower() or line[0] in " \t"
        else:
            groups.append(1)
        before = line
    if len(groups) > 1 and max(groups) > 1 and sum(groups) <= LINES_OF_GROUP * len(groups):
        return "blank"
    return "file" if breaks and 2 * runs_on > breaks else "line"


def _sample(head: bytes) -> list[str]:
    """Return the lines at the beginning of a file, without a last one that is cut off."""
    lines = head.decode("utf-8-sig", "replace").split("\n")
    return lines[:-1] if len(head) == SAMPLE and len(lines) > 1 else lines


def _refuse_json(lines: list[str], path: Path, *, is_cut: bool) -> None:
    filled = [line for line in lines if line.strip()][:SAMPLE_LINES]
    if filled and all(_is_object(line) for line in filled):
        what, ending = "each line of the file is JSON", "jsonl"
    elif _is_json("\n".join(lines), is_cut=is_cut):
        what, ending = "the file is JSON", "json"
    else:
        return
    name, _, compression = path.name.partition(".txt")
    better = f"{name}.{ending}{compression}" if path.suffix != ".zip" else f"FILE.{ending}"
    raise FileError(
        f"{what}, and a .txt is plain text",
        f"rename it to {quoted(Path(better))}; to train JSON as text, write each document as "
        '{"text": ...} in a .jsonl',
    )


def _is_json(text: str, *, is_cut: bool) -> bool:
    """Whether a text, as far as it goes, is an array of JSON objects or a sequence of them."""
    text = text.strip()
    if not _JSON_BEGINS.match(text):
        return False
    decoder, at = json.JSONDecoder(), 0
    try:
        while at < len(text):
            _, at = decoder.raw_decode(text, at)
            at = len(text) - len(text[at:].lstrip())
    except json.JSONDecodeError as error:
        return is_cut and (error.msg.startswith("Unterminated") or error.pos >= len(text) - LITERAL)
    except (ValueError, RecursionError):
        return False
    return True


def _is_object(line: str) -> bool:
    """Whether a line is a JSON object, or a list of them."""
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(each, dict) for each in value))


def _grouped(stream: BinaryIO, limits: Limits, documents: Documents) -> Iterator[SourceRow]:
    """Yield documents of several lines, each with the number of its first line; lines within one end in a line feed."""
    data: list[bytes] = []
    first = size = 0
    for line, raw in raw_lines(stream, limits):
        text = raw.removeprefix(codecs.BOM_UTF8 if line == 1 else b"").rstrip(b"\r\n")
        if not text.strip() and (documents == "blank" or not data):
            yield from _document(data, first)
            data, size = [], 0
            continue
        if not data:
            first = line
        data.append(text)
        size += len(text) + 1
        if size > limits.row_bytes:
            raise FileError(
                f"the document is larger than {in_mib(limits.row_bytes)}",
                f"set text.documents to {'blank or line' if documents == 'file' else 'line'}, or raise max_row_mb",
                first,
            )
    yield from _document(data, first)


def _document(data: list[bytes], first: int) -> Iterator[SourceRow]:
    text = decoded(b"\n".join(data), first)
    if isinstance(text, SourceRow):
        yield text
    elif text and not text.isspace():
        yield SourceRow(first, {"text": text.rstrip("\n")})


class _Rejoined(io.RawIOBase):
    """The bytes that were already read from a stream, followed by the rest of it."""

    def __init__(self, head: bytes, rest: Any) -> None:
        super().__init__()
        self._head = memoryview(head)
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._head:
            return self._rest.readinto1(buffer)
        count = min(len(buffer), len(self._head))
        buffer[:count] = self._head[:count]
        self._head = self._head[count:]
        return count
