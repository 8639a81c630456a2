"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Generator
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from onward.events import Event, FileDone, FileStarted, Note, Observe, StepTaken
from onward.store.rows import EventRow

NAME_WIDTH = 40
"""Columns of a name in a table at most."""
_HISTORY_TITLES = (
    "file", "name", "state", "rows", "trained", "steps", "loss", "learning rate", "handover", "seconds",
)  # fmt: skip
_LEFT = ("name", "state", "handover")


@contextlib.contextmanager
def make_observer(log_steps: Callable[[], int]) -> Generator[Observe]:
    """Yield an observer that shows events on stderr.

    Args:
        log_steps: reads the config; called at the first event, when the run is owned and the config was found sound.
    """
    if not sys.stderr.isatty():
        yield PlainLines(log_steps)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  lr {task.fields[rate]:.3g}  {task.fields[speed]:.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bar(progress)


class PlainLines:
    """A line per file begun and done, per note, and per `log_steps` steps."""

    def __init__(self, log_steps: Callable[[], int]) -> None:
        self.log_steps = functools.cache(log_steps)

    def __call__(self, event: Event) -> None:
        """Print an event."""
        text = describe(event, self.log_steps())
        if text:
            print(text, file=sys.stderr, flush=True)


class Bar:
    """A bar for the file in hand; finished files and notes above it."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: Any = None
        self.tasks: dict[int, Any] = {}

    def __call__(self, event: Event) -> None:
        """Draw an event."""

        if isinstance(event, FileStarted):
            title = f"{event.position} {event.name}"
            self.task = self.tasks[event.position] = self.progress.add_task(
                title, total=event.steps, completed=event.steps_done, loss=float("nan"), rate=0.0, speed=0.0
            )
        elif isinstance(event, StepTaken):
            speed = event.tokens / event.seconds
            self.progress.update(
                self.task, completed=event.step_in_file, loss=event.loss, rate=event.learning_rate, speed=speed
            )
        elif isinstance(event, FileDone) and event.position in self.tasks:
            self.progress.remove_task(self.tasks.pop(event.position))  # a bar per finished file would fill the screen
        if isinstance(event, FileStarted | FileDone | Note):
            self.progress.console.print(describe(event), markup=False)


def describe(event: Event, log_steps: int = 1) -> str | None:
    """Return an event as a line, or None where there is nothing to say."""

    if isinstance(event, FileStarted):
        done = f", {event.steps_done} done" if event.steps_done else ""
        return (
            f"file {event.position}: {event.name}, {event.rows} rows{over_length(event.truncated, event.dropped)},"
            f" {event.steps} steps{done} (handover {event.handover})"
        )
    if isinstance(event, StepTaken):
        if event.step % log_steps and event.step_in_file != event.steps_in_file:
            return None
        left = (event.steps_in_file - event.step_in_file) * event.seconds
        return (
            f"  step {event.step} ({event.step_in_file}/{event.steps_in_file})  loss {event.loss:.4f}"
            f"  lr {event.learning_rate:.3g}  {event.tokens / event.seconds:.0f} tokens/s  ETA {left:.0f} s"
        )
    if isinstance(event, FileDone):
        return f"file {event.position} done: steps {event.first_step}-{event.last_step} committed"
    return event.message if isinstance(event, Note) else None


def over_length(truncated: int, dropped: int) -> str:
    """Say what became of rows longer than `max_length`; empty where there were none."""
    counts = [f"{count} {word}" for count, word in ((truncated, "cut"), (dropped, "dropped")) if count]
    return f" ({' and '.join(counts)} for length)" if counts else ""


def print_history(entries: list[dict[str, Any]]) -> None:
    """Print the history as a table on stdout; written line by line, since a run may have 100,000 files."""
    rows = [_HISTORY_TITLES, *map(_history_cells, entries)]
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(_HISTORY_TITLES))]
    limit = Console().width if sys.stdout.isatty() else None
    for row in rows:
        line = "  ".join(
            f"{'' if title in _LEFT else ' ' * (width - cell_len(cell))}{cell}"
            f"{' ' * (width - cell_len(cell)) if title in _LEFT else ''}"
            for title, width, cell in zip(_HISTORY_TITLES, widths, row, strict=True)
        )
        print(_cut(line, limit) if limit else line)


def _history_cells(entry: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(entry["position"]),
        _cut(entry["name"], NAME_WIDTH),
        entry["state"],
        str(entry["rows"]),
        str(entry["rows_trained"]),
        _range(entry["first_step"], entry["last_step"], "-", "d"),
        _range(entry["first_loss"], entry["last_loss"], " -> ", ".4f"),
        _range(entry["first_learning_rate"], entry["last_learning_rate"], " -> ", ".3g"),
        entry["handover"] or "",
        f"{entry['seconds']:.1f}",
    )


def _cut(text: str, width: int) -> str:
    """Shorten a text to a number of columns of the terminal."""
    return text if cell_len(text) <= width else f"{set_cell_size(text, width - 1)}…"


def print_status(values: dict[str, Any], events: list[EventRow]) -> None:
    """Print a run's status and what happened last, on stdout."""
    for line in status_lines(values, events):
        print(line)


def status_lines(values: dict[str, Any], events: list[EventRow]) -> list[str]:
    """Return a run's status and what happened last as lines, one screen."""
    lines = [f"{key.replace('_', ' '):<18} {_plain(value)}" for key, value in values.items() if value is not None]
    for event in events:
        at = time.strftime("%m-%d %H:%M:%S", time.localtime(event.created))
        lines.append(f"{at}  {event.level:<8}{event.message}")
    return lines


def watch_status(read: Callable[[], list[str]], seconds: float) -> None:
    """Show lines on the terminal and refresh them until interrupted."""
    with Live(Text("\n".join(read())), console=Console(), auto_refresh=False) as live:
        while True:
            live.update(Text("\n".join(read())), refresh=True)
            time.sleep(seconds)


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _range(first: float | None, last: float | None, joint: str, form: str) -> str:
    return "" if first is None or last is None else f"{first:{form}}{joint}{last:{form}}"
