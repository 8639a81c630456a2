"""A live daemon and its surroundings: other processes, an inbox that is written to, moved away or read-only."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import assert_refused, onward_process
from daemons import LONG, SETTINGS, configure, done, end, hold, is_in, rows_file, twin_of, until, watch
from processes import command, kill_after
from runs import new_run
from states import assert_same_state

from onward import Run
from onward.digest import sha256_file
from onward.service.holder import read_holder


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Run:
    """A run that nothing was trained in."""
    return new_run(tmp_path / "run", model, **SETTINGS)


def dead_pid() -> int:
    """Return the id of a process that is gone."""
    with subprocess.Popen(["true"]) as process:
        return process.pid


@pytest.mark.parametrize("name", ["dead", "elsewhere", "alive"])
def test_a_name_that_a_process_left_keeps_nobody_out(run: Run, tmp_path: Path, name: str) -> None:
    """The content of `.lock.holder` refuses nobody: a dead process, another host, a pid that now belongs to another."""
    holder = run.layout.lock.with_name(".lock.holder")
    here = {"pid": dead_pid(), "host": socket.gethostname(), "started": time.time()}
    left = {
        "dead": json.dumps(here),
        "elsewhere": json.dumps({**here, "host": "elsewhere", "pid": 1}),
        "alive": json.dumps({**here, "pid": os.getpid()}),
    }
    holder.write_text(left[name])
    assert run.status()["heartbeat_seconds"] is None
    run.add(rows_file(tmp_path / "a.jsonl", 4))
    assert 0 == command(tmp_path / "output", "train", "--run", run.layout.root)
    assert (["a.jsonl"], False) == (done(run), holder.exists())


@pytest.mark.slow
def test_a_killed_owner_keeps_nobody_out(run: Run, model: Path, tmp_path: Path) -> None:
    """After a SIGKILL the name of the dead process is still there, and the next one trains at once."""
    file = rows_file(tmp_path / "long.jsonl", LONG)
    run.add(file)
    process = watch(run, prepare=hold(run))
    until(is_in(run, "long.jsonl"), process)
    assert kill_after(process, 0)
    assert process.pid == json.loads(run.layout.lock.with_name(".lock.holder").read_text())["pid"]
    assert 0 == command(tmp_path / "output", "train", "--run", run.layout.root)
    assert_same_state(twin_of(run, model, [file]), run.layout.root)


def test_a_second_owner_is_told_who_the_first_is(run: Run, tmp_path: Path) -> None:
    """While a daemon runs, `watch`, `train`, `verify` and `rebuild` end with 4 and its pid, host and start time."""
    process = watch(run)
    until(lambda: read_holder(run.layout.lock) is not None, process)
    holder = json.loads(run.layout.lock.with_name(".lock.holder").read_text())
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["started"]))
    said = f"pid {process.pid} on {socket.gethostname()}, since {since}"
    assert_refused(onward_process("watch", "--run", run.layout.root), 4, said, "onward status")
    for number, words in enumerate((["train"], ["verify"], ["rebuild", "--without", "a", "--yes"])):
        output = tmp_path / str(number)
        assert 4 == command(output, *words, "--run", run.layout.root)
        assert said in output.read_text()
    assert 0 == end(process)


def test_a_second_owner_does_not_wait(run: Run, tmp_path: Path) -> None:
    """The refusal comes first: not even the config is read before the lock is asked for."""
    run.layout.config.write_text("model: [")
    with run._owned():
        for number, word in enumerate(("watch", "train")):
            assert 4 == command(tmp_path / str(number), word, "--run", run.layout.root)
    assert 2 == command(tmp_path / "output", "train", "--run", run.layout.root)


def test_a_holder_that_cannot_be_read_is_still_an_owner(run: Run) -> None:
    """An incomplete holder file still gives exit status 4."""
    with run._owned():
        run.layout.lock.with_name(".lock.holder").write_text('{"pid": 1}')
        assert_refused(onward_process("train", "--run", run.layout.root), 4, "another process owns this run")


@pytest.mark.slow
@pytest.mark.parametrize("is_kept_open", [False, True], ids=["opened for each row", "kept open"])
def test_a_file_that_grows_for_a_while_is_taken_whole(run: Run, tmp_path: Path, is_kept_open: bool) -> None:
    """A writer that takes six times as long as a file settles in: the file is taken once, with its last byte."""
    whole = rows_file(tmp_path / "grows.jsonl", 30)
    rows_file(run.layout.inbox / "first.jsonl", 4)
    process = watch(run)
    until(lambda: done(run) == ["first.jsonl"], process)
    grows = run.layout.inbox / "grows.jsonl"
    lines = whole.read_bytes().splitlines(keepends=True)
    stream = grows.open("ab", buffering=0)
    for line in lines:
        if not is_kept_open:
            stream.close()
            stream = grows.open("ab", buffering=0)
        stream.write(line[:10])
        stream.write(line[10:])
        time.sleep(6 * SETTINGS["settle_seconds"] / len(lines))
        assert 0 == run.status()["queue"]
    stream.close()
    until(lambda: done(run) == ["first.jsonl", "grows.jsonl"], process)
    assert 0 == end(process)
    _, entry = run.history()
    assert (sha256_file(whole), 30) == (entry["sha256"], entry["rows_trained"])
    assert [] == list(run.layout.inbox.iterdir())
    assert [] == list(run.layout.rejected.iterdir())


def away(inbox: Path) -> Callable[[], None]:
    """Move the inbox away; returns a function that brings it back."""
    other = inbox.rename(inbox.with_name("away"))
    return lambda: (other.rename(inbox), None)[1]


def replaced(inbox: Path) -> Callable[[], None]:
    """Put a file in its place, which cannot be listed; returns a function that brings it back."""
    back = away(inbox)
    inbox.touch()
    return lambda: (inbox.unlink(), back())[1]


def read_only(inbox: Path) -> Callable[[], None]:
    """Mount something read-only over it; returns a function that unmounts it."""
    folder = inbox.with_name("mounted")
    folder.mkdir()
    shutil.copy(inbox.parent.parent / "held.jsonl", folder)
    for words in (["--bind", folder, inbox], ["-o", "remount,bind,ro", inbox]):
        if subprocess.run(["mount", *words], capture_output=True, check=False).returncode:
            subprocess.run(["umount", inbox], capture_output=True, check=False)
            pytest.skip("needs the right to mount")
    return lambda: (subprocess.run(["umount", inbox], check=True), None)[1]


@pytest.mark.parametrize("fault", [away, replaced, read_only])
def test_an_inbox_that_goes_and_comes_back(
    run: Run, model: Path, tmp_path: Path, fault: Callable[[Path], Callable[[], None]]
) -> None:
    """Gone, unreadable or read-only: `status` says so, the queue goes on, and files are taken when it is back."""
    rows_file(tmp_path / "held.jsonl", 4)
    process = watch(run)
    until(lambda: run.status()["heartbeat_seconds"] is not None, process)
    mend = fault(run.layout.inbox)
    try:
        until(lambda: "inbox" in (run.status()["problem"] or ""), process)
        queued = rows_file(tmp_path / "queued.jsonl", 6)
        run.add(queued)
        until(lambda: done(run) == ["queued.jsonl"], process)
        assert "inbox" in run.status()["problem"]
        run.pause()
        until(lambda: "paused by an operator" in (run.status()["problem"] or ""), process)
        run.resume()
        until(lambda: "inbox" in (run.status()["problem"] or ""), process)
    finally:
        mend()
    until(lambda: run.status()["problem"] is None, process)
    later = rows_file(tmp_path / "later.jsonl", 7)
    shutil.copy(later, run.layout.inbox)
    until(lambda: done(run) == ["queued.jsonl", "later.jsonl"], process)
    assert 0 == end(process)
    assert_same_state(twin_of(run, model, [queued, later]), run.layout.root)


def test_an_inbox_that_goes_while_a_file_is_trained(run: Run, tmp_path: Path) -> None:
    """Files that were in it are taken in when it is back, and the current file is trained meanwhile."""
    configure(run, settle_seconds=1.0)
    run.add(rows_file(tmp_path / "long.jsonl", LONG))
    process = watch(run, prepare=hold(run))
    until(is_in(run, "long.jsonl"), process)
    rows_file(run.layout.inbox / "later.jsonl", 5)
    mend = away(run.layout.inbox)
    hold(run).let_go.touch()
    until(lambda: done(run) == ["long.jsonl"], process)
    until(lambda: "inbox" in (run.status()["problem"] or ""), process)
    mend()
    until(lambda: done(run) == ["long.jsonl", "later.jsonl"], process)
    assert 0 == end(process)
