"""Commands that bring files to a run and train them: `train`, `add`, `watch`, and `check`, which a daemon starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from onward import startup
from onward.cli.options import AgainOption, JsonOption, RunOption
from onward.cli.output import say_stopped, show
from onward.cli.several import DevicesOption, flags, on_devices, place_or_follow
from onward.ranks import start_here
from onward.terminal import say
from onward.text import how_many, printable, quoted

_COUNTS = ("tokens", "truncated", "dropped", "split", "lost_tokens")
"""Counts that are shown for a file's rows and their lengths."""


def train(
    files: Annotated[list[Path] | None, typer.Argument(metavar="FILE", help="Training files, in order.")] = None,
    run: RunOption = Path(),
    again: AgainOption = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="Profile the first steps: a trace for Perfetto and the most expensive operations."
        ),
    ] = False,
    devices: DevicesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add files and train them in order. Without files, train those that are waiting."""
    if devices is not None:
        switches = flags(("--profile", profile), ("--json", as_json), ("--again", again))
        on_devices(devices, ["train", "--run", str(run), *switches, "--", *map(str, files or [])])
    from onward.profiling import StepProfile
    from onward.progress import make_observer
    from onward.run import Run
    from onward.service.wishes import Wishes

    place = place_or_follow(run)
    opened = Run(run, loading=startup.large_imports, place=place, start=start_here())
    stop = Wishes()
    with stop.on_signals(), make_observer(lambda: opened.config.log_steps) as observe:
        steps = StepProfile(opened.layout.profile, observe)
        done = opened.train(*(files or []), again=again, observe=steps if profile else observe, stop=stop, report=say)
    if profile:
        steps.end()
        say(steps.describe())
    if as_json:
        show(done)
    if stop.reason:
        say_stopped(opened, stop.reason, "train")
    elif not done:
        say("nothing left to train: every accepted file is done")


def add(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Training files, in order.")],
    run: RunOption = Path(),
    priority: Annotated[str, typer.Option(help="high, normal or low.")] = "normal",
    again: AgainOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check files and put them in the stream."""
    from onward.lengths import Lengths
    from onward.run import Run

    opened = Run(run, loading=startup.large_imports)
    accepted = opened.add(*files, priority=priority, again=again, report=say)
    max_length = opened.config.max_length
    if as_json:
        show([{key: row[key] for key in ("name", "sha256", "rows", *_COUNTS, "bad_rows", "note")} for row in accepted])
    for row in accepted:
        long = Lengths(row["rows"], **{name: row[name] for name in _COUNTS}).words(max_length)
        note = f"; {printable(row['note'])}" if row["note"] else ""
        say(f"accepted {printable(row['name'])}: {how_many(row['rows'], 'row')}{long}, {row['tokens']} tokens{note}")
    if len(accepted) < len(files):
        count = len(files) - len(accepted)
        say(f"{count} {'was' if count == 1 else 'were'} already in the stream")


def watch(
    run: RunOption = Path(),
    once: Annotated[bool, typer.Option("--once", help="End when inbox and queue are empty.")] = False,
    devices: DevicesOption = None,
) -> None:
    """Train whatever arrives in inbox/, until stopped."""
    if devices is not None:
        on_devices(devices, ["watch", "--run", str(run), *flags(("--once", once))])
    from onward.progress import make_observer
    from onward.run import Run
    from onward.service.wishes import Wishes

    place = place_or_follow(run)
    opened = Run(run, loading=startup.large_imports, place=place)
    stop = Wishes()
    with stop.on_signals(), make_observer(lambda: opened.config.log_steps) as observe:
        say(f"watching {quoted(opened.layout.inbox)}; onward stop --run {quoted(run)} or Ctrl-C commits and ends it")
        refused = opened.watch(once=once, observe=observe, stop=stop, report=say)
    if stop.reason:
        say_stopped(opened, stop.reason, "watch")
    elif once and refused:
        say(f"{refused} refused, quarantined or left in the inbox; the reports are in {quoted(opened.layout.rejected)}")
        raise typer.Exit(3)


def check(run: RunOption = Path()) -> None:
    """Check the rows of files that arrived; a daemon starts this while it trains."""
    from onward.run import Run
    from onward.service.wishes import Wishes

    os.nice(10)
    stop = Wishes()
    with stop.on_signals():
        Run(run, loading=startup.large_imports).check_arrived(stop=stop)
