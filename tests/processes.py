"""Real processes that train, started fast (imports are forked, not repeated) and killed by real signals."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from onward import cli
from onward.errors import OnwardError
from onward.run import Run
from onward.service.wishes import Wishes

_CHOOSING, _POLLING = threading.Lock(), threading.Lock()
"""The second one because a process that starts another one asks of all others whether they have ended, and of two
threads that ask of the same at once, one gets 255 for its exit status."""
COVERAGE, COVERAGE_LATER = "COVERAGE_PROCESS_CONFIG", "ONWARD_TESTS_COVERAGE"
"""The variable by which coverage measures a process from its start on, and what keeps its value for `measured`."""
IMPORTED = ["processes", "onward.service.owner.daemon"]
"""What the process has imported that others are forked from; without a GPU it has also built a model (`preloaded`)."""


def _context() -> Any:
    with _CHOOSING:
        return _chosen()


@cache
def _chosen() -> Any:
    """Return how processes are started: forked from one that imported everything, where such a one can use the GPU."""
    server, has_gpu = multiprocessing.get_context("forkserver"), torch.cuda.is_available()
    server.set_forkserver_preload([*IMPORTED, *([] if has_gpu else ["preloaded"]), "measured"])
    _start_server()
    if not has_gpu:
        return server
    process = server.Process(target=_use_gpu)
    process.start()
    process.join()
    return server if process.exitcode == 0 else multiprocessing.get_context("spawn")


def _use_gpu() -> None:
    torch.zeros(1, device="cuda").tolist()


def _start_server() -> None:
    """Start the process that others are forked from; Python 3.11 hands it no `sys.path` to find this module with."""
    changed = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))),
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # else a process that looked for a GPU could not be forked
        COVERAGE_LATER: os.environ.get(COVERAGE),
        COVERAGE: None,
    }
    given = {name: os.environ.get(name) for name in changed}
    _set(changed)
    try:
        forkserver.ensure_running()
    finally:
        _set(given)


def _set(variables: Mapping[str, str | None]) -> None:
    """Set variables of the environment; None removes one."""
    for name, value in variables.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _started(process: Any) -> BaseProcess:
    with _POLLING:
        process.start()
    return process


def ended(process: BaseProcess) -> int | None:
    """Wait for a process, in any thread; returns its exit status, negative for a signal."""
    wait([process.sentinel])
    with _POLLING:
        process.join()
    return process.exitcode


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
    return _started(_context().Process(target=_command, args=([str(word) for word in arguments], str(output), prepare)))


def command(output: Path, *arguments: object, prepare: Callable[[], None] = as_it_is) -> int | None:
    """Run the command line in a process of its own to its end; returns its exit status, negative for a signal."""
    return ended(start_command(output, *arguments, prepare=prepare))


def start_apart(function: Callable[..., None], *arguments: object) -> BaseProcess:
    """Call a function in a process of its own."""
    return _started(_context().Process(target=function, args=arguments))


def apart(function: Callable[..., None], *arguments: object) -> int | None:
    """Call a function in a process of its own to its end; returns its exit status."""
    return ended(start_apart(function, *arguments))


def apart_with(function: Callable[..., None], *arguments: object) -> None:
    """Call a function in a process of its own, which ends with this one."""
    _started(_context().Process(target=function, args=arguments, daemon=True))


def start(run: Path, files: Sequence[Path] = (), *, threads: int = 1) -> BaseProcess:
    """Start a process that trains `files` in a run; its exit code is the command line's exit status."""
    return _started(_context().Process(target=_train, args=(str(run), [str(file) for file in files], threads)))


def train(run: Path, files: Sequence[Path] = (), *, threads: int = 1) -> int:
    """Train `files` in a process of its own to its end; returns its exit status."""
    status = ended(start(run, files, threads=threads))
    return -1 if status is None else status


def kill_after(process: BaseProcess, seconds: float, number: signal.Signals = signal.SIGKILL) -> bool:
    """Send a signal after a while; returns whether the process was still running."""
    process.join(seconds)
    running = process.is_alive()
    if running and process.pid is not None:
        os.kill(process.pid, number)
    process.join()
    return running


def open_descriptors() -> int:
    """Return how many files, folders and the like this process has open, but for what is garbage."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))
