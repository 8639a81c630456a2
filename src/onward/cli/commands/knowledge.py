"""Commands about what the model knows: `grid`, `evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from onward import startup
from onward.cli.options import JsonOption, RunOption
from onward.cli.output import show
from onward.errors import UsageError, cannot_write
from onward.layout import RunLayout
from onward.terminal import is_interactive, say, show_line
from onward.text import quoted


def grid(
    run: RunOption = Path(),
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the losses as CSV.")] = False,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Write a heat map.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what the model knows, file by file, after each file.

    Loss, forgetting, transfer, distance from the base.
    """
    from onward.status import read_grid
    from onward.views.grid import grid_csv, grid_lines, grid_svg

    if as_csv and as_json:
        raise UsageError("only one format can be given", where="--csv, --json")
    found = read_grid(RunLayout(run))
    if svg is not None:
        try:
            svg.write_text(grid_svg(found), encoding="utf-8")
        except OSError as error:
            raise cannot_write(error, svg) from None
        say(f"wrote {quoted(svg)}")
    if as_json:
        show(found)
    elif as_csv:
        show_line(grid_csv(found).rstrip("\n"))
    elif svg is None:
        from rich.console import Console

        width = Console().width if is_interactive(sys.stdout) else None
        for line in grid_lines(found, width):
            show_line(line)


def evaluate(
    run: RunOption = Path(),
    at: Annotated[
        str | None,
        typer.Option(
            "--at", metavar="STEP|FILE", help="A boundary whose restore point is kept.", show_default="the last commit"
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks", metavar="NAME", help="Tasks of lm-evaluation-harness, separated by commas. Repeatable."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of questions per task.", show_default="all")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a kept state on all files, or on public tasks.

    The anchor and evaluation.files are measured too. Nothing is recorded.
    """
    with startup.large_imports():
        from onward.views.evaluate import lines_of, measure, measure_tasks

    layout = RunLayout(run)
    names = [name for text in tasks or () for name in text.split(",") if name]
    found = measure_tasks(layout, at, names, limit, say) if names else measure(layout, at, say)
    if as_json:
        show(found)
    else:
        for line in lines_of(found):
            show_line(line)
