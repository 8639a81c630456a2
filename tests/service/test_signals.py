"""A signal at any moment: SIGTERM commits and ends with 0 in seconds, a second SIGINT ends at once; nothing is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from daemons import LONG, done, end, hold, is_in, rows_file, seconds_to_end, twin_of, until, watch
from daemons import SETTINGS as DAEMON
from faults import FULL_SIZE, KILL, SIGNALS, Fault, assert_committed, assert_complete, committed_states, copy_run
from processes import command, start_command
from runs import new_run
from states import assert_same_state, temporary_files

from onward import Run
from onward.cli.entry import status_of_command
from onward.service.wishes import Stopped, Wishes
from onward.startup import ENDINGS, Ended, endings_interrupt

SETTINGS: dict[str, Any] = {
    "evaluation": {"share": 0},
    "batch_size": 2,
    "save_steps": 2,
    "max_length": 128,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "lora": {"rank": 2, "dropout": 0.1},
}
LONG_ROWS = {**DAEMON, "max_length": 16, "batch_size": 1000, "over_length": "truncate"}
"""Settings under which there is much to check and little to train."""
IN_TIME = 5.0 if FULL_SIZE else 30.0
"""Seconds in which a process must end when asked to; the small form runs on busy machines."""
STATUS = {"SIGTERM": (0,), "SIGINT twice": (1, 0)}
"""How the process ends; 0 for two interrupts that the system made one of."""
POINTS = 10**6 if FULL_SIZE else 3
"""Changes on the disk that a test strikes at, spread over all of them."""


@dataclass(frozen=True)
class Journey:
    """A command on a run and how it has to end.

    Args:
        before: the run before.
        words: the command.
        after: the run after it, undisturbed.
        states: digests of the states after each step.
    """

    before: Path
    words: tuple[object, ...]
    after: Path
    states: dict[int, str]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that takes one commit inside and one at its boundary."""
    return tiny.write_jsonl(tmp_path_factory.mktemp("file") / "6.jsonl", tiny.chat_rows(6, seed=6))


