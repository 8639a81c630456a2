"""Step metrics: written as they come, on a connection that does not wait for the disk.

The next checkpoint's transaction is durable and carries them with it: SQLite's write-ahead log is flushed in order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
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

    def append(self, record: StepRecord) -> None:
        """Write one record and its time, both or neither."""
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute(self._INSERT, astuple(record))
            values = (record.file_id, record.step, self._clock())
            self._connection.execute("INSERT OR REPLACE INTO step_times VALUES (?, ?, ?)", values)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
