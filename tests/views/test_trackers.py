"""Trackers: each receives every step once, in order, whatever fails, is killed or is rolled back in between."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
from commands import make_run, onward
from filelock import FileLock
from ledgers import add_file, made_up_run
from streams import Stream

from onward.errors import RunLocked, UsageError
from onward.layout import RunLayout
from onward.store.ledger import Ledger
from onward.store.metrics import Metrics
from onward.store.rows import StepRecord
from onward.views.trackers.feed import Feed
from onward.views.trackers.registry import BUILT_IN, find_tracker
from onward.views.trackers.telling import follow, tell, tell_once
from onward.views.trackers.tracker import Factory, Held, Point, TrackedRun


class Store:
    """What a tracker holds, apart from the process that tells it; `fails` says whether it takes points now."""

    def __init__(self, *, can_say: bool = True) -> None:
        self.points: list[Point] = []
        self.marks: list[tuple[int, int, int]] = []
        self.fails: str | None = None
        self.can_say = can_say
        self.runs: list[TrackedRun] = []
        self.told = threading.Event()

    def open(self, run: TrackedRun) -> Recorder:
        self.runs.append(run)
        return Recorder(self)


class Recorder:
    """A tracker that keeps points in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.id = "id-of-the-tracker"

    def held(self) -> Held | None:
        if not self._store.can_say or not self._store.points:
            return None
        newest = self._store.points[-1].values
        return Held(int(newest["step"]), int(newest["rollbacks"]))

    def log(self, points: Sequence[Point]) -> None:
        if self._store.fails is not None:
            raise ConnectionError(self._store.fails)
        self._store.points += points
        self._store.told.set()

    def rolled_back(self, rollbacks: int, step: int, number: int) -> None:
        self._store.marks.append((rollbacks, step, number))

    def close(self) -> None:
        return


def shown(points: Sequence[Point]) -> list[tuple[int, float]]:
    """Return step and loss of the points that no later one replaces."""
    kept: list[tuple[int, float]] = []
    for point in points:
        while kept and kept[-1][0] >= point.step:
            kept.pop()
        kept.append((point.step, point.values["loss"]))
    return kept


@pytest.mark.parametrize("seed", range(6))
def test_every_step_is_told_once_whatever_happens(tmp_path: Path, seed: int) -> None:
    """Trained, killed, rolled back, failing and restarted in any order, the next file begun while a boundary is still
    being committed or not: what is told is the stream, and nothing twice.

    Numbers only grow, a step that replaces an undone one says so, and what is not replaced is the run's own curve.
    """
    source, stream, store = random.Random(seed), Stream(tmp_path / "run"), Store()
    feed = Feed(stream.ledger, "it", lambda known: store.open(TrackedRun("r", "n", tmp_path, {}, known)))
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
                feed = Feed(stream.ledger, "it", lambda known: store.open(TrackedRun("r", "n", tmp_path, {}, known)))
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
    feed = Feed(stream.ledger, "it", lambda known: store.open(TrackedRun("r", "n", tmp_path, {}, known)))
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
        feed = Feed(ledger, "it", lambda known: store.open(TrackedRun("r", "n", tmp_path, {}, known)))
        before = feed.cursor
        assert 4 == feed.tell()
        ledger.keep_tracker(before)
        again = Feed(ledger, "it", lambda known: store.open(TrackedRun("r", "n", tmp_path, {}, known)))
        again.tell()
        assert [1, 2, 3, 4] * (1 if can_say else 2) == [point.step for point in store.points]


def test_a_tracker_that_lost_points_is_told_them_again(tmp_path: Path) -> None:
    """What a tracker certainly does not have is sent once more when it is next reached."""
    layout, store = made_up_run(tmp_path / "run", [("a.jsonl", 3), ("b.jsonl", 3)], float), Store()
    with Ledger(layout.ledger) as ledger:
        Feed(ledger, "it", lambda known: store.open(TrackedRun("r", "n", tmp_path, {}, known))).tell()
        del store.points[2:]
        file_id = add_file(ledger, "c.jsonl", state="done", position=3, start_step=6, planned_steps=1)
        metrics = Metrics(layout.ledger, clock=lambda: 7.0)
        metrics.append(StepRecord(file_id, 7, 1, 0, 2, "d", 20, 10, 7.0, 1e-4, 0.5, 0.25))
        metrics.close()
        Feed(ledger, "it", lambda known: store.open(TrackedRun("r", "n", tmp_path, {}, known))).tell()
    assert [(step, float(step)) for step in range(1, 8)] == shown(store.points)
    assert [None, "id-of-the-tracker"] == [run.known_as for run in store.runs]


def test_a_point_says_what_the_step_gave_and_what_was_measured_behind_a_file(tmp_path: Path) -> None:
    """Values are named as in `onward metrics`; numbers of hooks come with the last step of their file."""
    layout, store = made_up_run(tmp_path / "run", [("a.jsonl", 2)], lambda step: step / 2), Store()
    with Ledger(layout.ledger) as ledger:
        ledger.keep_boundary_results(1, 2, {"holdout": {"loss": 1.5, "ok": True, "name": "x"}})
        Feed(ledger, "it", lambda known: store.open(TrackedRun("r", "n", tmp_path, {}, known))).tell()
    first, last = store.points
    assert (1, 1, 1001.0) == (first.number, first.step, first.time)
    assert {
        "step": 1.0, "file": 1.0, "file_step": 1.0, "epoch": 0.0, "loss": 0.5, "learning_rate": 1e-4, "grad_norm": 0.5,
        "rows": 2.0, "tokens": 20.0, "target_tokens": 10.0, "seconds": 0.25, "tokens_per_second": 80.0,
        "rollbacks": 0.0,
    } == first.values  # fmt: skip
    assert 1.5 == last.values["holdout/loss"]
    assert first.values.keys() | {"holdout/loss"} == last.values.keys()


