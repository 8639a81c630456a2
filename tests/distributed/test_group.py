"""Several processes as a world: what one says all hear, what fails on one fails on all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import At, call_on_ranks
from runs import new_run
from torch.distributed import TCPStore

from onward import Run
from onward.errors import ConfigError, OnwardError, RankLost, UsageError
from onward.following import follow
from onward.ranks import Place, place_here
from onward.service.wishes import Stopped, Wishes
from onward.training.device.environment import describe_environment
from onward.training.ranks.forming import equalize, form, require_one_release
from onward.training.ranks.meeting import meet

LONG = {"order": "file", "rows": list(range(500))}
SIZE = 2


def talk(folder: Path) -> None:
    """On each rank: leave what it heard."""
    place = place_here()
    assert place is not None
    if place.rank == 1:
        torch.set_num_threads(2)
    said: list[str] = []
    group = form(place, 60.0, said.append)
    assert "onward-ranks" in {thread.name for thread in threading.enumerate()}  # which shows signs of life
    heard: dict[str, Any] = {"any": [group.any(place.rank == 1), group.any(False)], "said": said}
    heard["threads"], heard["uniform"] = torch.get_num_threads(), group.is_uniform
    heard["shared"] = group.share({"rank": place.rank, "text": "x" * place.rank})
    for message in (LONG, {"order": "step"}):
        if place.rank == 0:
            group.tell(lambda message=message: message)
        else:
            heard.setdefault("told", []).append(group.listen())
    tensors = [torch.full((3, 2), place.rank + 0.5).t(), torch.tensor(place.rank), torch.ones(4) * (1 - place.rank)]
    group.broadcast(tensors)
    heard["tensors"] = [tensor.tolist() for tensor in tensors]
    heard["errors"] = [error_of(group, rank, error) for rank, error in FAILURES]
    group.any(False)
    group.end()
    (folder / str(place.rank)).write_text(json.dumps(heard))


FAILURES: list[tuple[int, Exception]] = [
    (1, ValueError("odd")),
    (1, torch.OutOfMemoryError("CUDA out of memory")),
    (0, ConfigError("wrong", where="key", hint="mend it")),
    (1, ConfigError("wrong", where="key", hint="mend it")),
]


def error_of(group: Any, rank: int, error: Exception) -> str:
    """Fail on one rank, and return what this one got."""
    try:
        with group.together():
            if group.rank == rank:
                raise error
    except Exception as found:
        return f"{type(found).__name__}: {found}"
    return ""


def test_what_one_says_all_hear(tmp_path: Path) -> None:
    """Flags, values, messages of any length and tensors reach all; errors keep their kind and name the rank."""
    assert [0] * SIZE == call_on_ranks(talk, SIZE, tmp_path)
    zero, one = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(SIZE))
    shared = [{"rank": 0, "text": ""}, {"rank": 1, "text": "x"}]
    for heard in (zero, one):
        assert [True, False] == heard["any"]
        assert shared == heard["shared"]
        assert [[[0.5] * 3] * 2, 0, [1.0] * 4] == heard["tensors"]
        assert (1, True) == (heard["threads"], heard["uniform"])
    assert [LONG, {"order": "step"}] == one["told"]
    assert ["the ranks had 1, 2 threads: all use 1 now (OMP_NUM_THREADS)"] == zero["said"]
    assert [] == one["said"]
    wrong = "wrong [key]\n  mend it"
    assert [
        "RuntimeError: rank 1: ValueError: odd",
        "OutOfMemoryError: rank 1: CUDA out of memory",
        f"ConfigError: {wrong}",
        f"ConfigError: rank 1: {wrong}",
    ] == zero["errors"]
    assert [
        "ValueError: odd",
        "OutOfMemoryError: CUDA out of memory",
        f"ConfigError: rank 0: {wrong}",
        f"ConfigError: {wrong}",
    ] == one["errors"]


def absent() -> None:
    """Form a group of which one rank never comes."""
    place = place_here()
    assert place is not None
    with pytest.raises(RankLost, match=r"rank 2 did not join within 5 s"):
        form(Place(place.rank, 3, place.rank, 3), 5.0, print)


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named() -> None:
    """Who is there says who is not, and ends."""
    assert [0, 0] == call_on_ranks(absent, 2)
    assert issubclass(RankLost, OnwardError)


def test_differences_between_ranks_are_named() -> None:
    """All compute with the fewest threads, which makes them alike; in what else they differ is said, once, and a fact
    that one of them does not state is no difference."""
    threads, said = torch.get_num_threads(), list[str]()
    environment = describe_environment(torch.device("cpu"), torch.float32)
    unstated = {key: value for key, value in environment.items() if key != "processor_model"}
    other = {"torch": "1", "machine": "m", "ranks": "unequal"}
    try:
        for records in ([environment] * 2, [{**unstated, "threads": 3}, environment, {**environment, "threads": 2}]):
            assert [] == equalize([{"environment": record} for record in records], said.append)
        assert min(threads, 2) == torch.get_num_threads()
        records = [environment, unstated, {**unstated, **other}, {**environment, "torch": "2"}]
        assert ["machine", "ranks", "torch"] == equalize([{"environment": record} for record in records], said.append)
    finally:
        torch.set_num_threads(threads)
    assert [
        f"the ranks had {', '.join(map(str, sorted({threads, 2, 3})))} threads: all use {min(threads, 2)} now "
        "(OMP_NUM_THREADS)",
        "the ranks differ in machine, ranks, torch: equal bits are not promised, and handovers say so",
    ] == said


@pytest.mark.parametrize("listens", [True, False])
def test_who_finds_no_store_says_where_it_looked(listens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens there, or another program that never answers: either ends the wait with the address."""
    with socket.socket() as other:
        other.bind(("localhost", 0))
        if listens:
            other.listen()
        port = other.getsockname()[1]
        for name, value in At(1, 2, port).variables().items():
            monkeypatch.setenv(name, value)
        place = place_here()
        assert place is not None
        with pytest.raises(RankLost, match=r"^the processes cannot find each other: ") as lost:
            form(place, 0.2, print)
    assert f"localhost:{port}" == lost.value.where
    assert listens or "no answer" not in lost.value.what  # but what the attempt met


