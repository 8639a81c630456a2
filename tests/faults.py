"""Faults at the n-th change that a process makes on the disk: no space left, a failing disk, a kill.

`Fault` counts in the process itself the calls of Python that change files; those of SQLite are not among them.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import command
from states import assert_same_state, temporary_files

from onward.layout import RunLayout
from onward.run import Run
from onward.store.ledger import Ledger
from onward.training.checkpoints.checkpoint import inspect_checkpoint
from onward.training.model import weights

ERRORS = ("ENOSPC", "EIO")
KILL = "SIGKILL"
KINDS = (*ERRORS, KILL)
SIGNALS = {"SIGTERM": (signal.SIGTERM,), "SIGINT twice": (signal.SIGINT, signal.SIGINT)}
"""Faults that ask the process to end, and leave the change itself alone."""
ALONE = {name: (signal.Signals[name],) for name in ("SIGINT", "SIGHUP", "SIGUSR1")}
"""More of them, for tests that do not sweep."""
FULL_SIZE = os.environ.get("ONWARD_SOAK") == "1"
CALLS = ("fsync", "rename", "replace", "link", "mkdir", "unlink", "rmdir", "chmod")
"""Functions of `os` that change files, or wait until they are changed."""


@dataclass(frozen=True)
class Fault:
    """The n-th change that a process makes on the disk, in training or behind it, fails or is its last.

    Args:
        at: which change, from 1; 0 for none, to count them.
        kind: one of `KINDS`, `SIGNALS` or `ALONE`. A write is cut in the middle before it fails.
        record: a file that gets a line for every change; next to it the file `struck` is made when the fault comes.
    """

    at: int
    kind: str
    record: Path

    def __call__(self) -> None:
        """Arm the process that this is called in."""
        record = os.open(self.record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        counted = {"MainThread", "onward-writer", "onward-shards"}
        count = 0

        def change(name: str, half: Callable[[], object] = lambda: None) -> None:
            nonlocal count
            if threading.current_thread().name not in counted:
                return
            count += 1
            os.write(record, f"{name}\n".encode())
            if count == self.at:
                self.struck.touch()
                if self.kind not in SIGNALS | ALONE:
                    half()
                self._strike()

        for name in CALLS:
            setattr(os, name, _counted(getattr(os, name), name, change))
        opener = io.open

        def counted_open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if not set(mode) & set("wax+") or isinstance(file, int):
                return opener(file, mode, *args, **options)
            change("open")
            return _Stream(opener(file, mode, *args, **options), change)

        io.open = builtins.open = counted_open  # type: ignore[assignment]
        save_file = weights.save_file

        def counted_save_file(tensors: Any, path: Any, **options: Any) -> None:
            def half() -> None:
                save_file(tensors, path, **options)
                os.truncate(path, Path(path).stat().st_size // 2)

            change("write", half)
            save_file(tensors, path, **options)

        weights.save_file = counted_save_file

    @property
    def struck(self) -> Path:
        return self.record.with_name("struck")

    def _strike(self) -> None:
        if self.kind in SIGNALS | ALONE:
            for number in (SIGNALS | ALONE)[self.kind]:
                os.kill(os.getpid(), number)
                if threading.current_thread() is not threading.main_thread():
                    time.sleep(0.1)  # the main thread takes the first one before the second comes
            return
        if self.kind == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, self.kind)
        raise OSError(number, os.strerror(number))


def _counted(function: Callable[..., Any], name: str, change: Callable[[str], None]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        change(name)
        return function(*args, **options)

    return call


class _Stream:
    """A stream whose writes count."""

    def __init__(self, stream: Any, change: Callable[[str, Callable[[], object]], None]) -> None:
        self._stream = stream
        self._change = change

    def write(self, data: Any) -> int:
        def half() -> None:
            self._stream.write(data[: len(data) // 2])
            self._stream.flush()

        self._change("write", half)
        return self._stream.write(data)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def without_links(*_: object, **__: object) -> None:
    """Stand in for `os.link` on a file system without hard links, such as exFAT."""
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def copy_run(source: Path, target: Path) -> Path:
    """Copy a run as it is: files that are hard links of each other stay so."""
    links: dict[int, str] = {}

    def copy(origin: str, place: str) -> str:
        inode = Path(origin).stat().st_ino
        if inode in links:
            os.link(links[inode], place)
        else:
            shutil.copy2(origin, place)
        links.setdefault(inode, place)
        return place

    return Path(shutil.copytree(source, target, copy_function=copy))


def committed_states(root: Path) -> dict[int, str]:
    """Return the digest of every state that a run has committed, by step."""
    with Ledger(root / "ledger.sqlite3", read_only=True) as ledger:
        rows = ledger.query("SELECT step, state_digest FROM checkpoints WHERE state = 'committed'")
    return {row["step"]: row["state_digest"] for row in rows}


def assert_committed(states: dict[int, str], root: Path) -> None:
    """What the ledger claims is there, and all that verifies is among `states`: nothing incomplete counts."""
    layout = RunLayout(root)
    found: dict[int, str] = {}
    for folder in (*layout.checkpoints(), *layout.restore_points()):
        manifest = inspect_checkpoint(folder).verified
        if manifest is not None:
            found[manifest.step] = manifest.state_digest
    assert found.items() <= states.items()
    assert max(found, default=-1) >= max(committed_states(root), default=-1)


def assert_complete(root: Path) -> None:
    """Every file of the stream was trained once, and the run proves it."""
    history = Run(root).history()
    assert {"done"} == {entry["state"] for entry in history}
    assert [entry["rows"] for entry in history] == [entry["rows_trained"] for entry in history]
    proof = Run(root).verify()
    assert proof.ok, [check for check in proof.checks if not check.ok]


@dataclass(frozen=True)
class Sweep:
    """A run at the start of a file with one commit inside and one at its boundary, and how it has to end.

    Args:
        before: the run, with the file accepted.
        after: the same run, the file trained by an undisturbed process.
        file: the file.
        states: digests of all states that the run commits, by step.
    """

    before: Path
    after: Path
    file: Path
    states: dict[int, str]


def assert_goes_on(sweep: Sweep, root: Path, status: int | None, *words: object) -> None:
    """What a fault left is a committed state, and the next process ends where the uninterrupted run ended."""
    output = root.with_name("output")
    printed = output.read_text()
    assert "Traceback" not in printed, printed
    assert_committed(sweep.states, root)
    if status == 0:  # the process survived the fault: as if it had not happened
        assert_same_state(sweep.after, root)
    done = command(output, "train", *words, "--run", root)
    assert done in ((0, 3) if words else (0,)), output.read_text()  # 3: everything was trained already
    assert_same_state(sweep.after, root)
    assert [] == temporary_files(root)
    assert_complete(root)
