"""A tracker's feed: every step is sent once, in order, whatever fails, is killed or is rolled back in between."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from ledgers import add_file, made_up_run
from streams import Stream
from tracked import Store, shown

from onward.store.ledger import Ledger
from onward.store.metrics import Metrics
from onward.store.rows import StepRecord
from onward.views.trackers.feed import Feed
from onward.views.trackers.telling import tell
from onward.views.trackers.tracker import TrackedRun


def feed_of(ledger: Ledger, store: Store) -> Feed:
    """The feed of a tracker, as a process has it that has told nothing yet."""
    return Feed(ledger, "it", lambda known: store.open(TrackedRun("r", "n", Path("unused"), {}, known)))


@pytest.mark.parametrize("seed", range(6))
def test_every_step_is_told_once_whatever_happens(tmp_path: Path, seed: int) -> None:
    """Trained, killed, rolled back, failing and restarted in any order, the next file begun while a boundary is still
    being committed or not: what is told is the stream, and nothing twice.

    Numbers only grow, a step that replaces an undone one says so, and what is not replaced is the run's own curve.
    """
    source, stream, store = random.Random(seed), Stream(tmp_path / "run"), Store()
    feed = feed_of(stream.ledger, store)
    for _ in range(60):
        match source.randrange(8):
            case 0 | 1 | 2:
                stream.train(source.randrange(1, 5), last=source.random() < 0.5, late=source.random() < 0.5)
            case 7:
                stream.commit()
            case 3:
                stream.die_and_train_again(source.randrange(1, 4))
            case 4:
                stream.roll_back(source.randrange(len(stream.boundaries)))
            case 5:
                store.fails = source.choice((None, None, "no route to host"))
                tell(feed, stream.ledger)
            case _:  # another process
                feed = feed_of(stream.ledger, store)
    store.fails = None
    stream.train(1, last=True)
    feed.tell()
    numbers = [point.number for point in store.points]
    assert sorted(set(numbers)) == numbers
    assert list(enumerate(stream.lineage, start=1)) == shown(store.points)
    assert len({(point.step, point.values["rollbacks"]) for point in store.points}) == len(store.points)
    for before, after in zip(store.points, store.points[1:], strict=False):
        went_back = after.step <= before.step
        assert went_back == (after.values["rollbacks"] > before.values["rollbacks"])
        assert not went_back or (after.values["rollbacks"], after.step - 1, before.number) in store.marks
    stream.ledger.close()


def test_the_last_step_of_a_file_is_not_passed_over_while_its_boundary_is_committed(tmp_path: Path) -> None:
    """The next file begins meanwhile: its steps wait for the one before them, and then all are told in order."""
    stream, store = Stream(tmp_path / "run"), Store()
    feed = feed_of(stream.ledger, store)
    stream.train(3, last=True, late=True)
    stream.train(2, last=False)
    feed.tell()
    assert [1, 2] == [point.step for point in store.points]
    stream.commit()
    feed.tell()
    assert [1, 2, 3, 4, 5] == [point.step for point in store.points]
    stream.ledger.close()


@pytest.mark.parametrize("can_say", [True, False])
def test_what_was_told_right_before_a_kill_is_not_told_again(tmp_path: Path, can_say: bool) -> None:
    """A tracker that has more than the ledger knows is believed; one that cannot say is sent the points again."""
    layout, store = made_up_run(tmp_path / "run", [("a.jsonl", 4)], float), Store(can_say=can_say)
    with Ledger(layout.ledger) as ledger:
        feed = feed_of(ledger, store)
        before = feed.cursor
        assert 4 == feed.tell()
        ledger.keep_tracker(before)
        again = feed_of(ledger, store)
        again.tell()
        assert [1, 2, 3, 4] * (1 if can_say else 2) == [point.step for point in store.points]


@pytest.mark.parametrize("left", range(11))
def test_what_a_tracker_lost_before_or_after_rollbacks_is_told_again(tmp_path: Path, left: int) -> None:
    """Set back to any earlier moment, or made anew, it has the run's curve again, and what it has kept only once."""
    stream, store = Stream(tmp_path / "run"), Store()
    feed = feed_of(stream.ledger, store)
    for steps in (3, 2):
        stream.train(steps, last=True)
    feed.tell()
    stream.roll_back(1)
    for steps in (2, 2):
        stream.train(steps, last=True)
    assert 4 == feed.tell()
    stream.roll_back(2)
    stream.train(2, last=False)
    assert 2 == feed.tell()
    assert [1, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7] == [point.step for point in store.points]
    del store.points[left:]
    stream.train(1, last=True)
    feed_of(stream.ledger, store).tell()
    assert list(enumerate(stream.lineage, start=1)) == shown(store.points)
    numbers = [point.number for point in store.points]
    assert sorted(set(numbers)) == numbers
    stream.ledger.close()


@pytest.mark.parametrize(("cursor", "told"), [(1, [1, 2, 3, 4]), (4, [1, 2, 3])])
def test_one_that_may_hold_more_than_it_says_is_not_told_again(tmp_path: Path, cursor: int, told: list[int]) -> None:
    """What it names is not sent twice, and what it does not name is, to the best of the ledger's knowledge, there."""
    layout, store = made_up_run(tmp_path / "run", [("a.jsonl", 4)], float), Store()
    with Ledger(layout.ledger) as ledger:
        feed_of(ledger, store).tell()
        del store.points[3:]
        store.is_all = False
        ledger.write("UPDATE trackers SET step = ?", cursor)
        feed_of(ledger, store).tell()
    assert told == [point.step for point in store.points]


