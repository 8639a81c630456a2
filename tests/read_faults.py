"""Faults at the n-th read that a process makes of files under one folder: a failing disk, too many open files.

Calls of Python are counted; those of SQLite and of compiled libraries are not among them.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REFUSALS = ("EIO", "EMFILE", "ENFILE", "ESTALE", "EACCES", "ENOMEM")
"""Errors of the system that say nothing about the file."""
CALLS = ("stat", "lstat", "open", "listdir", "scandir")


@dataclass
class ReadFault:
    """The n-th read of a file or directory under `folder` fails.

    Args:
        at: which read, from 1; 0 for none, to count them.
        kind: one of `REFUSALS`.
        record: a file that gets a line for every read, for a test that counts them from another process.
    """

    folder: Path
    at: int = 0
    kind: str = "EIO"
    count: int = 0
    record: Path | None = None

    def again(self, at: int, kind: str) -> None:
        """Count from nothing, for another fault."""
        self.at, self.kind, self.count = at, kind, 0

    def arm(self) -> None:
        """Arm the process that this is called in, for the rest of its life."""
        for name in CALLS:
            setattr(os, name, self._counted(getattr(os, name)))
        opener = io.open

        def counted_open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if set(mode) & set("wax+") or not self._concerns(file):
                return opener(file, mode, *args, **options)
            self._read(file)
            return _Stream(opener(file, mode, *args, **options), self._read)

        io.open = builtins.open = counted_open  # type: ignore[assignment]

    def _concerns(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and Path(os.fspath(path)).is_relative_to(self.folder)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *args: Any, **options: Any) -> Any:
            if self._concerns(path):
                self._read(path)
            return function(path, *args, **options)

        return call

    def _read(self, path: Any = None) -> None:
        """Count a read; that of a path is refused by name, as the system does, that of an open file is not."""
        self.count += 1
        if self.record is not None:
            with self.record.open("a") as lines:
                lines.write(f"{self.count}\n")
        if self.count == self.at:
            number = getattr(errno, self.kind)
            raise OSError(number, os.strerror(number), *([] if path is None else [os.fspath(path)]))


class _Stream:
    """A stream whose reads count."""

    def __init__(self, stream: Any, read: Callable[[], None]) -> None:
        self._stream = stream
        self._read = read

    def read(self, *args: Any) -> Any:
        self._read()
        return self._stream.read(*args)

    def readinto(self, memory: Any) -> Any:
        self._read()
        return self._stream.readinto(memory)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
