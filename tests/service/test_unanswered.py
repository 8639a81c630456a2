"""Requests that a process does not come to, and signals that reach it in unusual places."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import LONG, PATIENCE, SETTINGS, rows_file, twin_of, until
from runs import new_run
from states import assert_same_state

from onward import Run
from onward.errors import NoSpace
from onward.events import StepTaken
from onward.service.client import EXPIRED, request
from onward.service.owner.process import account, operate
from onward.service.wishes import ENDED_FIRST, FAILED_FIRST, Wish, Wishes
from onward.store.ledger import Ledger


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Run:
    """A run that nothing was trained in."""
    return new_run(tmp_path / "run", model, **SETTINGS)


@pytest.mark.parametrize("answer", [None, f"{ENDED_FIRST}, at step 0", f"{FAILED_FIRST}, at step 0: no memory"])
@pytest.mark.parametrize("kind", ["pause", "resume", "skip"])
def test_what_a_process_does_not_come_to_is_done_without_it(
    kind: str, answer: str | None, run: Run, tmp_path: Path
) -> None:
    """Nobody has to ask again because a process, which may be a `verify`, ended first, whether or not it said so."""
    run.add(rows_file(tmp_path / "a.jsonl", 6))
    if kind == "resume":
        run.pause()
    asked: dict[str, Callable[[], str]] = {
        "pause": run.pause,
        "resume": run.resume,
        "skip": lambda: run.skip("a.jsonl"),
    }
    answers: list[str] = []
    operator = threading.Thread(target=lambda: answers.append(asked[kind]()))
    with run._owned() as ledger:
        operator.start()
        until(lambda: bool(ledger.open_requests()))
        for row in ledger.open_requests() if answer else []:
            ledger.acknowledge(row.id, answer)
    operator.join(PATIENCE)
    expected = {
        "pause": "no process owns this run; the next onward watch begins paused",
        "resume": "no longer paused; onward watch continues the run", "skip": "skipped a.jsonl",
    }  # fmt: skip
    assert [expected[kind]] == answers
    with Ledger(run.layout.ledger) as ledger:
        assert [] == ledger.open_requests()
        assert (kind == "pause") == (ledger.get("paused") is not None)
        assert [("skipped" if kind == "skip" else "queued")] == [row.state for row in ledger.files("queued", "skipped")]


def test_the_next_process_is_asked_what_the_last_one_did_not_come_to(run: Run) -> None:
    """A service manager starts another one: it is asked then."""
    answers: list[str] = []
    operator = threading.Thread(target=lambda: answers.append(Run(run.layout.root).pause()))
    with run._owned() as ledger:
        operator.start()
        until(lambda: bool(ledger.open_requests()))
        (number,) = [row.id for row in ledger.open_requests()]
        ledger.acknowledge(number, EXPIRED)
        until(lambda: bool(ledger.open_requests()))
        (number,) = [row.id for row in ledger.open_requests()]
        ledger.acknowledge(number, "paused at step 0")
        operator.join(PATIENCE)
    assert ["paused at step 0"] == answers


def test_without_room_for_a_request_the_signal_is_named(run: Run) -> None:
    """On a full disk nothing can be asked for in the ledger: the refusal names what can be typed."""
    with run._owned() as ledger:
        ledger.query("PRAGMA query_only = 1")
        with pytest.raises(NoSpace, match=f"kill -TERM {os.getpid()}"):
            request(run.layout, ledger, 60, Wish("stop"))


def test_a_signal_is_obeyed_by_a_process_whose_ledger_is_full(run: Run, model: Path, tmp_path: Path) -> None:
    """The step is committed where that can be done, and the process ends as it was asked to; nothing is lost."""
    file = rows_file(tmp_path / "long.jsonl", LONG)
    run.add(file)
    wishes, steps = Wishes(), list[int]()
    with wishes.on_signals((signal.SIGTERM,)), run._owned(wishes) as ledger:
        opened = run._opened(ledger)

        def fill(event: object) -> None:
            if isinstance(event, StepTaken):
                steps.append(event.step)
                if event.step == 7:
                    ledger.query("PRAGMA query_only = 1")
                    signal.raise_signal(signal.SIGTERM)

        with account(opened, wishes) as log, operate(opened, wishes, fill, log, watch=True) as owner:
            owner.run()
    assert (7, 7) == (steps[-1], run.status()["global_step"])
    run.train()
    assert_same_state(twin_of(run, model, [file]), run.layout.root)


def test_an_interrupt_in_a_notebook_commits_first(run: Run, model: Path, tmp_path: Path) -> None:
    """Ctrl-C in a program that calls `train`: the step is committed, then it is what it always is there."""
    file = rows_file(tmp_path / "long.jsonl", LONG)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    others = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGURG)}

    def press(event: object) -> None:
        if isinstance(event, StepTaken) and event.step == 7:
            signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            run.train(file, observe=press)
        assert signal.default_int_handler == signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert others == {number: signal.getsignal(number) for number in others}
    assert ("stopped", 7) == (run.status()["state"], run.status()["global_step"])
    run.train()
    assert_same_state(twin_of(run, model, [file]), run.layout.root)


def test_train_in_a_thread_that_is_not_the_main_one(run: Run, tmp_path: Path) -> None:
    """A host that trains in a thread of its own stops it by asking; its signals are its own."""
    file = rows_file(tmp_path / "long.jsonl", LONG)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGURG)}
    stop, during = Wishes(), list[object]()

    def observe(event: object) -> None:
        if isinstance(event, StepTaken) and event.step == 3:
            during.append({number: signal.getsignal(number) for number in before})
            stop.ask("the host")

    thread = threading.Thread(target=lambda: run.train(file, observe=observe, stop=stop))
    thread.start()
    thread.join(PATIENCE)
    assert ("stopped", 3) == (run.status()["state"], run.status()["global_step"])
    assert [before] == during
