"""Every error that a user can meet: what happened, where, and the next command to type.

The command line prints these without a traceback and exits with `exit_status`:
1 failed, 2 wrong usage or config, 3 a file was rejected, 4 the run is locked, 5 verification failed.
"""

from __future__ import annotations

import errno
import re
import sqlite3
from typing import Any, Self

from onward.text import printable

END_OTHERS = "End other processes that use the memory (nvidia-smi, top)"
"""What helps wherever memory ran out."""
NEWER_RELEASE = (
    "Use the release that wrote it, or a newer one: pip install --upgrade onward; from a checkout: git pull, then pip "
    "install ."
)
"""What helps wherever an earlier release meets what a later one wrote."""
NO_THREAD = "can't start new thread"
"""What Python says if a thread finds no room for its stack."""
_TOKEN = re.compile(r"hf_\w+")
_AGAIN = "then the same command again. Nothing was removed."
_READ_HINT = f"Fix the disk or its mount, {_AGAIN}"
_READ_HINTS: dict[int | None, str] = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), f"Let this user read it, {_AGAIN}"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), f"Raise the limit of open files (ulimit -n), {_AGAIN}"),
    errno.ENOMEM: f"Free some memory, {_AGAIN}",
}
_FAILURES = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOLCK, errno.EBUSY, errno.EAGAIN)
"""Errors of the machine that say nothing about the place that a person named."""


def printable_lines(text: str) -> str:
    """Return a text with each of its lines made printable; line endings are kept."""
    return "\n".join(map(printable, text.split("\n")))


class OnwardError(Exception):
    """An error with a place and a remedy.

    Args:
        what: one sentence that says what is wrong.
        where: the file, row, key or directory concerned.
        hint: the next command to type or the change to make.
    """

    exit_status = 1

    def __init__(self, what: str, *, where: object = None, hint: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.hint = hint
        super().__init__(self.__str__())

    def __str__(self) -> str:
        place = f" [{printable(self.where)}]" if self.where else ""
        remedy = f"\n  {printable_lines(self.hint)}" if self.hint else ""
        return f"{printable_lines(self.what)}{place}{remedy}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (type(self), self.args), self.__dict__

    def to_dict(self) -> dict[str, str | int | None]:
        """Return the error as plain values, as the page answers with it."""
        return {"error": self.what, "where": self.where, "hint": self.hint, "exit_status": self.exit_status}


def _made_again(kind: type[OnwardError], args: tuple[Any, ...]) -> OnwardError:
    """Return an error as another process raised it, without its constructor's arguments; its rest is set after."""
    return kind.__new__(kind, *args)


class UsageError(OnwardError):
    """The command or its arguments make no sense here."""

    exit_status = 2


class ConfigError(UsageError):
    """A config key or value is refused, or a locked key was changed."""


class FileRejected(OnwardError):
    """One or more training files were refused; nothing was added to the stream."""

    exit_status = 3


class RunLocked(OnwardError):
    """Another process owns the run."""

    exit_status = 4


class VerificationFailed(OnwardError):
    """A claim about the run does not hold."""

    exit_status = 5


class DamagedState(VerificationFailed):
    """State on disk is missing or is not what was committed, and nothing verifiable is left to continue from."""


class ModelError(OnwardError):
    """The base model cannot be found or loaded, or cannot be trained as asked."""


class TrainingError(OnwardError):
    """A step cannot be taken: the loss is not finite, or a postcondition of a file does not hold."""


class NothingTrained(OnwardError):
    """A file failed after others that had been quarantined, with none trained between: the files are not the cause."""


class GuardRejected(TrainingError):
    """A file exceeded the guard's limits and has to be taken back.

    Args:
        file_id: the file.
        problems: what was found, and the rows to look at, as in a report.
    """

    def __init__(self, what: str, file_id: int, problems: list[dict[str, Any]]) -> None:
        super().__init__(what, hint="Look at the rows that its report names; onward accept FILE trains it anyway.")
        self.file_id = file_id
        self.problems = problems


class DeviceLost(OnwardError):
    """The GPU can no longer be used by this process; a new process can continue."""


class RankLost(DeviceLost):
    """One of several processes that train together is gone or shows no sign of life; the others end too."""


class Outdated(DeviceLost):
    """A newer release has changed the ledger under this process: only a new process can continue."""


class NoSpace(OnwardError):
    """The disk has no room for the next checkpoint."""


class Unreadable(OnwardError):
    """Something on disk cannot be read now. Nothing is known about it, so nothing is removed because of it."""

    @classmethod
    def of(cls, error: OSError, path: object) -> Self:
        """Return the error for a read of `path` that the system refused."""
        reason = error.strerror or first_line(error)
        return cls(f"it cannot be read: {reason}", where=path, hint=_READ_HINTS.get(error.errno, _READ_HINT))


class NotMadeHere(OnwardError):
    """Something that Onward did not make is in a place where Onward would write; it is left alone."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def said_by_hub(error: BaseException) -> tuple[str, int | None]:
    """Return in one line, without tokens, why a hub could not be used, and the status of its answer; None without one.

    A hub that refuses a request says why apart from the first line.
    """
    answer = getattr(error, "response", None)
    said = " ".join([first_line(error), *str(getattr(error, "server_message", None) or "").split()])
    return _TOKEN.sub("hf_...", said), getattr(answer, "status_code", None)


def is_out_of_space(error: BaseException) -> bool:
    """Whether an error says that a disk is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, NoSpace) or (isinstance(error, sqlite3.OperationalError) and "full" in str(error))


def cannot_write(error: OSError, where: object, what: str = "cannot write it") -> OnwardError:
    """Return what to raise where the system refuses to write: a disk that is full or fails is no wrong usage."""
    said = f"{what}: {error.strerror}"
    if is_out_of_space(error):
        return NoSpace(said, where=where, hint="Free some space, or name another place.")
    if error.errno in _FAILURES:
        return OnwardError(said, where=where, hint=_READ_HINTS.get(error.errno, _READ_HINT))
    return UsageError(said, where=where, hint="Name another place, or let this user write there.")


def is_without_temporary(error: BaseException) -> bool:
    """Whether an error says that there is no place for temporary files: `tempfile` alone names no file then."""
    return isinstance(error, FileNotFoundError) and error.errno is not None and error.filename is None
