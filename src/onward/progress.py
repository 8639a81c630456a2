"""What the user sees while a run trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator
from typing import Any, TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from onward.errors import ConfigError, Unreadable, printable_lines
from onward.events import Committed, Event, FileDone, FileStarted, Observe, Resumed, StepTaken
from onward.lengths import Lengths
from onward.store.rows import EventRow
from onward.terminal import is_interactive, say, show_line, tolerant
from onward.text import how_many, printable

NAME_WIDTH = 40
"""The most columns of a name in a table."""
NARROW, WIDE = 60, 90
"""Columns that a terminal must have to show the time left, and to show the bar."""
_HISTORY_TITLES = (
    "file", "name", "state", "rows", "trained", "steps", "loss", "learning rate", "handover", "seconds",
)  # fmt: skip
_LEFT = ("name", "state", "handover")


@contextlib.contextmanager
def make_observer(log_steps: Callable[[], int]) -> Generator[Observe]:
    """Yield an observer that shows events on stderr.

    Args:
        log_steps: reads the config; called at each event, since the key takes effect at once.
    """
    if not is_interactive(sys.stderr):
        with contextlib.closing(InOrder(PlainLines(log_steps))) as ordered:
            yield ordered
        return
    console = terminal(sys.stderr)
    bar = Progress(*bar_columns(console.width), console=console)
    with bar as progress, contextlib.closing(InOrder(Bar(progress))) as ordered:
        yield ordered


class _Terminal(Console):
    """A console that leaves the cursor alone: a process that is suspended or killed could not restore it."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


def terminal(stream: TextIO) -> Console:
    """Return a console that prints to a stream and never fails."""
    return _Terminal(file=tolerant(stream))


def bar_columns(width: int) -> list[ProgressColumn]:
    """Return the columns of the bar that fit a terminal of this width."""
    name = Column(no_wrap=True, overflow="ellipsis", max_width=max(8, min(NAME_WIDTH, width - 24)))
    loss = TextColumn("loss {task.fields[loss]:.4f}", table_column=Column(no_wrap=True))
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False, table_column=name)]
    if width >= WIDE:
        columns.append(BarColumn(bar_width=None if width < 2 * WIDE else 40, table_column=Column(min_width=8)))
    columns += [MofNCompleteColumn(), loss]
    if width >= WIDE:
        columns.append(TextColumn("lr {task.fields[rate]:.3g}  {task.fields[speed]:.0f} tokens/s"))
    if width >= NARROW:
        columns.append(TimeRemainingColumn())
    return columns


class InOrder:
    """Passes events on so that the end of a file comes before the beginning of the next one.

    The next file begins while the boundary before it is committed, so its first events come early. They are held back
    until the file before is done.
    """

    def __init__(self, observe: Observe) -> None:
        self._observe = observe
        self._position = 0
        self._ends: int | None = None
        self._held: list[Event] = []

    def __call__(self, event: Event) -> None:
        """Pass an event on, or hold it back."""
        if isinstance(event, FileStarted):
            follows = self._ends is not None and event.position > self._ends and not self._held
            if follows:
                self._held.append(event)
                return
            self.close()  # the previous file will not end: something was started over
        elif isinstance(event, StepTaken) and self._held:
            self._held.append(event)
            return
        self._hand_on(event)
        if isinstance(event, FileDone):
            self.close()

    def close(self) -> None:
        """Pass on what was held back."""
        held, self._held = self._held, []
        self._ends = None
        for event in held:
            self._hand_on(event)

    def _hand_on(self, event: Event) -> None:
        if isinstance(event, FileStarted):
            self._position = event.position
        elif isinstance(event, StepTaken) and event.step_in_file == event.steps_in_file:
            self._ends = self._position
        self._observe(event)


class PlainLines:
    """Prints a line per file begun and done, per note, and per `log_steps` steps."""

    def __init__(self, log_steps: Callable[[], int]) -> None:
        self._read = log_steps
        self._log_steps = 1

    def __call__(self, event: Event) -> None:
        """Print an event."""
        with contextlib.suppress(
            ConfigError, Unreadable
        ):  # the config is broken now: the one read before stays in force
            self._log_steps = self._read()
        text = describe(event, self._log_steps)
        if text:
            say(text)


