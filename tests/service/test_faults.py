"""A write that fails or a kill at any point of a commit leaves a committed state, and the next start goes on from it.

The changes that a process makes on the disk are counted in the process itself. With ONWARD_SOAK=1 each of them gets
each fault.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from faults import (
    FULL_SIZE,
    KILL,
    KINDS,
    Fault,
    Sweep,
    assert_goes_on,
    committed_states,
    copy_run,
)
from processes import command
from runs import new_run

from onward import Run

SETTINGS: dict[str, Any] = {
    "evaluation": {"share": 0},
    "batch_size": 2,
    "save_steps": 2,
    "max_length": 128,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "lora": {"rank": 2, "dropout": 0.1},
}
SHARES = 4 if FULL_SIZE else 1
"""Number of tests that a sweep is split into, so that they run in parallel."""
POINTS = 10**6 if FULL_SIZE else 6
"""The small form tries this many changes, spread over all of them, each with one of the faults in turn."""
BEYOND = 2
"""Points after the last change that are tried too: nothing happens there."""


@pytest.fixture(scope="module")
def sweep(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A run with one file trained and one owed."""
    folder = tmp_path_factory.mktemp("sweep")
    first, second = (tiny.write_jsonl(folder / f"{n}.jsonl", tiny.chat_rows(n, seed=n)) for n in (4, 6))
    run = new_run(folder / "before", model, **SETTINGS)
    assert 0 == command(folder / "output", "train", first, "--run", run.layout.root)
    run.add(second)
    after = copy_run(folder / "before", folder / "after")
    assert 0 == command(folder / "output", "train", "--run", after)
    return Sweep(folder / "before", after, second, committed_states(after))


def points(total: int, share: int, shares: int = SHARES) -> Iterator[tuple[int, str]]:
    """Yield the points of a sweep that belong to a share, with their faults."""
    chosen = range(1, total + BEYOND + 1, max(1, -(-total // POINTS)))
    cases = [
        (at, kind)
        for number, at in enumerate(chosen)
        for kind in (KINDS if FULL_SIZE else [KINDS[number % len(KINDS)]])
    ]
    yield from cases[share::shares]


@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.slow
def test_faults_while_training(share: int, sweep: Sweep, tmp_path: Path) -> None:
    """No space, a failing disk or a kill at the n-th change of a process that trains and commits costs nothing."""
    assert_every_point(share, sweep, tmp_path, sweep.before)


@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.slow
def test_faults_while_a_boundary_is_committed_behind_the_next_file(share: int, model: Path, tmp_path: Path) -> None:
    """The same where one file's boundary is written while the next one is begun and trained."""
    run = new_run(tmp_path / "before", model, **SETTINGS)
    files = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.chat_rows(n, seed=n)) for n in (2, 5, 3)]
    for file in files:
        run.add(file)
    after = copy_run(run.layout.root, tmp_path / "after")
    assert 0 == command(tmp_path / "output", "train", "--run", after)
    assert ["bitwise"] * 3 == [entry["handover"] for entry in Run(after).history()]
    assert_every_point(
        share, Sweep(run.layout.root, after, files[0], committed_states(after)), tmp_path, run.layout.root
    )


@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.slow
def test_faults_while_a_file_arrives(share: int, sweep: Sweep, model: Path, tmp_path: Path) -> None:
    """The same from the arrival of the first file on: the command that failed is given again."""
    whole = new_run(tmp_path / "whole", model, **SETTINGS).layout.root
    empty = copy_run(whole, tmp_path / "empty")
    assert 0 == command(tmp_path / "output", "train", sweep.file, "--run", whole)
    alone = Sweep(empty, whole, sweep.file, committed_states(whole))
    assert_every_point(share, alone, tmp_path, empty, sweep.file)


def assert_every_point(share: int, sweep: Sweep, folder: Path, before: Path, *words: object) -> None:
    """Put every fault of a share into a copy of a run of its own, and let the next process go on."""
    record = folder / "record"
    counted = copy_run(before, folder / "counted" / "run")
    assert 0 == command(folder / "output", "train", *words, "--run", counted, prepare=Fault(0, KILL, record))
    total = len(record.read_text().splitlines())
    assert 100 < total
    for at, kind in points(total, share):
        root = copy_run(before, folder / f"{at}-{kind}" / "run")
        fault = Fault(at, kind, record)
        status = command(root.with_name("output"), "train", *words, "--run", root, prepare=fault)
        struck = len(record.read_text().splitlines()) >= at
        assert struck or status == 0
        assert (status == -signal.SIGKILL) is (kind == KILL and struck)
        try:
            assert_goes_on(sweep, root, status, *words)
        except (AssertionError, OSError) as error:
            error.add_note(f"{kind} at change {at}: {record.read_text().splitlines()[-1:]}")
            raise
        shutil.rmtree(root.parent)