def tracked(tmp_path: Path, *names: str) -> RunLayout:
    """Return a run of one finished file whose config names trackers."""
    layout = made_up_run(tmp_path / "run", [("a.jsonl", 3)], float)
    layout.config.write_text(f"model: smollm2-135m\ntrack: [{', '.join(names)}]\nnotify: {{url: http://secret}}\n")
    return layout


def test_a_failure_is_told_once_and_so_is_its_end(tmp_path: Path) -> None:
    """However often it is tried, one event says that a tracker fails, without a password, and one that it works."""
    layout, store = tracked(tmp_path, "ours", "other"), Store()
    other = Store()

    def find(name: str) -> Factory:
        return store.open if name == "ours" else other.open

    store.fails = "cannot connect to https://me:secret@example/api"
    reasons = [tell_once(layout, ["ours", "other"], find) for _ in range(3)]
    reason = "ConnectionError: cannot connect to https://example/api"
    assert [{"ours": reason, "other": None}] * 3 == reasons
    store.fails = None
    assert {"ours": None, "other": None} == tell_once(layout, ["ours", "other"], find)
    with Ledger(layout.ledger, read_only=True) as ledger:
        events = [(event.level, event.message) for event in ledger.events() if event.kind == "tracker"]
    assert [
        ("warning", f"tracker ours cannot be reached, and is tried again; training goes on: {reason}"),
        ("info", "tracker ours is reached again, up to step 3"),
    ] == events
    assert [1, 2, 3] == [point.step for point in store.points]
    assert [1, 2, 3] == [point.step for point in other.points]
    assert {"notify.url", "notify.command"}.isdisjoint(store.runs[0].config)
    assert layout.trackers / "ours" == store.runs[0].folder


def test_it_follows_until_its_owner_ends_and_then_tells_the_rest(tmp_path: Path) -> None:
    """Trackers of the config receive steps as they come, and at the end whatever is left."""
    layout, store, ended = tracked(tmp_path, "ours"), Store(), threading.Event()
    following = threading.Thread(
        target=lambda: follow(layout, ended, find=lambda name: store.open, seconds=30.0), daemon=True
    )
    following.start()
    assert store.told.wait(60)
    with Ledger(layout.ledger) as ledger:
        file_id = add_file(ledger, "b.jsonl", state="done", position=2, start_step=3, planned_steps=1)
        metrics = Metrics(layout.ledger)
        metrics.append(StepRecord(file_id, 4, 1, 0, 2, "d", 20, 10, 4.0, 1e-4, 0.5, 0.25))
        metrics.close()
    ended.set()
    following.join(60)
    assert not following.is_alive()
    assert [1, 2, 3, 4] == [point.step for point in store.points]


def test_one_process_tells(tmp_path: Path) -> None:
    """While another process is updating the trackers, nobody else does."""
    layout, store = tracked(tmp_path, "ours"), Store()
    with FileLock(layout.track_lock), pytest.raises(RunLocked, match="another process is updating"):
        tell_once(layout, ["ours"], lambda name: store.open)
    assert [] == store.points


def test_an_unknown_tracker_is_named_with_the_nearest_one() -> None:
    """A name that nobody brings is refused with those that there are."""
    with pytest.raises(UsageError) as refused:
        find_tracker("wanb")
    assert "there is no such tracker; did you mean 'wandb'?" == refused.value.what
    assert "mlflow, tensorboard, trackio, wandb" in str(refused.value.hint)


def test_a_package_brings_a_tracker_by_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a package names in the group `onward.trackers` is found by its name."""
    about = tmp_path / "brought-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[onward.trackers]\nbrought = pathlib:Path\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert ["1.0"] == [found.version for found in importlib.metadata.distributions(name="brought")]
    assert Path is find_tracker("brought")


def test_training_is_the_same_with_trackers_that_cannot_be_told(model: Path, tmp_path: Path) -> None:
    """A run whose tracker is missing trains to the same state, says so once, and `track` says what to install."""
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chat_rows(8))
    digests: list[str] = []
    for name, settings in (("plain", ()), ("tracked", ("track=[nobody]",))):
        run = make_run(tmp_path / name, model, *settings)
        outcome = onward("train", rows, "--run", run)
        assert 0 == outcome.status, outcome.err
        with Ledger(run / "ledger.sqlite3", read_only=True) as ledger:
            newest = ledger.newest_checkpoint()
            assert newest is not None
            digests.append(newest.state_digest)
            told = [event.message for event in ledger.events(100) if event.kind == "tracker"]
    assert digests[0] == digests[1]
    assert 1 == len(told)
    assert "tracker nobody cannot be reached, and is tried again; training goes on: there is no such tracker" in told[0]
    outcome = onward("track", "--run", tmp_path / "tracked", "--json")
    assert 1 == outcome.status
    assert [("nobody", 0)] == [(entry["tracker"], entry["step"]) for entry in outcome.json]
    assert "there is no such tracker" in outcome.json[0]["problem"]
    assert 2 == onward("track", "--run", tmp_path / "plain").status


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_missing_package_is_named_with_what_installs_it(name: str) -> None:
    """If a tracker's package is missing, the refusal says which extra brings it; if it is installed, it is found."""
    package = BUILT_IN[name][0]
    if importlib.util.find_spec(package) is not None:
        assert find_tracker(name)
        return
    with pytest.raises(UsageError) as refused:
        find_tracker(name)
    assert f"pip install 'onward[{name}]'" == refused.value.hint
