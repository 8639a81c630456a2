"""Status and history as a person reads them on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.live import Live
from rich.text import Text

from onward.progress import NAME_WIDTH, terminal
from onward.store.rows import EventRow
from onward.terminal import is_interactive, show_line
from onward.text import duration, printable, size

_TITLES = (
    "file", "name", "state", "rows", "trained", "steps", "loss", "learning rate", "handover", "seconds",
)  # fmt: skip
_LEFT = ("name", "state", "handover")


def print_history(entries: list[dict[str, Any]]) -> None:
    """Print the history as a table on stdout, line by line, since a run may have 100,000 files."""
    rows = [_TITLES, *map(_history_cells, entries)]
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(_TITLES))]
    limit = Console().width if is_interactive(sys.stdout) else None
    for row in rows:
        line = "  ".join(
            f"{'' if title in _LEFT else ' ' * (width - cell_len(cell))}{cell}"
            f"{' ' * (width - cell_len(cell)) if title in _LEFT else ''}"
            for title, width, cell in zip(_TITLES, widths, row, strict=True)
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
    left_out = {"hangs"}  # the problem says it in words
    if values.get("file") is None:
        left_out |= {"file_step", "file_steps"}
    if not values.get("lost_tokens"):
        left_out.add("lost_tokens")
    for key, value in values.items():
        if key in left_out:
            continue
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
