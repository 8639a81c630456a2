"""A disk that really fills up and is really emptied: the run lies on a small file system in memory."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from commands import assert_refused, onward
from daemons import SETTINGS, Hold, done, end, is_in, rows_file, until, watch
from faults import without_links
from ledgers import made_up_run
from processes import train
from runs import new_run
from safetensors import SafetensorError
from safetensors.torch import save_file
from states import assert_same_state, temporary_files

from onward import Run
from onward.atomic import system_errors
from onward.events import StepTaken
from onward.service.intake.archive import compress_original
from onward.service.lock import RunLock
from onward.service.proof.doctor.examination import examine
from onward.status import read_status
from onward.store.ledger import Ledger

ROWS = 60
MEGABYTE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Generator[Path]:
    """A file system of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    mounted = subprocess.run(words, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no right to mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, *, leave: int) -> Path:
    """Fill a disk up to a number of free bytes; returns the file that takes the room."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as stream:
        while (free := shutil.disk_usage(disk).free - leave) > 0:
            if not stream.write(bytes(min(free, MEGABYTE))):
                break
    return ballast


def waits(run: Run) -> bool:
    """Return whether a daemon says that it waits for room."""
    status: dict[str, Any] = run.status()
    return status["state"] == "paused" and "full" in (status["problem"] or "")


@pytest.mark.parametrize(
    ("leave", "log"),
    [(MEGABYTE, "elsewhere"), (0, "on the same disk")],
    ids=["below the margin", "to the last byte, the terminal's file too"],
)
@pytest.mark.slow
def test_a_disk_that_fills_up_while_a_file_is_trained(
    disk: Path, model: Path, tmp_path: Path, leave: int, log: str
) -> None:
    """The daemon pauses, says so, continues by itself when there is room, and ends in the same state as ever."""
    files = [rows_file(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", ROWS), ("b", 7))]
    twin = new_run(tmp_path / "twin", model, **SETTINGS)
    assert 0 == train(twin.layout.root, files)
    run = new_run(disk / "run", model, **SETTINGS)
    run.add(*files)
    held = Hold(2, tmp_path / "let_go")
    process = watch(run, prepare=held, log=disk / "log" if log == "on the same disk" else tmp_path / "log")
    until(is_in(run, "a.jsonl", step=2), process)
    ballast = fill(disk, leave=leave)
    held.let_go.touch()
    until(lambda: waits(run), process)
    process.join(0.5)
    assert waits(run)
    ballast.unlink()
    until(lambda: done(run) == ["a.jsonl", "b.jsonl"], process)
    until(lambda: run.status()["problem"] is None, process)
    assert 0 == end(process)
    assert_same_state(twin.layout.root, run.layout.root)
    assert [] == temporary_files(run.layout.root)
    assert run.verify().ok


@dataclass(frozen=True)
class Quota:
    """A process in which a disk claims to have room until it refuses to be written, as a user's quota does.

    Args:
        held: what holds the process.
    """

    held: Hold

    def __call__(self) -> None:
        """Arm the process that this is called in."""
        plain = shutil.disk_usage
        setattr(shutil, "disk_usage", lambda path: plain(path)._replace(free=1 << 50))  # noqa: B010
        self.held()


@pytest.mark.slow
@pytest.mark.parametrize("left", range(0, 160_000, 32_768))
def test_a_quota_is_a_full_disk_whichever_library_meets_it(disk: Path, model: Path, tmp_path: Path, left: int) -> None:
    """The daemon tries again every other second, blames no file, and goes on once there is room."""
    file = rows_file(tmp_path / "a.jsonl", ROWS)
    twin = new_run(tmp_path / "twin", model, **SETTINGS)
    twin.train(file)
    run, log = new_run(disk / "run", model, **SETTINGS), tmp_path / "log"
    run.add(file)
    held = Hold(2, tmp_path / "let_go")
    process = watch(run, prepare=Quota(held), log=log)
    until(is_in(run, "a.jsonl", step=2), process)
    ballast = fill(disk, leave=left)
    held.let_go.touch()
    until(lambda: "in a row" in log.read_text(), process)
    process.join(5)
    ballast.unlink()
    until(lambda: done(run) == ["a.jsonl"], process)
    assert 0 == end(process)
    failures = [line for line in log.read_text().splitlines() if "in a row" in line]
    assert all("tried again in 2 s" in line for line in failures), failures
    assert 2 >= len(failures)  # then it waits, and trains nothing in vain
    assert_same_state(twin.layout.root, run.layout.root)
    assert [] == temporary_files(run.layout.root)


def test_an_original_that_cannot_be_compressed_takes_no_more_room(disk: Path) -> None:
    """Nothing is left of one for which the disk has no room: that would be the room that training waits for."""
    layout = made_up_run(disk / "run", [("a.jsonl", 1)], float)
    (layout.archive / "a.jsonl").write_bytes(os.urandom(8 * MEGABYTE))
    fill(disk, leave=2 * MEGABYTE)
    with Ledger(layout.ledger) as ledger, pytest.raises(OSError, match="No space left on device"):
        compress_original(layout, ledger, ledger.file(1))
    assert ["a.jsonl"] == [path.name for path in layout.archive.iterdir()]


def _save_weights(place: Path) -> None:
    save_file({"a": torch.ones(1 << 20)}, place / "a.safetensors")


def _save_tokenizer(place: Path) -> None:
    tiny.byte_tokenizer()._tokenizer.save(str(place / "tokenizer.json"))


def _save_as_safetensors_0_5(place: Path) -> None:
    raise SafetensorError(f'IoError(Os {{ code: 28, kind: StorageFull, message: "{place}" }})')


@pytest.mark.parametrize("save", [_save_weights, _save_tokenizer, _save_as_safetensors_0_5])
def test_what_libraries_say_of_a_full_disk_in_words_is_an_error_of_the_system(
    disk: Path, save: Callable[[Path], None]
) -> None:
    """Libraries written in Rust raise errors of their own, with the system's number in the text."""
    fill(disk, leave=0)
    with pytest.raises(OSError, match="No space left on device") as refused, system_errors(disk):
        save(disk)
    assert (errno.ENOSPC, str(disk)) == (refused.value.errno, refused.value.filename)
    with pytest.raises(ValueError, match="28"), system_errors(disk):
        raise ValueError("28 rows")


