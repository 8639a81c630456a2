"""Runs with a sharded model: the bits of one device, on any number of ranks, whichever rank is killed."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from daemons import hold, is_in, until
from processes import command, train
from ranks import Ranks, on_ranks
from runs import new_run
from states import assert_same_state, temporary_files

from onward import Run
from onward.errors import ConfigError
from onward.service.session import open_session
from onward.store.ledger import Ledger
from onward.training.model.treatment import Treatment

pytestmark = pytest.mark.shards
SETTINGS: dict[str, Any] = {
    "evaluation": {"share": 0},
    "batch_size": 6,
    "parts": 3,
    "save_steps": 2,
    "max_length": 128,
    "disk_margin_mb": 1,
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "learning_rate": 1e-3},
    "lora": {"method": "lora", "learning_rate": 1e-2, "lora": {"rank": 4, "dropout": 0.1}},
}


@dataclass(frozen=True)
class Two:
    """A world of two ranks, as far as its size is asked."""

    size: int = 2


def test_ranks_are_told_how_the_model_is_treated_and_refuse_what_shards_do_not_support(
    model: Path, tmp_path: Path
) -> None:
    """The treatment that the admission found goes to the others as JSON. A config that comes into force during a run is
    checked like the one that it began with, if several ranks hold the model."""
    layout = new_run(tmp_path / "run", model, **SETTINGS, **METHODS["full"], sharding="full").layout
    with Ledger(layout.ledger) as ledger:
        session = open_session(layout, ledger, report=lambda _: None)
        told = json.loads(json.dumps(session.execution.model))
        assert (session.base_digest, session.treatment) == (told["base"], Treatment.of(told["treatment"]))
        wished = session.config.model_copy(update={"optimizer": "adamw_8bit"})
        session.check(wished)
        world: Any = Two()
        with pytest.raises(ConfigError, match="adamw_8bit, which sharding does not support"):
            replace(session, world=world).check(wished)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_shards_on_any_number_of_ranks_train_the_same_bits(
    method: str, model: Path, files: list[Path], tmp_path: Path
) -> None:
    """One file on two ranks in shards and the next on three give the state of one device, and so the handover says."""
    alone = new_run(tmp_path / "alone", model, **SETTINGS, **METHODS[method]).layout.root
    assert 0 == train(alone, files)
    run = new_run(tmp_path / "run", model, **SETTINGS, **METHODS[method], sharding="full")
    for size, file in zip((2, 3), files, strict=True):
        assert [0] * size == on_ranks(tmp_path / "log", size, "train", file, "--run", run.layout.root)
    assert_same_state(alone, run.layout.root)
    assert run.verify().ok
    assert {"first", "bitwise"} >= {entry["handover"] for entry in run.history()}
    assert [] == temporary_files(run.layout.root)


@pytest.fixture(scope="module")
def undisturbed(model: Path, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the first file on one device, all weights trained."""
    alone = new_run(tmp_path_factory.mktemp("undisturbed") / "run", model, **SETTINGS, **METHODS["full"]).layout.root
    assert 0 == train(alone, files[:1])
    return alone


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.slow
def test_a_rank_that_is_killed_leaves_the_last_commit(
    lost: int, model: Path, files: list[Path], undisturbed: Path, tmp_path: Path
) -> None:
    """The others name it and end; one device goes on from the last commit, with the bits of a run without a kill."""
    run: Run = new_run(tmp_path / "run", model, **SETTINGS, **METHODS["full"], sharding="full")
    arguments = ("train", files[0], "--run", run.layout.root)
    with Ranks(tmp_path / "log", 2, *arguments, prepare={0: hold(run, 3)}) as ranks:
        until(is_in(run, files[0].name), ranks.processes[0])
        ranks.send(lost, signal.SIGKILL)
        hold(run).let_go.touch()
        assert -signal.SIGKILL == ranks.join()[lost]
        assert 0 not in ranks.join()
    assert f"rank {lost} (pid {ranks.processes[lost].pid} on " in ranks.log(1 - lost).read_text()
    assert 0 == command(tmp_path / "log", "train", "--run", run.layout.root)
    assert_same_state(undisturbed, run.layout.root)
    assert [] == temporary_files(run.layout.root)
