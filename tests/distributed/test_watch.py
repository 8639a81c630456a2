"""Signs of life of several ranks: who is silent, gone or stays away is named, and a stop reaches rank 0."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from onward.errors import RankLost
from onward.training.ranks.failures import Released
from onward.training.ranks.group import Group
from onward.training.ranks.watch import Watch


@dataclass
class Scene:
    """Watches of some ranks on one store, and the time.

    Args:
        alive: ranks that show a sign of life whenever somebody looks at the clock, which is a second later then.
    """

    size: int
    patience: float = 10.0
    alive: list[int] = field(default_factory=list[int])
    now: float = 0.0
    watches: list[Watch] = field(default_factory=list[Watch])

    def __post_init__(self) -> None:
        store = torch.distributed.HashStore()
        names = [f"rank {rank}" for rank in range(self.size)]
        self.watches = [Watch(store, rank, names, self.patience, self.clock) for rank in range(self.size)]
        for rank in range(self.size):
            store.set(f"beat/{rank}", "0 0")

    def clock(self) -> float:
        """Return the time."""
        alive, self.alive = self.alive, []
        self.pass_seconds(1 if alive and self.watches else 0, alive)
        self.alive = alive
        return self.now

    def pass_seconds(self, seconds: int, alive: list[int]) -> None:
        """Let some ranks show signs of life each second, in their order."""
        for _ in range(seconds):
            self.now += 1.0
            for rank in alive:
                self.watches[rank].look()


def test_a_silent_rank_is_named_everywhere() -> None:
    """After its patience rank 0 says who is silent; the others say the same. Who misses rank 0 says so itself."""
    scene = Scene(3)
    scene.pass_seconds(12, [0, 1, 2])
    for watch in scene.watches:
        watch.check()
    scene.pass_seconds(12, [0, 1])
    for watch in scene.watches[:2]:
        with pytest.raises(RankLost, match="rank 2 has shown no sign of life for 10 s"):
            watch.check()
        assert not watch.misses_first
    other = Scene(2)
    other.pass_seconds(12, [1])
    with pytest.raises(RankLost, match="rank 0 has shown no sign of life"):
        other.watches[1].check()
    assert other.watches[1].misses_first
    assert [True, False] == [other.watches[1].is_first_to_say(), other.watches[1].is_first_to_say()]


def test_who_stood_still_itself_blames_nobody() -> None:
    """A process that was suspended with the whole machine knows nothing of the others until they were silent again."""
    scene = Scene(2)
    scene.pass_seconds(2, [1, 0])
    scene.now += 3600.0
    scene.pass_seconds(11, [0])
    scene.watches[0].check()
    scene.pass_seconds(1, [0])
    with pytest.raises(RankLost, match="rank 1 has shown no sign of life for 10 s"):
        scene.watches[0].check()


def test_a_rank_that_stays_away_is_named() -> None:
    """One that shows signs of life and does not come to where the others wait ends all, long after its patience."""
    scene = Scene(3)
    scene.watches[0].place = scene.watches[1].place = 5
    scene.pass_seconds(3, [0, 1, 2])
    scene.watches[0].check(waited=99.0)
    with pytest.raises(RankLost, match="rank 2 did not reach the point where the others waited for 101 s"):
        scene.watches[0].check(waited=101.0)
    scene.pass_seconds(1, [2])
    with pytest.raises(RankLost, match="waited for 101 s"):  # what was found first
        scene.watches[0].check(waited=150.0)
    with pytest.raises(RankLost, match="rank 2 did not reach the point"):
        scene.watches[2].check()
    early, late = Scene(3), Scene(2)
    early.watches[0].place = 1
    with pytest.raises(RankLost, match=r"^rank 1, rank 2 did not reach"):
        early.watches[0].check(waited=101.0)
    with pytest.raises(RankLost, match=r"^another rank did not reach"):  # it came between two signs of life
        late.watches[0].check(waited=101.0)


def test_a_broken_connection_is_explained_by_who_knows() -> None:
    """Who is gone is named; if nobody is, the words are those of the connection's end, and the first to say why a rank
    ends says it for all."""
    scene = Scene(3)
    scene.pass_seconds(2, [0, 1, 2])
    scene.alive = [0, 1]
    broken = RuntimeError("Connection reset\nby peer")
    assert "rank 2 is gone: it was killed or died" == scene.watches[0].blame(broken).what
    scene.alive = []
    scene.pass_seconds(1, [1])
    assert "rank 2 is gone: it was killed or died" == scene.watches[1].explain(RankLost("it broke")).what
    assert [False, False] == [watch.misses_first for watch in scene.watches[:2]]
    orphan = Scene(2, now=5.0)
    orphan.now += 4.0
    assert "rank 0 is gone: it was killed or died" == orphan.watches[1].explain(RankLost("it broke")).what
    assert orphan.watches[1].misses_first
    whole = Scene(2, alive=[0, 1])
    error = whole.watches[1].blame(broken)
    assert ("the connection to another rank broke: Connection reset", "devices") == (error.what, error.where)
    assert "onward train goes on from the last commit" in str(error.hint)
    assert "rank 1 failed" == whole.watches[1].explain(RankLost("rank 1 failed")).what
    whole.alive = []
    whole.pass_seconds(1, [0])
    assert "rank 1 failed" == whole.watches[0].explain(error).what
    assert "rank 1 failed" == whole.watches[1].explain(error).what


@pytest.mark.parametrize(("patience", "grace"), [(10, 10), (60, 20)])
def test_a_process_that_may_hang_ends_by_itself(patience: int, grace: int) -> None:
    """Where it waits in PyTorch's own collectives nothing can be raised: once another rank is lost, it has some time
    to end, and no rank is lost too early."""
    scene, lost = Scene(3, float(patience)), list[RankLost]()
    scene.watches[0].on_loss = lost.append
    scene.watches[1].on_loss = lambda _: pytest.fail("it waits nowhere without looking")
    scene.watches[0].may_hang = True
    scene.pass_seconds(1 + patience, [0, 1])
    scene.watches[0].check()
    scene.pass_seconds(1 + grace, [0, 1])
    assert [] == lost
    scene.pass_seconds(1, [0, 1])
    assert [f"rank 2 has shown no sign of life for {patience} s"] == [error.what for error in lost]


class Agent:
    """The store of an agent that may end."""

    def __init__(self) -> None:
        self.store = torch.distributed.HashStore()
        self.has_ended = False

    def __getattr__(self, name: str) -> Any:
        if self.has_ended:
            raise RuntimeError("Broken pipe")
        return getattr(self.store, name)


def test_the_end_of_the_agent_is_a_stop() -> None:
    """Rank 0 shows a sign of life at once. When the store is gone, which torchrun's agent keeps, it stops as on a
    signal, unless it had ended its watch itself."""
    agent, stops, has_stopped = Agent(), list[str](), threading.Event()

    def watch() -> Watch:
        made = Watch(agent, 0, ["rank 0", "rank 1"], 10.0)
        made.on_stop = lambda reason: (stops.append(reason), has_stopped.set())[0]
        made.start()
        return made

    ended = watch()
    assert b"0 0" == agent.store.get("beat/0")
    agent.store.set("beat/1", "0 0")
    ended.close(released=False)
    assert not agent.store.check(["released"])
    left = watch()
    agent.has_ended = True
    assert has_stopped.wait(60)
    left.close(released=True)
    assert ["the end of the process that started the others"] == stops
    assert "onward-ranks" not in {thread.name for thread in threading.enumerate()}
    assert left.is_first_to_say()


@dataclass
class Work:
    """A collective of torch that ends right after the first glance at it, well or with an error."""

    error: str | None = None
    glances: int = 0

    def is_completed(self) -> bool:
        """Whether it has ended."""
        return self.glances > 0

    def wait(self, _: object) -> None:
        """Wait for a glance; raises what torch raises."""
        self.glances += 1
        if self.glances == 1 or self.error:
            raise RuntimeError(self.error if self.glances > 1 else "Operation timed out!")


def test_what_ends_between_two_glances_has_not_failed() -> None:
    """A collective that ends right after a glance at it has worked; one that fails then names who is gone."""
    scene = Scene(2)
    group = Group(1, 2, torch.device("cpu"), scene.watches[1], is_uniform=True)
    work = Work()
    group.wait(work)
    assert (2, False) == (work.glances, group.is_broken)
    scene.now += 5.0
    with pytest.raises(RankLost, match="rank 0 is gone"):
        group.wait(Work("Connection closed by peer"))
    assert group.is_broken


def test_a_rank_that_left_its_place_tells_nothing() -> None:
    """What fails on a rank is passed on at the next meeting; what ends it in the middle of a step, a signal say, leaves
    the ranks in different places, and then nothing is sent any more."""
    group = Group(0, 2, torch.device("cpu"), Scene(2).watches[0], is_uniform=True)
    for error, is_broken in ((ValueError, False), (KeyboardInterrupt, True)):
        with pytest.raises(error), group.in_step():
            raise error
        assert is_broken == group.is_broken
    group.tell(lambda: pytest.fail("it was told"))


def test_a_stop_asked_of_any_rank_reaches_rank_0() -> None:
    """It is passed on once, with who was asked, as soon as rank 0 can be told; the end of rank 0 reaches the others,
    also where it broke their connections."""
    scene = Scene(2)
    stops: list[str] = []
    scene.watches[1].asked = lambda: "SIGTERM"
    scene.pass_seconds(2, [1, 0])
    scene.watches[0].on_stop = stops.append
    scene.pass_seconds(3, [1, 0])
    assert ["SIGTERM to rank 1"] == stops
    scene.watches[0].close(released=True)
    scene.pass_seconds(1, [1])
    with pytest.raises(Released):
        scene.watches[1].check()
    with pytest.raises(Released):
        scene.watches[1].blame(RuntimeError("Connection reset"))
    with pytest.raises(Released):
        scene.watches[1].explain(RankLost("rank 1 failed: Connection reset"))
