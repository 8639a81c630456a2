"""The page of the command line."""

from __future__ import annotations

from typing import Any

import typer
from typer.main import get_command

from made_pages.words import NOTE
from onward import cli

HELP_WIDTH = 100

CLI_HEAD = """\
Results go to stdout, messages for people to stderr.

FILE in a control command is a name, a position or a prefix of the SHA-256. Write `file:4` or `step:4` where a number
could mean either.

`onward --install-completion` makes your shell complete commands, options and, for `skip`, `rollback` and `rebuild`, the
names of the run's files."""


def cli_page() -> str:
    """Return the text of cli.md."""
    group: Any = get_command(cli.app)
    lines = [NOTE, "", "# Command line", "", CLI_HEAD, ""]
    lines += ["```text", _help(group, typer.Context(group, info_name="onward")), "```", ""]
    for name, command in group.commands.items():
        context = typer.Context(command, info_name=f"onward {name}")
        lines += [f"## onward {name}", "", "```text", _help(command, context), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _help(command: Any, context: Any) -> str:
    context.terminal_width = context.max_content_width = HELP_WIDTH
    lines = (line.rstrip() for line in command.get_help(context).splitlines())
    return "\n".join(lines).strip("\n")
