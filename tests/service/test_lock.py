"""One process owns a run, and the lock dies with it."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
from filelock import FileLock
from runs import new_run

from onward import Run
from onward.errors import OnwardError, RunLocked, UsageError
from onward.service.holder import SILENCE, beat_of, is_held, read_heartbeat, read_holder
from onward.service.lock import RunLock
from onward.service.proof.doctor.examination import examine
from onward.store.ledger import Ledger


def test_second_owner_is_refused_with_the_first_named(tmp_path: Path) -> None:
    """While one holds the run, another is refused with pid, host and what can be done; afterwards the run is free."""
    lock = tmp_path / ".lock"
    owner = RunLock(lock)
    with owner:
        assert is_held(lock)
        assert os.getpid() == (read_holder(lock) or {})["pid"]
        with pytest.raises(RunLocked, match=f"pid {os.getpid()}") as refused, RunLock(lock, patience=0):
            pass
        for command in ("onward status", "onward add", "onward stop"):  # whoever wants the run itself ends the owner
            assert command in str(refused.value.hint)
    assert (False, None) == (is_held(lock), read_holder(lock))
    with RunLock(lock):
        pass


def test_name_of_a_dead_holder_refuses_nobody(tmp_path: Path) -> None:
    """What a killed process wrote about itself is no lock: only the kernel's lock counts."""
    lock = tmp_path / ".lock"
    (tmp_path / ".lock.holder").write_text('{"pid": 1, "host": "elsewhere", "started": 0}')
    with RunLock(lock):
        assert os.getpid() == (read_holder(lock) or {})["pid"]


def test_holder_without_a_name_is_still_an_owner(tmp_path: Path) -> None:
    """A lock whose holder left no name still refuses."""
    lock = tmp_path / ".lock"
    with FileLock(lock), pytest.raises(RunLocked, match="its name is not recorded"), RunLock(lock, patience=0):
        pass


def test_a_name_that_cannot_be_removed_keeps_no_lock(tmp_path: Path) -> None:
    """What lies where the holder writes its name stays, and the run is free when the holder is done."""
    lock = tmp_path / ".lock"
    (tmp_path / ".lock.holder").mkdir()
    with RunLock(lock):
        assert is_held(lock)
    assert not is_held(lock)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"pid": "x", "host": "h", "started": 1}', '{"pid": 1, "host": "h", "started": null}']
)
def test_a_name_that_is_damaged_is_none(text: str, tmp_path: Path) -> None:
    """The lock holds all the same; whoever is refused is told that the name is not known."""
    lock = tmp_path / ".lock"
    with RunLock(lock):
        (tmp_path / ".lock.holder").write_text(text)
        assert (None, True) == (read_holder(lock), is_held(lock))
        with pytest.raises(RunLocked, match="its name is not recorded"), RunLock(lock, patience=0):
            pass


def test_a_heartbeat_says_something_of_the_process_that_gave_it() -> None:
    """Not of one that took over, nor of one that got the number of a process before; without a name, it may be its."""
    holder, fact = {"pid": 7, "host": "h", "started": 100.0}, {"pid": 7, "at": 100.0, "hangs": False, "quiet": 0.0}
    assert (fact, fact, None) == (beat_of(holder, fact), beat_of(None, fact), beat_of(holder, None))
    assert [None, None] == [beat_of(holder, fact | other) for other in ({"pid": 8}, {"at": 99.9})]
    assert [(None, None), (0.0, None), (SILENCE, None)] == [
        read_heartbeat(None, 9.0), read_heartbeat(fact, 99.0), read_heartbeat(fact, 100.0 + SILENCE)
    ]  # fmt: skip
    stuck = "no heartbeat for 31 s: the process (pid 7) is stuck or frozen"
    assert (SILENCE + 1.0, stuck) == read_heartbeat(fact | {"hangs": True}, 101.0 + SILENCE)


def run_id(run: Run) -> str:
    """Return what the ledger calls the run."""
    with Ledger(run.layout.ledger) as ledger:
        return ledger.get("run")


@pytest.mark.parametrize("there", [False, True])
def test_one_process_at_a_time_makes_a_run_in_a_directory(model: Path, tmp_path: Path, there: bool) -> None:
    """A second one is refused while the first one proves its model, and afterwards; the first run stays as it is."""
    root, refusals = tmp_path / "new" / "run", list[str]()
    if there:
        root.mkdir(parents=True)

    def make(batch_size: int) -> Run:
        return Run.create(root, str(model), batch_size=batch_size, report=make_another)

    def make_another(line: str) -> None:
        del line
        with pytest.raises(UsageError) as refused:
            make(8)
        refusals.append(refused.value.what)

    run = make(2)
    first = run_id(run)
    assert {"another process is making a run in this directory"} == set(refusals)
    with pytest.raises(UsageError, match="already a run"):
        make(8)
    assert (2, first) == (Run(root).config.batch_size, run_id(run))


def test_a_refused_run_leaves_no_directory(tmp_path: Path) -> None:
    """Folders that were made for it are removed again; others stay."""
    (tmp_path / "mine").mkdir()
    for place in ("mine/new/run", "mine"):
        with pytest.raises(OnwardError):
            Run.create(tmp_path / place, str(tmp_path / "no-model"))
    assert [tmp_path / "mine"] == list(tmp_path.rglob("*"))


def test_status_and_doctor_read_the_heartbeat(model: Path, tmp_path: Path) -> None:
    """A process that holds the lock and hangs is named by both; what an earlier one left says nothing about it."""
    run = new_run(tmp_path / "run", model)
    holder = run.layout.lock.with_name(".lock.holder")
    fact = {"at": time.time() - 100.0, "quiet": 0.0, "hangs": False, "pid": os.getpid()}
    with run._owned() as ledger:
        started = json.loads(holder.read_text())
        ledger.put(state="training", heartbeat=fact)
        for earlier in (started, {**started, "pid": 1, "started": 0.0}):
            holder.write_text(json.dumps(earlier))
            assert [None, None] == [run.status()[key] for key in ("heartbeat_seconds", "problem")]
            assert "heartbeat" not in {finding.subject for finding in examine(run.layout)}
        for own in (json.dumps({**started, "started": fact["at"]}), ""):
            holder.write_text(own)
            assert re.match(r"no heartbeat for 1\d\d s", run.status()["problem"])  # and what the test itself took
            (finding,) = [finding for finding in examine(run.layout) if finding.subject == "heartbeat"]
            assert "error" == finding.level
    assert run.status()["heartbeat_seconds"] is None
