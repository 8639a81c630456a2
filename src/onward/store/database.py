"""One SQLite file: how it is opened, its schema, its transactions, and which of its errors are damage."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Generator
from pathlib import Path
from typing import Any, TypeVar

from onward.errors import DamagedState, OnwardError, Outdated, UsageError
from onward.layout import RunLayout
from onward.store.migrations import fill_in, is_newer, migrate
from onward.store.waiting import TRY, Waiting, code_of, is_held_by_others
from onward.text import quoted

PASSING = {
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_PROTOCOL,
}  # fmt: skip
"""SQLite errors that say nothing about the content: the disk is full, failing or closed, or others use the file."""
FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}
"""SQLite errors that may mean that the disk has no room for the files of its log."""
DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
"""SQLite errors that mean that the content is damaged."""

LOG_BYTES = 16 << 20
"""Bytes that SQLite's log is truncated to after a long-lived reader let it grow."""

OPTIONS: dict[str, Any] = {"uri": True, "isolation_level": None, "check_same_thread": False}

Values = dict[str, Any]
Record = TypeVar("Record")


def connect(
    path: Path,
    *,
    durable: bool = True,
    read_only: bool = False,
    create: bool = False,
    waiting: Waiting | None = None,
) -> sqlite3.Connection:
    """Open a ledger file; a missing one is made only with `create`, because a run is made once.

    Args:
        durable: make each transaction wait for the disk (`synchronous=FULL`).
        waiting: how long to wait for others that hold it.

    Raises:
        DamagedState: it is gone, or not a database.
        UsageError: this user may not read it or, unless `read_only`, may not write it.
        sqlite3.DatabaseError: the machine fails, or others hold it.
    """
    waiting = waiting or Waiting()
    try:
        if read_only:
            connection = _connect_to_look(path, waiting)
        else:
            connection = _connect(f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}")
            waiting.for_others(lambda: connection.execute("PRAGMA journal_mode = WAL"))
            connection.execute("PRAGMA fullfsync = ON")  # macOS: `fsync` alone does not reach the disk
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            connection.execute(f"PRAGMA journal_size_limit = {LOG_BYTES}")
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.DatabaseError as error:
        raise refusal(path, error) from None
    return connection


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def begin(connection: sqlite3.Connection, waiting: Waiting) -> None:
    """Begin to write, once nobody else does.

    Raises:
        sqlite3.OperationalError: others still write after a while, or the machine fails.
    """
    waiting.for_others(lambda: connection.execute("BEGIN IMMEDIATE"))


def _connect_to_look(path: Path, waiting: Waiting) -> sqlite3.Connection:
    """Open a ledger for reading only.

    SQLite needs the two files of its log next to the ledger, and makes them if they are missing. Where they cannot be
    made, because this user may not or the disk is full, a ledger without a log is read as a single file: nobody is
    writing to it then.

    Raises:
        UsageError: the user may not read it.
    """
    path = path.resolve()  # the log is next to a link's target
    address = f"{path.as_uri()}?mode=ro"
    try:
        connection = _connect(address)
        waiting.for_others(lambda: connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall())
        return connection
    except sqlite3.OperationalError as error:
        log = log_of(path)
        if is_held_by_others(error) or not path.exists():
            raise
        if os.access(path.parent, os.W_OK):
            if code_of(error) not in FULL or (log.exists() and log.stat().st_size):
                raise  # not a matter of permissions or room
        elif not os.access(path, os.R_OK) or log.exists():
            hint = f"Run this as the user who owns the run, or make {quoted(path)} and its -wal and -shm readable."
            raise UsageError("this user may not read the ledger", where=path, hint=hint) from None
    return sqlite3.connect(f"{address}&immutable=1", factory=Snapshot, **OPTIONS)


def log_of(path: Path) -> Path:
    """Return the file with what SQLite has not written into a database yet."""
    return path.with_name(f"{path.name}-wal")


class Snapshot(sqlite3.Connection):
    """A connection that does not notice what others write after it was opened."""


