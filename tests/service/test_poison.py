"""Files that kill their reader, change while they are read, or have to be taken out: nothing waits behind them."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from poisons import POISONS, SETTINGS, announce, states
from runs import new_run

from onward import Run
from onward.errors import FileRejected
from onward.layout import RunLayout
from onward.service.intake import refusals
from onward.service.intake.budget import Budget, BudgetSpent, Spending
from onward.service.intake.checking import Intake
from onward.service.intake.file_check import ATTEMPTS
from onward.store.ledger import Ledger
from onward.store.rows import FileRow


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Run:
    """A run that nothing was trained in."""
    return new_run(tmp_path / "run", model, **SETTINGS)


def test_what_is_behind_a_poison_is_queued(run: Run) -> None:
    """Every poisoned file is refused with a report, and the good file that arrived after them is queued."""
    for name, content in POISONS.items():
        (run.layout.inbox / name).write_bytes(content)
    tiny.write_jsonl(run.layout.inbox / "good.jsonl", tiny.chat_rows(3))
    with Ledger(run.layout.ledger) as ledger:
        announce(run.layout, ledger, *POISONS, "good.jsonl")
        intake = Intake(run.layout, ledger)
        while intake.check_next():
            pass
        assert dict.fromkeys(POISONS, "rejected") | {"good.jsonl": "queued"} == states(ledger)
    kept = {path.name for path in run.layout.rejected.iterdir()}
    assert set(POISONS) | {f"{name}.report.json" for name in POISONS} == kept


def die(row: FileRow) -> None:
    """End the process at the beginning of a check, as lack of memory does."""
    if row.name == "poison.jsonl":
        os.kill(os.getpid(), signal.SIGKILL)


def check_in_child(layout: RunLayout) -> int:
    """Check what arrived in a process that dies at the poisoned file; returns its status as a shell reports it."""
    child = os.fork()
    if child == 0:
        with Ledger(layout.ledger) as ledger:
            intake = Intake(layout, ledger, begun=die)
            while intake.check_next():
                pass
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_file_that_kills_the_checker_is_refused_after_three_deaths(run: Run) -> None:
    """Each death is counted before the file is opened; after the third it is refused, and the next file is queued."""
    for name in ("poison.jsonl", "good.jsonl"):
        tiny.write_jsonl(run.layout.inbox / name, tiny.chat_rows(3, seed=len(name)))
    with Ledger(run.layout.ledger) as ledger:
        announce(run.layout, ledger, "poison.jsonl", "good.jsonl")
    ends = [check_in_child(run.layout) for _ in range(ATTEMPTS + 1)]
    assert [-signal.SIGKILL] * ATTEMPTS + [0] == ends
    with Ledger(run.layout.ledger) as ledger:
        assert {"poison.jsonl": "rejected", "good.jsonl": "queued"} == states(ledger)
    (problem,) = json.loads((run.layout.rejected / "poison.jsonl.report.json").read_text())["problems"]
    assert problem["reason"].startswith("checking it killed the process 3 times")


def test_a_command_that_is_given_again_counts_the_deaths_at_its_file(run: Run, tmp_path: Path) -> None:
    """Adding a file again whose content killed the process three times gives the refusal, not a fourth death."""
    poison = tiny.write_jsonl(tmp_path / "poison.jsonl", tiny.chat_rows(3))
    for _ in range(ATTEMPTS):
        child = os.fork()
        if child == 0:
            with Ledger(run.layout.ledger) as ledger:
                Intake(run.layout, ledger, begun=die).take([poison])
            os._exit(0)
        assert -signal.SIGKILL == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with Ledger(run.layout.ledger) as ledger:
        intake = Intake(run.layout, ledger, begun=die)
        with pytest.raises(FileRejected, match="checking it killed the process 3 times"):
            intake.take([poison])
        assert [True] * ATTEMPTS == [intake.check_next() for _ in range(ATTEMPTS)]
        assert not ledger.files("arriving")


@pytest.mark.parametrize("error", [MemoryError, KeyError("odd")])
def test_a_command_prints_a_refusal_whatever_checking_raises(
    run: Run, tmp_path: Path, error: BaseException | type[BaseException]
) -> None:
    """Lack of memory is tried three times, any other unexpected error is refused at once: never a traceback."""
    calls: list[str] = []

    def fail(row: FileRow) -> None:
        calls.append(row.name)
        raise error

    file = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(3))
    with Ledger(run.layout.ledger) as ledger:
        with pytest.raises(FileRejected, match=r"1 of 1 files rejected"):
            Intake(run.layout, ledger, begun=fail).take([file])
        assert {"a.jsonl": "rejected"} == states(ledger)
    assert ["a.jsonl"] * (ATTEMPTS if error is MemoryError else 1) == calls


def test_a_budget_that_is_spent_leaves_the_file_and_counts_no_attempt(run: Run) -> None:
    """A file that needs more than its budget is left as it was, for a process of its own, and keeps its place."""
    tiny.write_jsonl(run.layout.inbox / "a.jsonl", tiny.chat_rows(50))
    with Ledger(run.layout.ledger) as ledger:
        announce(run.layout, ledger, "a.jsonl")
        intake = Intake(run.layout, ledger)
        for budget in (Budget(size=10), Budget(rows=5, seconds=600.0), Budget(seconds=0.0)):
            row = intake.check_ahead(seconds=1.0, budget=budget, leaves=lambda _: False)
            assert row is not None
            assert ("a.jsonl", 0) == (row.name, ledger.file(row.id).attempts)
            assert {"a.jsonl": "arriving"} == states(ledger)
        assert intake.check_next()
        assert {"a.jsonl": "queued"} == states(ledger)


def test_a_budget_is_of_bytes_rows_and_seconds() -> None:
    """The part of the budget that is spent first ends the work; without a budget nothing does."""
    clock = [0.0]
    spending = Spending(budget=Budget(size=10, rows=2, seconds=1.0), monotonic=lambda: clock[0])
    spending.spend_bytes(10)
    spending.spend_row()
    spending.spend_row()
    for spend in (spending.spend_row, lambda: spending.spend_bytes(1)):
        with pytest.raises(BudgetSpent):
            spend()
    late = Spending(budget=Budget(seconds=1.0), monotonic=lambda: clock[0])
    clock[0] = 1.0
    with pytest.raises(BudgetSpent):
        late.spend_row()
    Spending().spend_row()


def test_a_file_is_withdrawn_while_it_is_checked(run: Run) -> None:
    """A file taken out at the moment that its check begins is skipped, its content kept; the next one is queued."""
    for name in ("out.jsonl", "good.jsonl"):
        tiny.write_jsonl(run.layout.inbox / name, tiny.chat_rows(3, seed=len(name)))

    def withdraw(row: FileRow) -> None:
        if row.name == "out.jsonl":
            with Ledger(run.layout.ledger) as other:
                Intake(run.layout, other).withdraw(other.file(row.id), "no use")

    with Ledger(run.layout.ledger) as ledger:
        announce(run.layout, ledger, "out.jsonl", "good.jsonl")
        intake = Intake(run.layout, ledger, begun=withdraw)
        while intake.check_next():
            pass
        assert {"out.jsonl": "skipped", "good.jsonl": "queued"} == states(ledger)
    assert (run.layout.rejected / "out.jsonl").is_file()
    assert ["good.jsonl"] == [path.name for path in run.layout.archive.iterdir()]
    assert 1 == len(list(run.layout.tokens.iterdir()))


@pytest.mark.parametrize("at", range(1, 7))
def test_a_file_is_withdrawn_while_it_or_the_next_one_is_read(at: int, run: Run) -> None:
    """Files that arrive together are recorded together: one that was read, and then skipped, is in nobody's way."""
    looks = 0
    for name in ("out.jsonl", "good.jsonl"):
        tiny.write_jsonl(run.layout.inbox / name, tiny.chat_rows(3, seed=len(name)))

    def withdraw() -> None:
        nonlocal looks
        looks += 1
        if looks == at:  # the first two are for the lock, the next two for `out.jsonl`, the last two for `good.jsonl`
            intake.withdraw(ledger.announced()[0], "no use")

    with Ledger(run.layout.ledger) as ledger:
        announce(run.layout, ledger, "out.jsonl", "good.jsonl")
        intake = Intake(run.layout, ledger)
        intake.stop = withdraw
        assert ["good.jsonl"] == [row.name for row in intake.bring_in()]
        assert {"out.jsonl": "skipped", "good.jsonl": "arriving"} == states(ledger)
    assert (run.layout.rejected / "out.jsonl").is_file()
    assert ["good.jsonl"] == [path.name for path in run.layout.archive.iterdir()]


