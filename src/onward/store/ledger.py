"""The ledger: the durable record of the stream and of what came of each file (SQLite, write-ahead log)."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from onward.atomic import TEMPORARY_PREFIX, fsync_directory
from onward.errors import DamagedState, OnwardError
from onward.store.migrations import migrate

LEGAL = {
    "arriving": {"queued", "rejected"},
    "queued": {"training", "undone", "skipped", "quarantined"},
    "training": {"done", "queued", "undone", "skipped", "quarantined"},
    "done": {"training", "queued", "undone", "skipped"},  # back only when state was lost or rolled back
}
"""States that a file may go to, by the state it is in."""

HELD = ("queued", "training", "done")
"""States of a file whose content belongs to the stream."""

IN_STREAM = "position IS NOT NULL AND state IN ('queued', 'training', 'done')"
"""What holds for the files that have a place in the stream; worded as the index `files_position` is."""

PASSING = {
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM,
}  # fmt: skip
"""Errors of SQLite that say nothing of the ledger's content: the disk is full or fails, or others are at work."""

LOG_BYTES = 16 << 20
"""Bytes that SQLite's log is cut back to, after a reader that kept its view for long let it grow."""

Row = dict[str, Any]


def connect(path: Path, *, durable: bool = True, read_only: bool = False) -> sqlite3.Connection:
    """Open a ledger file; `durable` makes each transaction wait for the disk (`synchronous=FULL`)."""
    try:
        if read_only:
            address = f"{path.absolute().as_uri()}?mode=ro"
            connection = sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False)
        else:
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        connection.row_factory = lambda cursor, row: {column[0]: row[i] for i, column in enumerate(cursor.description)}
        connection.execute("PRAGMA busy_timeout = 30000")
        if not read_only:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            connection.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.DatabaseError as error:
        raise refusal(path, error) from None
    return connection


def refusal(path: Path, error: sqlite3.DatabaseError) -> Exception:
    """Return what to raise for an error of SQLite: itself if the ledger is whole and the machine fails."""
    code: int = getattr(error, "sqlite_errorcode", 0)  # an error of the module itself has none
    if code & 0xFF in PASSING and path.exists():
        return error
    return damaged(path, error)


def damaged(path: Path, error: sqlite3.DatabaseError) -> DamagedState:
    """Return the refusal for a ledger that SQLite cannot read."""
    hint = "Restore ledger.sqlite3 from a copy, or adopt the newest checkpoint into a new run: onward adopt CHECKPOINT"
    return DamagedState(f"the ledger cannot be read: {error}", where=path, hint=hint)