@pytest.mark.slow
def test_a_stop_while_the_disk_is_full(disk: Path, model: Path, tmp_path: Path) -> None:
    """A stop ends the process although nothing can be written; the next one goes on from the last commit."""
    file = rows_file(tmp_path / "a.jsonl", ROWS)
    twin = new_run(tmp_path / "twin", model, **SETTINGS)
    assert 0 == train(twin.layout.root, [file])
    run = new_run(disk / "run", model, **SETTINGS)
    run.add(file)
    held = Hold(2, tmp_path / "let_go")
    process = watch(run, prepare=held, log=tmp_path / "log")
    until(is_in(run, "a.jsonl", step=2), process)
    ballast = fill(disk, leave=0)
    held.let_go.touch()
    until(lambda: waits(run), process)
    assert 0 == end(process)
    ballast.unlink()
    assert 0 == train(run.layout.root)
    assert_same_state(twin.layout.root, run.layout.root)


def test_a_file_that_arrives_on_a_full_disk(disk: Path, model: Path, tmp_path: Path) -> None:
    """An inbox on another disk than the run: a file that cannot be brought in stays, and is taken when it can."""
    file = rows_file(tmp_path / "a.jsonl", ROWS)
    run = new_run(disk / "run", model, **SETTINGS)
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    run.layout.inbox.rmdir()
    run.layout.inbox.symlink_to(inbox)
    process = watch(run, log=tmp_path / "log")
    until(lambda: run.status()["heartbeat_seconds"] is not None, process)
    ballast = fill(disk, leave=0)
    shutil.copy(file, inbox)
    until(lambda: waits(run), process)
    process.join(1.5)
    assert ([], True) == (done(run), (inbox / "a.jsonl").exists())
    ballast.unlink()
    until(lambda: done(run) == ["a.jsonl"], process)
    assert 0 == end(process)
    assert [] == list(inbox.iterdir())
    assert file.read_bytes() == (run.layout.archive / "a.jsonl").read_bytes()


