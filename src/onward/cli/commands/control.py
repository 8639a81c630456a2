"""Commands to the process that trains: `pause`, `resume`, `stop`, `skip`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onward.cli.options import JsonOption, RunOption, completer
from onward.cli.output import show
from onward.terminal import say


def pause(
    run: RunOption = Path(),
    release: Annotated[bool, typer.Option("--release", help="Free the model's memory while it is paused.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Finish the current step, commit and wait."""
    from onward.run import Run

    answer(Run(run).pause(release=release), as_json)


def resume(run: RunOption = Path(), as_json: JsonOption = False) -> None:
    """Go on after a pause."""
    from onward.run import Run

    answer(Run(run).resume(), as_json)


def stop(
    run: RunOption = Path(),
    after_file: Annotated[bool, typer.Option("--after-file", help="Finish the current file first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Commit and end the process that trains. The next start continues in the same file."""
    from onward.run import Run

    answer(Run(run).stop(after_file=after_file), as_json)


def skip(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]",
            help="A name, a position (4 or file:4) or a hash prefix; without it, the file in training.",
            autocompletion=completer("arriving", "queued", "training"),
        ),
    ] = None,
    run: RunOption = Path(),
    reason: Annotated[str | None, typer.Option("--reason", help="Kept in the ledger.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Take a file out of the stream. The run is as if it had never begun it."""
    from onward.run import Run

    answer(Run(run).skip(file, reason=reason), as_json)


def answer(text: str, as_json: bool) -> None:
    """Print the answer to a control command."""
    if as_json:
        show({"answer": text})
    else:
        say(text)
