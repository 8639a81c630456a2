"""The ledger is durable, moves legally, and is readable by others."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onward.errors import DamagedState, DeviceLost, OnwardError
from onward.store.database import LOG_BYTES, connect, refusal
from onward.store.ledger import Ledger, look_into, make_ledger
from onward.store.metrics import Metrics
from onward.store.migrations import MIGRATIONS, migrate
from onward.store.rows import StepRecord
from onward.store.waiting import Waiting


def add(ledger: Ledger, name: str, **values: object) -> int:
    """Record a queued file."""
    known = {"command": "c", "sha256": name * 8, "bytes": 1, "format": "jsonl", "copy": f"archive/{name}"}
    return ledger.insert_file(name=name, state="queued", **{**known, **values})


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """An empty ledger with a clock that stands still."""
    return Ledger(tmp_path / "ledger.sqlite3", clock=lambda: 1000.0, create=True)


def test_queue_is_taken_by_priority_then_arrival(ledger: Ledger) -> None:
    """The file begun goes first, then those that had a place in the stream, then priority, then arrival."""
    ids = {name: add(ledger, name, priority=priority) for name, priority in [("a", 0), ("b", 1), ("c", 0), ("d", -1)]}
    order: list[str] = []
    while row := ledger.next_owed():
        order.append(row.name)
        ledger.move_file(row.id, "training", position=len(order))
        assert ledger.next_owed() == ledger.file(row.id)
        ledger.move_file(row.id, "done")
    assert ["b", "a", "c", "d"] == order
    ledger.move_file(ids["c"], "queued")
    add(ledger, "e", priority=1)
    assert "c" == getattr(ledger.next_owed(), "name", None)


def test_illegal_moves_are_refused(ledger: Ledger) -> None:
    """A file cannot be done without having been trained, and nothing of a refused move is written."""
    file_id = add(ledger, "a")
    with pytest.raises(OnwardError, match="from queued to done"):
        ledger.move_file(file_id, "done", note="x")
    assert ("queued", None) == (ledger.file(file_id).state, ledger.file(file_id).note)


def test_a_failed_transaction_leaves_nothing(ledger: Ledger) -> None:
    """What was written inside a transaction that fails is gone, nested ones included."""

    def fail() -> None:
        with ledger.transaction():
            add(ledger, "a")
            with ledger.transaction():
                ledger.put(fact=1)
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        fail()
    assert [] == ledger.files("queued")
    assert ledger.get("fact") is None


def test_no_event_is_left_out_of_those_after_one(ledger: Ledger) -> None:
    """However many events a long command leaves, what the guard took back is among those after its beginning."""
    with ledger.transaction():
        for number in range(1200):
            ledger.add_event("info", str(number))
    ledger.add_event("error", "taken back", kind="quarantined")
    assert [*map(str, range(1, 1200)), "taken back"] == [event.message for event in ledger.events_after(1)]


def test_what_a_commit_takes_along_does_not_wait_for_the_disk(ledger: Ledger) -> None:
    """Only transactions in the body are not flushed one by one; what fails there is as anywhere else."""

    def level() -> int:
        return int(ledger.scalar("PRAGMA synchronous"))

    normal, full = 1, 2
    assert full == level()
    with contextlib.closing(connect(ledger.path, durable=False)) as other:
        assert (normal,) == other.execute("PRAGMA synchronous").fetchone()
    with ledger.without_waiting():
        ledger.put(state="training")
        assert normal == level()
    assert full == level()
    with pytest.raises(ZeroDivisionError), ledger.without_waiting(), ledger.transaction():
        raise ZeroDivisionError
    assert full == level()
    with ledger.transaction(), ledger.without_waiting():
        ledger.put(state="saving")
        assert full == level()
    with Ledger(ledger.path, read_only=True) as reader:
        assert "saving" == reader.get("state")


def test_foreign_keys_hold(ledger: Ledger) -> None:
    """A step of a file that does not exist is refused."""
    metrics = Metrics(ledger.path)
    with pytest.raises(sqlite3.IntegrityError):
        metrics.append(StepRecord(99, 1, 1, 0, 1, "d", 1, 1, 0.5, 0.1, 1.0, 0.1))


def test_readers_see_steps_while_they_are_written(ledger: Ledger) -> None:
    """A reader sees each step record as soon as it is written, and a reader cannot write."""
    file_id = add(ledger, "a")
    metrics = Metrics(ledger.path)
    with Ledger(ledger.path, read_only=True) as reader:
        for step in (1, 2):
            metrics.append(StepRecord(file_id, step, step, 0, 1, "d", 1, 1, 0.5, 0.1, 1.0, 0.1))
            assert step == len(reader.steps(file_id))
        with pytest.raises(sqlite3.OperationalError):
            reader.put(fact=1)


def test_a_look_is_of_one_moment(ledger: Ledger) -> None:
    """What others write during a look is seen by the next one, not by half of this one; and it writes nothing."""
    with look_into(ledger.path) as look:
        before = look.files("queued"), look.get("state")
        add(ledger, "a")
        ledger.put(state="training")
        assert before == (look.files("queued"), look.get("state"))
        with pytest.raises(sqlite3.OperationalError):
            look.put(state="idle")
    with look_into(ledger.path) as look:
        assert (["a"], "training") == ([row.name for row in look.files("queued")], look.get("state"))


def test_going_back_forgets_steps_and_marks_checkpoints(ledger: Ledger) -> None:
    """`trim` forgets later steps of the files named and keeps later checkpoints under another state."""
    file_id = add(ledger, "a")
    metrics = Metrics(ledger.path)
    for step in (1, 2, 3):
        metrics.append(StepRecord(file_id, step, step, 0, 1, "d", 1, 1, 0.5, 0.1, 1.0, 0.1))
        number = ledger.begin_checkpoint(step=step, boundary=0, state_digest=f"digest {step}", basis="b")
        ledger.commit_checkpoint(number, size=1, seconds=0.1)
    ledger.begin_checkpoint(step=4, boundary=0, state_digest="never written", basis="b")
    ledger.trim(1, [file_id], "lost")
    assert [1] == [row.step for row in ledger.steps(file_id)]
    assert 1 == ledger.committed_step()
    assert "digest 3" == ledger.lost_digest(3, "b")
    assert ledger.lost_digest(3, "another basis") is None
    assert ledger.lost_digest(4, "b") is None


def test_a_ledger_of_the_future_is_refused(ledger: Ledger) -> None:
    """A schema that this release does not know is refused with the remedy, also by who only looks at it.

    A process that has it open while a newer release changes it ends, so that a new process continues.
    """
    ledger.require_own_release()
    known = len(MIGRATIONS)
    ledger.write(f"PRAGMA user_version = {known + 1}")
    refusal = rf"^the ledger has schema {known + 1}, this release knows {known}(.|\n)*pip install --upgrade onward"
    for read_only in (False, True):
        with pytest.raises(OnwardError, match=refusal):
            Ledger(ledger.path, read_only=read_only)
    with pytest.raises(DeviceLost, match="Start another process"):
        ledger.require_own_release()


def test_a_ledger_that_is_no_database_is_refused(tmp_path: Path) -> None:
    """Garbage in place of the ledger is damage, never a fresh ledger."""
    path = tmp_path / "ledger.sqlite3"
    path.write_bytes(b"garbage" * 1000)
    with pytest.raises(DamagedState, match="cannot be read"):
        Ledger(path)
    assert b"garbage" * 1000 == path.read_bytes()


def test_a_ledger_of_the_first_release_is_brought_up(tmp_path: Path) -> None:
    """A ledger of schema 1 keeps its files, steps and events, references included, and takes the new states."""
    path = tmp_path / "ledger.sqlite3"
    with sqlite3.connect(path) as old:
        old.executescript(f"BEGIN;\n{MIGRATIONS[0]}\nPRAGMA user_version = 1;\nCOMMIT;")
        old.execute(
            "INSERT INTO files (id, command, name, sha256, bytes, format, copy, state, position, arrived)"
            " VALUES (7, 'c', 'a.jsonl', 'aa', 1, 'jsonl', 'archive/a.jsonl', 'training', 1, 5.0)"
        )
        old.execute("INSERT INTO steps VALUES (7, 1, 1, 0, 1, 'd', 1, 1, 0.5, 0.1, 1.0, 0.1)")
        old.execute("INSERT INTO events (level, message, created) VALUES ('info', 'old', 1.0)")
    old.close()
    with Ledger(path) as ledger:
        assert [] == ledger.query("PRAGMA foreign_key_check")
        assert [{"foreign_keys": 1}] == ledger.query("PRAGMA foreign_keys")
        assert [1] == [row.step for row in ledger.steps(7)]
        assert [("old", None)] == [(event.message, event.kind) for event in ledger.events()]
        ledger.move_file(7, "skipped", position=None, note="no use")
        assert "skipped" == ledger.file(7).state
        with pytest.raises(sqlite3.IntegrityError):
            ledger.write("INSERT INTO steps VALUES (8, 1, 1, 0, 1, 'd', 1, 1, 0.5, 0.1, 1.0, 0.1, 0, NULL)")


def test_a_transaction_that_the_disk_refuses_leaves_none_open(tmp_path: Path) -> None:
    """After a commit that failed, the next transaction is one of its own and is kept."""
    ledger = Ledger(tmp_path / "ledger.sqlite3", create=True)
    pages = ledger.query("PRAGMA page_count")[0]["page_count"]
    ledger.query(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        ledger.put(large="x" * 100_000)
    ledger.query("PRAGMA max_page_count = 100000")
    ledger.put(small=1)
    with Ledger(ledger.path, read_only=True) as reader:
        assert (None, 1) == (reader.get("large"), reader.get("small"))


def test_the_log_is_cut_back_after_a_long_reader(tmp_path: Path) -> None:
    """While a reader keeps its view the log grows; once it is gone the next commits cut the log back to its bound."""
    path = tmp_path / "ledger.sqlite3"
    log = path.with_name("ledger.sqlite3-wal")
    make_ledger(path)
    with Ledger(path) as ledger:
        with Ledger(path, read_only=True) as reader:
            reader.query("BEGIN")
            reader.query("SELECT * FROM files")
            for _ in range(24):
                ledger.add_event("info", "x" * (1 << 20))
            assert LOG_BYTES < log.stat().st_size
            assert [] == reader.events()
        for _ in range(3):
            ledger.add_event("info", "short")
        assert LOG_BYTES >= log.stat().st_size
        assert 27 == len(ledger.events(100))


@pytest.mark.parametrize(
    ("code", "is_damage"),
    [
        (sqlite3.SQLITE_IOERR_FSYNC, False), (sqlite3.SQLITE_FULL, False), (sqlite3.SQLITE_READONLY_DBMOVED, False),
        (sqlite3.SQLITE_PROTOCOL, False), (sqlite3.SQLITE_CORRUPT_VTAB, True), (sqlite3.SQLITE_ERROR, True),
    ],
)  # fmt: skip
def test_a_machine_that_fails_is_no_damage(tmp_path: Path, code: int, is_damage: bool) -> None:
    """A full or failing disk is raised as it is; what SQLite finds wrong in the file, or no file, is damage."""
    path = tmp_path / "ledger.sqlite3"
    error = sqlite3.DatabaseError("what SQLite said")
    error.sqlite_errorcode = code
    assert isinstance(refusal(path, error), DamagedState)
    make_ledger(path)
    assert is_damage is isinstance(refusal(path, error), DamagedState)
    assert is_damage is (refusal(path, error) is not error)


def test_a_signal_is_noticed_while_others_write(ledger: Ledger) -> None:
    """Who waits to write because somebody else does is interrupted by a signal at once, not when the wait is over."""
    other = sqlite3.connect(ledger.path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    came, first = threading.Event(), list[bool]()

    def interrupt(*_: object) -> None:
        came.set()
        raise InterruptedError

    def signal_and_let_go() -> None:
        os.kill(os.getpid(), signal.SIGUSR2)
        first.append(came.wait(10))
        other.rollback()

    before = signal.signal(signal.SIGUSR2, interrupt)
    waiting = threading.Timer(0.3, signal_and_let_go)
    try:
        waiting.start()
        with contextlib.suppress(sqlite3.OperationalError), pytest.raises(InterruptedError):
            ledger.put(paused=None)
    finally:
        waiting.join()
        signal.signal(signal.SIGUSR2, before)
        other.close()
    assert [True] == first
    ledger.put(paused=None)


class Late(sqlite3.Connection):
    """A connection that begins to write only after another one did what it wanted."""

    meanwhile: Callable[[], object] = staticmethod(lambda: None)

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        """Execute a statement; the lock is taken after the other one let it go."""
        if sql == "BEGIN IMMEDIATE":
            self.meanwhile()
            self.meanwhile = lambda: None
        return super().execute(sql, *values)


@pytest.mark.parametrize("is_held", [False, True])
def test_two_processes_bring_the_same_ledger_up(is_held: bool, tmp_path: Path) -> None:
    """Whoever comes second, before or after it asked for the lock, finds nothing left to do; its references hold."""
    path = tmp_path / "ledger.sqlite3"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as first:
        first.execute("PRAGMA journal_mode = WAL")
        for script in MIGRATIONS[:-1]:
            first.executescript(script)
        first.execute(f"PRAGMA user_version = {len(MIGRATIONS) - 1}")

        def go_on() -> bool:
            for statement in f"{MIGRATIONS[-1]} PRAGMA user_version = {len(MIGRATIONS)}; COMMIT".split(";"):
                first.execute(statement)
            return False

        with contextlib.closing(sqlite3.connect(path, timeout=0.0, isolation_level=None, factory=Late)) as second:
            second.meanwhile = (lambda: None) if is_held else go_on
            first.execute("BEGIN IMMEDIATE")
            Waiting(should_end=go_on).for_others(lambda: migrate(second))
            seen = [second.execute(f"PRAGMA {name}").fetchone()[0] for name in ("user_version", "foreign_keys")]
    assert [len(MIGRATIONS), 1] == seen


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS)))
def test_a_ledger_of_any_release_has_all_columns_for_who_reads_it(version: int, ledger: Ledger, tmp_path: Path) -> None:
    """Whoever only reads finds every table and column of today: missing ones are empty or have their defaults."""
    path = tmp_path / "old.sqlite3"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as old:
        for script in MIGRATIONS[:version]:
            old.executescript(script)
        old.execute(f"PRAGMA user_version = {version}")
        columns = "file_id, step, step_in_file, epoch, rows, rows_digest, tokens, target_tokens, loss, learning_rate"
        old.execute(
            f"INSERT INTO steps ({columns}, grad_norm, seconds) VALUES (7, 1, 1, 0, 1, 'd', 1, 1, 0.5, 0.1, 1.0, 0.1)"
        )
    before = path.read_bytes()
    with Ledger(path, read_only=True) as reader:
        for (table,) in map(dict.values, ledger.query("SELECT name FROM sqlite_master WHERE type = 'table'")):
            todays = {row["name"] for row in ledger.query(f"PRAGMA table_info({table})")}
            assert todays <= {row["name"] for row in reader.query(f"PRAGMA table_info({table})")}
            reader.query(f"SELECT {', '.join(todays)} FROM {table}")
        assert [(1, 0, None)] == [(row.step, row.replayed, row.anchor) for row in reader.steps(7)]
        assert reader.is_snapshot
    assert before == path.read_bytes()
    with Ledger(path) as owner:
        assert not owner.is_snapshot
    with Ledger(path, read_only=True) as reader:
        assert not reader.is_snapshot
