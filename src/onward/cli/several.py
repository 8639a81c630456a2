"""Commands that several processes carry out together: rank 0 is the command, the others follow it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from onward import startup
from onward.errors import OnwardError, RankLost, UsageError
from onward.ranks import LOST, RESTARTS, UNSET, Place, place_here
from onward.terminal import flush_results, say

DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="N|all|A:B",
        help="Train on several devices of this machine; A:B continues with fewer if one is lost.",
        show_default="one",
    ),
]

QUIET = ("TORCH_CPP_LOG_LEVEL", "ERROR")
"""The variable that keeps torch's C++ from printing its stack when a connection ends; read when torch is loaded."""


def place_or_follow(run: Path) -> Place | None:
    """Return the place of this process if it is rank 0 of several, None if it is alone; any other rank follows."""
    place = place_here()
    if place is not None:
        os.environ.setdefault(*QUIET)
    if place is not None and place.rank:
        _follow(run, place)
    return place


def on_devices(devices: str, words: Sequence[str]) -> NoReturn:
    """Run a command on several devices to its end.

    Args:
        devices: how many, as the user wrote it.
        words: the command and its arguments.

    Raises:
        UsageError: there are not that many devices.
    """
    if place_here() is not None:
        hint = f"With torchrun, give the number as --nproc-per-node N, without --devices. In any other shell: {UNSET}"
        raise UsageError("torchrun has already started several processes", where="--devices", hint=hint)
    startup.set_environment()
    os.environ.setdefault(*QUIET)
    with startup.large_imports():
        from onward.service.outside.elastic import count_gpus, read_devices, run_on

        wanted = read_devices(devices, count_gpus)
    raise typer.Exit(run_on(wanted, command, list(words), say))


def flags(*given: tuple[str, bool]) -> list[str]:
    """Return the names of the switches that are on."""
    return [name for name, is_on in given if is_on]


def command(words: Sequence[str], starts: int) -> int:
    """Carry out a command line in a process that the elastic agent started; returns its exit status.

    Args:
        starts: how often it was started before, by earlier agents.
    """
    from onward.cli.entry import status_of_command

    started_by = os.getppid()
    os.environ[RESTARTS] = str(starts)
    lost: list[bool] = []
    sys.argv = ["onward", *words]
    status = status_of_command(lambda error: lost.append(isinstance(error, RankLost)))
    if any(lost):
        os._exit(LOST)  # so that the agent ends the others
    if os.getppid() != started_by:
        os._exit(status)  # nothing is left that could handle an exception
    return status


def _follow(run: Path, place: Place) -> NoReturn:
    """Follow rank 0 until it ends; all output is rank 0's."""
    from onward.following import follow
    from onward.service.wishes import Wishes

    stop = Wishes()
    try:
        with stop.on_signals():
            follow(run, place, stop=stop, report=say, loading=startup.large_imports)
    except RankLost:
        flush_results()
        os._exit(LOST)  # a normal exit would wait for connections to a rank that is gone
    except OnwardError as error:
        raise typer.Exit(error.exit_status) from None
    raise typer.Exit