class Bar:
    """Shows a bar for the current file, with finished files and notes above it."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: Any = None
        self.tasks: dict[int, Any] = {}

    def __call__(self, event: Event) -> None:
        """Draw an event."""
        if isinstance(event, FileStarted):
            title = f"{event.position} {printable(event.name)}"
            self.task = self.tasks[event.position] = self.progress.add_task(
                title, total=event.steps, completed=event.steps_done, loss=float("nan"), rate=0.0, speed=0.0
            )
        elif isinstance(event, StepTaken) and self.task is not None:
            speed = event.tokens / event.seconds
            self.progress.update(
                self.task, completed=event.step_in_file, loss=event.loss, rate=event.learning_rate, speed=speed
            )
        elif isinstance(event, FileDone) and event.position in self.tasks:
            self.progress.remove_task(self.tasks.pop(event.position))  # a bar per finished file would fill the screen
        if not isinstance(event, StepTaken) and (text := describe(event)):
            self.progress.console.print(printable_lines(text), markup=False, highlight=False)


def describe(event: Event, log_steps: int = 1) -> str | None:
    """Return an event as a line, or None if there is nothing to say."""
    if isinstance(event, FileStarted):
        return _describe_start(event)
    if isinstance(event, StepTaken):
        if event.step % log_steps and event.step_in_file != event.steps_in_file:
            return None
        left = (event.steps_in_file - event.step_in_file) * event.seconds
        return (
            f"  step {event.step} ({event.step_in_file}/{event.steps_in_file})  loss {event.loss:.4f}"
            f"  lr {event.learning_rate:.3g}  {event.tokens / event.seconds:.0f} tokens/s  ETA {duration(left)}"
        )
    if isinstance(event, FileDone):
        return f"file {event.position} done: steps {event.first_step}-{event.last_step} committed"
    if isinstance(event, Resumed):
        return (
            f"resuming from {printable(event.checkpoint)}: weights, moments, learning rate {event.learning_rate:.3g},"
            f" step {event.step}"
        )
    if isinstance(event, Committed):
        return _describe_commit(event)
    return event.message


def _describe_start(event: FileStarted) -> str:
    lengths = Lengths(event.rows, event.truncated, event.dropped, event.split, event.tokens, event.lost_tokens)
    long = lengths.words(event.max_length)
    done = f", {event.steps_done} done" if event.steps_done else ""
    long += f", {event.held_out} held out" if event.held_out else ""
    return (
        f"file {event.position}: {printable(event.name)}, {how_many(event.rows, 'row')}{long}, "
        f"{how_many(event.steps, 'step')}{done} (handover {event.handover})"
    )


def _describe_commit(event: Committed) -> str | None:
    """Describe what a commit at a boundary kept and removed; None for the many others and for step 0."""
    if event.restore_point is None or event.step == 0:
        return None
    removed = f"; removed {', '.join(event.removed)}" if event.removed else ""
    kept = "weights, optimizer, scheduler, RNG"
    return f"committed checkpoint-{event.step} ({kept}){removed}; restore point {event.restore_point}"


def duration(seconds: float) -> str:
    """Return a duration in its two largest units."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def size(count: float) -> str:
    """Return a number of bytes in decimal units, with at most three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"


def print_history(entries: list[dict[str, Any]]) -> None:
    """Print the history as a table on stdout, line by line, since a run may have 100,000 files."""
    rows = [_HISTORY_TITLES, *map(_history_cells, entries)]
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(_HISTORY_TITLES))]
    limit = Console().width if is_interactive(sys.stdout) else None
    for row in rows:
        line = "  ".join(
            f"{'' if title in _LEFT else ' ' * (width - cell_len(cell))}{cell}"
            f"{' ' * (width - cell_len(cell)) if title in _LEFT else ''}"
            for title, width, cell in zip(_HISTORY_TITLES, widths, row, strict=True)
        )
        show_line(_cut(line, limit) if limit else line)


def _history_cells(entry: dict[str, Any]) -> tuple[str, ...]:
    return (
        "-" if entry["position"] is None else str(entry["position"]),
        _cut(printable(entry["name"]), NAME_WIDTH),
        entry["state"],
        f"{entry['rows']} ({entry['rows_held_out']} held out)" if entry["rows_held_out"] else str(entry["rows"]),
        f"{entry['rows_trained']} + {again}" if (again := entry["rows_replayed"]) else str(entry["rows_trained"]),
        _range(entry["first_step"], entry["last_step"], "-", "d"),
        _range(entry["first_loss"], entry["last_loss"], " -> ", ".4f"),
        _range(entry["first_learning_rate"], entry["last_learning_rate"], " -> ", ".3g"),
        entry["handover"] or "",
        f"{entry['seconds']:.1f}",
    )


def _cut(text: str, width: int) -> str:
    """Shorten a text to a number of terminal columns."""
    return text if cell_len(text) <= width else f"{set_cell_size(text, width - 1)}…"


def print_status(values: dict[str, Any], events: list[EventRow]) -> None:
    """Print a run's status and what happened last, on stdout."""
    for line in status_lines(values, events):
        show_line(line)


def status_lines(values: dict[str, Any], events: list[EventRow]) -> list[str]:
    """Return a run's status and what happened last as lines, one screen."""
    lines = [f"{title:<18} {printable(text)}" for title, text in _status_texts(values)]
    for event in events:
        at = time.strftime("%m-%d %H:%M:%S", time.localtime(event.created))
        message = " ".join(line.strip() for line in event.message.split("\n"))  # an event is one line of the screen
        lines.append(f"{at}  {event.level:<8}{printable(message)}")
    return lines


def _status_texts(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the title and the text of each value present, in human-readable units."""
    shown: dict[str, tuple[str, Callable[[Any], str]]] = {
        "disk_free_bytes": ("disk free", size),
        "heartbeat_seconds": ("heartbeat", lambda value: f"{duration(value)} ago"),
        "eta_seconds": ("time left", duration),
        "tokens_per_second": ("speed", lambda value: f"{value:.0f} tokens/s"),
    }
    texts: list[tuple[str, str]] = []
    for key, value in values.items():
        if value is not None and (key, value) != ("doing", values.get("state")):
            title, form = shown.get(key, (key.replace("_", " "), _plain))
            texts.append((title, form(value)))
    return texts


def watch_status(read: Callable[[], list[str]], seconds: float) -> None:
    """Show lines on the terminal and refresh them until interrupted."""
    with Live(Text("\n".join(read())), console=terminal(sys.stdout), auto_refresh=False) as live:
        while True:
            live.update(Text("\n".join(read())), refresh=True)
            time.sleep(seconds)


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _range(first: float | None, last: float | None, joint: str, form: str) -> str:
    return "" if first is None or last is None else f"{first:{form}}{joint}{last:{form}}"
