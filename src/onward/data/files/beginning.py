"""Signs at the beginning of a text that it is not what its name says: other encodings, other line endings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onward.data.files.content import SIGNS
from onward.data.files.faults import FileError
from onward.text import quoted

LOOKED_AT = 64
"""How many bytes are searched for NUL."""
MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"), (b"\x00\x00\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"),
)  # fmt: skip
"""Byte order marks of encodings other than UTF-8, the longest first."""
WIDE = (("UTF-32LE", 4, 0), ("UTF-32BE", 4, 3), ("UTF-16LE", 2, 0), ("UTF-16BE", 2, 1))
"""Encodings, their bytes per unit, and the place in the unit where a Latin letter has its only nonzero byte."""
POINTER = b"version https://git-lfs."
PAGES = (b"<!doctype html", b"<html")
OTHERS = (
    (b"%PDF-", 0, "a PDF document", "write its text into the file"),
    (b"{\\rtf", 0, "an RTF document", "write its text into the file"),
    (b"SQLite format 3\0", 0, "an SQLite database", "export its rows, as JSON lines or CSV"),
    (b"ustar", 257, "a tar archive", "unpack it, and add its files one by one"),
)
"""Formats that Onward does not read: their magic bytes, the offset of these, the format's name, and what to do."""


UNPACKERS = {".gz": "gzip -dc", ".zst": "zstd -dc", ".xz": "xz -dc", ".bz2": "bzip2 -dc", ".zip": "unzip -p"}
"""Commands that write what a file of such an ending holds to standard output."""


def require_text(stream: Any, path: Path, form: str) -> None:
    """Refuse a text that does not begin like UTF-8 with the usual line endings.

    Args:
        stream: the unpacked bytes; they are peeked at, not consumed.
        form: the format of the text: jsonl, json, txt, csv or tsv.

    Raises:
        FileError: it is something else; the remedy says how to have it read.
    """
    head: bytes = stream.peek(LOOKED_AT)
    for sign, place, kind, remedy in OTHERS:
        if head.startswith(sign, place):
            raise FileError(f"the content is {kind}, not text", remedy)
    encoding = _encoding(head[:LOOKED_AT])
    if encoding:
        way = _filtered(f"iconv -f {encoding} -t UTF-8", path, opens=True)
        raise FileError(f"the text is {encoding}, not UTF-8", f"convert it to UTF-8: {way}", line=1)
    again = next((sign for sign, pattern in SIGNS if pattern.match(head)), None)
    if again is not None and path.suffix.lower() in UNPACKERS:
        way = f"{UNPACKERS[path.suffix.lower()]} {quoted(Path(path.name))} > new-file"
        raise FileError(f"it is packed twice: what it contains is {again}", f"unpack it once: {way}.{again}")
    if b"\x00" in head[:LOOKED_AT]:
        way = _filtered("tr -d '\\000'", path)
        what = "the content is not text: it contains zero bytes"
        raise FileError(what, f"write it as text; if it is text, remove them: {way}", line=1)
    if head.startswith(POINTER):
        raise FileError("the file is a pointer of Git LFS, not what it points to", "fetch the content: git lfs pull")
    if form != "txt" and head.lstrip()[:LOOKED_AT].lower().startswith(PAGES):
        raise FileError("the file is a web page, not data", "download the file itself, not the page that shows it")
    if form != "json" and b"\n" not in head and b"\r" in head.rstrip(b"\r"):
        way = _filtered("tr '\\r' '\\n'", path)
        what = "its lines end in a carriage return only, as on old Macs"
        raise FileError(what, f"convert them to line feeds: {way}", line=1)


def _filtered(command: str, path: Path, *, opens: bool = False) -> str:
    """Return a line that applies a command to the text of a file, which may be packed.

    Args:
        opens: whether the command takes the name of a file.
    """
    name, unpack = quoted(Path(path.name)), UNPACKERS.get(path.suffix.lower())
    if unpack:
        return f"{unpack} {name} | {command} > new-file"
    return f"{command} {'' if opens else '< '}{name} > new-file"


def _encoding(head: bytes) -> str | None:
    """Return the encoding that a text appears to be in; None if it may be UTF-8, or is not text."""
    for mark, encoding in MARKS:
        if head.startswith(mark):
            return encoding
    for encoding, width, place in WIDE:
        whole = head[: len(head) - len(head) % width]
        units = [whole[start : start + width] for start in range(0, len(whole), width)]
        narrow = [unit for unit in units if unit[place] and not any(unit[:place] + unit[place + 1 :])]
        if units and 2 * len(narrow) > len(units):
            return encoding
    return None
