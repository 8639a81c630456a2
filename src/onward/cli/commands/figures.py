"""Commands that output or pass on the figures of the steps: `metrics`, `plot`, `track`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Generator
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import IO, Annotated, BinaryIO

import typer

from onward import startup
from onward.cli.options import JsonOption, RunOption
from onward.cli.output import show
from onward.errors import UsageError, cannot_write
from onward.layout import RunLayout
from onward.terminal import reader_may_leave, say

LOWEST_PRIORITY = 19


def metrics(
    run: RunOption = Path(),
    every: Annotated[
        int, typer.Option(min=1, metavar="N", help="Keep one step in N, those of lowest and highest loss.")
    ] = 1,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV (the default).")] = False,
    as_json: JsonOption = False,
    as_parquet: Annotated[bool, typer.Option("--parquet", help="Write a Parquet file; needs onward[parquet].")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write there.", show_default="stdout")
    ] = None,
) -> None:
    """Print the steps of all files: loss, learning rate, tokens, time."""
    from onward.views import figures

    if as_csv + as_json + as_parquet > 1:
        raise UsageError("only one format can be given", where="--csv, --json, --parquet")
    rows = figures.steps(RunLayout(run), every)
    rows = chain(list(islice(rows, 1)), rows)  # a ledger that cannot be read leaves an earlier FILE as it is
    if as_parquet:
        if output is None and sys.stdout.isatty():
            raise UsageError(
                "a Parquet file cannot be shown on a terminal", hint="onward metrics --parquet -o steps.parquet"
            )
        write = figures.parquet_writer()  # without pyarrow, an earlier FILE stays as it is
        with _binary(output) as stream:
            write(rows, stream)
        return
    with _text(output) as stream:
        (figures.write_json if as_json else figures.write_csv)(rows, stream)


def plot(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The picture to write; its name ends with .svg, .png or .pdf.")
    ],
    run: RunOption = Path(),
) -> None:
    """Draw the curve of all files as a picture.

    The boundaries between them are marked. This needs onward[plot].
    """
    from onward.text import how_many, quoted
    from onward.views.plot import plot

    count, is_whole = plot(RunLayout(run), file)
    say(f"{how_many(count, 'step')} drawn into {quoted(file)}")
    if not is_whole:
        say("some names have characters that the font lacks, and are drawn with boxes; .svg keeps them as text")


@contextlib.contextmanager
def _text(output: Path | None) -> Generator[IO[str]]:
    """Yield the stream that a text result is written to."""
    if output is None:
        with reader_may_leave():
            yield sys.stdout
        return
    with _opened(output) as stream, TextIOWrapper(stream, encoding="utf-8", newline="") as text:
        yield text


@contextlib.contextmanager
def _binary(output: Path | None) -> Generator[IO[bytes]]:
    """Yield the stream that a binary result is written to."""
    if output is None:
        with reader_may_leave():
            yield sys.stdout.buffer
        return
    with _opened(output) as stream:
        yield stream


def _opened(output: Path) -> BinaryIO:
    try:
        return output.open("wb")
    except OSError as error:
        raise cannot_write(error, output) from None


def track(
    run: RunOption = Path(),
    keep_telling: Annotated[
        bool,
        typer.Option("--follow", help="Keep going until standard input ends; a daemon starts this while it trains."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Send the run's trackers what they lack. Use it after an outage, or from another machine."""
    from onward.config.text import read_config

    layout = RunLayout(run)
    layout.require()
    names = read_config(layout.config).track
    if not names and not keep_telling:
        hint = "For instance: track: [tensorboard]. docs/trackers.md lists the others."
        raise UsageError("the config names no tracker", where=layout.config, hint=hint)
    startup.set_tracker_environment(layout.trackers)
    from onward.views.trackers.telling import follow, tell_once

    if keep_telling:
        os.nice(LOWEST_PRIORITY)
        follow(layout, _end_of_input())
        sys.stdout.flush()
        os._exit(0)  # a tracker that hangs must not keep the process alive
    with contextlib.redirect_stdout(sys.stderr):  # the trackers' libraries print to stdout
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
        say(f"{name}: {problem}" if problem else f"{name}: sent up to step {step}")


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