def make_ledger(path: Path) -> None:
    """Make a new run's ledger, whole or not at all."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    temporary.unlink(missing_ok=True)
    with Ledger(temporary) as ledger:
        ledger.put(run=uuid.uuid4().hex, state="idle", origin_step=0)
    temporary.replace(path)
    fsync_directory(path.parent)


class Ledger:
    """Reads and legal moves of the ledger. One writer of training state; readers at any time.

    Args:
        path: the file `ledger.sqlite3`; made with its schema where missing and not `read_only`.
        clock: seconds since the epoch; injected by tests.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time, read_only: bool = False) -> None:
        self.path = path
        self.clock = clock
        self._connection = connect(path, read_only=read_only)
        if not read_only:
            self._connection.row_factory, factory = None, self._connection.row_factory
            try:
                migrate(self._connection)
            except (sqlite3.DatabaseError, OnwardError) as error:
                self._connection.close()
                raise refusal(path, error) if isinstance(error, sqlite3.DatabaseError) else error from None
            self._connection.row_factory = factory

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def transaction(self) -> Generator[None]:
        """Make the statements inside one durable act; nested use joins the outer one."""
        if self._connection.in_transaction:
            yield
            return
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # a full or failing disk may have rolled back by itself
                self._connection.execute("ROLLBACK")
            raise

    def query(self, sql: str, *values: Any) -> list[Row]:
        """Return the rows of a query as dictionaries."""
        try:
            return self._connection.execute(sql, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise refusal(self.path, error) from None

    def one(self, sql: str, *values: Any) -> Row | None:
        """Return the first row of a query, or None."""
        rows = self.query(sql, *values)
        return rows[0] if rows else None

    def write(self, sql: str, *values: Any) -> int:
        """Run one statement; returns the id of an inserted row."""
        with self.transaction():
            return int(self._connection.execute(sql, values).lastrowid or 0)

    # facts of the run

    def get(self, key: str, default: Any = None) -> Any:
        """Return a fact of the run."""
        row = self.one("SELECT value FROM run WHERE key = ?", key)
        return default if row is None else json.loads(row["value"])

    def put(self, **facts: Any) -> None:
        """Set facts of the run."""
        with self.transaction():
            for key, value in facts.items():
                self.write("INSERT OR REPLACE INTO run VALUES (?, ?)", key, json.dumps(value))

    def keep_config(self, fingerprint: str, config: dict[str, Any]) -> None:
        """Keep a config under its fingerprint."""
        self.write("INSERT OR IGNORE INTO configs VALUES (?, ?)", fingerprint, json.dumps(config))

    def config(self, fingerprint: str) -> dict[str, Any]:
        """Return the config of a fingerprint."""
        row = self.one("SELECT config FROM configs WHERE fingerprint = ?", fingerprint)
        if row is None:
            raise OnwardError("the ledger has no such config", where=fingerprint)
        return json.loads(row["config"])

    # files

    def insert_file(self, **values: Any) -> int:
        """Record a file; returns its id."""
        values = {"arrived": self.clock(), **values}
        names = ", ".join(values)
        return self.write(f"INSERT INTO files ({names}) VALUES ({', '.join('?' * len(values))})", *values.values())

    def file(self, file_id: int) -> Row:
        """Return the file with this id."""
        row = self.one("SELECT * FROM files WHERE id = ?", file_id)
        if row is None:
            raise OnwardError("the ledger has no such file", where=file_id)
        return row

    def files(self, *states: str) -> list[Row]:
        """Files in these states: those with a position in stream order, then the queue in the order it is taken."""
        marks = ", ".join("?" * len(states))
        order = "position IS NULL, position, priority DESC, id"
        return self.query(f"SELECT * FROM files WHERE state IN ({marks}) ORDER BY {order}", *states)

    def holding(self, sha256: str) -> Row | None:
        """The file of the stream that has this content, if any."""
        marks = ", ".join("?" * len(HELD))
        return self.one(
            f"SELECT * FROM files WHERE sha256 = ? AND state IN ({marks}) ORDER BY id LIMIT 1", sha256, *HELD
        )

    def next_owed(self) -> Row | None:
        """The file to train now: the one begun, else the head of the queue."""
        begun = self.one("SELECT * FROM files WHERE state = 'training' ORDER BY position LIMIT 1")
        return begun or self.next_queued()

    def next_queued(self) -> Row | None:
        """The head of the queue: what has a position already, else by priority."""
        placed = self.one(
            "SELECT * FROM files WHERE state = 'queued' AND position IS NOT NULL ORDER BY position LIMIT 1"
        )
        return placed or self.one("SELECT * FROM files WHERE state = 'queued' ORDER BY priority DESC, id LIMIT 1")

    def next_arriving(self) -> Row | None:
        """The file that is to be checked next: the order of the queue that it wants to enter."""
        return self.one("SELECT * FROM files WHERE state = 'arriving' ORDER BY priority DESC, id LIMIT 1")

    def last_position(self) -> int:
        """The highest position given so far in the stream."""
        row = self.one(f"SELECT max(position) AS last FROM files WHERE {IN_STREAM}")
        return int(row["last"] or 0) if row else 0

    def at_position(self, position: int) -> Row | None:
        """Return the file at a place in the stream."""
        return self.one(f"SELECT * FROM files WHERE position = ? AND {IN_STREAM}", position)

    def queued(self) -> int:
        """Return how many files wait, those included whose rows are still to be checked."""
        row = self.one("SELECT count(*) AS n FROM files WHERE state IN ('queued', 'arriving')")
        return int(row["n"]) if row else 0

    def move_file(self, file_id: int, state: str, **values: Any) -> None:
        """Move a file to another state and set columns with it, in one transaction.

        Raises:
            OnwardError: the move is not legal.
        """
        with self.transaction():
            old = self.file(file_id)["state"]
            if state not in LEGAL.get(old, set()):
                raise OnwardError(f"a file cannot go from {old} to {state}", where=f"file id {file_id}")
            self.set_file(file_id, state=state, **values)

    def set_file(self, file_id: int, **values: Any) -> None:
        """Set columns of a file that stays in its state."""
        assignments = ", ".join(f"{name} = ?" for name in values)
        self.write(f"UPDATE files SET {assignments} WHERE id = ?", *values.values(), file_id)

    # checkpoints

    def begin_checkpoint(self, **values: Any) -> int:
        """Record that a checkpoint is about to be written; makes the metrics before it durable too."""
        values = {"state": "writing", "created": self.clock(), **values}
        names = ", ".join(values)
        return self.write(
            f"INSERT INTO checkpoints ({names}) VALUES ({', '.join('?' * len(values))})", *values.values()
        )

    def commit_checkpoint(self, checkpoint_id: int, *, size: int, seconds: float) -> None:
        """Record that a checkpoint is in place."""
        self.write(
            "UPDATE checkpoints SET state = 'committed', bytes = ?, seconds = ? WHERE id = ?",
            size, seconds, checkpoint_id,
        )  # fmt: skip

    def newest_checkpoint(self) -> Row | None:
        """The committed checkpoint with the highest step."""
        return self.one("SELECT * FROM checkpoints WHERE state = 'committed' ORDER BY step DESC, id DESC LIMIT 1")

    def lost_digest(self, step: int, basis: str) -> str | None:
        """The state digest of a checkpoint at `step` that was lost to damage, made on the same basis."""
        row = self.one(
            "SELECT state_digest FROM checkpoints WHERE step = ? AND basis = ? AND state = 'lost' ORDER BY id DESC",
            step,
            basis,
        )
        return row["state_digest"] if row else None

    # what observers read

    def add_handover(self, **values: Any) -> int:
        """Record a handover."""
        values = {"created": self.clock(), **values}
        names = ", ".join(values)
        return self.write(f"INSERT INTO handovers ({names}) VALUES ({', '.join('?' * len(values))})", *values.values())

    def add_config_change(self, step: int, file_id: int, key: str, old: Any, new: Any) -> None:
        """Record that a key took another value at a boundary."""
        self.write(
            "INSERT INTO config_changes (step, file_id, key, old, new, created) VALUES (?, ?, ?, ?, ?, ?)",
            step, file_id, key, json.dumps(old), json.dumps(new), self.clock(),
        )  # fmt: skip

    def add_event(self, level: str, message: str, step: int | None = None, *, kind: str | None = None) -> None:
        """Record what an operator should be able to read later; `kind` is what `notify.events` chooses by."""
        self.write(
            "INSERT INTO events (level, message, step, created, kind) VALUES (?, ?, ?, ?, ?)",
            level, message.encode(errors="backslashreplace").decode(), step, self.clock(), kind,
        )  # fmt: skip

    def events(self, limit: int = 20) -> list[Row]:
        """Return the newest events, oldest first."""
        return self.query("SELECT * FROM events ORDER BY id DESC LIMIT ?", limit)[::-1]

    def events_after(self, event_id: int, limit: int = 1000) -> list[Row]:
        """Return the events recorded after one, oldest first."""
        return self.query("SELECT * FROM events WHERE id > ? ORDER BY id LIMIT ?", event_id, limit)

    def steps(self, file_id: int) -> list[Row]:
        """Return the step records of a file."""
        return self.query("SELECT * FROM steps WHERE file_id = ? ORDER BY step", file_id)

    def history(self) -> list[Row]:
        """One row per file of the stream, with its first and last step, then those that were taken out of it."""
        return self.query(
            """
            SELECT f.*, s.trained, s.steps, s.first_step, s.last_step, s.seconds,
                a.loss AS first_loss, a.learning_rate AS first_learning_rate,
                b.loss AS last_loss, b.learning_rate AS last_learning_rate,
                (SELECT h.class FROM handovers h WHERE h.file_id = f.id AND h.kind = 'boundary'
                 ORDER BY h.id DESC LIMIT 1) AS handover
            FROM files f
            LEFT JOIN (
                SELECT file_id, sum(rows) AS trained, count(*) AS steps, min(step) AS first_step,
                    max(step) AS last_step, sum(seconds) AS seconds
                FROM steps GROUP BY file_id
            ) s ON s.file_id = f.id
            LEFT JOIN steps a ON a.file_id = f.id AND a.step = s.first_step
            LEFT JOIN steps b ON b.file_id = f.id AND b.step = s.last_step
            WHERE f.state IN ('queued', 'training', 'done', 'undone', 'skipped', 'quarantined')
            ORDER BY f.state IN ('undone', 'skipped', 'quarantined'), f.position IS NULL, f.position,
                f.priority DESC, f.id
            """
        )

    # control

    def add_request(self, kind: str, argument: str | None = None) -> int:
        """Record what an operator asks of the process that owns the run; returns the request's id."""
        return self.write(
            "INSERT INTO requests (kind, argument, created) VALUES (?, ?, ?)", kind, argument, self.clock()
        )

    def open_requests(self) -> list[Row]:
        """Return the requests that nobody acknowledged yet, oldest first."""
        return self.query("SELECT * FROM requests WHERE acknowledged IS NULL ORDER BY id")

    def last_request(self) -> int:
        """The id of the newest request, 0 where none was made."""
        row = self.one("SELECT coalesce(max(id), 0) AS id FROM requests")
        return int(row["id"]) if row else 0

    def acknowledge(self, request_id: int, answer: str) -> None:
        """Answer a request."""
        self.write("UPDATE requests SET acknowledged = ?, answer = ? WHERE id = ?", self.clock(), answer, request_id)

    # going back

    def trim(self, step: int, file_ids: Sequence[int], checkpoint_state: str) -> None:
        """Forget the step records after `step` of these files and mark later checkpoints as lost or undone."""
        with self.transaction():
            for file_id in file_ids:
                self.write("DELETE FROM steps WHERE file_id = ? AND step > ?", file_id, step)
            self.write(
                "UPDATE checkpoints SET state = ? WHERE step > ? AND state = 'committed'", checkpoint_state, step
            )
            self.write("DELETE FROM checkpoints WHERE state = 'writing'")
