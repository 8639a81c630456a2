"""Output that several commands share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from onward.terminal import say, show_line
from onward.text import finite, quoted

if TYPE_CHECKING:
    from onward.run import Run


def show(value: Any) -> None:
    """Print a result as JSON; a number that is not finite is null."""
    show_line(json.dumps(finite(value), indent=2, ensure_ascii=False))


def show_each(values: Iterable[Any]) -> None:
    """Print a result as a JSON list, one value per line and never all in memory; odd characters are escaped."""
    before = "["
    for value in values:
        text = json.dumps(value, ensure_ascii=False)
        show_line(before)
        before = f"  {text if text.isprintable() else json.dumps(value)},"
    show_line("[]" if before == "[" else f"{before[:-1]}\n]")


def say_stopped(run: Run, reason: str, command: str) -> None:
    """Print that a command ended because of a stop, what is committed by now, and which command continues."""
    checkpoint = run.status()["checkpoint"]
    committed = f"{checkpoint} is committed" if checkpoint else "nothing has been committed yet"
    say(f"stopped ({reason}); {committed}; onward {command} --run {quoted(run.layout.root)} goes on")