@pytest.fixture(scope="module")
def journey(model: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Journey:
    """The first file of a run, from its arrival to its boundary."""
    folder = tmp_path_factory.mktemp("journey")
    before = new_run(folder / "before", model, **SETTINGS).layout.root
    after = copy_run(before, folder / "after")
    every_step = new_run(folder / "every_step", model, **{**SETTINGS, "save_steps": 1}).layout.root
    for root in (after, every_step):
        assert 0 == command(folder / "output", "train", file, "--run", root)
    return Journey(before, ("train", file), after, committed_states(every_step))


def points(total: int, offset: int = 0) -> Iterator[int]:
    """Yield changes spread over all that there are but the very last: how many there are differs by a few."""
    yield from range(1 + offset, total - 5, max(1, total // POINTS))


def count_changes(journey: Journey, folder: Path) -> int:
    """Return how many changes the command makes on the disk."""
    record = folder / "record"
    root = copy_run(journey.before, folder / "counted")
    assert 0 == command(folder / "output", *journey.words, "--run", root, prepare=Fault(0, KILL, record))
    return len(record.read_text().splitlines())


@pytest.mark.parametrize("kind", list(SIGNALS))
@pytest.mark.slow
def test_a_signal_at_any_change(journey: Journey, tmp_path: Path, kind: str) -> None:
    """While a file arrives, is checked, trained and saved: the process ends in time, and the next one goes on."""
    for at in points(count_changes(journey, tmp_path), offset=list(SIGNALS).index(kind) * 7):
        root, output = copy_run(journey.before, tmp_path / str(at) / "run"), tmp_path / str(at) / "output"
        fault = Fault(at, kind, tmp_path / str(at) / "record")
        status = command(output, *journey.words, "--run", root, prepare=fault)
        struck = fault.struck.exists()  # how many changes there are differs by a few
        took = time.time() - fault.struck.stat().st_mtime if struck else 0.0
        try:
            assert status in (STATUS[kind] if struck else (0,))
            assert IN_TIME > took
            assert "Traceback" not in output.read_text()
            assert_committed(journey.states, root)
            assert command(output, *journey.words, "--run", root) in (0, 3)  # 3: all was trained before the signal came
            assert_same_state(journey.after, root)
            assert [] == temporary_files(root)
            assert_complete(root)
        except (AssertionError, OSError) as error:
            error.add_note(f"{kind} at change {at}: {fault.record.read_text().splitlines()[at - 1 : at]}")
            error.add_note(output.read_text())
            raise
        shutil.rmtree(root.parent)


def swallow() -> None:
    """Go on after any error, as some libraries do while they are imported."""
    with contextlib.suppress(Exception):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


def break_later() -> None:
    """Fail because of what an interruption left half done."""
    with contextlib.suppress(BaseException):
        swallow()
    raise RecursionError


@pytest.mark.parametrize("work", [swallow, break_later])
def test_a_stop_while_modules_are_imported(work: Callable[[], None]) -> None:
    """Code that swallows an error, or fails later in its own way, neither holds up a stop nor changes its outcome."""
    stop = Wishes()

    def load() -> None:
        work()
        raise AssertionError("it went on")

    with stop.on_signals(), pytest.raises(Stopped):
        stop.interruptibly(load, by_any=False)
    assert "SIGTERM" == stop.reason


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Run:
    """A run for a daemon."""
    return new_run(tmp_path / "run", model, **DAEMON)


def test_a_second_interrupt_while_a_file_is_trained(run: Run, model: Path, tmp_path: Path) -> None:
    """Ctrl-C pressed twice waits for nothing; what was committed stays, and the next start goes on."""
    file = rows_file(tmp_path / "long.jsonl", LONG)
    shutil.copy(file, run.layout.inbox)
    process = watch(run, prepare=hold(run, step=7))
    until(is_in(run, "long.jsonl", step=7), process)
    until(lambda: run.status()["checkpoint"] == "checkpoint-5", process)  # it is written while others are computed
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    assert IN_TIME > seconds_to_end(process, signal.SIGINT)
    assert process.exitcode in (0, 1)  # 0: it ended before the second one
    assert 5 <= run.status()["global_step"]
    assert 0 == run.watch(once=True)
    assert_same_state(twin_of(run, model, [file]), run.layout.root)


def is_open_in(pid: int | None, path: Path) -> Callable[[], bool]:
    """Return whether a process, or one that it started, has a file open."""

    def holds() -> bool:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for process in (pid, *children):
            with contextlib.suppress(OSError):  # it closed the file or ended meanwhile
                if any(link.readlink() == path.resolve() for link in Path(f"/proc/{process}/fd").iterdir()):
                    return True
        return False

    return holds


@pytest.mark.slow
def test_a_stop_while_a_large_file_is_checked(model: Path, tmp_path: Path) -> None:
    """Checking long rows ends in time with status 0, and the next start ends as if there had been no stop."""
    for rows in (200, 1_000, 5_000):  # large enough for this machine: not checked before anybody can ask for a stop
        run, file = new_run(tmp_path / f"run-{rows}", model, **LONG_ROWS), tmp_path / f"{rows}.jsonl"
        tiny.write_jsonl(file, ({"text": f"{number} {'word ' * 5_000}"} for number in range(rows)))
        shutil.copy(file, run.layout.inbox)
        process = watch(run)
        until(lambda run=run: run.status()["state"] == "tokenizing" or bool(done(run)), process)
        assert IN_TIME > seconds_to_end(process)
        assert 0 == process.exitcode
        if run.status()["queue"] == 1:
            break
    assert (1, []) == (run.status()["queue"], done(run))
    assert [] == temporary_files(run.layout.root)
    twin = new_run(tmp_path / "twin", model, **LONG_ROWS)
    for root, words in ((run.layout.root, ()), (twin.layout.root, (file,))):
        assert 0 == command(tmp_path / "output", "train", *words, "--run", root)
    assert_same_state(twin.layout.root, run.layout.root)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc to see which files a process has open")
def test_a_stop_while_a_huge_file_is_hashed(run: Run) -> None:
    """A file that takes long to read is left in the inbox by a stop, as it was."""
    huge = run.layout.inbox / "huge.jsonl"
    huge.touch()
    os.truncate(huge, 200 << 30)  # it takes no space
    process = watch(run)
    until(is_open_in(process.pid, huge), process)
    process.join(0.3)
    assert IN_TIME > seconds_to_end(process)
    assert (0, 1) == (process.exitcode, run.status()["queue"])  # its place is kept
    assert 200 << 30 == huge.stat().st_size
    assert [] == temporary_files(run.layout.root)


@dataclass(frozen=True)
class Listening:
    """A fault in a process that is not deaf to signals, as one that was started in the background is."""

    fault: Fault

    def __call__(self) -> None:
        """Arm the process that this is called in."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in ENDINGS:
            signal.signal(number, signal.SIG_DFL)
        self.fault()


@pytest.mark.parametrize(
    ("word", "kind"), [("add", "SIGTERM"), ("verify", "SIGHUP"), ("verify", "SIGUSR1"), ("add", "SIGINT")]
)
def test_a_command_that_trains_nothing_says_what_ended_it(word: str, kind: str, run: Run, tmp_path: Path) -> None:
    """Any signal that asks for an end is answered by one line and status 1; the same command works afterwards."""
    run.train(rows_file(tmp_path / "a.jsonl", 4))
    words = (word, *([rows_file(tmp_path / "b.jsonl", 6)] if word == "add" else []), "--run", run.layout.root)
    fault = Fault(1, kind, tmp_path / "record")
    assert 1 == command(tmp_path / "log", *words, prepare=Listening(fault))
    by = "interrupted" if kind == "SIGINT" else f"ended by {kind}"
    assert f"{by}; what was committed is safe\n" == (tmp_path / "log").read_text()
    assert 0 == command(tmp_path / "log", *words)


def test_a_rebuild_that_is_asked_to_stop_says_what_goes_on(run: Run, tmp_path: Path) -> None:
    """It commits like any training, with status 0, and names the command that trains the rest."""
    run.train(rows_file(tmp_path / "a.jsonl", 4), rows_file(tmp_path / "b.jsonl", LONG))
    words = ("rebuild", "--without", "a.jsonl", "--yes", "--run", run.layout.root)
    process = start_command(tmp_path / "log", *words, prepare=hold(run, step=7))
    until(is_in(run, "b.jsonl", step=7), process)
    assert 0 == end(process, signal.SIGUSR1)
    root = run.layout.root
    said = f"stopped (SIGUSR1); checkpoint-7 is committed; onward train --run {root} goes on"
    assert said == (tmp_path / "log").read_text().splitlines()[-1]


def test_signals_that_are_ignored_or_handled_are_left_alone() -> None:
    """What `nohup` or a host program set stays, and whatever was taken is given back."""
    before = {number: signal.getsignal(number) for number in ENDINGS}
    heard: list[int] = []
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with endings_interrupt() as came:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGUSR1)
            with pytest.raises(Ended):
                signal.raise_signal(signal.SIGTERM)
        assert (["SIGTERM"], [signal.SIGUSR1]) == (came, heard)
        assert signal.SIG_DFL == signal.getsignal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_while_an_error_is_put_into_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that is ending with a refusal ends with a line, not a traceback."""
    monkeypatch.setattr(sys, "argv", ["onward", "status", "--run", str(tmp_path)])
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert 1 == status_of_command(lambda _: signal.raise_signal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "ended by SIGTERM; what was committed is safe\n" == capsys.readouterr().err.splitlines(keepends=True)[-1]
