"""Commands for other programs: `service` prints files for systemd and schedulers, `mcp` answers an assistant."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from onward import startup
from onward.cli.options import RunOption
from onward.errors import UsageError
from onward.layout import RunLayout
from onward.terminal import say, show_line
from onward.text import printable

if TYPE_CHECKING:
    from onward.service.outside.elastic import Devices


def mcp(run: RunOption = Path()) -> None:
    """Answer an assistant over the Model Context Protocol.

    It speaks on standard input and output. This needs onward[mcp].
    """
    from onward.run import Run

    opened = Run(run, loading=startup.large_imports)
    try:
        from onward.views.assistant import serve
    except ImportError:
        raise UsageError("the Model Context Protocol needs mcp", hint="pip install 'onward[mcp]'") from None
    for number in startup.ENDINGS:
        if callable(signal.getsignal(number)):
            signal.signal(number, _end)
    serve(opened)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    """End at once: a thread is waiting for standard input, and no exception interrupts that."""
    say(f"ended by {signal.Signals(number).name}; what was committed is safe")
    os._exit(1)


def service(
    run: RunOption = Path(),
    scheduler: Annotated[
        str, typer.Option("--for", metavar="NAME", help="systemd, slurm, ray, skypilot or kubernetes.")
    ] = "systemd",
    devices: Annotated[
        str, typer.Option(metavar="N|A:B", help="GPUs per node, or from A to B, as many as there are.")
    ] = "1",
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes, for Slurm.")] = 1,
    cpu: Annotated[
        bool | None, typer.Option("--cpu/--gpu", help="The kind of device; by default that of the last commit.")
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The user who runs it under systemd; by default you or, for root, the owner of the run's directory.",
        ),
    ] = None,
) -> None:
    """Print a systemd unit or a scheduler's file to start the run."""
    from onward.service.outside.launch.formats import SCHEDULERS
    from onward.service.outside.launch.job import describe, read_asked, require_parts

    layout = RunLayout(run)
    layout.require()
    asked = read_asked(devices)
    require_parts(layout, asked, nodes)
    if scheduler == "systemd":
        if nodes > 1:
            raise UsageError(
                "a systemd unit starts one machine only", where="--nodes", hint="onward service --for slurm"
            )
        show_line(_unit(layout, user, asked, on_cpu=bool(cpu)).rstrip("\n"))
        return
    if scheduler not in SCHEDULERS:
        hint = f"One of systemd, {', '.join(SCHEDULERS)}."
        raise UsageError(f"no such scheduler: {printable(scheduler)}", where="--for", hint=hint)
    if user is not None:
        raise UsageError(
            "--user applies only to systemd", where="--user", hint="Schedulers run a job as the user who submits it."
        )
    show_line(SCHEDULERS[scheduler](describe(layout, asked, nodes, on_cpu=cpu)).rstrip("\n"))


def _unit(layout: RunLayout, user: str | None, devices: Devices, *, on_cpu: bool) -> str:
    from onward.service.outside.launch.job import as_asked, threads_of
    from onward.service.outside.unit import Host, systemd_unit

    host = Host.here()
    threads = threads_of(layout, host)
    return systemd_unit(layout.root, user, host, devices=as_asked(devices), on_cpu=on_cpu, threads=threads)
