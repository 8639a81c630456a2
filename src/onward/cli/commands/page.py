"""The command `page`: runs in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onward.cli.options import RunOption
from onward.errors import UsageError
from onward.terminal import flush_results, say, show_line

PORT = 8017


def page(
    directories: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR]...", help="Runs, or folders of runs; by default the run of --run."),
    ] = None,
    run: RunOption = Path(),
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 for any that is free.")] = PORT,
    read_only: Annotated[bool, typer.Option("--read-only", help="For viewing only: no uploads, no buttons.")] = False,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--name", metavar="HOST", help="Another host name of the page, for example behind a proxy. Repeatable."
        ),
    ] = None,
) -> None:
    """Show runs in the browser, live. The link to open is the first line on stdout."""
    try:
        from onward.views.page.serving import Address, serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("starlette", "uvicorn", "sse_starlette", "anyio"):
            raise
        raise UsageError(f"the page needs {error.name}", hint="pip install 'onward[page]'") from None

    def show(link: str) -> None:
        show_line(link)
        flush_results()  # or a pipe would hold it back

    serve(directories or [run], Address(host, port, tuple(names or ())), show, say, read_only=read_only)
