"""Commands that hand on what the steps gave: `metrics`, `plot`, `track`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from onward import startup
from onward.cli.options import JsonOption, RunOption
from onward.cli.output import show
from onward.errors import UsageError
from onward.layout import RunLayout
from onward.terminal import say

LOWEST_PRIORITY = 19


def track(
    run: RunOption = Path(),
    keep_telling: Annotated[
        bool, typer.Option("--follow", help="Go on until standard input ends; a daemon starts this while it trains.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Tell the trackers of the run what they lack: after an outage, or on another machine."""
    from onward.config_text import read_config

    layout = RunLayout(run)
    layout.require()
    names = read_config(layout.config).track
    if not names and not keep_telling:
        hint = "For instance: track: [tensorboard]. docs/trackers.md has the others."
        raise UsageError("the config names no tracker", where=layout.config, hint=hint)
    startup.set_tracker_environment(layout.trackers)
    from onward.views.trackers.telling import follow, tell_once

    if keep_telling:
        os.nice(LOWEST_PRIORITY)
        follow(layout, _end_of_input())
        sys.stdout.flush()
        os._exit(0)  # a tracker that hangs must not keep the process
    with contextlib.redirect_stdout(sys.stderr):  # their libraries talk
        results = tell_once(layout, names)
    _show_told(layout, results, as_json)
    if any(results.values()):
        raise typer.Exit(1)


def _show_told(layout: RunLayout, results: dict[str, str | None], as_json: bool) -> None:
    from onward.store.ledger import Ledger

    with Ledger(layout.ledger, read_only=True) as ledger:
        rows = {row.name: row for row in ledger.trackers()}
    if as_json:
        show(
            [
                {"tracker": name, "id": rows[name].run_id, "step": max(rows[name].step, 0), "problem": problem}
                if name in rows
                else {"tracker": name, "id": None, "step": 0, "problem": problem}
                for name, problem in results.items()
            ]
        )
        return
    for name, problem in results.items():
        step = max(rows[name].step, 0) if name in rows else 0
        say(f"{name}: {problem}" if problem else f"{name}: told up to step {step}")


def _end_of_input() -> threading.Event:
    """Return an event that is set when standard input ends, or when the process is asked to end."""
    ended = threading.Event()

    def read() -> None:
        with contextlib.suppress(OSError, ValueError):
            while sys.stdin.buffer.read(1):
                pass
        ended.set()

    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    threading.Thread(target=read, daemon=True).start()
    return ended
