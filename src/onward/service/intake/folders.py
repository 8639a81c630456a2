"""Joins a folder that `datasets` saved (`save_to_disk`) into one Arrow file: the batches of its files in order."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from onward.data.files.columnar.arrow_ipc import END, SCHEMA, Message, messages_of
from onward.data.files.faults import FileError
from onward.errors import UsageError
from onward.service.intake.budget import Spending
from onward.text import printable, quoted

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
SAVE_AGAIN = "save it again: dataset.flatten_indices().save_to_disk(FOLDER)"
NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
"""Errors that say that there is no file of that name."""


def is_saved_dataset(folder: Path) -> bool:
    """Return whether a folder is one that `Dataset.save_to_disk` wrote."""
    return (folder / STATE).is_file() and (folder / INFO).is_file()


def require_one_split(folder: Path) -> None:
    """Refuse a folder of several splits.

    Raises:
        UsageError: it is one that `DatasetDict.save_to_disk` wrote; the hint names a split.
    """
    if not (folder / SPLITS).is_file():
        return
    splits = [name for name in _names(folder / SPLITS, "splits") if is_saved_dataset(folder / name)]
    first = "train" if "train" in splits else next(iter(splits), "SPLIT")
    raise UsageError(
        f"this is a data set of {len(splits)} splits ({', '.join(map(printable, splits[:5]))})",
        where=printable(str(folder)),
        hint=f"Name the split to train: {quoted(folder / first)}",
    )


def joined(folder: Path, writer: BinaryIO, spending: Spending) -> tuple[str, int]:
    """Write the files of a folder as one file; return its SHA-256 and its size in bytes.

    Raises:
        FileError: a file is missing or damaged, their columns differ, or the folder selects some of their rows.
    """
    if _names(folder / STATE, "_indices_data_files") or _names(folder / STATE, "_indices_files"):
        raise FileError("the folder contains a selection of rows, not the rows themselves", SAVE_AGAIN)
    digest, size = hashlib.sha256(), 0
    for part in _parts(folder, _names(folder / STATE, "_data_files"), spending):
        writer.write(part)
        digest.update(part)
        size += len(part)
    return digest.hexdigest(), size


def _parts(folder: Path, names: list[str], spending: Spending) -> Iterator[bytes]:
    """Yield the messages of all files as one stream: the schema that they share once, then every batch."""
    schema: bytes | None = None
    for name in names:
        for message in _messages(folder / name, spending):
            if message.kind == SCHEMA:
                if schema not in (None, message.metadata):
                    raise FileError(f"{printable(name)} has different columns from the files before it", SAVE_AGAIN)
                if schema is not None:
                    continue
                schema = message.metadata
            yield message.start + message.metadata
            yield from message.parts()
    yield END


def _messages(path: Path, spending: Spending) -> Iterator[Message]:
    """Yield the messages of a file, and refuse it at its end if it changed meanwhile."""
    with path.open("rb") as stream:
        before = os.fstat(stream.fileno())
        for message in messages_of(stream):
            spending.spend_bytes(0)
            yield message
        after = path.stat()
    if (before.st_mtime_ns, before.st_size, before.st_ino) != (after.st_mtime_ns, after.st_size, after.st_ino):
        raise FileError("the folder changed while it was read", "add it again when its writer is done")


def _names(path: Path, key: str) -> list[str]:
    """Return the names that a JSON file lists under a key, each of an entry in its own folder."""
    try:
        found: Any = json.loads(path.read_bytes()).get(key) or []
        names = [str(entry["filename"]) if isinstance(entry, dict) else str(entry) for entry in found]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FileError(f"{path.name} cannot be read", SAVE_AGAIN) from None
    if any(name in (".", "..") or Path(name).name != name for name in names):
        raise FileError(f"{path.name} names a file outside the folder", SAVE_AGAIN)
    return names


def require_file(path: Path) -> None:
    """Refuse a mistyped path: one at which there is nothing or cannot be anything, or a directory.

    Raises:
        UsageError: it is one of those.
    """
    shown = printable(str(path))
    try:
        path.stat()
    except (OSError, ValueError) as error:  # ValueError: no name of a file has a zero byte or half a surrogate pair
        if isinstance(error, OSError) and error.errno not in NOWHERE:
            return  # reported when the file is read
        raise UsageError("there is no such file", where=shown, hint="Check the path; nothing was added.") from None
    if path.is_dir() and not is_saved_dataset(path):
        require_one_split(path)
        raise UsageError("this is a directory, not a file", where=shown, hint=f"Name its files: {quoted(path)}/*.jsonl")
