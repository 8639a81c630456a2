"""What the page reads of a run: the ledger, read-only, and the names in a few folders. Nothing is written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onward.config.text import read_config
from onward.curve import as_columns, read_curve
from onward.errors import OnwardError
from onward.layout import RunLayout, entries, step_of
from onward.service.intake.inbox import FOLDERS, IGNORED
from onward.service.intake.names import REPORT
from onward.service.knowledge.table import read_newest
from onward.status import read_grid, read_history, read_status
from onward.store.database import Values
from onward.store.files import Finished
from onward.store.ledger import PROOF, Ledger, look_into
from onward.text import printable
from onward.views.page.buckets import KeptBuckets

LISTED = 200
"""The most entries shown of the inbox, of the queue, of refused files and of events."""
GRID = 12
"""How many of the newest files and boundaries are shown in the grid."""
REPORT_BYTES = 1 << 20
AUTOMATIC = 2000
"""How many records are returned if a request does not say."""


class RunReader:
    """Reads one run, from any thread; costly sums are kept."""

    def __init__(self, layout: RunLayout) -> None:
        self.layout = layout
        self._lock = threading.Lock()
        self._totals: dict[Finished, Values] = {}
        self._buckets = KeptBuckets()

    @contextlib.contextmanager
    def ledger(self) -> Generator[Ledger]:
        """Open the ledger for reading.

        Raises:
            UsageError, DamagedState: it is gone, or this user may not read it.
        """
        self.layout.require()
        with look_into(self.layout.ledger) as ledger:
            yield ledger

    def status(self) -> dict[str, Any]:
        """Return what `onward status --json` prints."""
        return read_status(self.layout)

    def history(self) -> list[dict[str, Any]]:
        """Return what `onward history --json` prints."""
        with self._lock:  # requests wait while a long run is being added up
            return read_history(self.layout, self._totals)

    def warm(self) -> None:
        """Add up once what later reads build on."""
        self.history()
        with self.ledger() as ledger:
            self._buckets.fill(ledger)

    def metrics(self, every: int | None) -> dict[str, list[Any]]:
        """Return the step records as columns, one in `every` (see `read_curve`); by default, a few thousand in all."""
        with self.ledger() as ledger:
            if every is None:
                spans = ledger.spans()
                every = max(1, -(-spans[-1].last // AUTOMATIC)) if spans else 1
            return as_columns(read_curve(ledger, every))

    def curve(self, points: int, first: int | None, last: int | None) -> dict[str, Any]:
        """Return the curve as it is drawn: see `KeptBuckets.draw`."""
        with self.ledger() as ledger:
            return self._buckets.draw(ledger, points, first, last)

    def states(self) -> dict[str, int]:
        """Return how many files are in each state."""
        with self.ledger() as ledger:
            return {row["state"]: row["files"] for row in ledger.files_mark()}

    def log(self, limit: int = LISTED) -> list[dict[str, Any]]:
        """Return the newest events of the ledger, oldest first."""
        with self.ledger() as ledger:
            return [asdict(event) for event in ledger.events(limit)]

    def overview(self) -> dict[str, Any]:
        """Return what is shown around the curve: inbox, queue, refused files, proof, restore points, disk, events."""
        layout = self.layout
        with self.ledger() as ledger:
            waiting = [_waiting(row) for row in ledger.files("queued", "arriving")[:LISTED]]
            proof = {"verified": ledger.get(PROOF), **_handovers(ledger)}
            events = [asdict(event) for event in ledger.events(LISTED)]
            grid = read_newest(ledger, GRID)
            margin = disk_reserve(self)
            points = [_restore_point(ledger, folder) for folder in layout.restore_points()]
        usage = shutil.disk_usage(layout.root)
        return {
            "inbox": self.inbox(),
            "queue": waiting,
            "refused": self.refused(),
            "proof": proof,
            "restore_points": points,
            "disk": {"free": usage.free, "total": usage.total, "reserve": margin},
            "events": events,
            "grid": grid,
        }

    def grid(self) -> dict[str, Any]:
        """Return what `onward grid --json` prints."""
        return read_grid(self.layout)

    def inbox(self) -> list[dict[str, Any]]:
        """Return the files in the inbox, with those still being written marked as such."""
        found: list[dict[str, Any]] = []
        for below in (folder.rstrip("/") for folder in FOLDERS):
            with (
                contextlib.suppress(FileNotFoundError, NotADirectoryError),
                os.scandir(self.layout.inbox / below) as all_,
            ):
                found += [_arrived(entry, below) for entry in all_ if _is_shown(entry)]
        return sorted(found, key=lambda file: file["time"])[:LISTED]

    def refused(self) -> list[dict[str, Any]]:
        """Return the reports on refused files, newest first."""
        paths = [path for path in entries(self.layout.rejected) if path.name.endswith(REPORT)]
        reports = [report for path in paths if (report := _report(path)) is not None]
        return sorted(reports, key=lambda report: -report["rejected"])[:LISTED]


def disk_reserve(reader: RunReader) -> int:
    """Return the bytes that training needs free on the disk: the config's margin and the next checkpoint."""
    with reader.ledger() as ledger:
        newest = ledger.newest_checkpoint()
    try:
        margin = read_config(reader.layout.config).disk_margin_mb << 20
    except OnwardError:  # a refused config stops training, not reading
        margin = 0
    return margin + (newest.bytes if newest else 0)


