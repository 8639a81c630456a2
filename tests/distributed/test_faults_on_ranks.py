"""A rank that is killed, or refused by the disk, at any change that it makes there: all end, and no bit is lost.

With ONWARD_SOAK=1 the faults come at ten changes of each rank, in each way that a state is kept.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import FULL_SIZE, KILL, KINDS, Fault, Sweep, assert_goes_on, committed_states, copy_run
from processes import command
from ranks import Ranks
from runs import new_run

SETTINGS: dict[str, Any] = {
    "batch_size": 6,
    "parts": 3,
    "save_steps": 2,
    "max_length": 128,
    "disk_margin_mb": 1,
    "rank_timeout": 60,
}
WAYS: dict[str, dict[str, Any]] = {
    "whole": {"method": "lora", "learning_rate": 1e-2, "lora": {"rank": 4, "dropout": 0.1}},
    "shards": {"method": "full", "learning_rate": 1e-3},
}
SIZE = 2
POINTS = 10 if FULL_SIZE else 1
"""Changes of a rank that get a fault, spread over all of them."""
CASES = [("whole", 0), *(pytest.param("shards", rank, marks=pytest.mark.shards) for rank in (0, 1))]
"""Ways, and ranks that write: alongside a whole model the others write nothing."""


@pytest.fixture(scope="module")
def sweep(request: pytest.FixtureRequest, model: Path, files: list[Path], tmp_path_factory: Any) -> Sweep:
    """A run with a file owed, of which nothing was trained yet: commits at its start, inside and at the boundary."""
    folder, way = tmp_path_factory.mktemp(request.param), WAYS[request.param]
    run = new_run(folder / "before", model, **SETTINGS, **way, sharding="full" if request.param == "shards" else "off")
    run.add(files[1])
    after = copy_run(folder / "before", folder / "after")
    assert 0 == command(folder / "output", "train", "--run", after)
    return Sweep(folder / "before", after, files[1], committed_states(after))


def points(total: int, rank: int) -> Iterator[tuple[int, str]]:
    """Yield changes of a rank, spread over all of them, with a fault in turn."""
    for number in range(POINTS):
        yield 1 + (2 * number + 1) * total // (2 * POINTS), KINDS[(number + rank + 2) % len(KINDS)]


@pytest.mark.slow
@pytest.mark.parametrize(("sweep", "rank"), CASES, indirect=["sweep"])
def test_faults_of_one_rank(sweep: Sweep, rank: int, tmp_path: Path) -> None:
    """No space, a failing disk or a kill at the n-th change of a rank: one device goes on to the undisturbed bits."""
    record = tmp_path / "record"
    counted = copy_run(sweep.before, tmp_path / "counted" / "run")
    assert [0] * SIZE == train(counted, rank, Fault(0, KILL, record))[0]
    total = len(record.read_text().splitlines())
    assert 10 < total
    for at, kind in points(total, rank):
        root = copy_run(sweep.before, tmp_path / f"{at}-{kind}" / "run")
        statuses, numbers, logs = train(root, rank, Fault(at, kind, record))
        assert None not in statuses
        if kind == KILL and len(record.read_text().splitlines()) >= at:
            assert -signal.SIGKILL == statuses[rank]
            assert 0 != statuses[1 - rank]
            assert f"rank {rank} (pid {numbers[rank]} on " in logs[1 - rank], (at, logs)
        assert_goes_on(sweep, root, 0 if statuses == [0] * SIZE else 1)
        shutil.rmtree(root.parent)


def train(root: Path, rank: int, fault: Fault) -> tuple[list[int | None], list[int | None], list[str]]:
    """Train a run on ranks of which one meets a fault; returns their exit statuses, numbers of process and output."""
    with Ranks(root.with_name("output"), SIZE, "train", "--run", root, prepare={rank: fault}) as ranks:
        statuses = ranks.join()
        numbers = [process.pid for process in ranks.processes]
    return statuses, numbers, [ranks.log(each).read_text() for each in range(SIZE)]
