"""The queue of wishes and what obeys it, on a real ledger without a process: each wish answered once, in its order."""

from __future__ import annotations

import contextlib
import itertools
import random
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from daemons import LONG, SETTINGS, rows_file
from faults import copy_run
from runs import new_run

from onward import Run
from onward.events import Hub
from onward.service.client import expire_requests
from onward.service.intake.checking import Intake
from onward.service.outside.reporting import NewNotes
from onward.service.owner.alongside.heartbeat import Heartbeat
from onward.service.owner.answers import Answers
from onward.service.owner.control import Control, Work
from onward.service.owner.owned import Owned
from onward.service.settings import Settings
from onward.service.shown import Shown
from onward.service.wishes import AFTER_FILE, RELEASE, Stopped, Wish, Wishes, interrupts_of_host
from onward.store.ledger import Ledger

IN_HAND, WAITING, UNREAD = "m1.jsonl", "m2.jsonl", "m3.jsonl"
STEP, BOUNDARY = 5, 2
"""The step at which the current file is committed, and that of the boundary before it."""

ASKED: dict[str, tuple[str, str | None, str | None]] = {
    "pause": ("pause", None, None),
    "pause --release": ("pause", RELEASE, None),
    "resume": ("resume", None, None),
    "stop": ("stop", None, None),
    "stop --after-file": ("stop", AFTER_FILE, None),
    "skip": ("skip", None, IN_HAND),
    "skip m2": ("skip", None, WAITING),
    "skip m3": ("skip", None, UNREAD),
}
"""What is typed, and the request that the command makes of it: kind, argument, the file that it means."""

ALONE = {
    "pause": f"paused at step {STEP}",
    "pause --release": f"paused at step {STEP}",
    "resume": "it was not paused",
    "stop": f"stopped at step {STEP}",
    "stop --after-file": "stops after the current file",
    "skip": f"skipped {IN_HAND}, back at step {BOUNDARY}",
    "skip m2": f"skipped {WAITING}",
    "skip m3": f"skipped {UNREAD}",
}
"""The answer to each where nothing else is asked for."""

