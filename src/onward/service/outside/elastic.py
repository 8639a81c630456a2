"""Runs a command on several devices of this machine: torch's elastic agent starts and supervises a process for each.

It is the agent that torchrun starts; this adds the choice of devices, signals that let the run commit first, and
continuing on the devices that are left.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields
from multiprocessing import forkserver, resource_tracker
from types import FrameType
from typing import Any

from onward.errors import UsageError
from onward.ranks import LOST
from onward.service.wishes import STOP_SIGNALS
from onward.text import how_many

MOST = 1024
"""The most processes that are started: more fill any machine before they can be told that a step has fewer parts."""
GRACE = 5.0
"""Seconds that the last processes have to end once the others have ended."""
PRELOADED = (
    "onward.service.outside.preloaded",
    "onward.service.owner.daemon", "onward.service.owner.leading", "onward.service.owner.follower",
)  # fmt: skip
"""Modules that every process needs, imported once before they are forked."""
FORKS, IMPORTS = "forkserver", "spawn"
"""How processes are started: forked from one that imported everything, or each imports by itself."""

Command = Callable[[Sequence[str], int], int]
"""Takes a command line to run in a process of its own, and how often it was started before; returns its exit status."""


@dataclass(frozen=True)
class Devices:
    """How many devices a command uses: between `least` and `most`, fewer once one was lost."""

    least: int
    most: int


def read_devices(text: str, there: Callable[[], int | None]) -> Devices:
    """Return what `--devices N|all|A:B` means here.

    Args:
        there: counts the GPUs of this machine; None if training runs on the CPU.

    Raises:
        UsageError: it is none of these, or there are not that many devices.
    """
    count = there()
    if text == "all":
        return Devices(count or 1, count or 1)
    first, _, last = text.partition(":")
    try:
        devices = Devices(int(first), int(last) if last else int(first))
    except ValueError:
        raise _wrong(f"{text!r} is not a number of devices") from None
    if not 1 <= devices.least <= devices.most:
        raise _wrong(f"{text!r} is not a number of devices, 1 or more" if devices.least < 1 else f"{text!r} goes down")
    if count is None and devices.most > MOST:
        raise _wrong(f"one machine starts at most {MOST:,} processes, not {devices.most}")
    if count is not None and devices.least > count:
        raise _wrong(f"this machine has {how_many(count, 'GPU')}, not {devices.least}")
    return devices if count is None else Devices(devices.least, min(devices.most, count))


def count_gpus() -> int | None:
    """Return the number of GPUs here; None if there are none."""
    import torch

    return torch.cuda.device_count() or None


def run_on(devices: Devices, command: Command, words: Sequence[str], say: Callable[[str], None]) -> int:
    """Run a command on devices to its end; return its exit status.

    Args:
        command: what each process does; it has torchrun's variables in its environment.
        words: its arguments, which stay the same if fewer processes continue.
        say: shows a line to the user.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // devices.most)))
    os.environ["PYTHONSAFEPATH"] = "1"  # a run's directory holds other people's files: import nothing from it
    multiprocessing.set_forkserver_preload(list(PRELOADED))
    _start_server()
    name, method = uuid.uuid4().hex, FORKS if count_gpus() is None else start_method(_use_gpus)
    with tempfile.TemporaryDirectory(prefix="onward-") as folder, _passing_on() as stopped:
        for starts, count in enumerate(range(devices.most, devices.least - 1, -1)):
            end = _run_once(_config((name, method), count, folder), command, words, starts)
            if isinstance(end, int):
                return end
            if stopped:
                say(f"{end.words} after {stopped[0]}; what was committed is safe")
                break
            left = f"{count - 1} device{'s go' if count > 2 else ' goes'} on from the last commit"
            say(f"{end.words}; {left if count > devices.least else 'too few are left to go on'}")
    return 1


@dataclass(frozen=True)
class _Loss:
    """A process that is gone, in words."""

    words: str


def _run_once(config: Any, command: Command, words: Sequence[str], starts: int) -> int | _Loss:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    for library in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # they report every start and end
    with _ending_the_rest():
        try:
            return int(elastic_launch(config, _listening)(command, words, starts)[0])
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode == LOST:
                return _Loss(f"a process was lost, and the {config.nproc_per_node} of the group have ended")
            if failure.exitcode < 0:
                return _Loss(f"rank {rank} (pid {failure.pid}) was ended by {failure.signal_name()}")
            return 1


def _start_server() -> None:
    """Start the process that forks the others. It reports how they end, so it must outlive a signal to the group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        for server in (resource_tracker, forkserver):
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the tracker's start unblocks some
            server.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_method(use: Callable[[], None]) -> str:
    """Return how processes are started: forked, if one that is forked can do something, else each by itself.

    The one that they are forked from may have begun to use CUDA: bitsandbytes does so when PEFT imports it.
    """
    process = multiprocessing.get_context(FORKS).Process(target=use)
    process.start()
    process.join()
    return IMPORTS if process.exitcode else FORKS


def _use_gpus() -> None:
    """Begin to use CUDA in this process; it ends with another status than 0 if that is not possible."""
    import torch

    try:
        torch.cuda.init()
    except Exception:  # PyTorch has several for this
        raise SystemExit(1) from None


def _listening(command: Command, words: Sequence[str], starts: int) -> int:
    """Carry out a command in a process that may have been forked with its signals blocked."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    return command(words, starts)


def _config(group: tuple[str, str], count: int, folder: str) -> Any:
    """Return the agent's settings for a group with a name, whose processes are started in one of two ways."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    known = {field.name for field in fields(LaunchConfig)}
    later: dict[str, Any] = {"signals_to_handle": "SIGQUIT"}  # others are passed on, so that the run commits first
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=group[0],
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        start_method=group[1],
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        **{name: value for name, value in later.items() if name in known},
    )


@contextlib.contextmanager
def _passing_on() -> Generator[list[str]]:
    """Pass signals on to the processes, of which rank 0 commits and ends and the others follow; yield their names."""
    passed: list[str] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        passed.append(signal.Signals(number).name)
        number = signal.SIGTERM if number == signal.SIGINT else number  # a terminal sends Ctrl-C to all of them
        for process in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)

    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup's SIGHUP
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        yield passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _ending_the_rest() -> Generator[None]:
    """Kill what is left some time after rank 0 ended because of a lost rank: SIGTERM does not end a frozen process."""
    over = threading.Event()

    def look() -> None:
        known: dict[str, Any] = {}
        while not over.wait(0.2):
            known |= {process.name: process for process in multiprocessing.active_children()}
            ranks = [known[name] for name in sorted(known, key=lambda name: int(name.rpartition("-")[2]))]
            ended = [process.exitcode is not None for process in ranks]
            if any(process.exitcode == LOST for process in ranks) and (ended[0] or all(ended[1:])):
                over.wait(GRACE)
                for process in ranks:
                    if process.exitcode is None:
                        process.kill()
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _wrong(what: str) -> UsageError:
    hint = "--devices 4 takes four, --devices all takes all, --devices 2:8 from two to eight."
    return UsageError(what, where="--devices", hint=hint)
