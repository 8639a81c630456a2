"""A clock that is set back and a reader that never ends change nothing of what is trained and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from daemons import done, rows_file
from runs import new_run
from states import assert_same_state

from onward import Run
from onward.layout import step_of
from onward.service.lock import RunLock
from onward.service.owner.process import OpenedRun, account, operate
from onward.service.state.retention import DAY
from onward.service.wishes import Wishes
from onward.store.ledger import Ledger

NOON = 1_700_000_000.0 - 1_700_000_000.0 % DAY + DAY / 2
"""A moment in the middle of a day, in seconds since the epoch."""
SETTINGS: dict[str, Any] = {
    "evaluation": {"share": 0},
    "batch_size": 2,
    "save_steps": 2,
    "max_length": 128,
    "learning_rate": 1e-2,
    "keep_boundaries": 1,
    "keep_days": 3,
    "lora": {"rank": 2, "dropout": 0.1},
}


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.at = NOON

    def __call__(self) -> float:
        self.at += 0.001
        return self.at


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four files of two steps each."""
    folder = tmp_path_factory.mktemp("files")
    return [rows_file(folder / f"{name}.jsonl", 4, seed=seed) for seed, name in enumerate("dbca")]


@pytest.fixture(scope="module")
def twin(model: Path, tmp_path_factory: pytest.TempPathFactory, files: list[Path]) -> Path:
    """The run of the same files under a clock that was not changed."""
    made = new_run(tmp_path_factory.mktemp("twin") / "run", model, **SETTINGS)
    made.train(*files)
    return made.layout.root


def train(run: Run, file: Path, clock: Clock) -> None:
    """Train a file as `onward train` does, by another clock."""
    with RunLock(run.layout.lock), Ledger(run.layout.ledger, clock=clock) as ledger:
        opened = OpenedRun(run.layout, ledger, lambda _: None)
        wishes = Wishes()
        with account(opened, wishes) as reporter, operate(opened, wishes, lambda _: None, reporter) as daemon:
            daemon.intake.take([file])
            daemon.run(once=True)


@pytest.mark.parametrize("jump", [0.0, -DAY, -30 * DAY, DAY])
def test_a_clock_that_jumps(model: Path, tmp_path: Path, files: list[Path], twin: Path, jump: float) -> None:
    """Order and state are those of any run; what retention counts on is kept, and a clock set back loses none of it."""
    run, clock = new_run(tmp_path / "run", model, **SETTINGS), Clock()
    for number, file in enumerate(files):
        clock.at += jump if number == 2 else 60.0
        train(run, file, clock)
    assert [file.name for file in files] == done(run)
    last_of_the_first_day = {4} if jump else set[int]()
    assert {6, 8} | last_of_the_first_day == {step_of(point) for point in run.layout.restore_points()}
    assert_same_state(twin, run.layout.root)
    assert run.verify(deep=True).ok
    run.rollback(files[2].name)
    assert 6 == run.status()["global_step"]


def test_a_reader_that_holds_its_view(model: Path, tmp_path: Path, files: list[Path], twin: Path) -> None:
    """A read transaction that stays open sees the run as it was, and holds up neither training nor other readers."""
    run = new_run(tmp_path / "run", model, **SETTINGS)
    run.train(files[0])
    with Ledger(run.layout.ledger, read_only=True) as reader:
        reader.query("BEGIN")
        assert 1 == len(reader.files("done"))
        run.train(*files[1:])
        assert (1, 2) == (len(reader.files("done")), reader.committed_step())
        assert (4, 8) == (len(done(run)), run.status()["global_step"])
        assert run.verify().ok
        reader.query("COMMIT")
        assert (4, 8) == (len(reader.files("done")), reader.committed_step())
    assert_same_state(twin, run.layout.root)
