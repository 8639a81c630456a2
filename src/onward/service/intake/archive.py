"""The archive: accepted originals, plain or compressed; the ledger's hash is always that of the original bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from onward.atomic import fsync_directory, fsync_file, link_or_copy
from onward.data.files.formats import TEXT_FORMATS
from onward.digest import CHUNK, sha256_file
from onward.errors import DamagedState
from onward.layout import RunLayout
from onward.service.intake.names import unused_name
from onward.service.intake.reading import look
from onward.store.ledger import Ledger
from onward.store.rows import FileRow

PACKED = ".zst"
TEXT = tuple(f".{form}" for form in TEXT_FORMATS)
"""Endings of originals that are worth compressing; the row reader unpacks them by their name."""


PACKING = ".packing"
"""Ending of an original's name while it is compressed; not one of intake's temporary names, which others may remove."""


def require_original(layout: RunLayout, row: FileRow, stop: Callable[[], None] = lambda: None) -> Path:
    """Return the archived original of a file, checked against its hash.

    Args:
        stop: called while it is read; may raise.

    Raises:
        DamagedState: it is missing or changed.
        OSError: the machine cannot read it now.
    """
    path = layout.kept(row.copy)
    if look(path) is None or _digest(path, row, stop) != row.sha256:
        raise DamagedState(
            f"the archived original of {row.name} is missing or changed",
            where=path,
            hint=f"Restore the file with SHA-256 {row.sha256}, then: onward train",
        )
    return path


def compress_original(layout: RunLayout, ledger: Ledger, row: FileRow, stop: Callable[[], None] = lambda: None) -> None:
    """Replace the archived original of a finished file with a compressed one that unpacks to the same bytes.

    Args:
        stop: called while it is read; if it raises, the original stays as it is.
    """
    plain = layout.kept(row.copy)
    if plain.suffix not in TEXT or not plain.is_file() or ledger.sharing_copy(row.copy) > 1:
        return
    packed = unused_name(layout.archive, f"{plain.name}{PACKED}")
    temporary = layout.archive / PACKING
    try:
        with plain.open("rb") as source, temporary.open("wb") as target:
            with zstandard.ZstdCompressor(level=9).stream_writer(target, closefd=False) as packer:
                for chunk in _chunks(source, stop):
                    packer.write(chunk)
            target.flush()
            os.fsync(target.fileno())
        if _unpacked_digest(temporary, stop) != row.sha256:
            raise DamagedState(f"the archived original of {row.name} was changed", where=plain)
    except BaseException:  # what is left of it would take the room that training waits for
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(packed)
    fsync_directory(layout.archive)
    ledger.set_file(row.id, copy=packed.relative_to(layout.root).as_posix())
    plain.unlink()


def take_out_original(layout: RunLayout, row: FileRow, target: Path) -> None:
    """Make `target` the original of a file as it arrived, if the archive still has it: a link, or unpacked."""
    path = layout.kept(row.copy)
    if not path.is_file():
        return
    if not _is_packed(path, row):
        link_or_copy(path, target)
        return
    try:
        with path.open("rb") as source, target.open("xb") as stream:
            zstandard.ZstdDecompressor().copy_stream(source, stream)
    except zstandard.ZstdError:
        target.unlink()
    else:
        fsync_file(target)


def _is_packed(path: Path, row: FileRow) -> bool:
    return path.suffix == PACKED and not row.name.endswith(PACKED)


def _digest(path: Path, row: FileRow, stop: Callable[[], None]) -> str:
    return _unpacked_digest(path, stop) if _is_packed(path, row) else sha256_file(path, stop)


def _unpacked_digest(path: Path, stop: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream, zstandard.ZstdDecompressor().stream_reader(stream) as reader:
            for chunk in _chunks(reader, stop):
                digest.update(chunk)
    except zstandard.ZstdError:
        return ""
    return digest.hexdigest()


def _chunks(stream: BinaryIO, stop: Callable[[], None]) -> Iterator[bytes]:
    while chunk := stream.read(CHUNK):
        stop()
        yield chunk
