"""Runs that earlier releases made verify, go on, go back and are rebuilt, to the last bit (see fixtures/README.md)."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import yaml
from commands import onward
from faults import FULL_SIZE
from old_runs import read_environment, read_states, read_steps

from onward.layout import RunLayout
from onward.views.page.reading import RunReader

FIXTURES = Path(__file__).parent / "fixtures"
OLD = sorted(archive.name.partition(".")[0] for archive in FIXTURES.glob("run-*.tar.xz"))
METHODS = ("lora", "full")


@pytest.fixture(scope="module", params=OLD)
def unpacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of one earlier commit, their base model, and what that commit computed."""
    folder = tmp_path_factory.mktemp(request.param)
    with tarfile.open(FIXTURES / f"{request.param}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    shutil.copy(FIXTURES / f"{request.param}.json", folder / "recorded.json")
    return folder


@pytest.fixture(params=METHODS)
def old(request: pytest.FixtureRequest, unpacked: Path, tmp_path: Path) -> Path:
    """A copy of one of the runs, whose base model now lies somewhere else."""
    run = shutil.copytree(unpacked / request.param, tmp_path / request.param)
    config = run / "onward.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"model": str(unpacked / "model")}))
    return run


def train(run: Path, *files: Path, threads: int = 1) -> None:
    """Train in a process of its own, as the next day would."""
    assert 0 == processes.train(run, files, threads=threads)


def assert_as_recorded(unpacked: Path, act: str, run: Path) -> None:
    """Rows, learning rates and counters are those recorded; losses and states too, where the machine is the same."""
    recorded = json.loads((unpacked / "recorded.json").read_text())
    expected, steps, states = recorded[run.name][act], read_steps(run), read_states(run)
    if recorded["environment"] == read_environment(run):
        assert expected["steps"] == steps
        assert expected["states"] == states
        return
    assert [step[:-1] for step in expected["steps"]] == [step[:-1] for step in steps]
    assert [step[-1] for step in expected["steps"]] == pytest.approx([step[-1] for step in steps], rel=1e-3)
    assert [plain(state) for state in expected["states"].items()] == [plain(state) for state in states.items()]


def plain(state: tuple[str, dict[str, Any]]) -> tuple[str, Any, Any]:
    """Return what of a state does not depend on the machine: its step, Adam's count and the learning rate."""
    step, measured = state
    return step, measured["adam_step"], measured["learning_rate"]


def failing(run: Path, *options: str) -> list[str]:
    """Return the checks of `onward verify` that do not hold."""
    proof = onward("verify", "--run", run, "--json", *options).json
    return [check["name"] for check in proof["checks"] if not check["ok"]]


def test_verifies(old: Path, unpacked: Path) -> None:
    """An old run verifies as it is; where the machine is the one that made it, trained again it gives the same bits."""
    recorded = json.loads((unpacked / "recorded.json").read_text())
    assert [] == failing(old)
    replayed = failing(old, "--deep")
    assert replayed == [] or (replayed == ["replay"] and recorded["environment"] != read_environment(old))


def test_can_be_looked_at(old: Path) -> None:
    """Whoever only looks at an old run that nothing has brought up to date finds all there is, and changes nothing."""
    before = (old / "ledger.sqlite3").read_bytes()
    for words in (["status"], ["history"], ["metrics", "--every", "2"], ["grid"], ["releases"], ["doctor"]):
        outcome = onward(*words, "--run", old, "--json")
        assert 0 == outcome.status, outcome.err
    reader = RunReader(RunLayout(old))
    assert reader.curve(10, None, None)["columns"]["step"]
    assert reader.overview()["restore_points"]
    assert before == (old / "ledger.sqlite3").read_bytes()


def test_goes_on(old: Path, unpacked: Path) -> None:
    """The stopped file, the waiting one and a new one give what the commit that made the run would have given."""
    train(old)
    train(old, unpacked / "files" / "more.jsonl")
    assert_as_recorded(unpacked, "go_on", old)
    assert [] == failing(old, "--deep")


def test_goes_back(old: Path, unpacked: Path) -> None:
    """After a rollback the undone files, trained again, give what the original commit would have given."""
    outcome = onward("rollback", "--run", old, "--to", "completions.jsonl", "--requeue", "--yes")
    assert 0 == outcome.status, outcome.err
    assert [] == failing(old)
    train(old)
    assert_as_recorded(unpacked, "requeue", old)
    assert [] == failing(old)


def test_is_rebuilt(old: Path, unpacked: Path) -> None:
    """Rebuilt without one of its files the run is what the original commit would have made of it."""
    outcome = onward("rebuild", "--run", old, "--without", "completions.jsonl", "--yes")
    assert 0 == outcome.status, outcome.err
    assert_as_recorded(unpacked, "leave_out", old)
    assert [] == failing(old, "--deep")


@pytest.mark.parametrize("old", METHODS if FULL_SIZE else ["lora"], indirect=True)
@pytest.mark.slow
def test_goes_on_elsewhere(old: Path, unpacked: Path, tmp_path: Path) -> None:
    """With another thread count, as on another machine, it goes on too; a replay is refused, all else is proven."""
    train(old, threads=2)
    assert [] == failing(old)
    assert ["replay"] == failing(old, "--deep")
    train(old, tiny.write_jsonl(tmp_path / "more.jsonl", tiny.chat_rows(3)))
    assert [] == failing(old)
