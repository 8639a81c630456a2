"""Commands that go back: `rollback`, `rebuild`, `reset`. They ask first."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from onward import startup
from onward.cli.options import JsonOption, RunOption, YesOption, completer
from onward.cli.output import say_stopped, show
from onward.errors import UsageError
from onward.terminal import say, write
from onward.text import how_many, printable, quoted


def rollback(
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FILE|STEP",
            help="A file (name, position, hash prefix) or a step; file:4 and step:4 say which is meant.",
            autocompletion=completer("done"),
        ),
    ],
    run: RunOption = Path(),
    requeue: Annotated[bool, typer.Option("--requeue", help="Queue the undone files again.")] = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Go back to the boundary after FILE. Later files are marked undone."""
    from onward.run import Run

    opened = Run(run, loading=startup.large_imports)
    ask(f"go back to {printable(to)} and undo every later file of {quoted(opened.layout.root)}?", yes)
    result = opened.rollback(to, requeue=requeue)
    if as_json:
        show(result)
    say(f"back at step {result['global_step']}; undone: {_names(result['undone'])}")


def rebuild(
    without: Annotated[
        str,
        typer.Option(
            "--without",
            metavar="FILE",
            help="A name, a position (4 or file:4) or a hash prefix.",
            autocompletion=completer("training", "done"),
        ),
    ],
    run: RunOption = Path(),
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make the run as if it had never seen FILE.

    The later files are trained again, from the boundary before it.
    """
    from onward.progress import make_observer
    from onward.run import Run
    from onward.service.wishes import Wishes

    opened = Run(run, loading=startup.large_imports)
    question = (
        f"go back to before {printable(without)} and train every later file of {quoted(opened.layout.root)} again?"
    )
    ask(question, yes)
    asked = Wishes()
    with asked.on_signals(), make_observer(lambda: opened.config.log_steps) as observe:
        result = opened.rebuild(without, observe=observe, stop=asked, report=say)
    if as_json:
        show(result)
    if asked.reason:
        say_stopped(opened, asked.reason, "train")
        return
    again = len(result["queued"])
    name = printable(result["without"])
    say(f"without {name}: step {result['global_step']}; trained again: {how_many(again, 'file')}")


def reset(run: RunOption = Path(), yes: YesOption = False, as_json: JsonOption = False) -> None:
    """Forget all progress. The model and its restore points are removed, and every file is marked undone."""
    from onward.run import Run

    opened = Run(run, loading=startup.large_imports)
    ask(f"remove the model and all restore points of {quoted(opened.layout.root)}?", yes)
    result = opened.reset()
    if as_json:
        show(result)
    step = result["global_step"]
    now = f"back at the adopted step {step}" if step else "reset"
    say(f"{now}; undone: {_names(result['undone'])}. The originals stay in archive/")


def ask(question: str, yes: bool) -> None:
    """Ask before something is destroyed. The answer may come from a terminal or, as `yes` gives it, through a pipe.

    Raises:
        UsageError: there is nobody to ask.
        Abort: the answer is not yes.
    """
    if yes:
        return
    write(sys.stderr, f"{question} [y/N]: ")  # `typer.confirm` writes to stdout, too, which is for results
    typed = ""
    with contextlib.suppress(UnicodeDecodeError):
        typed = sys.stdin.readline() if sys.stdin else ""
    if not typed.endswith("\n"):
        write(sys.stderr, "\n")
    if not typed and not (sys.stdin and sys.stdin.isatty()):
        raise UsageError(
            "this destroys state, and there is no terminal on which to ask", hint="Give --yes if you mean it."
        )
    if typed.strip().lower() not in ("y", "yes"):
        raise typer.Abort


def _names(names: list[str]) -> str:
    return ", ".join(map(printable, names)) or "nothing"
