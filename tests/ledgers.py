"""Ledgers with a stream and step records that tests make up, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from onward.layout import RunLayout
from onward.store.ledger import Ledger, make_ledger
from onward.store.metrics import Metrics
from onward.store.rows import StepRecord


def empty_run(directory: Path) -> RunLayout:
    """Make the directories and the ledger of a run without a config and a model."""
    layout = RunLayout(directory)
    directory.mkdir()
    layout.make()
    make_ledger(layout.ledger)
    return layout


def made_up_run(directory: Path, files: Sequence[tuple[str, int]], loss: Callable[[int], float]) -> RunLayout:
    """Make a run whose ledger has these finished files, each with its number of steps; `loss` gives that of a step."""
    layout = empty_run(directory)
    layout.config.write_text("model: smollm2-135m\ndisk_margin_mb: 1\n")
    with Ledger(layout.ledger) as ledger:
        step = 0
        metrics = Metrics(layout.ledger, clock=lambda: 1000.0 + step)
        for position, (name, count) in enumerate(files, start=1):
            file_id = add_file(ledger, name, state="done", position=position, start_step=step, planned_steps=count)
            for inner in range(1, count + 1):
                step += 1
                metrics.append(StepRecord(file_id, step, inner, 0, 2, "digest", 20, 10, loss(step), 1e-4, 0.5, 0.25))
        metrics.close()
    return layout


def add_file(ledger: Ledger, name: str, **values: object) -> int:
    """Record a file; returns its id."""
    plain = {"command": "c", "sha256": "", "bytes": 10, "format": "jsonl", "copy": f"archive/{name}", "rows": 2}
    return ledger.insert_file(name=name, **{**plain, **values})
