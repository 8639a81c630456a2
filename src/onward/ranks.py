"""Which of several processes this is, and which start of them, from torchrun's variables. Nothing here loads torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from onward.errors import UsageError

LOST = 75
"""Exit status (EX_TEMPFAIL) of a process whose group lost a rank: a smaller group can continue. No command has it."""
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
"""The variable that says how often the processes were started before."""
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for every process that it starts."""
UNSET = "unset RANK WORLD_SIZE"
"""The command for a shell that has these variables from elsewhere."""


@dataclass(frozen=True)
class Place:
    """One of several processes.

    Args:
        rank: its number, from 0.
        size: how many there are.
        local_rank: its number on its machine.
        local_size: how many there are on its machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int


@dataclass(frozen=True)
class Start:
    """One of the starts of a command; its processes are started again with the same arguments if one was lost.

    Args:
        command: distinguishes the command from others.
        number: how often it was started before.
    """

    command: str
    number: int


def place_here(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Return the place of this process; None if it is alone.

    Raises:
        UsageError: the variables are not those that torchrun sets.
    """
    if "RANK" not in environment or environment.get("WORLD_SIZE", "1") == "1":
        return None
    missing = [name for name in VARIABLES if name not in environment]
    if missing:
        raise _wrong(f"RANK is set without {', '.join(missing)}")
    try:
        rank, size, local_rank, local_size = (int(environment[name]) for name in VARIABLES[:4])
    except ValueError:
        raise _wrong("RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are not all numbers") from None
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise _wrong(f"rank {rank} of {size}, {local_rank} of {local_size} here, cannot be")
    return Place(rank, size, local_rank, local_size)


def start_here(environment: Mapping[str, str] = os.environ) -> Start | None:
    """Return which start of its command this process belongs to; None if nothing would start it again."""
    number, name = (environment.get(variable, "") for variable in (RESTARTS, "TORCHELASTIC_RUN_ID"))
    if not number.isdecimal():
        return None
    return Start(f"{name} {os.getppid()}", int(number))  # another agent may give the same name


def _wrong(what: str) -> UsageError:
    hint = (
        "torchrun --nproc-per-node N -m -- onward train sets them all. To train in one process, or to let onward train "
        f"--devices N start several: {UNSET}"
    )
    return UsageError(f"the variables of torchrun make no sense: {what}", where="environment", hint=hint)
