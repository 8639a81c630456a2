"""The files of the stream: their rows in the ledger, the order of the queue, and the moves between states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from onward.errors import OnwardError
from onward.store.database import Values, marks
from onward.store.metrics import Ranges
from onward.store.rows import FileRow, HistoryRow

LEGAL = {
    "arriving": {"queued", "rejected", "skipped"},
    "queued": {"training", "undone", "skipped", "quarantined"},
    "training": {"done", "queued", "undone", "skipped", "quarantined"},
    "done": {"training", "queued", "undone", "skipped", "quarantined"},  # back only if state is lost or rolled back
    "quarantined": {"undone"},
}
"""States that a file may move to, by its current state."""

HELD = ("queued", "training", "done")
"""States of a file whose content belongs to the stream."""

IN_STREAM = "position IS NOT NULL AND state IN ('queued', 'training', 'done')"
"""The condition for files that have a place in the stream; worded like the index `files_position`."""

BEGUN_STATES = ("training", "done")
BEGUN = f"state IN {BEGUN_STATES}"
LAST = (1 << 63) - 1
"""A position that no file exceeds."""


class Files(Ranges):
    """Reads and moves files."""

    def insert_file(self, **values: Any) -> int:
        """Record a file; return its id."""
        return self.insert("files", {"arrived": self.clock(), **values})

    def file(self, file_id: int) -> FileRow:
        """Return the file with this id."""
        row = self.find(file_id)
        if row is None:
            raise OnwardError("the ledger has no such file", where=file_id)
        return row

    def find(self, file_id: int) -> FileRow | None:
        """Return the file with this id, or None: a file that vanished from the inbox unread is forgotten."""
        return self.record(FileRow, "SELECT * FROM files WHERE id = ?", file_id)

    def files(self, *states: str) -> list[FileRow]:
        """Return files in these states: those with a position in stream order, then the queue in its order."""
        order = "position IS NULL, position, priority DESC, id"
        return self.records(FileRow, f"SELECT * FROM files WHERE state IN ({marks(states)}) ORDER BY {order}", *states)

    def arriving(self, command: str) -> list[FileRow]:
        """Return the files that arrived with a command and are not settled, in the order given."""
        return self.records(
            FileRow, "SELECT * FROM files WHERE state = 'arriving' AND command = ? ORDER BY id", command
        )

    def announced(self) -> list[FileRow]:
        """Return the files that were seen in the inbox but not read yet, in the order of the queue."""
        return self.records(
            FileRow, "SELECT * FROM files WHERE state = 'arriving' AND copy = '' ORDER BY priority DESC, id"
        )

    def arriving_copies(self) -> list[str]:
        """Return the places, below the run's directory, of the files that were read and are not settled."""
        rows = self.query("SELECT copy FROM files WHERE state = 'arriving' AND copy != ''")
        return [row["copy"] for row in rows]

    def forget_arriving(self, file_id: int) -> None:
        """Forget a file of the inbox that changed or vanished before it was read, or cannot be taken out of it."""
        self.write("DELETE FROM files WHERE id = ? AND state = 'arriving' AND inbox IS NOT NULL", file_id)

    def count_attempt(self, file_id: int, by: int = 1) -> int:
        """Durably count the beginning of a check of a file (-1 takes it back); return how often one began."""
        self.write("UPDATE files SET attempts = max(0, attempts + ?) WHERE id = ?", by, file_id)
        return self.file(file_id).attempts

    def attempts_at(self, row: FileRow) -> int:
        """Return how often checking a file's content was begun and never ended, under whatever name it arrived."""
        known = "SELECT coalesce(sum(attempts), 0) FROM files WHERE state = 'arriving' AND sha256 = ? AND id != ?"
        return self.file(row.id).attempts + (int(self.scalar(known, row.sha256, row.id)) if row.sha256 else 0)

    def share_attempts(self, row: FileRow, attempts: int) -> None:
        """Count attempts at a file for every file of its content that arrived, so that all are given up with it."""
        if row.sha256:
            self.write("UPDATE files SET attempts = ? WHERE state = 'arriving' AND sha256 = ?", attempts, row.sha256)

    def next_occurrence(self, sha256: str) -> int:
        """Return the occurrence that a file with this content gets if it joins the stream now; 0 for the first."""
        last = self.scalar(
            f"SELECT max(occurrence) FROM files WHERE sha256 = ? AND state IN ({marks(HELD)})", sha256, *HELD
        )
        return 0 if last is None else int(last) + 1

    def with_content(self, sha256: str) -> list[FileRow]:
        """Return all files with this content, whatever became of them, in the order in which they arrived."""
        return self.records(FileRow, "SELECT * FROM files WHERE sha256 = ? ORDER BY id", sha256)

    def places_of(self, sha256: str, up_to: int) -> list[int]:
        """Return the positions, up to one, at which training on a content began, in order."""
        rows = self.query(f"SELECT position FROM files WHERE sha256 = ? AND position <= ? AND {BEGUN}", sha256, up_to)
        return sorted(row["position"] for row in rows)

    def holding(self, sha256: str) -> FileRow | None:
        """Return the file of the stream with this content, if any."""
        return self.record(
            FileRow, f"SELECT * FROM files WHERE sha256 = ? AND state IN ({marks(HELD)}) ORDER BY id LIMIT 1",
            sha256, *HELD,
        )  # fmt: skip

    def in_stream(self, after: int, up_to: int = LAST) -> list[FileRow]:
        """Return the files with a place in the stream after one position and up to another, in order."""
        where = f"{IN_STREAM} AND position > ? AND position <= ?"
        return self.records(FileRow, f"SELECT * FROM files WHERE {where} ORDER BY position", after, up_to)

    def unfinished_from(self, position: int) -> list[FileRow]:
        """Return the files of the stream that are not done or are at a position or later, in order."""
        return self.records(
            FileRow,
            f"SELECT * FROM files WHERE {IN_STREAM} AND (position >= ? OR state != 'done') ORDER BY position",
            position,
        )

    def done_before(self, step: int, limit: int) -> list[FileRow]:
        """Return the newest finished files that began before a step, at most `limit`, newest first."""
        return self.records(
            FileRow, "SELECT * FROM files WHERE state = 'done' AND start_step < ? ORDER BY position DESC LIMIT ?",
            step, limit,
        )  # fmt: skip

    def next_owed(self) -> FileRow | None:
        """Return the file to train now: the one begun, else the head of the queue."""
        begun = self.record(FileRow, "SELECT * FROM files WHERE state = 'training' ORDER BY position LIMIT 1")
        return begun or self.next_queued()

    def next_queued(self) -> FileRow | None:
        """Return the head of the queue: a file that already has a position, else by priority."""
        queued = "SELECT * FROM files WHERE state = 'queued'"
        placed = self.record(FileRow, f"{queued} AND position IS NOT NULL ORDER BY position LIMIT 1")
        return placed or self.record(FileRow, f"{queued} ORDER BY priority DESC, id LIMIT 1")

    def next_arriving(self) -> FileRow | None:
        """Return the file to check next, in the order of the queue that it will join."""
        return self.record(FileRow, "SELECT * FROM files WHERE state = 'arriving' ORDER BY priority DESC, id LIMIT 1")

    def last_done(self) -> int:
        """Return the highest position of a finished file."""
        return int(self.scalar("SELECT max(position) FROM files WHERE state = 'done'") or 0)

    def last_position(self) -> int:
        """Return the highest position given in the stream so far."""
        return int(self.scalar(f"SELECT max(position) FROM files WHERE {IN_STREAM}") or 0)

    def last_begun(self) -> int:
        """Return the highest position of a file that was begun."""
        return int(self.scalar(f"SELECT max(position) FROM files WHERE {BEGUN}") or 0)

    def at_position(self, position: int) -> FileRow | None:
        """Return the file at a place in the stream."""
        return self.record(FileRow, f"SELECT * FROM files WHERE position = ? AND {IN_STREAM}", position)

    def queued(self) -> int:
        """Return how many files wait, including those whose rows are not checked yet."""
        return int(self.scalar("SELECT count(*) FROM files WHERE state IN ('queued', 'arriving')"))

    def files_mark(self) -> list[Values]:
        """Return a value that changes whenever a file is recorded, forgotten or moved to another state."""
        return self.query(
            "SELECT state, count(*) AS files, max(id) AS newest, sum(id) AS ids FROM files GROUP BY state"
        )

    def sharing_copy(self, copy: str) -> int:
        """Return how many files have their original at this path of the archive."""
        return int(self.scalar("SELECT count(*) FROM files WHERE copy = ?", copy))

    def move_file(self, file_id: int, state: str, **values: Any) -> None:
        """Move a file to another state and set columns, in one transaction.

        Raises:
            OnwardError: the move is not legal.
        """
        with self.transaction():
            old = self.file(file_id).state
            if state not in LEGAL.get(old, set()):
                raise OnwardError(f"a file cannot go from {old} to {state}", where=f"file id {file_id}")
            self.set_file(file_id, state=state, **values)

    def change_arriving(self, file_id: int, **values: Any) -> bool:
        """Set columns of a file that is still arriving, its state among them; return False if it is no longer.

        `skip` takes a file out while another process, or this one, reads it.
        """
        with self.transaction():
            row = self.find(file_id)
            if row is None or row.state != "arriving":
                return False
            self.set_file(file_id, **values)
            return True

    def set_file(self, file_id: int, **values: Any) -> None:
        """Set columns of a file that stays in its state."""
        assignments = ", ".join(f"{name} = ?" for name in values)
        self.write(f"UPDATE files SET {assignments} WHERE id = ?", *values.values(), file_id)

    def history(self, known: dict[Finished, Values] | None = None) -> list[HistoryRow]:
        """Return one row per file of the stream, with its first and last step, then those that were taken out of it.

        Args:
            known: a cache of the totals of finished files, which this fills. An observer that calls repeatedly passes
                the same one, so that only current files are added up again.
        """
        rows = self.query(LISTED)
        known = {} if known is None else known
        kept = {row["id"]: known[_finished(row)] for row in rows if _finished(row) in known}
        missing = [row["id"] for row in rows if row["id"] not in kept]
        totals = kept | {values.pop("file_id"): values for values in self._totals(missing, all_files=not kept)}
        known.clear()
        known.update((_finished(row), totals[row["id"]]) for row in rows if row["finished"] and row["id"] in totals)
        expected = [row["position"] or place if row["state"] in HELD else None for place, row in enumerate(rows, 1)]
        return [
            HistoryRow(**row, expected=place, **totals.get(row["id"], NO_TOTALS))
            for row, place in zip(rows, expected, strict=True)
        ]

    def _totals(self, file_ids: Sequence[int], *, all_files: bool) -> list[Values]:
        """Return the totals of the steps of files; files without steps have no row."""
        parts = RANGED if self.has_ranges else SINGLE
        if all_files:
            return self.query(TOTALS.format(which="", parts=parts))
        found: list[Values] = []
        for start in range(0, len(file_ids), SOME):
            ids = file_ids[start : start + SOME]
            which = f"WHERE id IN ({marks(ids)})"
            found += self.query(TOTALS.format(which=which, parts=parts), *ids)
        return found


