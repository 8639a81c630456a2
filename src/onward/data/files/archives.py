"""Zip archives that hold one training file."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from typing import Any

from onward.data.files.faults import FileError, described, is_of_machine
from onward.data.files.formats import SEEKS, TABLE_FORMATS, format_of
from onward.text import printable

DIRECTORY_BYTES = 1 << 20
"""The most bytes that an archive's directory may have: a longer one lists thousands of files, which take memory."""
BUFFER = 1 << 18
_END = struct.Struct("<4s4H2LH")
_WIDE_END = struct.Struct("<4sQ2H2L4Q")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Compression methods for which zipfile unpacks no more at a time than was asked for."""
_OTHER_METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard"}


def member_name(descriptor: int) -> str:
    """Return the name of the one file of an archive that Onward reads; the descriptor keeps its place.

    Raises:
        FileError: there is no such file, there are several, or it cannot be read from the archive.
    """
    place = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        with _opened(descriptor) as archive:
            return _member(archive).filename
    finally:
        os.lseek(descriptor, place, os.SEEK_SET)


def member_of(descriptor: int) -> tuple[str, Any, list[str]]:
    """Return the format and a buffered stream of the one file of an archive that Onward reads, and what to know of it.

    Raises:
        FileError: as `member_name`.
    """
    archive = _opened(descriptor)
    member = _member(archive)
    form = format_of(member.filename)
    assert form is not None
    try:
        stream: Any = archive.open(member)
    except Exception as error:  # a damaged directory may name any place in the file
        if is_of_machine(error):
            raise
        raise _damage(error) from None
    others = [info for info in _of_user(archive) if info is not member]
    notes = [f"ignored files of the archive: {_named(others)}"] if others else []
    return form, io.BufferedReader(_Member(stream), BUFFER), notes


class _Member(io.RawIOBase):
    """The bytes of a file in an archive; damage that zipfile reports becomes the refusal."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count: int = self._stream.readinto1(buffer)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise _damage(error) from None
        return count


def _opened(descriptor: int) -> zipfile.ZipFile:
    file = io.FileIO(descriptor, closefd=False)
    if os.fstat(descriptor).st_size >= _directory_bytes(file) > DIRECTORY_BYTES:
        raise FileError("the archive contains many files", "unpack it, and add its files one by one")
    try:
        return zipfile.ZipFile(file)
    except Exception as error:
        if is_of_machine(error):
            raise
        raise _damage(error) from None


def _member(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    if min((info.header_offset for info in archive.infolist()), default=0) > 0:
        raise FileError("something else precedes the archive, such as another one", "unpack each, and add their files")
    known = _of_user(archive)
    readable = [info for info in known if format_of(info.filename) is not None]
    if len(readable) > 1:
        raise FileError(
            f"the archive contains {len(readable)} files ({_named(readable)})",
            "unpack it, and add its files one by one",
        )
    if not readable:
        names = _named(known) or "none"
        raise FileError(f"the archive contains no file that Onward reads (its files: {names})", "unpack or convert it")
    (info,) = readable
    if format_of(info.filename) in (*TABLE_FORMATS, *SEEKS):
        raise FileError(f"the archive contains {printable(info.filename)}", "unpack it, and add that file")
    if info.flag_bits & 1:
        raise FileError("the archive is encrypted", "unpack it, and add the file inside")
    if info.compress_type not in _METHODS:
        how = _OTHER_METHODS.get(info.compress_type, f"method {info.compress_type}")
        raise FileError(
            f"the archive is compressed with {how}, but only stored and deflated files are read",
            "unpack it, and add the file inside",
        )
    return info


def _named(files: list[zipfile.ZipInfo]) -> str:
    """Return the names of the first of some files."""
    return ", ".join([*(printable(info.filename) for info in files[:3]), *(["..."] if len(files) > 3 else [])])


def _of_user(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the files that a user put into an archive, without those that macOS's Finder adds next to each."""
    paths = [(info, info.filename.split("/")) for info in archive.infolist() if not info.is_dir()]
    return [info for info, parts in paths if parts[0] != "__MACOSX" and not parts[-1].startswith(".")]


def _directory_bytes(file: io.FileIO) -> int:
    """Return the size that an archive's end record states for its directory, before zipfile reads all of it."""
    size = os.fstat(file.fileno()).st_size
    longest = _END.size + (1 << 16)  # with the longest comment
    file.seek(max(0, size - longest - 20 - _WIDE_END.size))
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    stated = _END.unpack_from(tail, at)[5] if 0 <= at <= len(tail) - _END.size else 0
    wide = tail.rfind(b"PK\x06\x06", 0, max(at, 0))
    if 0 <= wide <= len(tail) - _WIDE_END.size:
        stated = max(stated if stated != 0xFFFFFFFF else 0, _WIDE_END.unpack_from(tail, wide)[8])
    file.seek(0)
    return stated


def _damage(error: BaseException) -> FileError:
    return FileError(
        f"the zip archive cannot be read ({described(error)})", "make or download it again, or add the file in it"
    )
