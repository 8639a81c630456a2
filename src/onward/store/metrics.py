"""Step metrics: written as they come, on a connection that does not wait for the disk.

The next checkpoint's transaction is durable and carries them with it: SQLite's write-ahead log is flushed in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path

from onward.store.database import connect
from onward.store.rows import StepRecord


class Metrics:
    """Appends step records to the ledger file."""

    _INSERT = (
        f"INSERT OR REPLACE INTO steps ({', '.join(field.name for field in fields(StepRecord))})"
        f" VALUES ({', '.join('?' * len(fields(StepRecord)))})"
    )

    def __init__(self, path: Path) -> None:
        self._connection = connect(path, durable=False)

    def append(self, record: StepRecord, replayed: Sequence[tuple[str, int]] = ()) -> None:
        """Write one record, and the rows that were replayed in its step: each a file's SHA-256 and an index."""
        if not replayed:
            self._connection.execute(self._INSERT, astuple(record))
            return
        of_step = (record.file_id, record.step)
        rows = [(*of_step, place, sha256, row) for place, (sha256, row) in enumerate(replayed)]
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.execute(self._INSERT, astuple(record))
        self._connection.execute("DELETE FROM replayed_rows WHERE file_id = ? AND step = ?", of_step)
        self._connection.executemany("INSERT INTO replayed_rows VALUES (?, ?, ?, ?, ?)", rows)
        self._connection.execute("COMMIT")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
