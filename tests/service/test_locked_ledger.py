"""Another program holds the ledger locked: a stop is obeyed all the same, and nothing that was committed is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
from collections.abc import Generator
from pathlib import Path

import pytest
from daemons import PATIENCE, SETTINGS, done, hold, is_in, rows_file, twin_of, until, watch
from processes import start_command
from runs import new_run
from states import assert_same_state

from onward import Run
from onward.store.ledger import Ledger, make_ledger
from onward.store.waiting import LAST, Waiting

ROWS = 20


@contextlib.contextmanager
def locked(run: Run) -> Generator[None]:
    """Hold the ledger of a run locked for writing, as another program does."""
    with contextlib.closing(sqlite3.connect(run.layout.ledger, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


@pytest.mark.parametrize(("way", "number"), [("watch", signal.SIGTERM), ("train", signal.SIGINT)])
def test_a_stop_is_obeyed(tmp_path: Path, model: Path, way: str, number: signal.Signals) -> None:
    """A signal ends `train` and `watch` although the ledger stays locked; the next process trains what is missing, and
    the state is that of a run that was never stopped.
    """
    run, file = new_run(tmp_path / "run", model, **SETTINGS), rows_file(tmp_path / "a.jsonl", ROWS)
    if way == "watch":
        shutil.copy(file, run.layout.inbox)
        process = watch(run, prepare=hold(run, step=7))
    else:
        process = start_command(tmp_path / "log", "train", file, "--run", run.layout.root, prepare=hold(run, step=7))
    until(is_in(run, "a.jsonl", step=7), process)
    with locked(run):
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(PATIENCE)
        assert not process.is_alive()
        said = (tmp_path / "log").read_text()
    assert ("another program holds the ledger locked" in said) is (way == "train")
    assert ["a.jsonl"] == [entry["name"] for entry in run.train()] == done(run)
    assert_same_state(twin_of(run, model, [file]), run.layout.root)
    assert run.verify().ok


class Program:
    """A process as `Waiting` sees it: a clock, whether it was asked to end, and accesses that others keep from it."""

    def __init__(self, held: float, ends_at: float = float("inf")) -> None:
        self.now, self.held, self.ends_at = 0.0, held, ends_at
        self.waiting = Waiting(30.0, should_end=lambda: self.now >= self.ends_at, monotonic=lambda: self.now)

    def access(self) -> float:
        """Use the ledger; return when that was possible."""
        return self.waiting.for_others(self._try)

    def _try(self) -> float:
        if self.now >= self.held:
            return self.now
        self.now += 0.25
        error = sqlite3.OperationalError("database is locked")
        error.sqlite_errorcode = sqlite3.SQLITE_BUSY
        raise error


def test_an_access_waits_for_a_while() -> None:
    """Who is not asked to end waits for others up to 30 seconds, at every access."""
    assert 29.0 == Program(held=29.0).access()
    program = Program(held=100.0)
    for ends in (30.0, 60.0):
        with pytest.raises(sqlite3.OperationalError):
            program.access()
        assert ends == program.now


def test_a_process_that_should_end_waits_for_a_moment_in_all() -> None:
    """From when it is asked to end, all accesses together wait a few seconds, and later ones are tried once."""
    program = Program(held=100.0, ends_at=10.0)
    with pytest.raises(sqlite3.OperationalError):
        program.access()
    assert 10.0 + LAST - 0.25 == program.now  # the try in which it was asked counts, too
    with pytest.raises(sqlite3.OperationalError):
        program.access()
    assert 10.0 + LAST == program.now


def test_only_waiting_counts() -> None:
    """A commit that takes long after a stop waits for another writer as one that takes no time."""
    program = Program(held=1000.0 + LAST / 2, ends_at=10.0)
    program.now = 1000.0
    assert program.held == program.access()


@pytest.mark.parametrize("read_only", [True, False])
def test_opening_and_reading_wait_as_writing_does(tmp_path: Path, read_only: bool) -> None:
    """Who holds the whole file keeps others from opening it; they wait as long as they would for a writer."""
    path = tmp_path / "ledger.sqlite3"
    make_ledger(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            Ledger(path, read_only=read_only, waiting=Waiting(0.0))
    with Ledger(path, read_only=read_only) as ledger:
        assert "idle" == ledger.get("state")


def test_other_failures_are_raised_at_once() -> None:
    """What does not come from others is no reason to wait."""
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        Waiting().for_others(lambda: sqlite3.connect(":memory:").execute("SELECT * FROM missing"))
