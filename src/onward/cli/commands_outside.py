"""Commands for other programs on this machine: `service` prints a systemd unit, `mcp` answers an assistant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onward import startup
from onward.cli.options import RunOption
from onward.errors import UsageError
from onward.layout import RunLayout
from onward.terminal import show_line


def mcp(run: RunOption = Path()) -> None:
    """Answer an assistant over the Model Context Protocol, on standard input and output; needs onward[mcp]."""
    from onward.run import Run

    opened = Run(run, loading=startup.large_imports)
    try:
        from onward.views.assistant import serve
    except ImportError:
        raise UsageError("the Model Context Protocol needs mcp", hint="pip install 'onward[mcp]'") from None
    serve(opened)


def service(
    run: RunOption = Path(),
    user: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Who runs it; by default you or, for root, the owner of the run's directory."
        ),
    ] = None,
) -> None:
    """Print a systemd unit that watches this run."""
    from onward.service.outside.unit import systemd_unit

    layout = RunLayout(run)
    layout.require()
    show_line(systemd_unit(layout.root, user).rstrip("\n"))
