"""Trackers: found by name, followed by one process, and never in the way of training."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock, call

import pytest
import tiny
from commands import make_run, onward
from filelock import FileLock
from ledgers import add_file, made_up_run
from tracked import Recorder, Store

from onward.errors import RunLocked, UsageError
from onward.layout import RunLayout
from onward.store.ledger import Ledger
from onward.store.metrics import Metrics
from onward.store.rows import StepRecord
from onward.store.waiting import Waiting
from onward.views.trackers import telling
from onward.views.trackers.registry import BUILT_IN, find_tracker
from onward.views.trackers.telling import follow, make_feed, tell, tell_once
from onward.views.trackers.to_trackio import TrackioTracker
from onward.views.trackers.tracker import Factory, Point, TrackedRun, Tracker


def tracked(tmp_path: Path, *names: str) -> RunLayout:
    """Return a run of one finished file whose config names trackers."""
    layout = made_up_run(tmp_path / "run", [("a.jsonl", 3)], float)
    configure(layout, *names)
    return layout


def configure(layout: RunLayout, *names: str) -> None:
    """Name trackers in the config of a run."""
    text = f"model: smollm2-135m\ntrack: [{', '.join(names)}]\nnotify: {{url: http://secret}}\n"
    (layout.root / "new.yaml").write_text(text)
    (layout.root / "new.yaml").replace(layout.config)


def train_one(layout: RunLayout) -> None:
    """Add a file of one step to a run of three."""
    with Ledger(layout.ledger) as ledger:
        file_id = add_file(ledger, "b.jsonl", state="done", position=2, start_step=3, planned_steps=1)
    metrics = Metrics(layout.ledger)
    metrics.append(StepRecord(file_id, 4, 1, 0, 2, "d", 20, 10, 4.0, 1e-4, 0.5, 0.25))
    metrics.close()


@pytest.mark.parametrize("failure", [ConnectionError, SystemExit])
def test_a_failure_is_told_once_and_so_is_its_end(tmp_path: Path, failure: type[BaseException]) -> None:
    """However often it is tried, one event says that a tracker fails, without a password, and one that it works.

    It may fail by ending the process, as a library does that has no key: the others are told nevertheless.
    """
    layout, store = tracked(tmp_path, "ours", "other"), Store()
    store.failure = failure
    other = Store()

    def find(name: str) -> Factory:
        return store.open if name == "ours" else other.open

    store.fails = "cannot connect to https://me:secret@example/api"
    reasons = [tell_once(layout, ["ours", "other"], find) for _ in range(3)]
    reason = f"{failure.__name__}: cannot connect to https://example/api"
    assert [{"ours": reason, "other": None}] * 3 == reasons
    store.fails = None
    for _ in range(2):
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
    assert (4, 1) == (store.closed, other.closed)


def test_it_follows_until_its_owner_ends_and_then_tells_the_rest(tmp_path: Path) -> None:
    """Trackers of the config receive steps as they come, and at the end whatever is left."""
    layout, store, ended = tracked(tmp_path, "ours"), Store(), threading.Event()
    following = threading.Thread(
        target=lambda: follow(layout, ended, find=lambda name: store.open, seconds=30.0), daemon=True
    )
    following.start()
    assert store.told.wait(60)
    train_one(layout)
    ended.set()
    following.join(60)
    assert not following.is_alive()
    assert [1, 2, 3, 4] == [point.step for point in store.points]


def test_a_tracker_that_the_config_no_longer_names_is_let_go_and_a_new_one_begins(tmp_path: Path) -> None:
    """While a process follows: the one gets what is left and is closed, the other everything from the first step on."""
    layout, ended = tracked(tmp_path, "ours"), threading.Event()
    stores = {"ours": Store(), "other": Store()}
    following = threading.Thread(
        target=lambda: follow(layout, ended, find=lambda name: stores[name].open, seconds=0.02), daemon=True
    )
    following.start()
    assert stores["ours"].told.wait(60)
    configure(layout, "other")
    assert stores["ours"].was_closed.wait(60)
    assert stores["other"].told.wait(60)
    train_one(layout)
    ended.set()
    following.join(60)
    assert not following.is_alive()
    assert [1, 2, 3] == [point.step for point in stores["ours"].points]
    assert [1, 2, 3, 4] == [point.step for point in stores["other"].points]
    assert [1, 1] == [store.closed for store in stores.values()]


def test_a_tracker_that_is_named_again_while_it_hangs_is_told_by_one_thread(tmp_path: Path) -> None:
    """By the one that hangs, and once that has ended by another: no step is told twice."""
    layout, ended, began, goes_on = tracked(tmp_path, "ours"), threading.Event(), threading.Event(), threading.Event()
    stores = {"ours": Store(), "second": Store(), "third": Store()}

    class Hanging(Recorder):
        def log(self, points: Sequence[Point]) -> None:
            began.set()
            assert goes_on.wait(60)
            super().log(points)

    def find(name: str) -> Factory:
        return stores[name].open if name != "ours" else lambda run: Hanging(stores[name])

    following = threading.Thread(target=lambda: follow(layout, ended, find=find, seconds=0.01), daemon=True)
    following.start()
    assert began.wait(60)
    for names in (["second"], ["ours", "third"]):
        configure(layout, *names)
        assert stores[names[-1]].told.wait(60)
    goes_on.set()
    ended.set()
    following.join(60)
    assert [1, 2, 3] == [point.step for point in stores["ours"].points]


def test_trackio_elsewhere_gets_the_names_that_it_gets_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`step` is its own count of points; the run's step has another name."""
    client = Mock()
    monkeypatch.setitem(sys.modules, "trackio", client)
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://localhost:7860")
    tracker = TrackioTracker(TrackedRun("r", "n", Path("unused"), {}))
    tracker.log([Point(9, 7, 0.0, {"step": 7.0, "loss": 0.5})])
    tracker.close()
    assert [call({"global_step": 7.0, "loss": 0.5}, step=9)] == client.init.return_value.log.mock_calls
    client.init.return_value.finish.assert_called_once_with()


