"""What the user sees while a run trains."""

from __future__ import annotations

from pathlib import Path

import tiny
from runs import new_run

from onward import Run
from onward.events import Event
from onward.progress import describe


def lines(run: Run, *files: Path) -> list[str]:
    """Train files and return the lines shown meanwhile."""
    events: list[Event] = []
    run.train(*files, observe=events.append)
    return [line for event in events if (line := describe(event, log_steps=100))]


def test_long_rows_are_counted_and_shown(model: Path, tmp_path: Path) -> None:
    """Rows longer than `max_length` are cut or dropped by policy, and the line of their file says how many."""
    rows = [{"text": "short"}, {"text": "x" * 60}, {"text": "y" * 60}, {"text": "short too"}]
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    cut = new_run(tmp_path / "cut", model, max_length=32, over_length="truncate")
    begun = "file 1: rows.jsonl, {} rows ({} at max_length=32: {}), 1 step (handover bitwise)"
    assert begun.format(4, "2 of 4 rows cut", "58 tokens lost, 42 %") == lines(cut, file)[0]
    dropped = new_run(tmp_path / "dropped", model, max_length=32, over_length="drop")
    assert begun.format(2, "2 of 4 rows dropped", "122 tokens lost, 88 %") == lines(dropped, file)[0]
    assert [(2, 0), (0, 2)] == [
        (entry["truncated"], entry["dropped"]) for run in (cut, dropped) for entry in run.history()
    ]


def test_an_observer_that_fails_is_dropped(model: Path, tmp_path: Path) -> None:
    """An observer that raises three times in a row sees nothing more, and the file is trained all the same."""
    seen: list[Event] = []

    def observe(event: Event) -> None:
        seen.append(event)
        raise RuntimeError("broken observer")

    run = new_run(tmp_path / "run", model, max_length=256)
    run.train(tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chat_rows(9)), observe=observe)
    assert 3 == len(seen)
    assert ["done"] == [entry["state"] for entry in run.history()]