def _connect(address: str) -> sqlite3.Connection:
    return sqlite3.connect(address, timeout=TRY, **OPTIONS)


def refusal(path: Path, error: sqlite3.DatabaseError) -> Exception:
    """Return what to raise for an SQLite error: the error itself if the machine, not the ledger, is at fault."""
    if code_of(error) == sqlite3.SQLITE_READONLY and not _may_write(path):
        hint = "Run this as the user who owns the run; onward doctor names what this user may not write."
        return UsageError("this user may not write the ledger", where=path, hint=hint)
    if code_of(error) not in PASSING:
        return damaged(path, error)
    return error if path.exists() else RunLayout(path.parent).lost_ledger()


def _may_write(path: Path) -> bool:
    """Whether this user may write all that SQLite needs; an existing log is part of it."""
    own = [place for name in ("", "-wal", "-shm") if (place := path.with_name(f"{path.name}{name}")).exists()]
    return all(os.access(place, os.W_OK) for place in (path.parent, *own))


def damaged(path: Path, error: BaseException) -> DamagedState:
    """Return the refusal for a ledger that SQLite cannot read."""
    hint = RunLayout(path.parent).way_without_ledger()
    return DamagedState(f"the ledger cannot be read: {error}", where=path, hint=hint)


class Database:
    """A connection with nested transactions and rows as records.

    Args:
        path: the file `ledger.sqlite3`.
        clock: seconds since the epoch; injected by tests.
        create: make the file with its schema if it is missing; otherwise that is an error.
        waiting: how long to wait for others that hold it; a process shares one among its connections.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.time,
        read_only: bool = False,
        create: bool = False,
        waiting: Waiting | None = None,
    ) -> None:
        self.path = path
        self.clock = clock
        self.waiting = waiting or Waiting()
        self._connection = connect(path, read_only=read_only, create=create, waiting=self.waiting)
        self.is_snapshot = isinstance(self._connection, Snapshot)
        """Whether what others write is seen only once the file is opened again."""
        self._identity = _identity(path)
        try:
            self._require_schema(read_only=read_only, create=create)
        except (sqlite3.DatabaseError, OnwardError) as error:
            self._connection.close()
            raise refusal(path, error) if isinstance(error, sqlite3.DatabaseError) else error from None
        self._log = log_of(path.resolve())  # next to a link's target
        self._log_identity = None if read_only else _identity(self._log)

    def _require_schema(self, *, read_only: bool, create: bool) -> None:
        """Bring the schema up to date; where nothing may be written, let this connection see it as if it were."""
        if not create and not self.scalar("PRAGMA user_version"):
            raise RunLayout(self.path.parent).empty_ledger()
        if read_only:
            self.is_snapshot = fill_in(self._connection) or self.is_snapshot
        else:
            self.waiting.for_others(lambda: migrate(self._connection))

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def flush(self) -> None:
        """Write everything into the file itself, so that it may be renamed: closing does so, but says no failure.

        Raises:
            sqlite3.OperationalError: the machine fails.
        """
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def copy_to(self, path: Path) -> None:
        """Write the current database into a new file, even if others write to it meanwhile.

        Raises:
            sqlite3.DatabaseError: the machine fails.
        """
        with contextlib.closing(connect(path, create=True)) as target:
            self._connection.backup(target)

    def require_in_place(self) -> None:
        """Raise if the file or its log was removed, replaced or emptied under this process; asked in any thread.

        SQLite itself removes a log only when nobody uses the file any more.

        Raises:
            DamagedState: it was; whatever is written now would be lost.
        """
        if _identity(self.path) != self._identity:
            raise RunLayout(self.path.parent).lost_ledger()
        if not self.path.stat().st_size:
            raise RunLayout(self.path.parent).empty_ledger()
        if self._log_identity is not None and _identity(self._log) != self._log_identity:
            what = "the log of the ledger was removed or replaced, and what was recorded last may be lost with it"
            hint = "onward train goes on from the last commit, or says what is missing."
            raise DamagedState(what, where=self._log.absolute(), hint=hint)

    def require_own_release(self) -> None:
        """Raise if a newer release has changed the file under this process, or others removed it.

        It is asked in the thread that uses the connection: a question from another one would hold its view of the file.

        Raises:
            DamagedState: it was removed, replaced or emptied.
            Outdated: its schema was brought up to date, as an upgrade under a running process does.
        """
        self.require_in_place()
        if is_newer(self.scalar("PRAGMA user_version")):
            what = "a newer release has changed the ledger while this process ran"
            raise Outdated(what, where=self.path, hint="Start another process; it goes on from the last commit.")

    def version(self) -> int:
        """Return a number that changes when another connection has written to the file since the last call."""
        if self.is_snapshot:
            return sum(path.stat().st_mtime_ns for path in (self.path, log_of(self.path)) if path.exists())
        return int(self.scalar("PRAGMA data_version"))

    @contextlib.contextmanager
    def transaction(self) -> Generator[None]:
        """Make the statements in the body one durable transaction; a nested one joins the outer one."""
        if self._connection.in_transaction:
            yield
            return
        try:  # a signal may interrupt right after BEGIN
            begin(self._connection, self.waiting)
            yield
            self._connection.execute("COMMIT")
        except BaseException as error:
            if self._connection.in_transaction:  # a full or failing disk may have caused a rollback
                self._connection.execute("ROLLBACK")
            if code_of(error) in DAMAGE:
                raise damaged(self.path, error) from None
            raise

    @contextlib.contextmanager
    def one_moment(self) -> Generator[None]:
        """Let everything that the body reads be of one moment, whatever others write meanwhile; nothing is written."""
        self._connection.execute("BEGIN")
        try:
            yield
        finally:
            self._connection.rollback()

    @contextlib.contextmanager
    def without_waiting(self) -> Generator[None]:
        """Let no transaction in the body wait for the disk; the next one that does makes them durable too.

        SQLite's log is written in order, so a power cut loses only the newest transactions and none in between.
        Processes that are killed lose nothing.
        """
        if self._connection.in_transaction:  # the outer transaction decides
            yield
            return
        self._connection.execute("PRAGMA synchronous = NORMAL")
        try:
            yield
        finally:
            self._connection.execute("PRAGMA synchronous = FULL")

    def query(self, sql: str, *values: Any) -> list[Values]:
        """Return the rows of a query as dictionaries."""
        try:
            cursor = self.waiting.for_others(lambda: self._connection.execute(sql, values))
            names = [column[0] for column in cursor.description or ()]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
        except sqlite3.DatabaseError as error:
            raise refusal(self.path, error) from None

    def records(self, kind: type[Record], sql: str, *values: Any) -> list[Record]:
        """Return the rows of a query as records of a class whose fields are the query's columns."""
        return [kind(**row) for row in self.query(sql, *values)]

    def record(self, kind: type[Record], sql: str, *values: Any) -> Record | None:
        """Return the first row of a query as a record, or None."""
        return next(iter(self.records(kind, sql, *values)), None)

    def scalar(self, sql: str, *values: Any) -> Any:
        """Return the value of a query with one column and at most one row; None if there is no row."""
        rows = self.query(sql, *values)
        return next(iter(rows[0].values())) if rows else None

    def write(self, sql: str, *values: Any) -> int:
        """Run one statement; return the id of an inserted row."""
        with self.transaction():
            return int(self._connection.execute(sql, values).lastrowid or 0)

    def insert(self, table: str, values: Values, *, replace: bool = False) -> int:
        """Insert a row, given by column; return its id.

        Args:
            replace: whether it takes the place of one with the same key.
        """
        into = "INSERT OR REPLACE INTO" if replace else "INSERT INTO"
        return self.write(f"{into} {table} ({', '.join(values)}) VALUES ({marks(values)})", *values.values())


def marks(values: Collection[object]) -> str:
    """Return a question mark for each value, for SQL."""
    return ", ".join("?" * len(values))
