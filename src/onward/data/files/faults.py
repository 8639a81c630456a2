"""Whose fault an error is: a training file's, which is then refused, or something else's, and then it is raised."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterable

from onward.data.row_types import RowError
from onward.errors import NO_THREAD, OnwardError
from onward.text import printable

FILE_ERRNOS = frozenset(
    {
        errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG,
        errno.EINVAL, errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP, errno.EILSEQ,
    }
)  # fmt: skip
"""Errors of the operating system that trying again does not cure; all others are the machine's."""

REASON_LENGTH = 300
TOO_DEEP = ("the JSON is nested too deeply", "flatten the row")
SPECIAL_FILE = ("is a special file (fifo, socket or device)", "copy its content to a regular file")


class FileError(Exception):
    """A training file cannot be read to its end.

    Args:
        reason: what is wrong with the file.
        remedy: what to change.
        line: the 1-based line where it was noticed, if known.
    """

    def __init__(self, reason: str, remedy: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy
        self.line = line


class SourceChanged(FileError):
    """The content of a training file no longer has the hash that was taken of it."""

    def __init__(self) -> None:
        super().__init__("the file changed after it was accepted", "add it again once nothing writes to it")


def is_of_machine(error: BaseException) -> bool:
    """Return whether an error comes from the machine (disk, memory, descriptors) and not from the file being read."""
    if isinstance(error, OSError):
        return error.errno is not None and error.errno not in FILE_ERRNOS
    has_no_thread = type(error) is RuntimeError and str(error) == NO_THREAD
    return has_no_thread or isinstance(error, MemoryError) or lacks_thread_pool(error)


def lacks_thread_pool(error: BaseException) -> bool:
    """Return whether a Rust library found no threads, for lack of memory or processes; it tries once in a process."""
    return _is_panic(error) and "thread pool" in str(error)


def refusal_of(error: BaseException) -> FileError | RowError:
    """Turn `error`, raised by reading, parsing, rendering or tokenizing a file, into the refusal of that file.

    Raises:
        BaseException: `error` itself, if the cause is not the content but the machine, the model, or a request to stop.
    """
    if isinstance(error, FileError | RowError):
        return error
    if is_of_machine(error) or isinstance(error, OnwardError) or not (isinstance(error, Exception) or _is_panic(error)):
        raise error
    if isinstance(error, RecursionError):
        return FileError(*TOO_DEEP)
    return FileError(f"it cannot be used ({described(error)})", "correct or remove it, then add the file again")


def refuse_twice(names: Iterable[str], line: int | None = None) -> None:
    """Refuse columns two of which have the same name.

    Raises:
        FileError: there are such columns.
    """
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise FileError(f"two columns are named {printable(twice)}", "rename or remove one of them", line)


def described(error: BaseException) -> str:
    """Return the kind and the first line of an error, cut to what fits a report."""
    first = next(iter(str(error).splitlines()), "")
    return printable(f"{type(error).__name__}: {first}" if first else type(error).__name__)[:REASON_LENGTH]


def _is_panic(error: BaseException) -> bool:
    """Return whether a Rust library panicked; what it raises is not an `Exception`."""
    return type(error).__module__ == "pyo3_runtime"