def test_an_unread_file_is_withdrawn(run: Run) -> None:
    """A file that only has its place in the queue is taken out of the inbox, and does not come back."""
    tiny.write_jsonl(run.layout.inbox / "a.jsonl", tiny.chat_rows(3))
    with Ledger(run.layout.ledger) as ledger:
        announce(run.layout, ledger, "a.jsonl")
        intake = Intake(run.layout, ledger)
        assert "skipped a.jsonl" == intake.withdraw(ledger.announced()[0], "no use")
        assert not intake.check_next()
    assert [] == list(run.layout.inbox.iterdir())
    assert (run.layout.rejected / "a.jsonl").is_file()


@pytest.mark.parametrize("fails", ["the report", "the ledger"])
def test_a_skip_that_ends_halfway_brings_no_unread_file_back(
    fails: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits as before, or it is out: a file that is skipped by the ledger and still in the inbox is seen again."""
    tiny.write_jsonl(run.layout.inbox / "a.jsonl", tiny.chat_rows(3))
    with Ledger(run.layout.ledger) as ledger:
        announce(run.layout, ledger, "a.jsonl")
        intake, row = Intake(run.layout, ledger), ledger.announced()[0]

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(*((refusals, "replace_json") if fails == "the report" else (ledger, "move_file")), refuse)
            with pytest.raises(OSError, match="No space"):
                intake.withdraw(row, "no use")
        assert {"a.jsonl": "arriving"} == states(ledger)
        assert (fails == "the report") == (run.layout.inbox / "a.jsonl").exists()
        announce(run.layout, ledger, "a.jsonl")
        while intake.check_next():
            pass
        assert ({"a.jsonl": "queued"} if fails == "the report" else {}) == states(ledger)


def test_the_order_does_not_depend_on_who_read_first(run: Run) -> None:
    """A small file that is read and queued before an earlier large one does not pass it: the queue waits for it."""
    for name in ("large.jsonl", "small.jsonl"):
        tiny.write_jsonl(run.layout.inbox / name, tiny.chat_rows(3, seed=ord(name[0])))
    with Ledger(run.layout.ledger) as ledger:
        announce(run.layout, ledger, "large.jsonl", "small.jsonl")
        intake = Intake(run.layout, ledger)
        intake.bring_in(leaves=lambda row: row.name == "large.jsonl")
        assert ["large.jsonl"] == [row.name for row in ledger.announced()]
        while intake.check_next():
            pass
        assert ["large.jsonl", "small.jsonl"] == [row.name for row in ledger.files("queued")]


def append(path: Path) -> None:
    """Write on with a descriptor that was open before the file was moved."""
    with path.open("a") as writer:
        writer.write('{"text": "late"}\n')


def exchange(path: Path) -> None:
    """Put a link to another file in its place."""
    other = tiny.write_jsonl(path.parents[1] / "secret.jsonl", tiny.chat_rows(2, seed=9))
    path.unlink()
    path.symlink_to(other)


@pytest.mark.parametrize("change", [append, exchange])
def test_what_was_hashed_is_what_is_checked(run: Run, change: Callable[[Path], None]) -> None:
    """A file that is changed or exchanged after it was hashed is refused with the reason, never trained."""
    tiny.write_jsonl(run.layout.inbox / "a.jsonl", tiny.chat_rows(3))
    with Ledger(run.layout.ledger) as ledger:
        announce(run.layout, ledger, "a.jsonl")
        intake = Intake(run.layout, ledger, begun=lambda row: change(run.layout.kept(row.copy)))
        intake.check_next()
        assert {"a.jsonl": "rejected"} == states(ledger)
    (problem,) = json.loads((run.layout.rejected / "a.jsonl.report.json").read_text())["problems"]
    assert "its writer still had it open" in problem["reason"] or "symbolic link" in problem["reason"]


def test_a_file_that_changes_before_it_is_read_settles_again(run: Run) -> None:
    """A file that was written on after it was seen is forgotten and left in the inbox; nothing is refused."""
    path = tiny.write_jsonl(run.layout.inbox / "a.jsonl", tiny.chat_rows(3))
    with Ledger(run.layout.ledger) as ledger:
        announce(run.layout, ledger, "a.jsonl")
        append(path)
        assert Intake(run.layout, ledger).check_next()
        assert {} == states(ledger)
    assert path.is_file()
