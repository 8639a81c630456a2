"""Real processes that train, started fast (imports are forked, not repeated) and killed by real signals."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from onward import cli
from onward.errors import OnwardError
from onward.run import Run
from onward.service.wishes import Wishes

_CONTEXT: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
"""How processes are started; one that is forked cannot use a GPU which its parent has looked at."""


def _start_server() -> None:
    """Start the process that others are forked from; Python 3.11 hands it no `sys.path` to find this module with."""
    if _CONTEXT.get_start_method() != "forkserver":
        return
    _CONTEXT.set_forkserver_preload(["processes", "onward.service.owner.daemon", "preloaded"])
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), path)))
    try:
        forkserver.ensure_running()
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path


def _train(directory: str, files: list[str], threads: int) -> None:
    torch.set_num_threads(threads)
    stop = Wishes()
    try:
        with stop.on_signals():
            Run(directory).train(*files, stop=stop)
    except OnwardError as error:
        print(error, flush=True)
        os._exit(error.exit_status)


def _command(arguments: list[str], output: str, prepare: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["onward", *arguments]
    prepare()
    cli.main()


def as_it_is() -> None:
    """Prepare nothing."""


def start_command(output: Path, *arguments: object, prepare: Callable[[], None] = as_it_is) -> BaseProcess:
    """Start the command line in a process of its own; `prepare` runs in it first, `output` gets what it prints."""
    _start_server()
    process = _CONTEXT.Process(target=_command, args=([str(word) for word in arguments], str(output), prepare))
    process.start()
    return process


def command(output: Path, *arguments: object, prepare: Callable[[], None] = as_it_is) -> int | None:
    """Run the command line in a process of its own to its end; returns its exit status, negative for a signal."""
    process = start_command(output, *arguments, prepare=prepare)
    process.join()
    return process.exitcode


def start_apart(function: Callable[..., None], *arguments: object) -> BaseProcess:
    """Call a function in a process of its own."""
    _start_server()
    process = _CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def apart(function: Callable[..., None], *arguments: object) -> int | None:
    """Call a function in a process of its own to its end; returns its exit status."""
    process = start_apart(function, *arguments)
    process.join()
    return process.exitcode


def apart_with(function: Callable[..., None], *arguments: object) -> None:
    """Call a function in a process of its own, which ends with this one."""
    _start_server()
    _CONTEXT.Process(target=function, args=arguments, daemon=True).start()


def start(run: Path, files: Sequence[Path] = (), *, threads: int = 1) -> BaseProcess:
    """Start a process that trains `files` in a run; its exit code is the command line's exit status."""
    _start_server()
    process = _CONTEXT.Process(target=_train, args=(str(run), [str(file) for file in files], threads))
    process.start()
    return process


def train(run: Path, files: Sequence[Path] = (), *, threads: int = 1) -> int:
    """Train `files` in a process of its own to its end; returns its exit status."""
    process = start(run, files, threads=threads)
    process.join()
    return process.exitcode if process.exitcode is not None else -1


def kill_after(process: BaseProcess, seconds: float, number: signal.Signals = signal.SIGKILL) -> bool:
    """Send a signal after a while; returns whether the process was still running."""
    process.join(seconds)
    running = process.is_alive()
    if running and process.pid is not None:
        os.kill(process.pid, number)
    process.join()
    return running
