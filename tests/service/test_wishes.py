"""The queue of wishes and what obeys it, on a real ledger without a process: each wish answered once, in its order."""

from __future__ import annotations

import contextlib
import itertools
import random
import sqlite3
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

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
from onward.service.wishes import AFTER_FILE, RELEASE, Wishes
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
