"""A run on several ranks: the bits of one, whichever rank is stopped, killed or frozen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from daemons import configure, hold, is_in, until
from processes import train
from ranks import Ranks, on_ranks
from runs import new_run
from states import assert_same_state

from onward import Run
from onward.ranks import LOST
from onward.service.holder import is_held

SETTINGS: dict[str, Any] = {
    "evaluation": {"share": 0},
    "batch_size": 6,
    "parts": 4,
    "save_steps": 2,
    "max_length": 128,
    "learning_rate": 1e-2,
    "disk_margin_mb": 1,
    "rank_timeout": 60,
    "lora": {"rank": 4, "dropout": 0.1},
}
FULL = {**SETTINGS, "method": "full", "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def alone(model: Path, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both files on one rank."""
    root = tmp_path_factory.mktemp("alone") / "run"
    new_run(root, model, **SETTINGS)
    assert 0 == train(root, files)
    return root


@pytest.fixture
def made(model: Path, tmp_path: Path) -> Run:
    """A run that has not trained."""
    return new_run(tmp_path / "run", model, **SETTINGS)


def classes(run: Run) -> set[str]:
    """Return the classes of all handovers of a run."""
    return {entry["handover"] for entry in run.history()}


def test_any_number_of_ranks_trains_the_same_bits(made: Run, files: list[Path], alone: Path) -> None:
    """One file on two ranks and the next on four give the state of one rank, and the handover says so."""
    for size, file in zip((2, 4), files, strict=True):
        log = made.layout.root.parent / "log"
        assert [0] * size == on_ranks(log, size, "train", file, "--run", made.layout.root), log.read_text()
    assert_same_state(alone, made.layout.root)
    assert made.verify().ok
    assert {"first", "bitwise"} >= classes(made)


def test_all_weights_trained_on_several_ranks(model: Path, files: list[Path], tmp_path: Path) -> None:
    """A run that trains all weights has the same bits on three ranks as on one."""
    one, three = (new_run(tmp_path / name, model, **FULL).layout.root for name in ("one", "three"))
    assert 0 == train(one, files[:1])
    assert [0, 0, 0] == on_ranks(tmp_path / "log", 3, "train", files[0], "--run", three)
    assert_same_state(one, three)


def test_a_signal_to_any_rank_commits(made: Run, files: list[Path], alone: Path) -> None:
    """SIGTERM to rank 1 in the middle of a file commits and ends all; another number of ranks goes on."""
    root = made.layout.root
    log = root.parent / "log"
    with Ranks(log, 2, "train", *files, "--run", root, prepare={0: hold(made, 3)}) as ranks:
        until(is_in(made, files[0].name), ranks.processes[0])
        ranks.send(1, signal.SIGTERM)
        assert [0, 0] == ranks.join()
    assert "stopped (SIGTERM to rank 1)" in log.read_text()
    assert 3 == made.status()["global_step"]
    assert [0, 0, 0] == on_ranks(log, 3, "train", "--run", root)
    assert_same_state(alone, root)


def test_a_released_pause_frees_the_models_of_all(made: Run, files: list[Path], alone: Path) -> None:
    """`pause --release` in the middle of a file: a resume loads the model again on every rank and loses no bit."""
    root = made.layout.root
    log = root.parent / "log"
    with Ranks(log, 2, "train", *files, "--run", root, prepare={0: hold(made, 3)}) as ranks:
        until(is_in(made, files[0].name), ranks.processes[0])
        made.pause(release=True)
        until(lambda: made.status()["state"] == "paused", ranks.processes[0])
        hold(made).let_go.touch()
        made.resume()
        assert [0, 0] == ranks.join(), log.read_text()
    assert_same_state(alone, root)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_ends_all(lost: int, made: Run, files: list[Path], alone: Path) -> None:
    """The others say which rank is gone and end with status 1; from the last commit on the bits are the same."""
    root = made.layout.root
    log = root.parent / "log"
    with Ranks(log, 2, "train", *files, "--run", root, prepare={0: hold(made, 3)}) as ranks:
        until(is_in(made, files[0].name), ranks.processes[0])
        ranks.send(lost, signal.SIGKILL)
        hold(made).let_go.touch()
        assert -signal.SIGKILL == ranks.join()[lost]
        assert 0 not in ranks.join()
    assert f"rank {lost} (pid {ranks.processes[lost].pid} on " in ranks.log(1 - lost).read_text()
    assert 0 == train(root)
    assert_same_state(alone, root)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["paused", "idle"])
