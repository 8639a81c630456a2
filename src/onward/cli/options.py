"""Options and arguments that several commands take."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from onward.errors import OnwardError
from onward.layout import RunLayout
from onward.text import quoted

RunOption = Annotated[
    Path, typer.Option("--run", envvar="ONWARD_RUN", help="The run's directory.", show_default="current directory")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a config key: lora.rank=8. Repeatable.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Hugging Face name, path, or smollm2-135m.")]
AdapterOption = Annotated[
    Path | None,
    typer.Option("--adapter", metavar="FOLDER", help="Start from the weights of a PEFT LoRA adapter (fresh moments)."),
]
AgainOption = Annotated[bool, typer.Option("--again", help="Accept content that the stream already has.")]


def completer(*states: str) -> Callable[[typer.Context, str], list[str]]:
    """Return a completer of FILE: the names of the run's files in these states that need no quoting in a shell."""

    def complete(context: typer.Context, incomplete: str) -> list[str]:
        from onward.store.ledger import Ledger

        run = Path(context.params.get("run") or os.environ.get("ONWARD_RUN") or ".")
        try:
            with Ledger(RunLayout(run).ledger, read_only=True) as ledger:
                names = [row.name for row in ledger.files(*states)]
        except (OnwardError, sqlite3.Error, OSError):
            return []
        return [name for name in names if name.startswith(incomplete) and quoted(name) == name]

    return complete


AtOption = Annotated[
    str | None,
    typer.Option(
        "--at",
        metavar="FILE|STEP|RELEASE",
        help="A file (name, position, hash prefix), a step or a release; file:4 and step:4 say which is meant.",
        show_default="the newest commit",
        autocompletion=completer("done"),
    ),
]
