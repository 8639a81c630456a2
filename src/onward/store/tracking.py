"""What trackers receive: the steps of the stream in order, how often the run went back, and how far each tracker is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from onward.store.database import Database
from onward.store.rows import FileRow, RewindRow, StepRecord, TrackerRow

FILES = 20
"""How many files' steps are queried at a time."""


class Tracking(Database):
    """Reads the stream step by step, and records how far trackers have received it."""

    def add_rewind(self, step: int) -> None:
        """Record that the run goes back to a step, in the transaction that makes it so."""
        self.insert("rewinds", {"step": max(step, 0), "created": self.clock()})

    def last_rewind(self) -> int:
        """Return the id of the newest rewind, 0 if there was none."""
        return int(self.scalar("SELECT coalesce(max(id), 0) FROM rewinds"))

    def rewinds_after(self, rewind: int) -> list[RewindRow]:
        """Return the rewinds after one, oldest first."""
        return self.records(RewindRow, "SELECT * FROM rewinds WHERE id > ? ORDER BY id", rewind)

    def tracker(self, name: str) -> TrackerRow | None:
        """Return how far a tracker has got; None for one that never received anything."""
        return self.record(TrackerRow, "SELECT * FROM trackers WHERE name = ?", name)

    def trackers(self) -> list[TrackerRow]:
        """Return how far each tracker has got."""
        return self.records(TrackerRow, "SELECT * FROM trackers ORDER BY name")

    def keep_tracker(self, row: TrackerRow) -> None:
        """Record how far a tracker has got."""
        self.insert("trackers", asdict(row) | {"updated": self.clock()}, replace=True)

    def steps_after(self, step: int, limit: int) -> list[tuple[FileRow, StepRecord]]:
        """Return the steps of the stream after a step, each with its file, in order; at most about `limit`.

        The last step of a file is returned only when the file is done, when the hooks' measurements at its boundary are
        known. No step of a later file comes before it: that file begins while this one's boundary is committed.
        """
        found: list[tuple[FileRow, StepRecord]] = []
        for row in self._files_after(step):
            sql = "SELECT * FROM steps WHERE file_id = ? AND step > ? ORDER BY step LIMIT ?"
            records = self.records(StepRecord, sql, row.id, step, limit - len(found))
            is_done = row.state == "done"
            found += [(row, record) for record in records if is_done or record.step != row.last_step]
            if len(found) >= limit or not is_done:
                break
        return found

    def step_time(self, record: StepRecord) -> float | None:
        """Return when a step was recorded; None for steps of earlier releases."""
        return self.scalar("SELECT time FROM step_times WHERE file_id = ? AND step = ?", record.file_id, record.step)

    def _files_after(self, step: int) -> Iterator[FileRow]:
        """Yield the files of the stream that may have steps after a step, in order."""
        begun = "state IN ('training', 'done') AND position IS NOT NULL"
        first = self.scalar(
            f"SELECT position FROM files WHERE {begun} AND start_step <= ? ORDER BY position DESC LIMIT 1", step
        )
        place = int(first or 0) - 1
        while True:
            rows = self.records(
                FileRow, f"SELECT * FROM files WHERE {begun} AND position > ? ORDER BY position LIMIT ?", place, FILES
            )
            yield from rows
            if len(rows) < FILES:
                return
            place = rows[-1].place