def _waiting(row: Any) -> dict[str, Any]:
    return {"name": row.name, "state": row.state, "rows": row.rows, "bytes": row.bytes, "position": row.position,
            "priority": row.priority}  # fmt: skip


def _handovers(ledger: Ledger) -> dict[str, Any]:
    """Return how many handovers there are of each class, and the newest of them."""
    newest = ledger.newest_handovers(LISTED)
    names = {file_id: found.name for file_id in {row.file_id for row in newest} if (found := ledger.find(file_id or 0))}
    shown = [
        {"step": row.step, "kind": row.kind, "class": row.name, "difference": row.difference, "time": row.created,
         "file": names.get(row.file_id or 0), "loss": _loss(row.after)}
        for row in newest
    ]  # fmt: skip
    return {"classes": ledger.handover_classes(), "handovers": shown}


def _loss(measured: str) -> float | None:
    with contextlib.suppress(ValueError, AttributeError):
        return json.loads(measured).get("probe_loss")
    return None


def _restore_point(ledger: Ledger, folder: Path) -> dict[str, Any]:
    """Return a restore point's step, the file that it was made after (None for the base), and when."""
    step, time = step_of(folder), None
    with contextlib.suppress(OSError):
        time = folder.stat().st_mtime
    before = ledger.done_before(step, 1)
    return {"step": step, "file": before[0].name if before else None, "time": time}


def _is_shown(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".") and not entry.is_dir(follow_symlinks=False)


def _arrived(entry: os.DirEntry[str], below: str) -> dict[str, Any]:
    size, time = 0, 0.0
    with contextlib.suppress(FileNotFoundError):  # it was taken in meanwhile
        found = entry.stat(follow_symlinks=False)
        size, time = found.st_size, found.st_mtime
    is_whole = not entry.name.endswith(IGNORED)
    return {"name": printable(entry.name), "folder": below, "bytes": size, "time": time, "whole": is_whole}


def _report(path: Path) -> dict[str, Any] | None:
    """Return a report as it was written; None if the file is something else."""
    try:
        if path.stat().st_size > REPORT_BYTES:
            return None
        values = json.loads(path.read_bytes())
        problems = [
            {"line": problem["line"], "reason": str(problem["reason"]), "remedy": str(problem["remedy"])}
            for problem in values["problems"]
        ]
        return {
            "file": str(values["file"]), "problem_count": int(values["problem_count"]),
            "unit": str(values.get("unit", "line")), "rejected": float(values["rejected"]), "problems": problems,
            "way_out": str(values.get("way_out", "")),
        }  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