def test_an_observer_that_fails_on_a_full_disk(disk: Path, model: Path, tmp_path: Path) -> None:
    """An observer whose own disk is the full one, a terminal in a file there, does not end the daemon."""
    run = new_run(disk / "run", model, **SETTINGS)
    run.add(rows_file(tmp_path / "a.jsonl", 8))
    is_full = False

    def observe(event: object) -> None:
        nonlocal is_full
        if isinstance(event, StepTaken) and not is_full:
            is_full = True
            threading.Timer(1.0, fill(disk, leave=0).unlink).start()
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert 0 == run.watch(once=True, observe=observe)
    assert ["a.jsonl"] == done(run)
    assert run.verify().ok


def test_a_run_on_a_full_disk_can_be_looked_at(disk: Path, model: Path, tmp_path: Path) -> None:
    """Without a process, and without room for SQLite's log, status, history and doctor still say what is there.

    A connection that could not have a log says so, and tells that others wrote.
    """
    run = new_run(disk / "run", model, **SETTINGS)
    run.train(rows_file(tmp_path / "a.jsonl", 4))
    for path in run.layout.root.glob("ledger.sqlite3-*"):
        path.unlink()
    ballast = fill(disk, leave=0)
    assert ["a.jsonl"] == done(run)
    assert ("idle", 2) == (run.status()["state"], run.status()["global_step"])
    assert [("error", "disk")] == [(entry.level, entry.subject) for entry in examine(run.layout) if entry.level != "ok"]
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        assert ledger.is_snapshot
        before = ledger.version()
        ballast.unlink()
        run.train(rows_file(tmp_path / "b.jsonl", 5))
        assert before != ledger.version()
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        assert not ledger.is_snapshot
    assert ["a.jsonl", "b.jsonl"] == done(run)


def test_a_disk_without_hard_links(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has none (exFAT), files are copied; the run goes back, is rebuilt, and is the same run."""
    files = [rows_file(tmp_path / f"{name}.jsonl", 8, seed) for seed, name in enumerate("abc")]
    twin = new_run(tmp_path / "twin", model, **SETTINGS)
    twin.train(files[0], files[2])
    monkeypatch.setattr(os, "link", without_links)
    run = new_run(tmp_path / "run", model, **SETTINGS)
    run.train(*files)
    run.rollback("b.jsonl")
    run.train(files[2], again=True)
    run.rebuild("b.jsonl")
    assert_same_state(twin.layout.root, run.layout.root)
    assert run.verify(deep=True).ok
    assert [] == temporary_files(run.layout.root)


def test_a_full_place_for_temporary_files_is_no_failed_proof(
    disk: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`verify --deep` trains in a temporary folder: a disk that is full there says nothing about the run."""
    run = new_run(tmp_path / "run", model, **SETTINGS)
    run.train(rows_file(tmp_path / "a.jsonl", ROWS))
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    assert run.verify(deep=True).ok
    fill(disk, leave=0)
    outcome = onward("verify", "--deep", "--run", run.layout.root)
    assert_refused(outcome, 1, "No space left on device", "What was committed is safe")


def test_status_tells_a_quota_from_a_frozen_process(disk: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that cannot write the ledger cannot write that it is alive either."""
    run = new_run(disk / "run", model, **SETTINGS)
    with Ledger(run.layout.ledger) as ledger:
        ledger.put(state="training", heartbeat={"at": 0.0, "quiet": 0.0, "hangs": False, "pid": 1})
    with RunLock(run.layout.lock):
        run.layout.lock.with_name(".lock.holder").unlink()
        assert "no heartbeat" in read_status(run.layout)["problem"]
        fill(disk, leave=0)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 50))
        found = read_status(run.layout)
    assert ("paused", True) == (found["state"], "a quota is used up" in found["problem"])


def test_doctor_sees_a_quota(disk: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free and what this user may write are two things; a checkpoint's size is tried, and nothing stays."""
    run = new_run(disk / "run", model, **SETTINGS)
    run.train(rows_file(disk / "a.jsonl", 4))
    ballast = fill(disk, leave=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 50))
    (found,) = [found for found in examine(run.layout) if found.subject == "disk"]
    ballast.unlink()
    (fine,) = [found for found in examine(run.layout) if found.subject == "disk"]
    assert ("error", "ok") == (found.level, fine.level)
    assert found.hint is not None
    assert "quota" in found.hint
    assert [] == temporary_files(run.layout.root)
