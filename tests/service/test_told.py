"""What happens is reported once to observers, and stays in the ledger and the log."""

from __future__ import annotations

import errno
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from daemons import LONG, SETTINGS, end, hold, is_in, rows_file, until, watch
from runs import new_run
from states import assert_same_state

from onward import Run
from onward.atomic import remove_tree
from onward.data.plan.loader import Batch
from onward.errors import FileRejected, NoSpace
from onward.events import Event, FileDone, Hub, Note, StepTaken
from onward.service.holder import read_heartbeat
from onward.service.owner.alongside.heartbeat import Heartbeat
from onward.service.owner.process import OpenedRun, account, operate
from onward.service.owner.recovery import Recovery
from onward.service.owner.training.start import load_start
from onward.service.owner.training.surroundings import Surroundings
from onward.service.owner.training.worker import Worker
from onward.service.settings import Settings
from onward.service.shown import Shown
from onward.service.state.retention import Retention
from onward.service.state.settle import Settlement
from onward.service.wishes import AFTER_FILE, Wish, Wishes
from onward.store.ledger import Ledger
from onward.training.boundary import AtBoundary, Boundary
from onward.training.trainer import Trainer

AFTER_FIRST = Wish("stop", AFTER_FILE)


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Run:
    """A new run."""
    return new_run(tmp_path / "run", model, **SETTINGS)


def test_an_observer_that_fails_disturbs_nobody() -> None:
    """It is reported once, dropped after three failures in a row, and the others receive everything."""
    heard, warned = list[Event](), list[str]()
    failing = iter([True, True, False, True, True, True, True])

    def observe(event: Event) -> None:
        if next(failing):
            raise ValueError("no terminal")

    hub = Hub([observe, heard.append], warned.append)
    events: list[Event] = [Note(str(number)) for number in range(8)]
    for event in events:
        hub.tell(event)
    assert events == heard
    assert [
        "an observer failed; training goes on: ValueError('no terminal')",
        "an observer failed 3 times in a row and gets no more events: ValueError('no terminal')",
    ] == warned
    assert [True] == list(failing)


def test_what_a_daemon_did_is_told_once(run: Run, tmp_path: Path) -> None:
    """`watch` prints refused files, what operators asked for and what changed, each once; the log has it all."""
    run.add(rows_file(tmp_path / "a.jsonl", LONG))
    (run.layout.inbox / "bad.jsonl").write_text("nonsense\n")
    (run.layout.inbox / "monday").mkdir()
    held = hold(run)
    process = watch(run, prepare=held)
    until(is_in(run, "a.jsonl"), process)
    assert "paused at step 3" == run.pause()
    until(lambda: "rejected" in run.layout.log.read_text(), process)  # held at a step, it would look at no file
    assert "goes on" == run.resume()
    until(is_in(run, "a.jsonl", step=4), process)
    assert 0 == end(process)
    printed, log = (tmp_path / "log").read_text(), run.layout.log.read_text()
    step = run.status()["global_step"]
    left = "inbox/monday is a directory and is ignored"
    for words in ("rejected: bad.jsonl", left, "paused by an operator at step 3", "resumed by an operator"):
        assert (1, 1) == (printed.count(words), log.count(words)), words
    here = f"pid {process.pid} on {socket.gethostname()}"
    for pattern in (
        rf"started: onward \S+, {here}", "loading the model and the state of step 0",
        rf"stopped by SIGTERM at step {step}",
    ):  # fmt: skip
        assert 1 == len(re.findall(pattern, log)), pattern
        with Ledger(run.layout.ledger) as ledger:
            assert 1 == sum(bool(re.search(pattern, event.message)) for event in ledger.events(100)), pattern
    run.train()
    assert f"resumed at step {step} from current_model/checkpoint-{step}, learning rate" in run.layout.log.read_text()


def test_train_tells_a_refusal_once(run: Run, tmp_path: Path) -> None:
    """What `train` raises is no note as well."""
    bad, told = tmp_path / "bad.jsonl", list[Event]()
    bad.write_text("nonsense\n")
    with pytest.raises(FileRejected):
        run.train(bad, observe=told.append)
    run.train(rows_file(tmp_path / "a.jsonl", 2), observe=told.append)
    assert [] == [event for event in told if isinstance(event, Note)]


