"""Step metrics, written as they come on a connection that does not wait for the disk.

The next checkpoint's transaction is durable and makes them durable too: SQLite's write-ahead log is flushed in order.
It also stores the totals of ranges of steps, so that an observer of a run of a million steps need not read them all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, fields
from functools import cached_property
from pathlib import Path

from onward.store.database import Database, Values, begin, connect, marks
from onward.store.rows import StepRecord
from onward.store.waiting import Waiting

RANGE = 512
"""Global steps per range: ranges end at multiples of this and at the ends of files. A power of two, as in the curve."""

MANY = 100
"""The number of pieces of files from which one query for all ranges is cheaper than one per piece."""
KEEP = f"""
    INSERT OR REPLACE INTO step_ranges
    SELECT r.*, (SELECT learning_rate FROM steps WHERE file_id = r.file_id AND step = r.last)
    FROM (
        SELECT file_id, min(step) AS first, max(step) AS last, count(*), sum(rows), sum(replayed), sum(tokens),
            sum(seconds), sum(loss), min(loss), max(loss), sum(grad_norm), min(grad_norm), max(grad_norm)
        FROM steps
        WHERE file_id = ? AND step <= ?
            AND step >= coalesce((SELECT max(first) FROM step_ranges WHERE file_id = ?), 0)
        GROUP BY (step - 1) / {RANGE}
    ) r
"""

WRONG = """
    SELECT f.name, r.first
    FROM step_ranges r JOIN files f ON f.id = r.file_id
        LEFT JOIN steps s ON s.file_id = r.file_id AND s.step BETWEEN r.first AND r.last
    GROUP BY r.file_id, r.first
    HAVING r.steps != count(s.step) OR r.rows != sum(s.rows) OR r.replayed != sum(s.replayed)
        OR r.tokens != sum(s.tokens) OR r.last != max(s.step)
        OR r.loss_min != min(s.loss) OR r.loss_max != max(s.loss) OR abs(r.loss - sum(s.loss)) > 1e-9 * abs(r.loss)
        OR r.grad_norm_min != min(s.grad_norm) OR r.grad_norm_max != max(s.grad_norm)
        OR abs(r.grad_norm - sum(s.grad_norm)) > 1e-9 * r.grad_norm OR abs(r.seconds - sum(s.seconds)) > 1e-6
"""


class Metrics:
    """Appends step records to the ledger file, each with the time of writing.

    Args:
        clock: seconds since the epoch.
        waiting: how long to wait for others that hold it.
    """

    _INSERT = (
        f"INSERT OR REPLACE INTO steps ({', '.join(field.name for field in fields(StepRecord))})"
        f" VALUES ({marks(fields(StepRecord))})"
    )

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time, waiting: Waiting | None = None) -> None:
        self._clock = clock
        self._waiting = waiting or Waiting()
        self._connection = connect(path, durable=False, waiting=self._waiting)

    def append(self, record: StepRecord, replayed: Sequence[tuple[str, int]] = ()) -> None:
        """Write one record, its time and the rows replayed in its step, all or nothing.

        Args:
            replayed: pairs of a file's SHA-256 and the index of a row in it.
        """
        of_step = (record.file_id, record.step)
        rows = [(*of_step, place, sha256, row) for place, (sha256, row) in enumerate(replayed)]
        with self._connection:
            begin(self._connection, self._waiting)
            self._connection.execute(self._INSERT, astuple(record))
            self._connection.execute("INSERT OR REPLACE INTO step_times VALUES (?, ?, ?)", (*of_step, self._clock()))
            if rows:
                self._connection.execute("DELETE FROM replayed_rows WHERE file_id = ? AND step = ?", of_step)
                self._connection.executemany("INSERT INTO replayed_rows VALUES (?, ?, ?, ?, ?)", rows)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class Ranges(Database):
    """Totals of ranges of a file's steps, stored with each commit: they cover the steps up to the last commit."""

    def keep_ranges(self, file_id: int, step: int) -> None:
        """Store totals of the steps of a file up to a global step: the newest range grows, others stay."""
        self.write(KEEP, file_id, step, file_id)

    def forget_ranges(self, file_id: int, step: int) -> None:
        """Remove the ranges of a file that contain steps after a global step."""
        self.write("DELETE FROM step_ranges WHERE file_id = ? AND last > ?", file_id, step)

    def step_ranges(self, pieces: Sequence[tuple[int, int, int]] | None = None) -> dict[tuple[int, int], Values]:
        """Return ranges by file id and first step.

        Args:
            pieces: file id, first and last step of the pieces that the ranges must lie in; None for all. With many
                pieces, all ranges are read at once, and the result may contain others.
        """
        if not self.has_ranges:
            return {}
        if pieces is None or len(pieces) > MANY:
            rows = self.query("SELECT * FROM step_ranges")
        else:
            inside = "SELECT * FROM step_ranges WHERE file_id = ? AND first BETWEEN ? AND ?"
            rows = [row for piece in pieces for row in self.query(inside, *piece)]
        return {(row["file_id"], row["first"]): row for row in rows}

    def wrong_ranges(self) -> list[Values]:
        """Return file and first step of the ranges that are not what their steps give; sums may differ by rounding."""
        return self.query(WRONG)

    @cached_property
    def has_ranges(self) -> bool:
        """Return whether the ledger has any; one opened for reading only may not be migrated yet."""
        return bool(self.query("SELECT 1 FROM sqlite_master WHERE name = 'step_ranges'"))
