"""Taking a file out, killed or after a restart: in the end the run is one that never had the file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from daemons import LONG, done, end, hold, is_in, rows_file, twin_of, until, watch
from daemons import SETTINGS as DAEMON
from faults import FULL_SIZE, KILL, Fault, copy_run
from processes import command, kill_after
from runs import new_run
from states import assert_same_state, temporary_files

from onward import Run

SETTINGS: dict[str, Any] = {
    "evaluation": {"share": 0},
    "batch_size": 2,
    "save_steps": 2,
    "max_length": 128,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "keep_days": 0,
    "lora": {"rank": 2, "dropout": 0.1},
}
POINTS = 10**6 if FULL_SIZE else 2
"""Changes on the disk that a test kills at, spread over all of them."""


@dataclass(frozen=True)
class Rebuilt:
    """A run of three files, and one that never had the second."""

    before: Path
    without: Path


@pytest.fixture(scope="module")
def rebuilt(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Rebuilt:
    """Both runs, without any interruption."""
    folder = tmp_path_factory.mktemp("rebuilt")
    files = [tiny.write_jsonl(folder / f"{n}.jsonl", tiny.chat_rows(n, seed=n)) for n in (4, 5, 6)]
    roots = [new_run(folder / name, model, **SETTINGS).layout.root for name in ("before", "without")]
    for root, given in zip(roots, (files, [files[0], files[2]]), strict=True):
        assert 0 == command(folder / "output", "train", *given, "--run", root)
    return Rebuilt(*roots)


def lose_boundary(root: Path) -> None:
    """Remove the restore points before the second file: the way back leads to the start."""
    for step in (0, 2):
        shutil.rmtree(root / "boundaries" / f"step-{step}")


def points(total: int) -> Iterator[int]:
    """Yield changes spread over all but the very last, the first ones densely, since those go back."""
    yield from sorted({*((3, 7, 11) if FULL_SIZE else (5,)), *range(1, total - 5, max(1, total // POINTS))})


@pytest.mark.parametrize("kept", [True, False], ids=["from its boundary", "from the start"])
@pytest.mark.slow
def test_a_rebuild_that_is_killed(rebuilt: Rebuilt, tmp_path: Path, kept: bool) -> None:
    """Killed while it goes back or trains again, at any change on the disk, the next start finishes the rebuild."""
    words = ("rebuild", "--without", "5.jsonl", "--yes", "--run")
    before = copy_run(rebuilt.before, tmp_path / "before")
    if not kept:
        lose_boundary(before)
    record = tmp_path / "record"
    counted = copy_run(before, tmp_path / "counted")
    assert 0 == command(tmp_path / "output", *words, counted, prepare=Fault(0, KILL, record))
    assert_same_state(rebuilt.without, counted)
    for at in points(len(record.read_text().splitlines())):
        root, output = copy_run(before, tmp_path / str(at) / "run"), tmp_path / str(at) / "output"
        fault = Fault(at, KILL, root.with_name("record"))
        status = command(output, *words, root, prepare=fault)
        assert (-9 if fault.struck.exists() else 0) == status
        try:
            states = {entry["name"]: entry["state"] for entry in Run(root).history()}
            if states["5.jsonl"] == "done":  # not even begun
                assert_same_state(rebuilt.before, root)
                continue
            again = words if kept and "queued" in states.values() else ("watch", "--once", "--run")
            assert 0 == command(output, *again, root)
            assert_same_state(rebuilt.without, root)
            assert ["4.jsonl", "6.jsonl"] == done(Run(root))
            assert [] == temporary_files(root)
            assert Run(root).verify().ok
        except (AssertionError, OSError) as error:
            error.add_note(f"killed at change {at}: {root.with_name('record').read_text().splitlines()[-1:]}")
            error.add_note(output.read_text())
            raise
        shutil.rmtree(root.parent)


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Run:
    """A run for a daemon."""
    return new_run(tmp_path / "run", model, **DAEMON)


@pytest.mark.parametrize(("how", "by"), [("stopped", "command"), ("killed", "daemon")])
def test_skip_after_a_restart(run: Run, model: Path, tmp_path: Path, how: str, by: str) -> None:
    """A file that an earlier process left half trained is skipped alike by the next daemon and without one."""
    files = [rows_file(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", 9), ("b", LONG), ("c", 7))]
    run.train(files[0])
    for file in files[1:]:
        run.add(file)
    process = watch(run, prepare=hold(run, step=7))
    until(is_in(run, "b.jsonl", step=7), process)
    kill_after(process, 0) if how == "killed" else end(process)
    assert "b.jsonl" == run.status()["file"]
    if by == "daemon":
        process = watch(run, prepare=hold(run, step=9))
        until(is_in(run, "b.jsonl", step=9), process)
    assert "skipped b.jsonl, back at step 5" == run.skip()
    if by == "daemon":
        until(lambda: done(run) == ["a.jsonl", "c.jsonl"], process)
        assert 0 == end(process)
    else:
        assert 0 == run.watch(once=True)
    assert ["a.jsonl", "c.jsonl"] == done(run)
    assert_same_state(twin_of(run, model, [files[0], files[2]]), run.layout.root)
    assert run.verify().ok
