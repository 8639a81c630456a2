"""Step metrics: written as they come, on a connection that does not wait for the disk.

The next checkpoint's transaction is durable and carries them with it: SQLite's write-ahead log is flushed in order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, fields
from pathlib import Path

from onward.store.database import connect
from onward.store.rows import StepRecord


class Metrics:
    """Appends step records to the ledger file, each with the time at which it is written.

    Args:
        clock: seconds since the epoch.
    """

    _INSERT = (
        f"INSERT OR REPLACE INTO steps ({', '.join(field.name for field in fields(StepRecord))})"
        f" VALUES ({', '.join('?' * len(fields(StepRecord)))})"
    )

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._connection = connect(path, durable=False)

    def append(self, record: StepRecord, replayed: Sequence[tuple[str, int]] = ()) -> None:
        """Write one record, its time and the rows that were replayed in its step, all or nothing.

        Args:
            replayed: each a file's SHA-256 and the index of a row in it.
        """
        of_step = (record.file_id, record.step)
        rows = [(*of_step, place, sha256, row) for place, (sha256, row) in enumerate(replayed)]
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute(self._INSERT, astuple(record))
            self._connection.execute("INSERT OR REPLACE INTO step_times VALUES (?, ?, ?)", (*of_step, self._clock()))
            if rows:
                self._connection.execute("DELETE FROM replayed_rows WHERE file_id = ? AND step = ?", of_step)
                self._connection.executemany("INSERT INTO replayed_rows VALUES (?, ?, ?, ?, ?)", rows)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
