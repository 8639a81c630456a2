"""A file begins while the boundary before it is written, and that commit fails: what may be done with the run then."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import tiny
from faults import copy_run
from runs import new_run
from states import assert_same_state

from onward import Run
from onward.errors import DamagedState
from onward.events import StepTaken
from onward.layout import step_of
from onward.service.owner import faults
from onward.service.state import commits
from onward.service.state.rollback import move_ledger_back, undone
from onward.store.ledger import Ledger

SETTINGS: dict[str, Any] = {"batch_size": 2, "warmup_steps": 0, "lora": {"rank": 2, "dropout": 0.1}}
FOUND = faults.Failure("no good", False, ({"line": 1, "reason": "no good", "remedy": "leave it"},))
BOUNDARY = 4
"""The step whose commit fails: the end of the second file. The third one has begun by then; a fourth one waits."""


@dataclass(frozen=True)
class Lost:
    """The run that such a process leaves, and runs that never had some of the files, by the names of the others."""

    root: Path
    files: Sequence[Path]
    twin: Callable[[str], Path]


@pytest.fixture(scope="module")
def lost(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Lost:
    """Four files of two steps each."""
    folder = tmp_path_factory.mktemp("lost")
    files = [tiny.write_jsonl(folder / f"{name}.jsonl", tiny.chat_rows(4, seed=n)) for n, name in enumerate("abcd")]
    made, begun, write = new_run(folder / "run", model, **SETTINGS), threading.Event(), commits.write_checkpoint

    def fail_at_boundary(target: Path, *arguments: Any, **options: Any) -> Any:
        if target.name == f"checkpoint-{BOUNDARY}":
            assert begun.wait(60)
            raise OSError(errno.EIO, "Input/output error")
        return write(target, *arguments, **options)

    def observe(event: object) -> None:
        if isinstance(event, StepTaken) and event.step > BOUNDARY:
            begun.set()

    @cache
    def twin(left: str) -> Path:
        other = new_run(folder / left, model, **SETTINGS)
        other.train(*(file for file in files if file.name[0] in left))
        return other.layout.root

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(commits, "write_checkpoint", fail_at_boundary)
        with pytest.raises(OSError, match="Input/output"):
            made.train(*files, observe=observe)
    assert {"a": "done", "b": "training", "c": "training", "d": "queued"} == states(made)
    return Lost(made.layout.root, files, twin)


@pytest.fixture
def run(lost: Lost, tmp_path: Path) -> Run:
    """A copy of that run."""
    return Run(copy_run(lost.root, tmp_path / "run"))


def states(run: Run) -> dict[str, str]:
    """Return the state of each file that was not taken out, by the first letter of its name."""
    out = ("undone", "skipped", "quarantined")
    return {entry["name"][0]: entry["state"] for entry in run.history() if entry["state"] not in out}


def quarantine(run: Run, name: str) -> None:
    """Take a file out as a daemon does after several deaths in it, which is before it looks at anything else."""
    with Ledger(run.layout.ledger) as ledger:
        (row,) = [row for row in ledger.files("training") if row.name == name]
        faults.quarantine(run.layout, ledger, row, "the process died")


@pytest.mark.parametrize(
    ("act", "left"),
    [
        (lambda run: run.train(), "abcd"),
        (lambda run: run.skip("c.jsonl"), "abd"),
        (lambda run: run.skip("b.jsonl"), "acd"),
        (lambda run: run.skip("d.jsonl"), "abc"),
        (partial(quarantine, name="c.jsonl"), "abd"),
        (partial(quarantine, name="b.jsonl"), "acd"),
        (lambda run: run.rebuild("b.jsonl"), "acd"),
        (lambda run: run.rebuild(3), "abd"),
        (lambda run: run.rebuild("a.jsonl"), "bcd"),
        (lambda run: run.rollback("a.jsonl"), "ad"),
        (lambda run: run.rollback("a.jsonl", requeue=True), "abcd"),
        (lambda run: run.reset(), "d"),
    ],
    ids=[
        "train", "skip the file begun", "skip the file lost", "skip the file that waits",
        "deaths in the file begun", "deaths in the file lost", "rebuild without the file lost",
        "rebuild without the file begun", "rebuild without the file done", "roll back", "roll back and queue", "reset",
    ],
)  # fmt: skip
def test_the_run_goes_on(act: Callable[[Run], object], left: str, run: Run, lost: Lost) -> None:
    """It ends where a run ends that never had the files that were taken out."""
    act(run)
    run.train()
    assert dict.fromkeys(left, "done") == states(run)
    assert_same_state(lost.twin(left), run.layout.root)
    assert run.verify().ok


def test_a_restore_point_that_does_not_verify_is_not_gone_back_to(run: Run) -> None:
    """It is refused before anything moves, with a way out that works."""
    run.train()
    before = run.history()
    with Ledger(run.layout.ledger) as ledger:
        (row,) = [row for row in ledger.files("done") if row.name == "d.jsonl"]
        (run.layout.boundary(row.first_step) / "adapter_config.json").write_text("{}")
        with pytest.raises(DamagedState, match="onward rollback --to FILE"):
            faults.handle(run.layout, ledger, row, FOUND, run.config)
    assert before == run.history()
    run.rollback("b.jsonl", requeue=True)
    run.train()
    assert dict.fromkeys("abcd", "done") == states(run)


@pytest.mark.parametrize("again", [False, True])
def test_a_restore_point_damaged_while_a_kill_left_it_to_be_gone_back_to(run: Run, lost: Lost, *, again: bool) -> None:
    """An older one is used, what followed it is trained again, and nothing of what was undone comes back."""
    run.train()
    with Ledger(run.layout.ledger) as ledger:  # a rollback to the second file that is killed before directories move
        later = [row for row in ledger.files("done") if row.name > "b.jsonl"]
        move_ledger_back(ledger, BOUNDARY, undone(later, queued_after=2 if again else None), "test")
    (run.layout.boundary(BOUNDARY) / "adapter_config.json").write_text("{}")
    run.train()
    left = "abcd" if again else "ab"
    assert dict.fromkeys(left, "done") == states(run)
    assert_same_state(lost.twin(left), run.layout.root)
    assert run.verify().ok


def test_a_state_that_is_undone_stays_until_another_verifies(run: Run) -> None:
    """Where none does, a start is refused, and what a person could still copy is not removed."""
    run.train()
    with Ledger(run.layout.ledger) as ledger:
        move_ledger_back(ledger, BOUNDARY, undone(ledger.in_stream(after=2)), "test")
    for point in run.layout.restore_points():
        if step_of(point) <= BOUNDARY:
            (point / "adapter_config.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(DamagedState, match="no checkpoint or restore point verifies"):
            run.train()
    newest = run.layout.checkpoint(8)
    assert (newest / "adapter_config.json").read_text() != "{}"
