"""Signals, stops and interrupts in one process: which work they end, when, and why it ended."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any

import pytest

from onward.service.wishes import AFTER_FILE, Stopped, Wish, Wishes, interrupts_of_host

# the queue alone


def strike_at(number: int, act: Callable[[], object]) -> Callable[[FrameType, str, Any], Any]:
    """Return a trace function that acts once, at the n-th instruction of the library's and contextlib's code."""
    seen = itertools.count()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.endswith(("wishes.py", "contextlib.py", "test_wishes.py")):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and next(seen) == number:
            act()
        return trace

    return trace


@pytest.mark.parametrize("by_any", [False, True])
def test_a_signal_at_any_instruction_of_interruptible_work(by_any: bool) -> None:
    """A stop inside or around work that may be ended is a `Stopped` or still open afterwards, never anything else."""
    ends: set[str] = set()
    for number in itertools.count(-1):  # -1 is none: Python 3.12.1 traces instructions from the second time on
        wishes, before = Wishes(), sys.gettrace()
        with wishes.on_signals():
            try:
                sys.settrace(strike_at(number, lambda: signal.raise_signal(signal.SIGTERM)))
                try:
                    wishes.interruptibly(lambda: sum(range(3)), by_any=by_any)
                finally:
                    sys.settrace(before)
                ends.add("done")
            except Stopped:
                ends.add("stopped")
        if wishes.reason is None and number >= 0:
            break
        assert (("SIGTERM", True) if number >= 0 else (None, False)) == (wishes.reason, wishes.wants_end)
    assert {"done", "stopped"} == ends


@pytest.fixture
def hangup() -> Generator[None]:
    """SIGHUP as a terminal finds it, also where the tests themselves run under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_each_signal_is_a_stop_and_the_handlers_before_are_back(number: signal.Signals, hangup: None) -> None:
    """Four signals ask for the same; a lone wake-up of SIGURG is nothing; what handled them before does so again."""
    before = [signal.getsignal(one) for one in (*signal.valid_signals(),)]
    wishes = Wishes()
    with wishes.on_signals():
        signal.raise_signal(signal.SIGURG)
        assert (False, None) == (wishes.pending, wishes.reason)
        signal.raise_signal(number)
        assert (True, True, number.name) == (bool(wishes), wishes.wants_end, wishes.reason)
    assert before == [signal.getsignal(one) for one in (*signal.valid_signals(),)]


def test_only_a_second_interrupt_ends_at_once() -> None:
    """Ctrl-C after another kind of stop is a first Ctrl-C: the step is committed."""
    wishes = Wishes()
    with wishes.on_signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "SIGTERM" == wishes.reason


def test_what_nohup_ignores_stays_ignored() -> None:
    """A process that was started so that a closed terminal does not end it is not ended by one."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        wishes = Wishes()
        with wishes.on_signals():
            signal.raise_signal(signal.SIGHUP)
            assert not wishes.pending
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("kind", ["stop", "pause", "resume", "skip"])
def test_a_wish_of_another_thread_ends_work_that_waits(kind: str) -> None:
    """Work of the main thread that waits in a system call ends when a request is found in the background."""
    wishes, waits, is_through = Wishes(), threading.Event(), threading.Event()
    ends: list[str] = []

    def ask() -> None:
        waits.wait(60)
        wishes.put(Wish(kind))
        while not is_through.wait(0.02):  # as polling does: a first signal may come just before the system call
            wishes.wake()

    def work() -> None:
        waits.set()
        threading.Event().wait(60)
        ends.append("after a minute")

    thread = threading.Thread(target=ask)
    thread.start()
    with wishes.on_signals(), pytest.raises(Stopped):
        wishes.interruptibly(work, by_any=True)
    is_through.set()
    thread.join()
    assert ([], True) == (ends, wishes.pending)


@pytest.mark.parametrize(
    ("wish", "leaves"),
    [
        (Wish("stop"), True), (Wish("stop", AFTER_FILE), False), (Wish("pause"), True), (Wish("resume"), False),
        (Wish("skip"), True), (Wish("skip", file=3), True), (Wish("skip", file=4), False),
    ],
)  # fmt: skip
def test_which_wishes_leave_the_file_in_hand(wish: Wish, leaves: bool) -> None:
    """The others are granted between two of its steps."""
    wishes = Wishes()
    wishes.in_hand = 3
    wishes.put(wish)
    assert (leaves, not leaves) == (bool(wishes), wishes.answered_at_once(wish))


def test_only_a_stop_ends_what_cannot_be_done_again() -> None:
    """A pause, a resume and a skip wait until imports are through; an import that is cut short cannot be repeated."""
    wishes = Wishes()
    for kind in ("pause", "resume", "skip"):
        wishes.put(Wish(kind))
    assert "done" == wishes.interruptibly(lambda: "done", by_any=False)
    wishes.put(Wish("stop"))
    with pytest.raises(Stopped):
        wishes.interruptibly(lambda: "done", by_any=False)


@pytest.mark.parametrize("error", [None, ImportError("cut short")])
def test_a_stop_that_comes_during_work_is_why_it_ended(error: Exception | None) -> None:
    """Whether the work was through by then, or failed because the stop cut something short; other errors are raised."""
    wishes = Wishes()

    def work(kind: str) -> None:
        wishes.put(Wish(kind))
        if error is not None:
            raise error

    with contextlib.nullcontext() if error is None else pytest.raises(ImportError):
        wishes.interruptibly(lambda: work("pause"), by_any=False)
    with pytest.raises(Stopped):
        wishes.interruptibly(lambda: work("stop"), by_any=False)


def test_a_signal_does_not_interrupt_the_main_thread_for_work_of_another() -> None:
    """A host that waits for a thread which loads a run: Ctrl-C is a wish, and strikes no line of the host's own."""
    wishes, loads, may_end = Wishes(), threading.Event(), threading.Event()
    ends: list[str] = []

    def work() -> None:
        loads.set()
        may_end.wait(60)

    def load() -> None:
        try:
            wishes.interruptibly(work, by_any=True)
        except Stopped:
            ends.append("stopped")

    thread = threading.Thread(target=load)
    with wishes.on_signals():
        thread.start()
        assert loads.wait(60)
        signal.raise_signal(signal.SIGINT)
        may_end.set()
        thread.join()
    assert ["stopped"] == ends


def test_in_a_thread_that_is_not_the_main_one() -> None:
    """There are no handlers to set there: wishes come by request and by the caller, and end what is done."""
    outcome: list[object] = []

    def host() -> None:
        wishes = Wishes()
        try:
            with interrupts_of_host(wishes, are_own=True):
                wishes.ask("the caller")
                wishes.interruptibly(lambda: None, by_any=True)
        except Stopped as stopped:
            outcome.append(str(stopped))

    thread = threading.Thread(target=host)
    thread.start()
    thread.join()
    assert ["the caller"] == outcome


def test_an_interrupt_of_a_host_comes_after_the_work() -> None:
    """Ctrl-C in a program that left it to Python: the body ends in its own time, then it is a KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    wishes, committed = Wishes(), list[str]()

    def work() -> None:
        with interrupts_of_host(wishes, are_own=True):
            wishes.ask("onward stop came first")
            signal.raise_signal(signal.SIGINT)
            committed.append("the step")

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert (["the step"], signal.default_int_handler) == (committed, signal.getsignal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_host_that_handles_interrupts_is_left_alone() -> None:
    """Its own handler is called, and nothing is asked for."""
    called: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: called.append(number))
    wishes = Wishes()
    try:
        with interrupts_of_host(wishes, are_own=True):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ([signal.SIGINT], False) == (called, wishes.pending)
