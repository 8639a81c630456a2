"""The entry point: every way in which a command ends becomes a line and an exit status."""

from __future__ import annotations

import errno
import io
import os
import sqlite3
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, cast

import typer

from onward import startup
from onward.cli.application import app
from onward.errors import (
    END_OTHERS,
    DeviceLost,
    OnwardError,
    UsageError,
    first_line,
    is_out_of_space,
    is_without_temporary,
)
from onward.store.waiting import is_held_by_others
from onward.terminal import flush_results, give_up_unwritten, open_standard_streams, say
from onward.text import without_module

CommandLineError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[2])
"""`ClickException`, from click itself or from the copy of click inside typer."""
NO_HOME = "Could not determine home directory."
"""What pathlib says where neither HOME nor the system's users name one."""
FREE_SPACE = "Free some space, then repeat the command."
OWN = ("onward", "__main__")
"""Modules in which an error is Onward's own."""
INTERRUPTED = 130
"""The exit status that typer gives a second Ctrl-C."""


def main() -> NoReturn:
    """Run the command line; every refusal becomes a line and an exit status, never a traceback."""
    sys.exit(status_of_command())


def status_of_command(seen: Callable[[OnwardError], None] = lambda _: None) -> int:
    """Run the command line and return its exit status.

    Args:
        seen: called with the error that ended the command.
    """
    startup.set_environment()
    startup.keep_out_fetched_code()
    open_standard_streams()
    try:
        with startup.endings_interrupt() as came:
            try:
                return _status_of(came, seen)
            except KeyboardInterrupt:  # it came while an error was put into words
                return _interrupted(came)
    finally:
        give_up_unwritten()


def _status_of(came: list[str], seen: Callable[[OnwardError], None]) -> int:
    """Run the command line; `came` collects the names of the signals that interrupted it, except for Ctrl-C."""
    try:
        _require_directory()
        with startup.kept_interrupts():
            outcome = app(standalone_mode=False)
        flush_results()
    except CommandLineError as error:
        words = io.StringIO()
        error.show(words)
        say(words.getvalue().rstrip())
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted(came)
    except OnwardError as error:
        say(f"onward: {error}")
        seen(error)
        return error.exit_status
    except sqlite3.DatabaseError as error:
        say(_about_ledger(error))
        return 1
    except Exception as error:
        words = _in_words(error)
        if words is None:
            raise
        say(f"onward: {words}")
        seen(words)
        return words.exit_status
    if outcome == INTERRUPTED:
        return _interrupted(came)
    return outcome if isinstance(outcome, int) else 0


def _require_directory() -> None:
    """Refuse a current directory that was removed: relative paths lead nowhere, and MKL ends the process without it.

    Raises:
        UsageError: it was removed.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UsageError(
            "the current directory was removed", hint="Change to another one (cd), then repeat the command."
        ) from None


def _in_words(error: Exception) -> OnwardError | None:
    """Return what to print for an error that is none of Onward's own; None if nobody but its authors can mend it."""
    if isinstance(error, ImportError) and (lacking := without_module(error)) is not None:
        return OnwardError(lacking)
    if isinstance(error, OSError) and error.errno is None:  # the linker found no shared object
        return _about_library(error) or _about_machine(error)
    if isinstance(error, OSError | MemoryError | RuntimeError):
        return _about_machine(error) or _about_library(error)
    return _about_library(error)


def _about_library(error: Exception) -> OnwardError | None:
    """Return what to print if a library failed while it was imported, whatever it raised; None if none did."""
    modules = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    names = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in modules]
    if not names or names[-1] in OWN:
        return None
    hint = "pip check names packages that do not fit together. If there are none, a variable of the environment may be "
    return OnwardError(
        f"{names[-1]} cannot be imported: {type(error).__name__}: {first_line(error)}",
        hint=f"{hint}wrong, or files are missing: pip install --force-reinstall {names[-1]}",
    )


def _about_machine(error: OSError | MemoryError | RuntimeError) -> OnwardError | None:
    """Return what to print for an error of the machine (disk, memory, GPU); None if it is another."""
    what, safe = first_line(error), "What was committed is safe"
    if _is_out_of_memory(error):
        hint = f"{safe}. {END_OTHERS}, then repeat the command."
        return OnwardError(f"memory ran out: {what}", hint=hint)
    if isinstance(error, OSError):
        return OnwardError(
            error.strerror or str(error), where=error.filename or "system", hint=f"{safe}. {_way_on(error)}"
        )
    if what == NO_HOME:
        hint = "Set HOME to a folder that you may write, then repeat the command. For models, ONWARD_CACHE suffices."
        return UsageError("this user has no home directory", where="HOME", hint=hint)
    if "torch" in sys.modules:
        from onward.training.device.errors import is_device_lost

        if is_device_lost(error):
            return DeviceLost(f"the GPU was lost to this process: {what}", hint=f"{safe}. Repeat the command.")
    return None


def _way_on(error: OSError) -> str:
    """Return what to do about an error of the system."""
    if is_without_temporary(error):
        return "Set TMPDIR to a folder that you may write, then repeat the command."
    if _is_of_the_cache(error):
        return "Set ONWARD_CACHE to a folder that has room and that you may write, then repeat the command."
    if is_out_of_space(error):
        return FREE_SPACE
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "Raise the limit of open files (ulimit -n), then repeat the command."
    return "onward doctor says more."


def _is_of_the_cache(error: OSError) -> bool:
    """Whether the system refused something in the folder in which models are kept."""
    embedded = sys.modules.get("onward.training.model.embedded")  # else nobody asked for a model
    if embedded is None or error.filename is None:
        return False
    try:
        return Path(os.fsdecode(error.filename)).is_relative_to(embedded.cache_directory())
    except (RuntimeError, TypeError):  # there is no home directory; a file is named by its descriptor
        return False


def _is_out_of_memory(error: OSError | MemoryError | RuntimeError) -> bool:
    if "torch" not in sys.modules:  # importing it would take more memory
        return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    from onward.training.device.errors import is_out_of_memory

    return is_out_of_memory(error)


def _about_ledger(error: sqlite3.DatabaseError) -> str:
    """Return what to print for an error of SQLite."""
    if not is_held_by_others(error):
        hint = f"What was committed is safe. {FREE_SPACE}" if is_out_of_space(error) else "onward doctor says more."
        return f"onward: the ledger cannot be used: {error}\n  {hint}"
    return (
        "onward: another program holds the ledger locked [ledger.sqlite3]\n"
        "  What was committed is safe. lsof ledger.sqlite3 names the program; once it ended, repeat the command."
    )


def _interrupted(came: list[str]) -> int:
    """Print that the command was interrupted, and by what; return its exit status."""
    say(startup.interrupted(came))
    return 1