def test_a_stop_after_the_file_is_recorded(run: Run, tmp_path: Path) -> None:
    """Who ended the process is said of every way to end it; an observer, which it waits for, does not wait for it."""
    run.add(rows_file(tmp_path / "a.jsonl", 4))
    wishes, answers = Wishes(), list[str]()

    def observe(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == 1:
            wishes.put(AFTER_FIRST)
            answers.append(run.resume(patience=5))

    run.watch(stop=wishes, observe=observe)
    assert "stopped by onward stop --after-file at step 2" in run.layout.log.read_text()
    assert ["the request is made; this thread trains the run, and comes to it after the current step"] == answers


def test_the_limit_of_a_step_holds_only_in_a_step(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps, while a commit or the next file is waited for, nothing hangs, however long it takes."""
    run.train(rows_file(tmp_path / "a.jsonl", 2))
    run.add(rows_file(tmp_path / "b.jsonl", 8))
    inside, outside = list[Any](), list[Any]()
    plain = Trainer.take_step
    with Run(run.layout.root)._owned() as ledger:
        opened = OpenedRun(run.layout, ledger, lambda _: None)

        def observe(event: Event) -> None:
            outside.append(daemon.owned.heartbeat.limit)

        def take_step(self: Trainer, batch: Batch, plan: Any) -> StepTaken:
            inside.append(daemon.owned.heartbeat.limit)
            return plain(self, batch, plan)

        monkeypatch.setattr(Trainer, "take_step", take_step)
        wishes = Wishes()
        with account(opened, wishes) as reporter, operate(opened, wishes, observe, reporter) as daemon:
            daemon.run(once=True)
    assert [None, 60.0, 60.0, 60.0] == inside
    assert {None} == set(outside)


class Hook:
    """What is done at a boundary: uses random numbers, keeps what it saw, returns a value."""

    def __init__(self, shown: Shown) -> None:
        self.seen: list[Any] = []
        self._shown = shown

    def __call__(self, boundary: Boundary) -> dict[str, Any]:
        self.seen.append((boundary.step, boundary.file, boundary.model.training, self._shown.state))
        return {"random": torch.rand(()).item(), "rows": boundary.plan.steps}


def train_with(run: Run, files: list[Path]) -> Hook:
    """Train files in one worker with a hook."""
    with run._owned() as ledger:
        opened = OpenedRun(run.layout, ledger, lambda _: None)
        opened.intake().take(files)
        settings, shown = Settings(run.layout.config), Shown(ledger)
        settled = Settlement(run.layout, ledger, Retention.of(settings.current)).settle()
        hook = Hook(shown)
        hooks: tuple[AtBoundary, ...] = (hook,)
        around = Surroundings(Wishes(), settings, shown, Heartbeat(run.layout.ledger), hooks=hooks)
        worker = Worker(opened.session, load_start(opened.session, settled), around)
        states = [shown.state for event in worker.train_next() if isinstance(event, StepTaken | FileDone)]
    assert "evaluating" not in states
    return hook


def test_what_is_done_at_a_boundary(run: Run, model: Path, tmp_path: Path) -> None:
    """Hooks see the model in eval mode at each boundary; results are kept and trimmed like steps; no bit changes."""
    files = [rows_file(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", 4), ("b", 6))]
    hook = train_with(run, files)
    assert [(2, "a.jsonl", False, "evaluating"), (5, "b.jsonl", False, "evaluating")] == hook.seen
    twin = new_run(tmp_path / "twin", model, **SETTINGS)
    twin.train(*files)
    assert_same_state(twin.layout.root, run.layout.root)
    assert run.verify(deep=True).ok
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        results = [ledger.boundary_results(row.id) for row in ledger.files("done")]
        assert [2, 3] == [result["rows"] for result in results]
        assert results[0]["random"] != results[1]["random"]
    remove_tree(run.layout.checkpoint(5))
    remove_tree(run.layout.boundary(5))
    run.train()  # goes back to step 2, and trains the rest again, without hooks
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        assert [results[0], {}] == [ledger.boundary_results(row.id) for row in ledger.files("done")]
    assert_same_state(twin.layout.root, run.layout.root)


def test_a_night_with_a_full_disk_is_told_a_few_times() -> None:
    """Of failures in a row, events and the log have the 1st, 2nd, 4th and so on; `status` has each.

    A failure of another kind is told, and so is the first one after a success.
    """
    shown, told = list[str](), list[str]()
    owned: Any = SimpleNamespace(
        shown=SimpleNamespace(set=lambda _, problem: shown.append(problem)),
        record=lambda _level, problem, _kind: told.append(problem.split("(failure ")[1].split(" ")[0]),
        wishes=SimpleNamespace(pending=True),  # so that nothing is waited for
    )
    recovery = Recovery(owned, None)
    for left in range(20):
        full = NoSpace(f"no room: {left} MB are left") if left != 10 else OSError(errno.EDQUOT, "Disk quota exceeded")
        recovery.outlive(full, full=True)
    assert (20, ["1", "2", "4", "8", "11", "16"]) == (len(shown), told)
    recovery.succeeded()
    recovery.outlive(NoSpace("no room"), full=True)
    assert "1" == told[-1]


def test_the_heartbeat_tells_a_hung_step_from_a_dead_process(run: Run) -> None:
    """A step that takes 20 times as long as the last one hangs; a clock that went back shows no age below zero."""
    now = {"at": 100.0}
    heart = Heartbeat(run.layout.ledger, clock=lambda: 1000.0, monotonic=lambda: now["at"])
    heart.expect_step(5.0)
    now["at"] += 99.0
    assert not heart.hangs
    now["at"] += 2.0
    assert heart.hangs
    heart.beat()
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        fact = ledger.get("heartbeat")
    assert (0.0, "the current step hangs: no progress for 101 s") == read_heartbeat(fact, 900.0)
    age, problem = read_heartbeat(fact, 1031.0)
    assert (31.0, True) == (age, "no heartbeat for 31 s" in str(problem))
    heart.moved()
    assert not heart.hangs