def test_a_rank_that_is_lost_while_nothing_is_trained_ends_all(where: str, made: Run, files: list[Path]) -> None:
    """Rank 0 waits for an operator or for a file, and not for the ranks: it misses one all the same."""
    root = made.layout.root
    log = root.parent / "log"
    configure(made, rank_timeout=10)
    words = ["train", *files] if where == "paused" else ["watch"]
    with Ranks(log, 2, *words, "--run", root, prepare={0: hold(made, 3)}) as ranks:
        if where == "paused":
            until(is_in(made, files[0].name), ranks.processes[0])
            made.pause()
            hold(made).let_go.touch()
        until(lambda: is_held(made.layout.lock) and made.status()["state"] == where, ranks.processes[0])
        ranks.send(1, signal.SIGKILL)
        assert [1, -signal.SIGKILL] == ranks.join(), log.read_text()
    assert f"rank 1 (pid {ranks.processes[1].pid} on " in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["off", pytest.param("full", marks=pytest.mark.shards)])
def test_a_frozen_rank_ends_all(sharding: str, model: Path, files: list[Path], tmp_path: Path) -> None:
    """A rank that is stopped shows no sign of life: after `rank_timeout` the others name it and end.

    In shards they may wait for it inside of a layer, where nothing can be told: then the process ends by itself.
    """
    run = new_run(tmp_path / "run", model, **{**FULL, "rank_timeout": 10, "sharding": sharding})
    log = tmp_path / "log"
    with Ranks(log, 2, "train", *files, "--run", run.layout.root, prepare={0: hold(run, 3)}) as ranks:
        until(is_in(run, files[0].name), ranks.processes[0])
        ranks.send(1, signal.SIGSTOP)
        hold(run).let_go.touch()
        ranks.processes[0].join(60)
        assert ranks.processes[0].exitcode in ({1, LOST} if sharding == "full" else {1})
    assert "has shown no sign of life for 10 s" in log.read_text()
    assert f"rank 1 (pid {ranks.processes[1].pid} on " in log.read_text()


def test_fast_exchange_says_close(model: Path, files: list[Path], tmp_path: Path) -> None:
    """Where ranks add their gradients in any order no equal bits are promised: handovers are close."""
    run = new_run(tmp_path / "run", model, **{**SETTINGS, "exchange": "fast"})
    assert [0, 0] == on_ranks(tmp_path / "log", 2, "train", *files, "--run", run.layout.root)
    assert "close" in classes(run)
    assert run.verify().ok


def test_more_ranks_than_parts(made: Run, files: list[Path]) -> None:
    """Ranks that would have nothing to do are refused before the first step, with the key to change."""
    configure(made, parts=1)
    log = made.layout.root.parent / "log"
    assert 2 == on_ranks(log, 2, "train", *files, "--run", made.layout.root)[0]
    assert "2 devices cannot share a step of 1 part [parts]" in log.read_text()
    assert 0 == made.status()["global_step"]


@pytest.mark.slow
def test_devices_on_the_command_line(made: Run, files: list[Path], alone: Path, tmp_path: Path) -> None:
    """`--devices 1:2` starts two processes, goes on with one after a kill, and lists all files of the command."""
    program, killed = tmp_path / "kill", tmp_path / "killed"
    program.write_text(f"#!/bin/sh\n[ -e {killed} ] || {{ echo $PPID > {killed}; kill -9 $PPID; }}\n")
    program.chmod(0o755)
    configure(made, notify={"command": str(program), "events": ["done"]})
    words = [sys.executable, "-P", "-m", "onward", "train", "--devices", "1:2", "--json", "--run", made.layout.root]
    ended = subprocess.run([*words, *files], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert 0 == ended.returncode, ended.stderr
    lost = f"rank 0 (pid {killed.read_text().strip()}) was ended by SIGKILL"
    assert f"{lost}; 1 device goes on from the last commit" in ended.stderr
    assert [file.name for file in files] == [entry["name"] for entry in json.loads(ended.stdout)]
    assert_same_state(alone, made.layout.root)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_command_commits(
    number: signal.Signals, made: Run, files: list[Path], tmp_path: Path
) -> None:
    """A scheduler may signal every process: rank 0 commits, and the command has not failed."""
    program, done, go_on = tmp_path / "wait", tmp_path / "done", tmp_path / "go_on"
    program.write_text(f"#!/bin/sh\ntrap '' TERM USR1\n: > {done}\nuntil [ -e {go_on} ]; do sleep 0.1; done\n")
    program.chmod(0o755)
    configure(made, notify={"command": str(program), "events": ["done"]})
    long = tiny.write_jsonl(tmp_path / "long.jsonl", tiny.chat_rows(1500, seed=9))  # the signal comes while it trains
    words = [sys.executable, "-P", "-m", "onward", "train", "--devices", "2", "--run", made.layout.root, files[0], long]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True) as command:
        try:
            until(done.exists)
            os.killpg(command.pid, number)
            go_on.touch()
            _, said = command.communicate(timeout=60)
        finally:
            command.kill()
    assert 0 == command.returncode, said
    assert f"stopped ({number.name})" in said
    assert "Traceback" not in said
    assert made.verify().ok
