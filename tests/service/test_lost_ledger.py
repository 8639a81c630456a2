"""The ledger is removed or replaced while a daemon owns the run."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import onward
from daemons import LONG, PATIENCE, SETTINGS, end, hold, is_in, rows_file, until, watch
from faults import assert_complete
from runs import new_run

from onward import Run
from onward.errors import DamagedState
from onward.layout import RunLayout
from onward.store.ledger import Ledger

COPY = "ledger.copy"
"""A copy of the ledger from when the run was made."""


def remove(layout: RunLayout) -> None:
    """Remove the ledger and its log."""
    for path in layout.root.glob("ledger.sqlite3*"):
        path.unlink()


def replace(layout: RunLayout) -> None:
    """Put an older copy in the ledger's place."""
    remove(layout)
    shutil.copy(layout.root / COPY, layout.ledger)


def restore(layout: RunLayout) -> None:
    """Write the content of an older copy into the ledger, as SQLite's shell does (`.restore`): the file is the same."""
    with (
        contextlib.closing(sqlite3.connect(layout.root / COPY)) as source,
        contextlib.closing(sqlite3.connect(layout.ledger)) as target,
    ):
        source.backup(target)


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Run:
    """A run that has trained one file."""
    made = new_run(tmp_path / "run", model, **SETTINGS)
    shutil.copy(made.layout.ledger, made.layout.root / COPY)
    made.train(rows_file(tmp_path / "a.jsonl", 4))
    return made


def require_told(run: Run, log: Path) -> list[str]:
    """The process named the ledger and the way out, and claimed no commit; returns the words of the command named."""
    words = log.read_text()
    assert "the ledger was removed or replaced" in words
    assert "committed" not in words.replace("last commit", "")
    assert "Traceback" not in words
    command = shlex.split(words.rpartition("last commit: ")[2].splitlines()[0])
    assert ["onward", "adopt", str(run.layout.checkpoints()[0]), "--run", "NEW_RUN"] == command
    return command


@pytest.mark.parametrize("lose", [remove, replace, restore])
@pytest.mark.parametrize("by", ["itself", "a stop"])
def test_in_the_middle_of_a_file(run: Run, tmp_path: Path, lose: Callable[[RunLayout], None], by: str) -> None:
    """The process ends with status 5, names the way out and claims no commit; nobody makes another ledger."""
    run.add(rows_file(tmp_path / "b.jsonl", LONG))
    held = hold(run)
    process = watch(run, prepare=held)
    until(is_in(run, "b.jsonl"), process)
    lose(run.layout)
    if by == "a stop":
        assert 5 == end(process, signal.SIGTERM)
    else:
        held.let_go.touch()
        process.join(PATIENCE)
        assert 5 == process.exitcode
    require_told(run, tmp_path / "log")
    assert (lose is not remove) == run.layout.ledger.exists()


@pytest.mark.parametrize("place", ["middle of a file", "idle"])
def test_a_log_that_is_removed(place: str, run: Run, tmp_path: Path) -> None:
    """The process cannot use the ledger any more, so it ends with status 5; the next one goes on with all of it."""
    held, name = hold(run), "b.jsonl"
    if place != "idle":
        run.add(rows_file(tmp_path / name, LONG))
    process = watch(run, prepare=held)
    until(is_in(run, name) if place != "idle" else lambda: run.status()["heartbeat_seconds"] is not None, process)
    run.layout.ledger.with_name("ledger.sqlite3-wal").unlink()
    held.let_go.touch()
    process.join(PATIENCE)
    assert 5 == process.exitcode
    assert "the log of the ledger was removed or replaced" in (tmp_path / "log").read_text()
    run.train(*[] if place != "idle" else [rows_file(tmp_path / name, LONG)])
    assert_complete(run.layout.root)


def test_while_nothing_is_trained(run: Run, tmp_path: Path) -> None:
    """An idle daemon notices, too; status, doctor and every command then say so, and the way out works."""
    process = watch(run)
    until(lambda: run.status()["state"] == "idle", process)
    step = run.status()["global_step"]
    remove(run.layout)
    process.join(PATIENCE)
    assert 5 == process.exitcode
    command = require_told(run, tmp_path / "log")
    for words in (["status"], ["history"], ["train"], ["stop"], ["add", tmp_path / "a.jsonl"]):
        outcome = onward(*words, "--run", run.layout.root)
        assert (5, True) == (outcome.status, shlex.join(command) in outcome.err), words
    examined = onward("doctor", "--run", run.layout.root)
    assert (1, True) == (examined.status, shlex.join(command) in examined.out)
    assert not run.layout.ledger.exists()
    adopted = Run.adopt(command[2], tmp_path / "new")
    assert step == adopted.status()["global_step"]
    assert adopted.verify().ok


def test_an_emptied_ledger_is_no_new_one(run: Run) -> None:
    """Every command says that it is empty and names the way out; none shows a run without files or makes tables."""
    run.layout.ledger.with_name("ledger.sqlite3-wal").unlink(missing_ok=True)
    run.layout.ledger.write_bytes(b"")
    command = shlex.join(["onward", "adopt", str(run.layout.checkpoints()[0]), "--run", "NEW_RUN"])
    for words in (["status"], ["history"], ["train"], ["stop"], ["grid"], ["verify"]):
        outcome = onward(*words, "--run", run.layout.root)
        assert (5, True, True) == (outcome.status, "the ledger is empty" in outcome.err, command in outcome.err), words
    examined = onward("doctor", "--run", run.layout.root)
    assert (1, True, True) == (examined.status, "the ledger is empty" in examined.out, command in examined.out)
    assert b"CREATE TABLE" not in run.layout.ledger.read_bytes()


def test_a_process_notices_that_its_ledger_was_emptied(run: Run) -> None:
    """The file is the same and its content is gone: that is damage, not a machine to be waited for."""
    with Ledger(run.layout.ledger) as ledger:
        os.truncate(run.layout.ledger, 0)
        with pytest.raises(DamagedState, match="the ledger is empty"):
            ledger.require_in_place()


def test_only_a_new_run_makes_a_ledger(tmp_path: Path) -> None:
    """A missing ledger is said to be missing, and stays missing."""
    path = tmp_path / "ledger.sqlite3"
    for read_only in (False, True):
        with pytest.raises(DamagedState, match="removed or replaced"):
            Ledger(path, read_only=read_only)
    assert [] == list(tmp_path.iterdir())
