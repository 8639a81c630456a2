"""Step metrics: written as they come, on a connection that does not wait for the disk.

The next checkpoint's transaction is durable and carries them with it: SQLite's write-ahead log is flushed in order.
"""

from __future__ import annotations

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

    def append(self, record: StepRecord) -> None:
        """Write one record."""
        self._connection.execute(self._INSERT, astuple(record))

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