def test_a_tracker_that_fails_is_tried_again_until_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the process that follows, without anybody asking for it; it waits longer after each failure in a row."""
    waits: list[tuple[int, float]] = []
    monkeypatch.setattr(telling, "pause_after", lambda *given: waits.append(given) or given[1])
    layout, store, ended = tracked(tmp_path, "ours"), Store(), threading.Event()
    store.fails = "no route to host"
    following = threading.Thread(
        target=lambda: follow(layout, ended, find=lambda name: store.open, seconds=0.001), daemon=True
    )
    following.start()
    for _ in range(3):
        assert store.was_closed.wait(60)
        store.was_closed.clear()
    store.fails = None
    assert store.told.wait(60)
    ended.set()
    following.join(60)
    assert [1, 2, 3] == [point.step for point in store.points]
    assert [(failures, 0.002) for failures in range(1, len(waits) + 1)] == waits
    assert 2 <= len(waits)


def test_a_ledger_that_takes_nothing_for_a_while_ends_no_telling(tmp_path: Path) -> None:
    """As on a full disk: not even the failure can be recorded, and the next try sends the points."""
    layout, store = tracked(tmp_path, "ours"), Store()
    with Ledger(layout.ledger) as other, Ledger(layout.ledger, waiting=Waiting(0.0)) as ledger:
        feed = make_feed(layout, ledger, "ours", lambda name: store.open)
        with other.transaction():
            other.put(x=1)
            assert "OperationalError: database is locked" == tell(feed, ledger)
        assert None is tell(feed, ledger)
        assert [] == [event for event in ledger.events() if event.kind == "tracker"]
    assert [1, 2, 3] == [point.step for point in store.points]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_is_begun_again(tmp_path: Path) -> None:
    """Whatever a tracker's library does in it."""
    layout, store, ended, tries = tracked(tmp_path, "ours"), Store(), threading.Event(), iter(range(9))

    def open_at_last(run: TrackedRun) -> Tracker:
        if next(tries) < 2:
            raise SystemExit
        return store.open(run)

    following = threading.Thread(
        target=lambda: follow(layout, ended, find=lambda name: open_at_last, seconds=0.01), daemon=True
    )
    following.start()
    assert store.told.wait(60)
    ended.set()
    following.join(60)
    assert [1, 2, 3] == [point.step for point in store.points]


@pytest.mark.parametrize("failure", [ConnectionError, SystemExit])
def test_what_fails_when_it_is_closed_is_recorded_in_a_printable_line(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    """Cut to a length that a terminal shows, and whoever asked is told; what was told stays told."""
    layout, store = tracked(tmp_path, "ours"), Store()
    store.failure = failure
    store.fails_to_close = "\x1b[2J" + "x" * 1000
    reason = f"{failure.__name__}: \\x1b[2J{'x' * 1000}"[:300]
    assert {"ours": reason} == tell_once(layout, ["ours"], lambda name: store.open)
    with Ledger(layout.ledger, read_only=True) as ledger:
        row = ledger.tracker("ours")
    assert row is not None
    assert (3, reason) == (row.step, row.problem)
    store.fails_to_close = None
    train_one(layout)
    assert {"ours": None} == tell_once(layout, ["ours"], lambda name: store.open)
    assert [1, 2, 3, 4] == [point.step for point in store.points]


def test_a_run_is_named_by_its_directory_and_its_id(tmp_path: Path) -> None:
    """Of the directory's name only what every tracker takes."""
    layout, store = tracked(tmp_path, "ours"), Store()
    moved = RunLayout(layout.root.rename(tmp_path / "my r\u00fcn/2".replace("/", ":")))
    with Ledger(moved.ledger) as ledger:
        ledger.put(run="0123456789abcdef")
    tell_once(moved, ["ours"], lambda name: store.open)
    (run,) = store.runs
    assert ("0123456789abcdef", "my_r_n_2-01234567", None) == (run.id, run.name, run.known_as)


def test_who_finds_another_process_telling_ends_when_asked_to(tmp_path: Path) -> None:
    """It waits for that one to be done, and tells nothing meanwhile."""
    layout, store, ended = tracked(tmp_path, "ours"), Store(), threading.Event()
    ended.set()
    with FileLock(layout.track_lock):
        follow(layout, ended, find=lambda name: store.open)
    assert [] == store.points


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
