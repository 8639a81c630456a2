"""The application: all commands, in the order in which `onward --help` lists them."""

from __future__ import annotations

from typing import Annotated

import typer

from onward import __version__
from onward.cli.commands.back import rebuild, reset, rollback
from onward.cli.commands.control import pause, resume, skip, stop
from onward.cli.commands.figures import metrics, plot, track
from onward.cli.commands.knowledge import evaluate, grid
from onward.cli.commands.make import adopt, init
from onward.cli.commands.outside import mcp, service
from onward.cli.commands.page import page
from onward.cli.commands.policy import accept, compare, release, releases
from onward.cli.commands.publish import export, push
from onward.cli.commands.show import doctor, history, preview, status, verify
from onward.cli.commands.talk import chat, serve
from onward.cli.commands.train import add, check, train, watch
from onward.terminal import show_line

app = typer.Typer(
    help="Cumulative fine-tuning: files arrive one after another, and every file continues the same run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit status: 0 done, 1 failed, 2 wrong usage or config, 3 a file was rejected, 4 the run is locked, "
    "5 verification failed.",
)
COMMANDS = (
    init, adopt,
    train, add, watch,
    pause, resume, stop, skip, accept,
    preview, status, history, verify, doctor,
    grid, evaluate,
    page, chat, serve, export, push,
    rollback, rebuild, reset,
    release, releases, compare,
    metrics, plot, track,
    service, mcp,
)  # fmt: skip


@app.callback(invoke_without_command=True)
def version(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Answer `--version`."""
    if show_version:
        show_line(f"onward {__version__}")
        raise typer.Exit


for command in COMMANDS:
    app.command()(command)
app.command(hidden=True)(check)