def test_a_stop_ends_the_wait_for_others(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a rank waits for those that have not come: rank 0 ends as one process does, the others just end."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    stop = Wishes()
    stop.ask("SIGTERM")
    with pytest.raises(Stopped):
        meet(store, (0, 2), {}, 60.0, stop.check_for_end)
    with socket.socket() as silent:
        silent.bind(("localhost", 0))
        silent.listen()
        for name, value in At(1, 2, silent.getsockname()[1]).variables().items():
            monkeypatch.setenv(name, value)
        run = new_run(tmp_path / "run", model)
        follow(run.layout.root, Place(1, 2, 1, 2), stop=stop)
        assert [] == Run(run.layout.root, place=Place(0, 2, 0, 2)).train(stop=stop)


def test_ranks_of_different_releases_are_refused() -> None:
    """They may not understand each other: who differs from rank 0 is named, on which machine, and what it has."""
    ranks = [{"host": f"node{rank}", "release": "0.3"} for rank in range(3)]
    require_one_release(ranks)
    for other, said in (({"release": "0.2"}, "0.2"), ({}, "an earlier release")):
        with pytest.raises(UsageError, match=f"rank 1 on node1 has Onward {said}, rank 0 has 0.3"):
            require_one_release([ranks[0], {"host": "node1", **other}, ranks[2]])


def port_without_rank_0() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as closed:
        closed.bind(("localhost", 0))
        return int(closed.getsockname()[1])


def test_who_does_not_meet_rank_0_says_why(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 cannot know it of another machine, of which one process speaks; on its own it meets the same itself,
    unless it is what is missing."""
    said: list[str] = []
    for place in (Place(1, 4, 1, 2), Place(2, 4, 0, 2), Place(3, 4, 1, 2)):
        with pytest.raises(UsageError, match="the run is not on this machine"):
            follow(tmp_path / "run", place, report=said.append)
    assert ["onward: rank 2: the run is not on this machine"] == [line.partition(" [")[0] for line in said]
    run, lost = new_run(tmp_path / "made", model, rank_timeout=1), [Place(1, 4, 1, 2), Place(3, 4, 1, 2)]
    for place in lost:
        for name, value in At(place.rank, 4, port_without_rank_0()).variables().items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RankLost):
            follow(run.layout.root, place, report=said.append)
    assert ["onward: rank 1"] == [line.partition(": the processes cannot")[0] for line in said[1:]]


def wait_for_the_frozen() -> None:
    """On rank 0: end as a program does whose other rank is frozen. On the other: freeze."""
    place = place_here()
    assert place is not None
    group = form(place, 20.0, lambda _: None)
    group.any(False)
    if place.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        group.any(False)
    except RankLost:
        group.end()
        sys.exit(7)


@pytest.mark.slow
def test_a_program_ends_though_a_rank_is_frozen() -> None:
    """Of whole interpreters, which end PyTorch's threads: what a frozen rank never sends is not waited for."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    started = list[subprocess.Popen[bytes]]()
    for rank in range(SIZE):
        variables = {**os.environ, **At(rank, SIZE, store.port).variables(), "PYTHONPATH": os.pathsep.join(sys.path)}
        started.append(subprocess.Popen([sys.executable, __file__], env=variables))
    try:
        assert 7 == started[0].wait(120)
    finally:
        for process in started:
            process.kill()
            process.wait()


if __name__ == "__main__":
    wait_for_the_frozen()