SECOND = {
    **{(pause, "resume"): "goes on" for pause in ("pause", "pause --release")},
    ("skip", "skip"): f"{IN_HAND} is already skipped",
    ("skip m2", "skip m2"): f"{WAITING} is already skipped",
    ("skip m3", "skip m3"): f"{UNREAD} is already skipped",
    ("skip", "pause"): f"paused at step {BOUNDARY}",
    ("skip", "pause --release"): f"paused at step {BOUNDARY}",
    ("skip", "stop"): f"stopped at step {BOUNDARY}",
    ("skip", "stop --after-file"): "stops now: no file is being trained",
    **{("stop", other): f"the process ended first, at step {STEP}" for other in ASKED},
    ("stop", "stop"): f"stopped at step {STEP}",
    ("stop", "stop --after-file"): f"stopped at step {STEP}",
}
"""The answer to the second of two where the first one changes it."""


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A run in the middle of a file, with one that waits and one that lies in the inbox unread."""
    folder = tmp_path_factory.mktemp("begun")
    run = new_run(folder / "run", model, **SETTINGS)
    run.add(*(rows_file(folder / name, rows) for name, rows in (("m0.jsonl", 4), (IN_HAND, LONG), (WAITING, 6))))
    stop = Wishes()
    run.train(stop=stop, observe=lambda event: stop.ask("test") if getattr(event, "step", 0) == STEP else None)
    announced = rows_file(run.layout.inbox / UNREAD, 7)
    with Ledger(run.layout.ledger) as ledger:
        assert 1 == Intake(run.layout, ledger).announce([(announced, 0)])
    return run.layout.root


@dataclass
class Process:
    """The process that owns a run, as far as it obeys: the requests, and their outcome.

    `let_go` holds what the work was told, in its order.
    """

    run: Run
    ledger: Ledger
    let_go: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wishes = Wishes()
        self.wishes.ignore_up_to(self.ledger.last_request())
        layout = self.run.layout
        self.owned = Owned(
            layout=layout,
            ledger=self.ledger,
            settings=Settings(layout.config),
            wishes=self.wishes,
            answers=Answers(self.ledger),
            heartbeat=Heartbeat(layout.ledger),
            hub=Hub([], self.said.append),
            shown=Shown(self.ledger),
            news=NewNotes(self.ledger),
        )
        self.intake = Intake(layout, self.ledger)
        self.control = Control(self.owned, self.intake)
        release = lambda: self.let_go.append("release")  # noqa: E731
        self.work = Work(leave=lambda: self.let_go.append("leave"), release=release, say=self.said.append)

    def id_of(self, name: str) -> int:
        """The id of a file, in whatever state it is."""
        return int(self.ledger.scalar("SELECT id FROM files WHERE name = ?", name))

    def state_of(self, name: str) -> str:
        """The state of a file."""
        return self.ledger.file(self.id_of(name)).state

    def ask(self, *typed: str) -> list[int]:
        """Record what was typed as commands do, all before the process looks."""
        requests = [ASKED[word] for word in typed]
        return [
            self.ledger.add_request(kind, argument, self.id_of(name) if name else None)
            for kind, argument, name in requests
        ]

    def look(self, *, in_hand: str | None = IN_HAND) -> None:
        """Act like a process after a step: obey what needs no leaving of the file, then leave it and obey the rest."""
        self.wishes.in_hand = self.id_of(in_hand) if in_hand else None
        self.wishes.poll(self.ledger)
        self.control.obey_at_once(self.work)
        if self.wishes:
            self.wishes.in_hand = None
            self.control.obey(self.work)
        if self.control.is_stopped:
            self.owned.answers.close(self.wishes, None)

    def answers(self, requests: list[int]) -> list[str | None]:
        """The answers, None where there is none."""
        rows = [self.ledger.request(number) for number in requests]
        return [row.answer if row else None for row in rows]


def count() -> Callable[[], float]:
    """Return a clock that moves at every look."""
    numbers = itertools.count(1.8e9)
    return lambda: float(next(numbers))


@pytest.fixture
def process(begun: Path, tmp_path: Path) -> Generator[Process]:
    """A process that trains the current file."""
    run = Run(copy_run(begun, tmp_path / "run"))
    with Ledger(run.layout.ledger, clock=count()) as ledger:
        yield Process(run, ledger)


@pytest.mark.parametrize("first", list(ASKED))
@pytest.mark.parametrize("second", list(ASKED))
def test_two_wishes_in_one_poll(process: Process, first: str, second: str) -> None:
    """Of each pair in each order, both are answered, once, the first as if it were alone, the second after it."""
    requests = process.ask(first, second)
    process.look()
    after = SECOND.get((first, second), ALONE[second])
    assert [ALONE[first], after] == process.answers(requests)
    assert [] == process.ledger.open_requests()
    answered = [process.ledger.request(number).acknowledged for number in requests]  # type: ignore[union-attr]
    assert answered == sorted(set(answered))


@pytest.mark.parametrize("seed", range(40))
def test_many_wishes_are_each_answered_once_and_in_order(process: Process, seed: int) -> None:
    """Whatever is asked, in one poll or several: one answer for each, in the order of asking, and one effect."""
    chance = random.Random(seed)
    requests: list[int] = []
    while not process.control.is_stopped and len(requests) < 12:
        requests += process.ask(*chance.choices([word for word in ASKED if word != "stop"], k=chance.randint(1, 4)))
        requests += process.ask("stop") if chance.random() < 0.2 else []
        begun = process.state_of(IN_HAND) == "training" and not process.control.is_paused
        process.look(in_hand=IN_HAND if begun else None)
        if not begun and not process.control.is_stopped:
            process.control.obey(process.work)
    assert None not in process.answers(requests)
    answered = [process.ledger.request(number).acknowledged for number in requests]  # type: ignore[union-attr]
    assert answered == sorted(set(answered))
    skips = [answer for answer in process.answers(requests) if answer and answer.startswith("skipped")]
    assert len(skips) == len(set(skips))


def test_a_pause_that_a_resume_follows_is_over_and_one_that_it_precedes_is_not(process: Process) -> None:
    """The last of pause, pause --release and resume decides, however many were asked for in one poll."""
    process.ask("pause", "pause --release", "resume")
    process.look()
    assert (False, None) == (process.control.is_paused, process.ledger.get("paused"))
    process.ask("resume", "pause")
    process.look()
    assert (True, {"release": False}) == (process.control.is_paused, process.ledger.get("paused"))


def test_a_resume_while_training_is_answered_at_once_and_cancels_no_later_pause(process: Process) -> None:
    """Nothing is left for a resume; the pause of the next poll holds."""
    requests = process.ask("resume")
    process.look()
    assert (["it was not paused"], False, []) == (
        process.answers(requests),
        process.wishes.pending,
        process.let_go,
    )
    requests = process.ask("pause")
    process.look()
    assert ([ALONE["pause"]], True) == (process.answers(requests), process.control.is_paused)


def test_two_who_skip_the_file_in_hand_lose_no_other(process: Process) -> None:
    """Both meant the same file: the second is told so, though another one is current when it is looked at."""
    first, second = process.ask("skip", "skip")
    process.look()
    assert ("skipped", "queued") == (process.state_of(IN_HAND), process.state_of(WAITING))
    assert [ALONE["skip"], f"{IN_HAND} is already skipped"] == process.answers([first, second])
    third = process.ask("skip")
    process.ledger.move_file(process.id_of(WAITING), "training", position=2, start_step=BOUNDARY)
    process.look(in_hand=WAITING)
    assert ([f"{IN_HAND} is already skipped"], "training") == (process.answers(third), process.state_of(WAITING))


def test_a_skip_of_a_file_that_was_done_meanwhile_names_the_way(process: Process) -> None:
    """It is left as it is, and the answer holds the command that leaves it out after all."""
    requests = process.ask("skip")
    process.ledger.move_file(process.id_of(IN_HAND), "done")
    process.look(in_hand=WAITING)
    said = f"{IN_HAND} is done; onward rebuild --without file:2 leaves it out"
    assert ([said], "done", []) == (process.answers(requests), process.state_of(IN_HAND), process.let_go)


def test_a_skip_of_a_file_whose_boundary_is_being_committed(process: Process) -> None:
    """While the next file trains already, the one before is neither done nor taken out: the answer says so."""
    requests = process.ask("skip")
    process.look(in_hand=WAITING)
    (answer,) = process.answers(requests)
    assert f"{IN_HAND} is fully trained and being committed; after that, onward rebuild --without file:2" in str(answer)
    assert ("training", []) == (process.state_of(IN_HAND), process.let_go)


def test_a_skip_of_a_file_that_vanished_unread(process: Process) -> None:
    """A file that was announced and is forgotten again: the skip is answered, nothing fails."""
    requests = process.ask("skip m3", "skip m2")
    process.ledger.forget_arriving(process.id_of(UNREAD))
    process.look()
    answer, after = process.answers(requests)
    assert ("vanished from the inbox" in str(answer), ALONE["skip m2"]) == (True, after)


def test_a_skip_that_meets_a_file_accepted_meanwhile(process: Process) -> None:
    """Between the look at an unread file and the act, another process queued it: it is skipped as a queued one."""
    process.ledger.forget_arriving(process.id_of(UNREAD))  # a copy of a run has other inodes
    process.intake.announce([(process.run.layout.inbox / UNREAD, 0)])
    row = process.ledger.file(process.id_of(UNREAD))
    process.intake.bring_in()
    accepted = process.ledger.file(row.id)
    process.ledger.move_file(row.id, "queued")
    with pytest.raises(Exception, match="no longer arriving"):
        process.intake.withdraw(row, "no use")
    requests = process.ask("skip m3")
    process.look()
    assert (["skipped m3.jsonl"], "skipped") == (process.answers(requests), process.state_of(UNREAD))
    assert process.run.layout.kept(accepted.copy).is_file()


def test_a_skip_that_fails_is_answered(process: Process) -> None:
    """What keeps a file from being taken out is the answer, and is passed on to the code that deals with failures."""
    requests = process.ask("skip", "resume")
    for file in process.run.layout.boundaries.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(Exception, match="restore point"):
        process.look()
    process.look(in_hand=None)
    answer, after = process.answers(requests)
    assert ("it could not be skipped: the restore point", "it was not paused") == (str(answer)[:42], after)


def test_on_a_full_disk_wishes_are_obeyed_and_answered_later(process: Process) -> None:
    """A pause holds though the ledger has no room for it; once there is room it is noted and answered, once."""
    requests = process.ask("pause", "resume", "pause --release")
    fill(process.ledger)
    process.look()
    assert (True, ["release"]) == (process.control.is_paused, process.let_go)
    assert [None, None, None] == process.answers(requests)
    process.ledger.query("PRAGMA max_page_count = 100000")
    process.look(in_hand=None)
    process.control.obey(process.work)
    assert [ALONE["pause"], "goes on", ALONE["pause --release"]] == process.answers(requests)
    assert {"release": True} == process.ledger.get("paused")


def fill(ledger: Ledger) -> None:
    """Leave the ledger no room for another row."""
    pages = ledger.query("PRAGMA page_count")[0]["page_count"]
    ledger.query(f"PRAGMA max_page_count = {pages}")
    for size in (100_000, 1_000, 10, 1):
        with contextlib.suppress(sqlite3.OperationalError):
            while True:
                ledger.add_event("info", "x" * size)


def test_an_answer_is_given_once(process: Process) -> None:
    """Whoever answers second changes nothing: a command and the next process may both close a request."""
    (number,) = process.ask("pause")
    process.ledger.acknowledge(number, "first")
    process.ledger.acknowledge(number, "second")
    assert ["first"] == process.answers([number])


def test_what_was_asked_of_a_dead_process_is_not_done_even_where_it_cannot_be_closed(process: Process) -> None:
    """On a full disk the next process cannot close old requests; it leaves them alone all the same."""
    requests = process.ask("stop")
    process.ledger.query("PRAGMA query_only = 1")  # to the last byte: not even a value of the same size is written
    expire_requests(process.ledger, requests[0])
    successor = Process(process.run, process.ledger)
    successor.look()
    assert ([None], False) == (successor.answers(requests), successor.control.is_stopped)


@pytest.mark.parametrize("failure", [None, "the ledger was removed or replaced"])
def test_what_is_open_when_the_process_ends_is_answered(process: Process, failure: str | None) -> None:
    """A stop that a failure came before is not answered as one that was obeyed."""
    requests = process.ask("stop", "skip")
    process.wishes.poll(process.ledger)
    process.owned.answers.close(process.wishes, failure)
    ended = [f"stopped at step {STEP}", f"the process ended first, at step {STEP}"]
    failed = [f"the process failed first, at step {STEP}: {failure}"] * 2
    assert (ended if failure is None else failed) == process.answers(requests)


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
