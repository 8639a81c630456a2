"""Scale: what the ledger keeps per step and per file, and the cost of queries after many of them.

`python bench/scale.py [FILES] [STEPS] [COLUMNS]` fills a scratch ledger through the functions that the worker calls, in
memory (`/dev/shm`), so that no disk is measured: FILES files of STEPS steps, each with a checkpoint, a handover, two
events and a row of the grid with COLUMNS files in it. It prints bytes for each table (SQLite's `dbstat`), and the
processor seconds of queries at a boundary or by a user. `docs/scale.md` computes with these figures.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onward.layout import RunLayout
from onward.service.knowledge.account import Account
from onward.service.knowledge.table import GRID, read_table
from onward.status import read_history, read_status
from onward.store.ledger import Ledger, make_ledger
from onward.store.metrics import Metrics
from onward.store.rows import StepRecord

SCORE = {"loss": 1.2345678901234567, "accuracy": 0.5678901234567891, "rows": 8, "trained": 512}
MEASURED = {
    "weights": "0" * 32, "moments": "1" * 32, "adam_step": 123456, "learning_rate": 0.0001, "probe": 2.345678901234567,
    "gradient": "2" * 32,
}  # fmt: skip


def fill(layout: RunLayout, files: int, steps: int, columns: int) -> dict[str, float]:
    """Fill a ledger as a worker does; return the seconds of one step record and of the rest of a file."""
    layout.make()
    layout.config.write_text("model: smollm2-135m\n", encoding="utf-8")
    make_ledger(layout.ledger)
    in_steps = in_files = 0.0
    with Ledger(layout.ledger) as ledger:
        metrics, step = Metrics(layout.ledger), 0
        ledger.keep_config("0" * 64, {"model": "smollm2-135m"})
        for number in range(1, files + 1):
            begun = time.process_time()
            file_id = _begin(ledger, number, step, steps)
            middle = time.process_time()
            for inner in range(1, steps + 1):
                step += 1
                metrics.append(StepRecord(file_id, step, inner, 0, 8, "0" * 32, 1000, 500, 1.25, 1e-4, 0.5, 0.25))
            end = time.process_time()
            _finish(ledger, file_id, number, step, columns)
            in_steps += end - middle
            in_files += time.process_time() - end + middle - begun
        metrics.close()
    return {"step": in_steps / files / steps, "file": in_files / files}


def _begin(ledger: Ledger, number: int, step: int, steps: int) -> int:
    name = f"day-{number:07}.jsonl"
    file_id = ledger.insert_file(
        command="0" * 32, name=name, sha256=f"{number:064x}", bytes=100_000, format="jsonl", copy=f"archive/{name}",
        state="queued", rows=8 * steps, tokens=1000 * steps, target_tokens=500 * steps,
    )  # fmt: skip
    ledger.move_file(file_id, "training", position=number, start_step=step, planned_steps=steps, config="0" * 64)
    ledger.add_handover(
        kind="continue", step=step, file_id=file_id, difference=0.0, before=json.dumps(MEASURED),
        after=json.dumps(MEASURED), name="bitwise",
    )  # fmt: skip
    return file_id


def _finish(ledger: Ledger, file_id: int, number: int, step: int, columns: int) -> None:
    measured = {f"{key:064x}": SCORE for key in range(number, max(number - columns, 0), -1)}
    names = dict.fromkeys(measured, f"day-{number:07}.jsonl")
    result = {"model": measured, "base": {}, "anchor": 0.0123, "names": names, "cost": 123456789}
    ledger.keep_boundary_results(file_id, step, {GRID: result})
    checkpoint = ledger.begin_checkpoint(step=step, file_id=file_id, boundary=1, state_digest="0" * 64, basis="1" * 64)
    with ledger.transaction():
        ledger.commit_checkpoint(checkpoint, size=500_000_000, seconds=0.5)
        ledger.move_file(file_id, "done", finished=ledger.clock())
        ledger.add_event("info", f"day-{number:07}.jsonl done: {step} steps", step, kind="done")
    ledger.add_event("info", f"day-{number:07}.jsonl accepted", step, kind="accepted")


def sizes(path: Path) -> dict[str, int]:
    """Return the bytes of each table with its indexes."""
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        found = connection.execute(
            "SELECT m.tbl_name, SUM(d.pgsize) FROM dbstat d JOIN sqlite_master m ON m.name = d.name GROUP BY 1"
        ).fetchall()
    return dict(sorted(found, key=lambda entry: -entry[1]))


def questions(layout: RunLayout) -> dict[str, float]:
    """Return the seconds of each query, the shortest of three times."""
    with Ledger(layout.ledger, read_only=True) as ledger:
        last = ledger.last_position()
        asked: dict[str, Callable[[], Any]] = {
            "status": lambda: read_status(layout),
            "history": lambda: read_history(layout),
            "what was measured so far, added up (once a process)": lambda: Account(ledger).up_to(last),
            "all rows of the grid (onward grid)": lambda: read_table(ledger),
            "next of the queue": ledger.next_queued,
            "steps of the stream (onward verify)": lambda: ledger.count_steps(1 << 60),
            "quick_check (onward doctor)": ledger.quick_check,
        }
        return {name: min(_seconds(question) for _ in range(3)) for name, question in asked.items()}


def _seconds(question: Callable[[], Any]) -> float:
    begun = time.process_time()
    question()
    return time.process_time() - begun


def measure(files: int = 10_000, steps: int = 10, columns: int = 8) -> dict[str, Any]:
    """Return sizes and seconds for a ledger of this size."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        layout = RunLayout(Path(scratch) / "run")
        layout.root.mkdir()
        seconds = fill(layout, files, steps, columns)
        found = sizes(layout.ledger)
        of_steps = found.get("steps", 0) + found.get("step_times", 0)
        return {
            "files": files, "steps": steps, "columns": columns,
            "insert_seconds": seconds,
            "bytes": {"all": sum(found.values()), **found},
            "bytes_of_a_step": of_steps / files / steps,
            "bytes_of_a_file": (sum(found.values()) - of_steps) / files,
            "question_seconds": questions(layout),
        }  # fmt: skip


def main() -> None:
    """Print the figures as JSON."""
    print(json.dumps(measure(*map(int, sys.argv[1:])), indent=2))


if __name__ == "__main__":
    main()
