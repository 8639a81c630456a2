"""Checks that a file begins as its name says it does."""

from __future__ import annotations

import re
from pathlib import Path

from onward.data.files.archives import member_name
from onward.data.files.faults import FileError
from onward.data.files.formats import ARCHIVE, COMPRESSIONS, TEXT_FORMATS
from onward.text import quoted

SIGNS = (
    ("gz", re.compile(rb"\x1f\x8b")),
    ("zst", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")),
    ("xz", re.compile(rb"\xfd7zXZ\0")),
    ("bz2", re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")),
    ("parquet", re.compile(rb"PAR1")),
    ("arrow", re.compile(rb"ARROW1\0\0|\xff\xff\xff\xff[^\0]..\0", re.DOTALL)),
    (ARCHIVE, re.compile(rb"PK(\x03\x04|\x05\x06)")),
)
"""Formats with the bytes that their files begin with; bzip2's second form is an empty file, and pzstd begins
with a frame that is skipped."""

LZMA = re.compile(rb"\x5d\0\0")
BINARY = re.compile(rb"[\0-\x08\x0e-\x1f]")
"""A byte that no text in UTF-8 begins with."""


def require_content(head: bytes, form: str, descriptor: int | None, path: Path) -> None:
    """Refuse a file that does not begin as its format does; an empty file passes as any format.

    Args:
        head: its first 16 bytes.
        form: the format that its name stands for.
        descriptor: the file, if more of it should be looked at; its position ends up at the end.

    Raises:
        FileError: it is something else; the remedy says how to have it read.
    """
    name, _, compression = form.partition(".")
    expected = compression or (name if name not in TEXT_FORMATS else None)
    found = next((sign for sign, pattern in SIGNS if pattern.match(head)), None)
    if not head or found == expected:
        return
    if found is not None:
        raise _misnamed(found, form, descriptor, path)
    if expected in COMPRESSIONS:
        raise FileError(f"the content is not {expected}, but the name says so", _plain_way(head, expected, path))
    if expected == ARCHIVE:
        raise FileError("the content is not zip, but the name says so", "give it the ending of its content")


def _plain_way(head: bytes, expected: str, path: Path) -> str:
    """Return the remedy for a name with the ending of a compression that the content does not have."""
    if LZMA.match(head):
        packed, plain = quoted(Path(path.name)), quoted(Path(path.with_suffix("").name))
        return f"unpack it, it is in the older format of LZMA: xz -dc --format=lzma < {packed} > {plain}"
    return "compress or download it again" if BINARY.search(head) else f"rename it without .{expected}"


def _misnamed(found: str, form: str, descriptor: int | None, path: Path) -> FileError:
    reason = f"the content is {found}, but the name does not say so"
    text, _, compression = form.partition(".")
    if found == ARCHIVE and descriptor is None:
        return FileError("the archive contains another archive", "unpack it, and add its content")
    if found == ARCHIVE and descriptor is not None:
        member_name(descriptor)  # renaming does not help if the archive cannot be read
    if found in COMPRESSIONS and text not in TEXT_FORMATS:
        return FileError(reason, f"unpack it: .{found} works only with the text formats")
    plain = path.with_suffix("") if compression else path
    name = f"{plain.name if found in COMPRESSIONS else plain.stem}.{found}"
    return FileError(reason, f"rename it to {quoted(Path(name))}")