def test_a_tracker_that_is_ahead_of_a_ledger_that_was_set_back_is_not_told_again(tmp_path: Path) -> None:
    """It followed a rollback that the ledger no longer knows of: what it has cannot be named, so nothing is doubled."""
    layout, store = made_up_run(tmp_path / "run", [("a.jsonl", 4)], float), Store()
    with Ledger(layout.ledger) as ledger:
        feed_of(ledger, store).tell()
        store.points[-1] = replace(store.points[-1], values={**store.points[-1].values, "step": 2.0, "rollbacks": 1.0})
        ledger.write("UPDATE trackers SET step = 3")
        feed_of(ledger, store).tell()
    assert [1, 2, 3, 4, 4] == [point.step for point in store.points]


def test_a_rollback_is_marked_once_and_one_in_the_middle_of_another_is_followed_too(tmp_path: Path) -> None:
    """However often the feed looks while nothing is trained; and no step is passed over if the run goes back again
    while what comes after the first rollback is read."""
    stream, store = Stream(tmp_path / "run"), Store()
    feed = feed_of(stream.ledger, store)
    for _ in range(4):
        stream.train(1, last=True)
    feed.tell()
    stream.roll_back(3)
    assert [0, 0, 0] == [feed.tell() for _ in range(3)]
    assert [(1, 3, 4)] == store.marks

    def go_back_again() -> None:
        store.when_marked = lambda: None
        stream.roll_back(1)
        stream.train(3, last=True)

    store.when_marked = go_back_again
    stream.roll_back(2)
    feed.tell()
    feed.tell()
    assert list(enumerate(stream.lineage, start=1)) == shown(store.points)
    assert [0, 0, 0, 0, 3, 3, 3] == [point.values["rollbacks"] for point in store.points]
    stream.ledger.close()


def test_a_tracker_is_closed_when_it_fails_and_at_the_end(tmp_path: Path) -> None:
    """What it has open in this process is let go, and the next try connects anew."""
    layout, store = made_up_run(tmp_path / "run", [("a.jsonl", 2)], float), Store()
    with Ledger(layout.ledger) as ledger:
        feed = feed_of(ledger, store)
        store.fails = "no route to host"
        for _ in range(2):
            with pytest.raises(ConnectionError):
                feed.tell()
        store.fails = None
        assert 2 == feed.tell()
        feed.close()
        feed.close()
    assert (3, 3) == (len(store.runs), store.closed)


def test_a_tracker_that_lost_points_is_told_them_again(tmp_path: Path) -> None:
    """What a tracker certainly does not have is sent once more when it is next reached."""
    layout, store = made_up_run(tmp_path / "run", [("a.jsonl", 3), ("b.jsonl", 3)], float), Store()
    with Ledger(layout.ledger) as ledger:
        feed_of(ledger, store).tell()
        del store.points[2:]
        file_id = add_file(ledger, "c.jsonl", state="done", position=3, start_step=6, planned_steps=1)
        metrics = Metrics(layout.ledger, clock=lambda: 7.0)
        metrics.append(StepRecord(file_id, 7, 1, 0, 2, "d", 20, 10, 7.0, 1e-4, 0.5, 0.25))
        metrics.close()
        feed_of(ledger, store).tell()
    assert [(step, float(step)) for step in range(1, 8)] == shown(store.points)
    assert [None, "id-of-the-tracker"] == [run.known_as for run in store.runs]


def test_a_point_says_what_the_step_gave_and_what_was_measured_behind_a_file(tmp_path: Path) -> None:
    """Values are named as in `onward metrics`; numbers of hooks come with the last step of their file."""
    layout, store = made_up_run(tmp_path / "run", [("a.jsonl", 2)], lambda step: step / 2), Store()
    with Ledger(layout.ledger) as ledger:
        ledger.keep_boundary_results(1, 2, {"holdout": {"loss": 1.5, "ok": True, "name": "x"}})
        feed_of(ledger, store).tell()
    first, last = store.points
    assert (1, 1, 1001.0) == (first.number, first.step, first.time)
    assert {
        "step": 1.0, "file": 1.0, "file_step": 1.0, "epoch": 0.0, "loss": 0.5, "learning_rate": 1e-4, "grad_norm": 0.5,
        "rows": 2.0, "tokens": 20.0, "target_tokens": 10.0, "seconds": 0.25, "tokens_per_second": 80.0,
        "rollbacks": 0.0,
    } == first.values  # fmt: skip
    assert 1.5 == last.values["holdout/loss"]
    assert first.values.keys() | {"holdout/loss"} == last.values.keys()


def test_a_point_of_a_step_without_a_time_has_that_of_its_file(tmp_path: Path) -> None:
    """Steps of earlier releases have none: when the file was finished, or else came; no time taken gives no pace."""
    layout, store = made_up_run(tmp_path / "run", [("a.jsonl", 1), ("b.jsonl", 1)], float), Store()
    with Ledger(layout.ledger) as ledger:
        ledger.write("DELETE FROM step_times")
        ledger.write("UPDATE files SET arrived = 7.0, finished = CASE position WHEN 1 THEN 9.0 END")
        ledger.write("UPDATE steps SET seconds = 0.0 WHERE step = 1")
        feed_of(ledger, store).tell()
    assert [9.0, 7.0] == [point.time for point in store.points]
    assert [0.0, 80.0] == [point.values["tokens_per_second"] for point in store.points]


def test_a_tracker_is_not_connected_to_while_there_is_nothing_to_send(tmp_path: Path) -> None:
    """Not even if the run went back to the very step that was told last."""
    stream, store = Stream(tmp_path / "run"), Store()
    stream.train(2, last=True)
    feed_of(stream.ledger, store).tell()
    stream.train(1, last=True)
    stream.roll_back(1)
    assert 0 == feed_of(stream.ledger, store).tell()
    assert 1 == len(store.runs)
    stream.ledger.close()
