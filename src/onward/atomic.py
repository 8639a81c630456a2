"""Durable writes: a file or a directory appears whole or not at all, even after a power cut."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from onward.errors import OnwardError, is_out_of_space

TEMPORARY_PREFIX = ".tmp-"
TRIAL = 1 << 30
"""The most bytes of a trial file: some file systems write a reserved block at a time."""
_IN_WORDS = re.compile(r"\(os error (\d+)\)|\bOs \{ code: (\d+)")
"""How libraries written in Rust say what the system refused: as its number, in the text of an error of their own."""


def force(descriptor: int) -> None:
    """Force what was written to a descriptor to the disk; on macOS that takes a call other than `fsync`."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(descriptor, full)
        except OSError:  # this file system does not support it
            pass
        else:
            return
    os.fsync(descriptor)


@contextlib.contextmanager
def system_errors(place: Path) -> Generator[None]:
    """Raise what the system refuses in the body as OSError, also where safetensors or tokenizers say it in words.

    Raises:
        OSError: the system refused to read or write at `place`.
    """
    try:
        yield
    except Exception as error:
        found = _IN_WORDS.search(str(error))
        if found is None or isinstance(error, OnwardError) or getattr(error, "errno", None) is not None:
            raise
        number = int(found[1] or found[2])
        raise OSError(number, os.strerror(number), str(place)) from None


def fsync_file(path: Path) -> None:
    """Force a file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        force(descriptor)
    finally:
        os.close(descriptor)


def fsync_directory(path: Path) -> None:
    """Force a directory's entries to the disk, if the file system supports that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        force(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems do not support it
            raise
    finally:
        os.close(descriptor)


def can_be_written(folder: Path, size: int) -> bool:
    """Return whether a disk takes a file of `size` bytes, `TRIAL` at most: a quota leaves less than what is free."""
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=TEMPORARY_PREFIX) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(1, min(size, TRIAL)))
            else:
                file.write(bytes(min(size, 1 << 20)))
                file.flush()
    except OSError as error:
        return not is_out_of_space(error)  # whatever else is wrong is told by what is really written
    return True


def why_less(folder: Path) -> str:
    """Return, in words, what keeps a file from a disk that has the bytes for it: its quota, or its count of files."""
    disk = os.statvfs(folder)
    return "no more files (inodes) are left" if disk.f_files and not disk.f_favail else "a quota is used up"


def write_file(path: Path, data: bytes) -> None:
    """Write `data` and force it to the disk; the caller's directory rename makes it visible."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        force(stream.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Replace the contents of `path` atomically."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    write_file(temporary, data)
    temporary.replace(path)
    fsync_directory(path.parent)


def replace_files(files: Mapping[Path, bytes]) -> None:
    """Replace the contents of files, one after another and each atomically."""
    for path, data in files.items():
        replace_file(path, data)


def replace_checked(path: Path, body: bytes, kind: str = "") -> None:
    """Atomically replace the contents of `path` with a checksum line followed by `body`.

    Args:
        kind: the start of that line, which names what the body is and its format.
    """
    replace_file(path, _check_line(body, kind) + body)


def read_checked(path: Path, kind: str = "") -> bytes | None:
    """Return the body that `replace_checked` wrote; None if there is no file, or it is damaged or of another kind.

    Raises:
        OSError: the file is there but cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    line, newline, body = data.partition(b"\n")
    return body if line + newline == _check_line(body, kind) else None


def _check_line(body: bytes, kind: str) -> bytes:
    return f"{kind}{xxhash.xxh3_128_hexdigest(body)}\n".encode()


def replace_json(path: Path, value: Any) -> None:
    """Atomically replace the contents of `path` with `value` as indented JSON."""
    replace_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def publish_directory(temporary: Path, final: Path) -> None:
    """Make a finished directory visible under its final name: fsync of its entries, rename, fsync of the parent.

    The files inside must already be fsynced. This is the one commit point of a checkpoint.

    Raises:
        FileExistsError: `final` exists already.
    """
    if final.exists():
        raise FileExistsError(final)
    fsync_directory(temporary)
    temporary.rename(final)
    fsync_directory(final.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link `source` as `target`, or copy it if the file system has no hard links.

    Raises:
        FileExistsError: the name is taken; a copy would be written into a file that may have other names.
    """
    try:
        target.hardlink_to(source)
    except OSError:
        _require_free(target)
        shutil.copyfile(source, target)
        fsync_file(target)


def move_to_free_name(source: Path, target: Path) -> None:
    """Move a file to a name in the same folder, never over another one.

    Raises:
        FileExistsError: the name is taken.
    """
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without hard links
        _require_free(target)
        source.rename(target)
    else:
        source.unlink()
    fsync_directory(target.parent)


def _require_free(target: Path) -> None:
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None


def link_tree(source: Path, target: Path) -> None:
    """Make `target` a directory of hard links to the files of `source`; it appears atomically."""
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    remove_tree(temporary)
    temporary.mkdir(parents=True)
    for entry in sorted(source.iterdir()):
        if entry.is_file():
            link_or_copy(entry, temporary / entry.name)
    publish_directory(temporary, target)


def remove_tree(path: Path) -> None:
    """Remove a directory if it exists.

    Raises:
        OSError: it cannot be removed; the error names it, and not only an entry of it.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        try:
            shutil.rmtree(path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None


def discard_tree(path: Path) -> None:
    """Remove what a write that ended left, as far as possible: its own error, if any, is the one to tell."""
    with contextlib.suppress(OSError):
        remove_tree(path)


def remove_temporaries(found: Iterable[Path], is_own: Callable[[Path], bool]) -> None:
    """Remove what interrupted writes left; everything else in the same folders stays.

    Args:
        found: entries of folders in which Onward writes, with any names.
        is_own: whether Onward made an entry with a temporary name; a name alone does not show that.
    """
    for entry in found:
        if entry.name.startswith(TEMPORARY_PREFIX) and is_own(entry):
            remove_tree(entry)


def is_own_folder(entry: Path, is_named: Callable[[str], object]) -> bool:
    """Whether an entry is a directory, and no link to one, that has only names which Onward gives there."""
    return entry.is_dir() and not entry.is_symlink() and all(is_named(path.name) for path in entry.iterdir())