Finished: TypeAlias = tuple[int, str, float | None]
"""A file, its state, and when it came to that state: while these do not change, its steps do not."""

SOME = 500
"""The most files that one query names."""

SINGLE = """
    SELECT s.file_id, s.rows, 1 AS steps, s.seconds, s.replayed
    FROM wanted w JOIN steps s ON s.file_id = w.id
"""
RANGED = f"""
    SELECT r.file_id, r.rows, r.steps, r.seconds, r.replayed FROM wanted w JOIN step_ranges r ON r.file_id = w.id
    UNION ALL {SINGLE.rstrip()}
        AND s.step > coalesce((SELECT max(last) FROM step_ranges WHERE file_id = w.id), 0)
"""
"""Totals of steps, from the ranges that the ledger keeps, then from single steps."""
TOTALS = """
    WITH wanted AS (SELECT id FROM files {which})
    SELECT s.*, a.step AS step_from, a.loss AS first_loss, a.learning_rate AS first_learning_rate,
        b.step AS step_to, b.loss AS last_loss, b.learning_rate AS last_learning_rate
    FROM (
        SELECT file_id, sum(rows) AS trained, sum(steps) AS steps, sum(seconds) AS seconds, sum(replayed) AS replayed
        FROM ({parts}) GROUP BY file_id
    ) s
    JOIN steps a ON a.file_id = s.file_id
        AND a.step = (SELECT step FROM steps WHERE file_id = s.file_id ORDER BY step LIMIT 1)
    JOIN steps b ON b.file_id = s.file_id
        AND b.step = (SELECT step FROM steps WHERE file_id = s.file_id ORDER BY step DESC LIMIT 1)
"""
NO_TOTALS: Values = dict.fromkeys(
    ("trained", "steps", "step_from", "step_to", "seconds", "first_loss", "first_learning_rate", "last_loss",
     "last_learning_rate", "replayed")
)  # fmt: skip
LISTED = """
    SELECT f.*,
        (SELECT h.class FROM handovers h WHERE h.file_id = f.id AND h.kind = 'boundary'
         ORDER BY h.id DESC LIMIT 1) AS handover
    FROM files f
    WHERE f.state IN ('queued', 'training', 'done', 'undone', 'skipped', 'quarantined')
    ORDER BY f.state IN ('undone', 'skipped', 'quarantined'), f.position IS NULL, f.position,
        f.priority DESC, f.id
"""


def _finished(row: Values) -> Finished:
    return row["id"], row["state"], row["finished"]
