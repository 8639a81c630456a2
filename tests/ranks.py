"""Several processes that train one run together, forked fast, with the store that torchrun would host."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from processes import as_it_is, start_apart, start_command
from torch.distributed import TCPStore

PATIENCE = 120.0
"""Seconds after which a test gives up on a process."""


@dataclass(frozen=True)
class At:
    """Sets torchrun's variables in the process that calls it, then prepares it."""

    rank: int
    size: int
    port: int
    prepare: Callable[[], None] = as_it_is

    def variables(self) -> dict[str, str]:
        """Return them."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.rank),
            "LOCAL_WORLD_SIZE": str(self.size),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(self.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }

    def __call__(self) -> None:
        """Set them."""
        os.environ |= self.variables()
        self.prepare()


class Ranks:
    """The ranks of one command; killed at the end if they are still there.

    Args:
        output: gets what rank 0 prints; that of rank N goes to a file next to it whose name ends with N.
        prepare: by rank, what is called in its process first.
    """

    def __init__(
        self, output: Path, size: int, *arguments: object, prepare: dict[int, Callable[[], None]] | None = None
    ) -> None:
        self.store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.output = output
        self.processes: list[BaseProcess] = [
            start_command(
                self.log(rank),
                *arguments,
                prepare=At(rank, size, self.store.port, (prepare or {}).get(rank, as_it_is)),
            )
            for rank in range(size)
        ]

    def log(self, rank: int) -> Path:
        """Return the file that gets what a rank prints."""
        return self.output if rank == 0 else self.output.with_name(f"{self.output.name}.{rank}")

    def send(self, rank: int, number: int) -> None:
        """Send a signal to a rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def join(self) -> list[int | None]:
        """Wait for all; returns their exit statuses, negative for a signal."""
        for process in self.processes:
            process.join(PATIENCE)
        return [process.exitcode for process in self.processes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _call(at: At, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    at()
    function(*arguments)


def call_on_ranks(function: Callable[..., None], size: int, *arguments: object) -> list[int | None]:
    """Call a function in several processes that have torchrun's variables; returns their exit statuses."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    started = [start_apart(_call, At(rank, size, store.port), function, arguments) for rank in range(size)]
    for process in started:
        process.join(PATIENCE)
    return [process.exitcode for process in started]


def on_ranks(output: Path, size: int, *arguments: object) -> list[int | None]:
    """Run a command on several ranks to its end; returns their exit statuses."""
    with Ranks(output, size, *arguments) as ranks:
        return ranks.join()
