"""What `status` and `history` say, on ledgers made by hand: each state, live or dead, and every figure."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ledgers import add_file, made_up_run

from onward import status
from onward.errors import UsageError
from onward.layout import RunLayout
from onward.service.lock import RunLock
from onward.service.shown import BUSY, DOING
from onward.status import FULL, PACE, read_grid, read_history, read_status, recent_events
from onward.store.ledger import Ledger
from onward.store.metrics import Metrics
from onward.store.rows import StepRecord

TAKEN, PLANNED, COMMITTED = 30, 50, 12
"""Steps of the file in training: taken, planned, and up to the last commit; three of another file came before."""


def seconds(step: int) -> float:
    """How long a step took; no two of them equally long."""
    return step / 64


@pytest.fixture
def layout(tmp_path: Path) -> RunLayout:
    """A run that is in the second of three files."""
    layout = made_up_run(tmp_path / "run", [("a.jsonl", 3)], float)
    with Ledger(layout.ledger) as ledger:
        file_id = add_file(
            ledger, "b.jsonl", state="training", position=2, start_step=3, planned_steps=PLANNED, lost_tokens=7
        )
        metrics = Metrics(layout.ledger)
        for inner in range(1, TAKEN + 1):
            step = 3 + inner
            metrics.append(
                StepRecord(file_id, step, inner, 0, 2, "d", 10 * step, 10, 1 / step, step * 1e-4, 0.5, seconds(step))
            )
        metrics.close()
        add_file(ledger, "c.jsonl", state="queued")
        for step in (3, 3 + COMMITTED):
            made = ledger.begin_checkpoint(step=step, file_id=file_id, boundary=0, state_digest="d", basis="b")
            ledger.commit_checkpoint(made, size=1, seconds=0.1)
    return layout


@contextlib.contextmanager
def owned(layout: RunLayout, *, held: bool, **facts: Any) -> Iterator[None]:
    """Let this process own the run, or nobody, while the ledger has these facts."""
    with Ledger(layout.ledger) as ledger:
        ledger.put(**facts)
    with RunLock(layout.lock) if held else contextlib.nullcontext():
        yield


@pytest.mark.parametrize(
    ("held", "free", "may_write", "state", "problem"),
    [
        (True, FULL - 1, True, "paused", "the disk is full: 1.0 MB free"),
        (True, FULL, False, "paused", "a quota is used up"), (True, FULL, True, "training", "the current step hangs"),
        (False, FULL - 1, False, "stopped", "the process that owned the run died"),
    ],
)  # fmt: skip
def test_a_disk_without_room_pauses_the_process_that_is_there(
    held: bool, free: int, may_write: bool, state: str, problem: str, layout: RunLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot even record that it waits; a process that hangs although it may write does not wait for room."""
    monkeypatch.setattr(status.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(status, "can_be_written", lambda *_: may_write)
    beat = {"at": time.time() + 100.0, "quiet": 0.0, "hangs": True, "pid": os.getpid()}
    with owned(layout, held=held, state="training", heartbeat=beat):
        found = read_status(layout)
    assert (state, True) == (found["state"], found["problem"].startswith(problem))


@pytest.mark.parametrize("state", [state for state in BUSY if state != "loading"])
def test_while_a_process_works_the_figures_are_those_of_the_newest_steps(layout: RunLayout, state: str) -> None:
    """The pace is that of the last steps only, and the time left is that of the steps that are left, at that pace."""
    last = range(3 + TAKEN - PACE + 1, 3 + TAKEN + 1)
    took = sum(seconds(step) for step in last)
    with owned(layout, held=True, state=state):
        found = read_status(layout)
    assert {
        "run": str(layout.root), "state": state, "doing": DOING[state], "global_step": 3 + TAKEN, "file": "b.jsonl",
        "file_step": TAKEN, "file_steps": PLANNED, "lost_tokens": 7, "queue": 1, "learning_rate": 33 * 1e-4,
        "loss": 1 / 33, "tokens_per_second": sum(10 * step for step in last) / took,
        "eta_seconds": (PLANNED - TAKEN) * took / PACE, "checkpoint": "checkpoint-15", "heartbeat_seconds": None,
        "hangs": False, "problem": None,
    } == {key: value for key, value in found.items() if key != "disk_free_bytes"}  # fmt: skip


@pytest.mark.parametrize(
    ("state", "held"), [*((state, False) for state in BUSY), ("loading", True), ("paused", True), ("failed", True)]
)
def test_what_is_in_no_commit_does_not_count_unless_it_is_being_trained(
    layout: RunLayout, state: str, held: bool
) -> None:
    """A process that died has lost it; one that loads, is paused or waits has none of it. Only who loads goes on by
    itself, at the pace before.
    """
    with owned(layout, held=held, state=state, problem="why"):
        found = read_status(layout)
    assert (15, COMMITTED, 1 / 15, 15 * 1e-4) == tuple(
        found[key] for key in ("global_step", "file_step", "loss", "learning_rate")
    )
    took = sum(seconds(step) for step in range(4, 16))
    pace = (sum(10 * step for step in range(4, 16)) / took, (PLANNED - COMMITTED) * took / COMMITTED)
    assert (pace if held and state == "loading" else (None, None)) == (
        found["tokens_per_second"],
        found["eta_seconds"],
    )


def test_a_command_that_does_not_train_is_not_taken_for_the_process_that_died(layout: RunLayout) -> None:
    """While `verify --deep` owns a run after a crash, what the dead process showed last is not what is done now."""
    found: list[tuple[str, str]] = []
    for pid in (os.getpid(), os.getpid() + 1):
        with owned(layout, held=True, state="training", shown_by=pid):
            found.append((read_status(layout)["state"], read_status(layout)["doing"]))
    assert [("training", "training"), ("stopped", f"pid {os.getpid()} owns the run")] == found


def test_between_two_files_the_last_steps_are_those_of_the_one_before(tmp_path: Path) -> None:
    """Its loss and rate are shown, also when a rollback gave the next one its place already; it is no longer the file,
    and has nothing left.
    """
    layout = made_up_run(tmp_path / "run", [("a.jsonl", 3)], lambda step: step / 2)
    with Ledger(layout.ledger) as ledger:
        add_file(ledger, "b.jsonl", state="queued", position=2)
    with owned(layout, held=True, state="evaluating"):
        found = read_status(layout)
    assert {
        "global_step": 3, "file": None, "file_step": 0, "file_steps": 0, "lost_tokens": 0, "queue": 1, "loss": 1.5,
        "learning_rate": 1e-4, "tokens_per_second": None, "eta_seconds": None, "checkpoint": None,
    }.items() <= found.items()  # fmt: skip
    empty = made_up_run(tmp_path / "empty", [], float)
    found = read_status(empty)
    assert ("idle", "no process owns the run, and no file is waiting", 0, None) == tuple(
        found[key] for key in ("state", "doing", "global_step", "loss")
    )


@pytest.mark.parametrize(("held", "committed"), [(True, 3), (False, 3), (True, 2), (False, 2)])
def test_a_file_that_has_taken_no_step_yet_has_no_figures(tmp_path: Path, held: bool, committed: int) -> None:
    """The run is where it began, also while the boundary before it is still being committed, and nothing is known of
    the pace; without a process, it is where it was committed.
    """
    layout = made_up_run(tmp_path / "run", [("a.jsonl", 3)], float)
    with Ledger(layout.ledger) as ledger:
        add_file(ledger, "b.jsonl", state="training", position=2, start_step=3, planned_steps=PLANNED)
        made = ledger.begin_checkpoint(step=committed, file_id=1, boundary=1, state_digest="d", basis="b")
        ledger.commit_checkpoint(made, size=1, seconds=0.1)
    with owned(layout, held=held, state="training"):
        found = read_status(layout)
    assert {
        "global_step": 3 if held else committed, "file": "b.jsonl", "file_step": 0, "file_steps": PLANNED,
        "loss": None, "learning_rate": None, "tokens_per_second": None, "eta_seconds": None,
    }.items() <= found.items()  # fmt: skip


@pytest.mark.parametrize("look", [read_status, read_history, read_grid, recent_events])
def test_where_there_is_no_run_there_is_nothing_to_look_at(look: Callable[[RunLayout], Any], tmp_path: Path) -> None:
    """That is said, and nothing is made there."""
    with pytest.raises(UsageError, match="there is no run"):
        look(RunLayout(tmp_path))
    assert [] == list(tmp_path.iterdir())


CONTINUES = "no process owns the run; onward train or onward watch continues it"
NOTHING = "no process owns the run, and no file is waiting"
PAUSED = "paused, and no process owns the run; onward watch begins paused, onward resume cancels the pause"


@pytest.mark.parametrize("state", DOING)
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("paused", [True, False])
@pytest.mark.parametrize("problem", [None, "the base is gone"])
def test_each_state_says_what_happens_and_what_is_wrong(
    layout: RunLayout, state: str, held: bool, paused: bool, problem: str | None
) -> None:
    """A state that only a living process can be in is that of a dead one if none owns the run; no problem is hidden."""
    with owned(layout, held=held, state=state, problem=problem, paused={"by": "x"} if paused else None):
        found = read_status(layout)
    died = state in BUSY and not held
    assert ("stopped" if died else state) == found["state"]
    assert (DOING[state] if held else PAUSED if paused else CONTINUES) == found["doing"]
    unknown = "the last attempt failed; logs/onward.log has the reason" if state == "failed" else None
    dead = f"the process that owned the run died ({state})" if died else None
    assert (problem or dead or unknown) == found["problem"]


@pytest.mark.parametrize(("state", "doing"), [("idle", NOTHING), ("stopped", CONTINUES), ("failed", CONTINUES)])
def test_with_no_file_waiting_only_what_was_cut_short_goes_on(tmp_path: Path, state: str, doing: str) -> None:
    """A run at rest has nothing to go on with."""
    layout = made_up_run(tmp_path / "run", [("a.jsonl", 3)], float)
    with owned(layout, held=False, state=state):
        assert doing == read_status(layout)["doing"]


def test_between_two_tries_the_problem_is_the_last_failure(layout: RunLayout) -> None:
    """Whatever else was recorded since."""
    with Ledger(layout.ledger) as ledger:
        for message, kind in (("first", "failed"), ("second", "failed"), ("other", "warned")):
            ledger.add_event("error", message, kind=kind)
    with owned(layout, held=True, state="failed", problem=None):
        assert "second" == read_status(layout)["problem"]


def test_a_file_has_the_place_in_the_stream_that_it_has_or_will_get(layout: RunLayout) -> None:
    """What was taken out has none, and takes none from those that wait; what is unknown of a file is no number."""
    with Ledger(layout.ledger) as ledger:
        for name, state in (("x.jsonl", "quarantined"), ("d.jsonl", "queued"), ("y.jsonl", "skipped")):
            add_file(ledger, name, state=state)
    found = read_history(layout)
    assert {"a.jsonl": 1, "b.jsonl": 2, "c.jsonl": 3, "d.jsonl": 4, "x.jsonl": None, "y.jsonl": None} == {
        entry["name"]: entry["position"] for entry in found
    }
    done, training, waiting = found[:3]
    assert (3, 1, 3, 6, 0.75, 1.0, 3.0) == tuple(
        done[key] for key in ("steps", "first_step", "last_step", "rows_trained", "seconds", "first_loss", "last_loss")
    )
    assert (30, 4, 33, 7) == tuple(training[key] for key in ("steps", "first_step", "last_step", "lost_tokens"))
    assert (0, None, None, 0, 0, 0.0, None) == tuple(
        waiting[key]
        for key in ("steps", "first_step", "last_step", "rows_trained", "rows_replayed", "seconds", "first_loss")
    )
