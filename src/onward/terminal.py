"""Printing for people: a stream that is closed, on a full disk or read by nobody never holds up a command's work."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import stat
import sys
from collections.abc import Callable, Generator
from typing import IO, TYPE_CHECKING, TextIO, cast

from onward.errors import printable_lines

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

GONE = (errno.EPIPE, errno.EBADF, errno.EIO)
"""Errors of a stream that nobody will ever read again."""

COLOURLESS = {"NO_COLOR": "1", "PYTHON_COLORS": "0", "TERM": "dumb"}
"""Variables of a program whose words are read: pip, and Python from 3.13 on, colour them where FORCE_COLOR is set."""

PATIENCE = 2.0
"""Seconds that messages wait for a reader who takes no more: a terminal stopped by Ctrl-S, a pager, a stuck log."""

BRACKETS = ("\u27e6", "\u27e7")
"""Mathematical white brackets, which are rare in texts."""
LINE_END = "\u23ce"
UNDERLINED, PLAIN = "\x1b[4;32m", "\x1b[0m"


def open_standard_streams() -> None:
    """Point standard streams that were closed at the null device, and let no character that they cannot code fail.

    Otherwise the next file opened, such as the ledger, would get the number of the closed stream, and whatever prints
    to that stream would write into the file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # this is the lowest free number
    # printing a name that the terminal cannot show must not fail; whatever takes bytes that are no text refuses them
    out = ("w", "backslashreplace")
    for name, (mode, errors) in {"stdin": ("r", "surrogateescape"), "stdout": out, "stderr": out}.items():
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, mode)  # noqa: PTH123, SIM115  # open as long as the process
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if type(sys.stderr) is io.TextIOWrapper and sys.stderr.fileno() == 2 and _may_block(2):
        raw = io.BufferedWriter(_Unblocked(_own_description(2)))
        sys.stderr = io.TextIOWrapper(raw, sys.stderr.encoding, "backslashreplace", newline="\n", line_buffering=True)


class _Unblocked(io.FileIO):
    """The file under a stream for people: what its reader does not take in time is lost."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._patience = PATIENCE
        self._is_ready = select.poll()
        self._is_ready.register(self, select.POLLOUT)

    def write(self, data: ReadableBuffer, /) -> int:
        """Write what fits at once, or drop everything; only the first wait for a reader takes time."""
        whole = memoryview(data)
        if self._is_ready.poll(1000 * self._patience):
            self._patience = PATIENCE
            written = super().write(whole[: select.PIPE_BUF])
            if written is not None:
                return written
        self._patience = 0.0
        return len(whole)


def _may_block(descriptor: int) -> bool:
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)


def _own_description(descriptor: int) -> int:
    """Return a descriptor of the same pipe or terminal whose writes never wait.

    The mode of the given one is shared with other processes, such as the shell. Where the system does not allow it, as
    for a socket, the given one is returned: it is written to only while it is ready.
    """
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return descriptor


def say(message: str) -> None:
    """Print a message for people on stderr; one that cannot be printed is lost, and the work continues."""
    write(sys.stderr, f"{printable_lines(message)}\n")


def show_line(text: str) -> None:
    """Print a line of a result on stdout; a reader that left early is not an error.

    Raises:
        OSError: the result cannot be written, as on a full disk.
    """
    with reader_may_leave():
        print(text)


@contextlib.contextmanager
def reader_may_leave() -> Generator[None]:
    """Write a result on stdout in the body; a reader that left early ends the writing, which is not an error.

    Raises:
        OSError: the result cannot be written, as on a full disk.
    """
    try:
        yield
    except BrokenPipeError:
        silence(sys.stdout)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, "standard output") from None


def show_text(text: str) -> None:
    """Print part of a result on stdout at once; a reader that left early is not an error.

    Raises:
        OSError: the result cannot be written, as on a full disk.
    """
    with reader_may_leave():
        print(text, end="", flush=True)


def flush_results() -> None:
    """Flush stdout; a reader that left early is not an error.

    Raises:
        OSError: the result cannot be written, as on a full disk.
    """
    with reader_may_leave():
        sys.stdout.flush()


def give_up_unwritten() -> None:
    """Drop what the standard streams still hold and cannot write: Python would end with a status of its own for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            silence(stream)


def write(stream: TextIO, text: str) -> None:
    """Write to a stream at once; what it does not accept is lost."""
    try:
        stream.write(text)
        stream.flush()
    except ValueError:  # it was closed inside this process
        return
    except OSError as error:
        if error.errno in GONE:
            silence(stream)


def silence(stream: TextIO) -> None:
    """Point a stream that nobody reads at the null device."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def is_interactive(stream: TextIO) -> bool:
    """Return whether a stream is a terminal on which the cursor can be moved."""
    if os.environ.get("TERM", "").lower() in ("dumb", "unknown"):
        return False
    try:
        return stream.isatty()
    except ValueError:
        return False


def marker(stream: TextIO) -> Callable[[str], str]:
    """Return a function that marks a printable text on a stream: underlined on a terminal, between brackets elsewhere.

    A terminal does not show whether the end of a line is marked, so a sign is put there. `NO_COLOR` asks for brackets.
    """
    if not is_interactive(stream) or os.environ.get("NO_COLOR"):
        return lambda text: f"{BRACKETS[0]}{text}{BRACKETS[1]}"
    return lambda text: "\n".join(
        f"{UNDERLINED}{line}{PLAIN}" for line in text.replace("\n", f"{LINE_END}\n").split("\n")
    )


class Tolerant:
    """A stream for libraries that print: what the underlying stream does not accept is lost, and nothing is raised."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write as far as possible."""
        write(self._stream, text)
        return len(text)

    def flush(self) -> None:
        """Do nothing: everything is written at once."""

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return the descriptor, for code that asks how wide the terminal is."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        """The encoding of the stream."""
        return self._stream.encoding


def tolerant(stream: TextIO) -> IO[str]:
    """Return a stream that never raises when it is written to."""
    return cast("IO[str]", Tolerant(stream))
