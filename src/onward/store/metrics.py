"""Step metrics: written as they come, on a connection that does not wait for the disk.

The next checkpoint's transaction is durable and carries them with it: SQLite's write-ahead log is flushed in order.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from pathlib import Path

from onward.store.ledger import connect


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step of one file, as it was trained.

    `loss` is the mean over the step's target tokens, `seconds` wall time, `rows_digest` the digest of the row
    indices that went in.
    """

    file_id: int
    step: int
    step_in_file: int
    epoch: int
    rows: int
    rows_digest: str
    tokens: int
    target_tokens: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float


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
