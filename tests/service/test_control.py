"""A live process in every state that it can be in: requests are answered before that state is over."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from daemons import LONG, PATIENCE, SETTINGS, configure, done, end, hold, is_in, rows_file, twin_of, until, watch
from processes import as_it_is, start_command
from runs import new_run
from states import assert_same_state

from onward import Run
from onward.errors import OnwardError, UsageError
from onward.service.holder import SILENCE
from onward.service.intake.budget import Spending
from onward.service.intake.file_check import FileCheck
from onward.service.intake.lock import IntakeLock
from onward.service.owner import daemon
from onward.store.ledger import Ledger


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Run:
    """A run that nothing was trained in."""
    return new_run(tmp_path / "run", model, **SETTINGS)


@dataclass(frozen=True)
class Stuck:
    """A process that does not get past one kind of work, and can be met in it.

    Args:
        where: `loading`, `failing` to load, or `checking` rows.
        record: a file that gets a line each time that it gets there.
    """

    where: str
    record: Path

    def __call__(self) -> None:
        """Arm the process that this is called in."""
        if self.where == "checking":
            FileCheck._read = self._check  # type: ignore[method-assign, assignment]
        else:
            daemon.load_start = self._load  # type: ignore[assignment]

    def times(self) -> int:
        """How often the process got there."""
        return len(self.record.read_text().splitlines()) if self.record.exists() else 0

    def _arrive(self) -> None:
        with self.record.open("a") as stream:
            stream.write("here\n")

    def _load(self, *_: Any) -> Any:
        self._arrive()
        if self.where == "failing":
            raise RuntimeError("no device today")
        while True:
            time.sleep(60)

    def _check(self, _row: Any, _rules: Any, _original: Path, spending: Spending) -> Any:
        self._arrive()
        while True:
            spending.spend_row()
            time.sleep(0.01)


@pytest.fixture
def ended() -> Generator[list[BaseProcess]]:
    """Processes that are killed at the end of a test, whatever came of it."""
    processes: list[BaseProcess] = []
    yield processes
    for process in processes:
        process.kill()


def ask_everything(run: Run, waiting: str) -> None:
    """Ask for all that leaves the process alive; each is answered, whatever the process is at. It is paused then."""
    assert "it was not paused" == run.resume()
    assert "paused at step 0" == run.pause()
    assert f"skipped {waiting}" == run.skip(waiting)


def test_an_empty_name_is_not_the_current_file(run: Run, tmp_path: Path) -> None:
    """As a script gives it whose variable is not set: the file in training stays."""
    run.add(rows_file(tmp_path / "a.jsonl", 4))
    with Ledger(run.layout.ledger) as ledger:
        (row,) = ledger.files("queued")
        ledger.move_file(row.id, "training", position=1)
        with pytest.raises(UsageError, match="this run has no file ''"):
            run.skip("")
        assert "training" == ledger.file(row.id).state


def test_a_reason_whose_bytes_are_no_text_is_kept_with_escapes(run: Run, tmp_path: Path) -> None:
    """As a terminal in another encoding sends it, or half an escape in JSON."""
    run.add(rows_file(tmp_path / "a.jsonl", 4))
    assert "skipped a.jsonl" == run.skip("a.jsonl", reason="caf\udce9")
    assert ["caf\\udce9"] == [entry["note"] for entry in run.history()]


@pytest.mark.parametrize("where", ["loading", "failing"])
def test_while_the_model_is_loaded_and_between_failures(
    run: Run, tmp_path: Path, ended: list[BaseProcess], where: str
) -> None:
    """A pause, a resume, a skip and a stop are answered by a process that never comes to its first step."""
    run.add(rows_file(tmp_path / "a.jsonl", 6), rows_file(tmp_path / "b.jsonl", 7), rows_file(tmp_path / "c.jsonl", 8))
    stuck = Stuck(where, tmp_path / "record")
    process = watch(run, prepare=stuck)
    ended.append(process)
    until(lambda: stuck.times() > 0, process)
    if where == "failing":
        until(lambda: run.status()["state"] == "failed", process)
    ask_everything(run, "b.jsonl")
    before = stuck.times()
    assert "goes on" == run.resume()
    until(lambda: stuck.times() > before, process)  # a resumed process loads again
    assert "skipped c.jsonl" == run.skip("c.jsonl")
    assert "stopped at step 0" == run.stop()
    process.join(PATIENCE)
    assert (0, [], 1) == (process.exitcode, done(run), run.status()["queue"])


def test_while_the_disk_has_no_room(run: Run, tmp_path: Path, ended: list[BaseProcess]) -> None:
    """Requests are answered without waiting for room; `stop --after-file` ends a process without a current file."""
    run.add(rows_file(tmp_path / "a.jsonl", 6), rows_file(tmp_path / "b.jsonl", 7))
    configure(run, disk_margin_mb=1 << 40)
    process = watch(run)
    ended.append(process)
    until(lambda: "disk is too full" in str(run.status()["problem"]), process)
    ask_everything(run, "b.jsonl")
    assert "goes on" == run.resume()
    until(lambda: "disk is too full" in str(run.status()["problem"]), process)
    assert "stops now: no file is being trained" == run.stop(after_file=True)
    process.join(PATIENCE)
    assert (0, [], 1) == (process.exitcode, done(run), run.status()["queue"])
    assert any("stopped by onward stop --after-file" in event for event in events(run))


def test_while_another_process_takes_files_in(run: Run, tmp_path: Path, ended: list[BaseProcess]) -> None:
    """`train FILE` waits for the intake lock, and answers; a pause is not its end, and a stop leaves the file owed."""
    run.add(rows_file(tmp_path / "a.jsonl", 6), rows_file(tmp_path / "b.jsonl", 7))
    with IntakeLock(run.layout).held(lambda: None, wait=True):
        process = train(run, rows_file(tmp_path / "c.jsonl", 8))
        ended.append(process)
        until(lambda: run.status()["state"] == "loading", process)
        ask_everything(run, "b.jsonl")
        assert "goes on" == run.resume()
        assert "stopped at step 0" == run.stop()
        process.join(PATIENCE)
    assert (0, []) == (process.exitcode, done(run))
    run.train()
    assert ["a.jsonl", "c.jsonl"] == sorted(done(run))


def test_while_rows_are_checked(run: Run, tmp_path: Path, ended: list[BaseProcess]) -> None:
    """A file whose check takes forever can be skipped, and the checker continues; nothing is reported as done."""
    stuck = Stuck("checking", tmp_path / "record")
    run.add(rows_file(tmp_path / "b.jsonl", 7))
    process = train(run, rows_file(tmp_path / "a.jsonl", 6), prepare=stuck)
    ended.append(process)
    until(lambda: stuck.times() > 0, process)
    ask_everything(run, "b.jsonl")
    assert "goes on" == run.resume()
    assert "stopped at step 0" == run.stop()
    process.join(PATIENCE)
    assert (0, [], 1) == (process.exitcode, done(run), run.status()["queue"])


def train(run: Run, file: Path, prepare: Callable[[], None] = as_it_is) -> BaseProcess:
    """Start `onward train FILE` on a run."""
    words = ("train", file, "--run", run.layout.root)
    return start_command(run.layout.root.parent / "log", *words, prepare=prepare)


def events(run: Run) -> list[str]:
    """What the ledger tells of a run, oldest first."""
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        return [event.message for event in ledger.events(1000)]


@dataclass(frozen=True)
class Listening:
    """A process that another one did not make deaf to hang-ups, held in a file."""

    then: Callable[[], None]

    def __call__(self) -> None:
        """Arm the process that this is called in."""
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        self.then()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_terminal_and_a_notice_of_slurm_are_stops(
    run: Run, model: Path, tmp_path: Path, ended: list[BaseProcess], number: signal.Signals
) -> None:
    """The current step is committed, the status is 0, the terminal and the log say who asked, and nothing is lost."""
    file = rows_file(tmp_path / "long.jsonl", LONG)
    run.add(file)
    process = watch(run, prepare=Listening(hold(run)))
    ended.append(process)
    until(is_in(run, "long.jsonl"), process)
    step = run.status()["global_step"]
    assert 0 == end(process, number)
    assert step == run.status()["global_step"]
    assert f"stopped by {number.name} at step {step}" == events(run)[-1]
    assert f"stopped ({number.name}); checkpoint-{step} is committed" in (tmp_path / "log").read_text()
    run.train()
    assert_same_state(twin_of(run, model, [file]), run.layout.root)


def test_pairs_between_two_steps(run: Run, tmp_path: Path, ended: list[BaseProcess]) -> None:
    """Two requests that a process finds at once are both answered, in their order, by what holds then."""
    run.add(*(rows_file(tmp_path / f"m{number}.jsonl", LONG, seed=number) for number in (1, 2, 3)))
    process = watch(run, prepare=hold(run))
    ended.append(process)
    until(is_in(run, "m1.jsonl"), process)
    with Ledger(run.layout.ledger) as ledger:
        first, second, third = (row.id for row in ledger.files("training", "queued"))
        resumed, paused = at_once(ledger, process, ("resume", None), ("pause", None))
        assert "it was not paused" == resumed
        assert f"paused at step {run.status()['global_step']}" == paused
        assert ["goes on", f"paused at step {run.status()['global_step']}"] == at_once(
            ledger, process, ("resume", None), ("pause", None)
        )
        assert "goes on" == run.resume()
        until(is_in(run, "m1.jsonl"), process)
        assert ["skipped m1.jsonl, back at step 0", "m1.jsonl is already skipped"] == at_once(
            ledger, process, ("skip", first), ("skip", first)
        )
        until(is_in(run, "m2.jsonl"), process)
        assert ["skipped m3.jsonl", "skipped m2.jsonl, back at step 0"] == at_once(
            ledger, process, ("skip", third), ("skip", second)
        )
        stopped, late = at_once(ledger, process, ("stop", None), ("pause", None))
        process.join(PATIENCE)
        assert ("stopped at step 0", "the process ended first, at step 0") == (stopped, late)
        assert (0, []) == (process.exitcode, ledger.open_requests())


def at_once(ledger: Ledger, process: BaseProcess, *asked: tuple[str, int | None]) -> list[str | None]:
    """Ask for several things in one act, wait until all are answered, and return the answers."""
    with ledger.transaction():
        numbers = [ledger.add_request(kind, None, file) for kind, file in asked]

    def rows() -> list[Any]:
        return [ledger.request(number) for number in numbers]

    until(lambda: all(row.acknowledged is not None for row in rows()) or not process.is_alive())
    return [row.answer for row in rows()]


def test_a_frozen_process_is_told_of(run: Run, ended: list[BaseProcess]) -> None:
    """Those who ask it for something learn what is wrong and what to type; the request is carried out when it wakes."""
    process = watch(run)
    ended.append(process)
    until(lambda: run.status()["state"] == "idle" and run.status()["heartbeat_seconds"] is not None, process)
    assert process.pid is not None
    with Ledger(run.layout.ledger) as ledger:
        with ledger.transaction():  # so that it does not hold the ledger's lock when it freezes
            os.kill(process.pid, signal.SIGSTOP)
            age_by(run, ledger, SILENCE + 60)
        with pytest.raises(OnwardError, match=f"kill -CONT {process.pid}") as refused:
            run.pause()
        assert f"(pid {process.pid}) is stuck or frozen" in refused.value.what
        (number,) = [row.id for row in ledger.open_requests()]
        os.kill(process.pid, signal.SIGCONT)
        until(lambda: ledger.request(number).answer == "paused at step 0", process)  # type: ignore[union-attr]
    assert 0 == end(process)


def age_by(run: Run, ledger: Ledger, seconds: float) -> None:
    """Let a process look as if it had begun, and fallen silent, that much earlier."""
    holder = run.layout.lock.with_name(".lock.holder")
    text = holder.read_text()
    started = text.split('"started": ')[1].rstrip("}")
    holder.write_text(text.replace(started, str(float(started) - 2 * seconds)))
    heartbeat = ledger.get("heartbeat")
    ledger.put(heartbeat={**heartbeat, "at": heartbeat["at"] - seconds})


def test_a_stop_of_a_process_that_is_killed_claims_nothing(run: Run, tmp_path: Path, ended: list[BaseProcess]) -> None:
    """It ended, and the answer says how far the commits go, not that all was committed; the request is closed."""
    run.add(rows_file(tmp_path / "long.jsonl", LONG))
    process = watch(run, prepare=hold(run, step=7))
    ended.append(process)
    until(is_in(run, "long.jsonl", step=7), process)
    assert process.pid is not None
    with Ledger(run.layout.ledger) as ledger:
        answers: list[str] = []
        with ledger.transaction():
            os.kill(process.pid, signal.SIGSTOP)
        operator = threading.Thread(target=lambda: answers.append(Run(run.layout.root).stop()))
        operator.start()
        until(lambda: len(ledger.open_requests()) == 1)
        process.kill()
        operator.join(PATIENCE)
        committed = ledger.committed_step()
        assert [f"it ended without an answer; the last commit is step {committed}"] == answers
        assert (True, []) == (committed < 7, ledger.open_requests())
