"""What the user sees while a run trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from onward.errors import ConfigError, Unreadable, printable_lines
from onward.events import Committed, Event, FileDone, FileStarted, Observe, Resumed, StepTaken
from onward.lengths import Lengths
from onward.terminal import is_interactive, say, tolerant
from onward.text import duration, how_many, printable

NAME_WIDTH = 40
"""The most columns of the name of a file."""
NARROW, WIDE = 60, 90
"""Columns that a terminal must have to show the time left, and to show the bar."""


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
    loss = TextColumn("{task.fields[loss]}", table_column=Column(no_wrap=True))
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False, table_column=name)]
    if width >= WIDE:
        columns.append(BarColumn(bar_width=None if width < 2 * WIDE else 40, table_column=Column(min_width=8)))
    columns += [MofNCompleteColumn(), loss]
    if width >= WIDE:
        columns.append(TextColumn("{task.fields[pace]}"))
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
            self.task = self.progress.add_task(title, total=event.steps, completed=event.steps_done, loss="", pace="")
            self.tasks[event.position] = self.task
        elif isinstance(event, StepTaken) and self.task is not None:
            pace = f"lr {event.learning_rate:.3g}  {event.tokens / event.seconds:.0f} tokens/s"
            self.progress.update(self.task, completed=event.step_in_file, loss=f"loss {event.loss:.4f}", pace=pace)
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
