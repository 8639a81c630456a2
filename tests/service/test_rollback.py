"""Going back to a boundary restores exactly the state it had, and keeps the record of what is undone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from faults import copy_run
from runs import new_run
from states import assert_same_state

from onward import Run
from onward.errors import FileRejected, UsageError
from onward.service.state.rollback import move_ledger_back, undone
from onward.service.state.settle import TO_NOTHING
from onward.service.wishes import Wishes
from onward.store.ledger import PROOF, Ledger

SETTINGS: dict[str, Any] = {
    "evaluation": {"share": 0},
    "batch_size": 4,
    "max_length": 256,
    "lora": {"rank": 4, "dropout": 0.1},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files."""
    folder = tmp_path_factory.mktemp("files")
    return [tiny.write_jsonl(folder / f"{n}.jsonl", tiny.chat_rows(n, seed=n)) for n in (9, 14, 6)]


@pytest.fixture(scope="module")
def trained(model: Path, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the three files, to be copied."""
    made = new_run(tmp_path_factory.mktemp("trained") / "run", model, **SETTINGS)
    made.train(*files)
    return made.layout.root


@pytest.fixture(scope="module")
def stopped(model: Path, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the first file, to be copied."""
    made = new_run(tmp_path_factory.mktemp("stopped") / "run", model, **SETTINGS)
    made.train(files[0])
    return made.layout.root


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Run:
    """A run of the three files."""
    return Run(copy_run(trained, tmp_path / "run"))


@pytest.mark.parametrize("to", ["9.jsonl", "1", "step-3", "hash"])
def test_back_to_a_boundary(to: str, run: Run, stopped: Path) -> None:
    """Name, position, step and hash prefix name a boundary; the state is that of a run which stopped there."""
    result = run.rollback(run.history()[0]["sha256"][:8] if to == "hash" else to)
    assert {"global_step": 3, "undone": ["14.jsonl", "6.jsonl"]} == result
    assert_same_state(stopped, run.layout.root)
    assert ["done", "undone", "undone"] == [entry["state"] for entry in run.history()]
    assert run.verify().ok
    run.rollback("step-3")
    with Ledger(run.layout.ledger) as ledger:
        told = [event.message for event in ledger.events(2)]
    assert [f"went back to step 3; undone: {names}" for names in ("14.jsonl, 6.jsonl", "nothing")] == told


def test_another_file_after_going_back(run: Run, stopped: Path, files: list[Path], tmp_path: Path) -> None:
    """What is trained after a rollback gives the bits of a run that never had what was undone."""
    twin = Run(copy_run(stopped, tmp_path / "twin"))
    run.rollback("9.jsonl")
    run.train(files[2])
    twin.train(files[2])
    assert_same_state(twin.layout.root, run.layout.root)
    assert run.verify(deep=True).ok


def test_the_oldest_state_cannot_be_trained_again(run: Run, files: list[Path]) -> None:
    """After a rollback to the oldest restore point that is kept, `deep` says why it proves nothing, and from when on it
    does; every other check holds.
    """
    shutil.rmtree(run.layout.boundary(0))
    run.rollback(1)
    proof = run.verify(deep=True)
    (failed,) = [check for check in proof.checks if not check.ok]
    assert failed.name == "replay"
    assert "nothing to train again from" in failed.detail
    assert "The next file can be proven again: onward train FILE" in failed.detail
    run.train(files[2])
    assert run.verify(deep=True).ok


def test_a_proof_of_what_is_undone_is_forgotten(run: Run) -> None:
    """The last proof stays while its state does: at a step that is undone, other rows may be trained now."""

    def proven() -> int | None:
        with Ledger(run.layout.ledger) as ledger:
            proof = ledger.get(PROOF)
        return proof and proof["step"]

    assert run.verify().ok
    newest = proven()
    run.rollback("14.jsonl")
    assert (9, None) == (newest, proven())
    assert run.verify().ok
    at = proven()
    run.rollback("14.jsonl")
    assert at == proven()
    run.reset()
    assert proven() is None


def test_undone_files_can_come_again(run: Run, files: list[Path], tmp_path: Path) -> None:
    """`requeue` puts undone files back in their order; trained again they give the same state."""
    before = shutil.copytree(run.layout.current, tmp_path / "before" / "current_model").parent
    run.rollback(1, requeue=True)
    assert 2 == run.status()["queue"]
    run.train()
    assert_same_state(before, run.layout.root)
    assert run.verify().ok


def test_undone_content_is_no_duplicate(run: Run, files: list[Path]) -> None:
    """A file that was undone may be added again; one in the stream is a duplicate unless asked for."""
    run.rollback(2)
    run.train(files[2])
    with pytest.raises(FileRejected, match="--again"):
        run.train(files[2])
    run.train(files[2], again=True)
    assert 4 == sum(entry["state"] == "done" for entry in run.history())
    assert run.verify().ok


def test_unknown_boundaries_are_refused(run: Run) -> None:
    """What names neither a finished file nor a boundary is refused with what there is; nothing changes."""
    for to in ("nothing.jsonl", "17", "step-1"):
        with pytest.raises(UsageError, match="neither a finished file"):
            run.rollback(to)
    assert run.verify().ok


def test_only_kept_boundaries_can_be_reached(model: Path, files: list[Path], tmp_path: Path) -> None:
    """`keep_boundaries` bounds the restore points, and a boundary no longer kept is named as such."""
    run = new_run(tmp_path / "run", model, **SETTINGS, keep_boundaries=1)
    run.train(*files)
    assert ["step-9", "step-7"] == [point.name for point in run.layout.restore_points()]
    with pytest.raises(UsageError, match="no longer kept"):
        run.rollback(1)
    assert 7 == run.rollback(2)["global_step"]


def test_reset_forgets_progress_and_keeps_originals(run: Run, files: list[Path], model: Path, tmp_path: Path) -> None:
    """After a reset the run starts at step 0 with its archive and its record, and trains as a new run would."""
    run.reset()
    assert 0 == run.status()["global_step"]
    assert 3 == len(list(run.layout.archive.iterdir()))
    run.train(files[1])
    twin = new_run(tmp_path / "twin", model, **SETTINGS)
    twin.train(files[1])
    assert_same_state(twin.layout.root, run.layout.root)
    assert run.verify().ok


@pytest.mark.parametrize(("step", "position"), [(3, 1), (TO_NOTHING, 0)], ids=["rollback", "reset"])
def test_kill_while_going_back(step: int, position: int, run: Run) -> None:
    """Going back that is killed between ledger and directories is finished by the next start, never reverted."""
    with Ledger(run.layout.ledger) as ledger:
        later = [row for row in ledger.files("done") if row.place > position]
        move_ledger_back(ledger, step, undone(later), "test")
    run.train()
    assert max(step, 0) == run.status()["global_step"]
    assert 3 - position == sum(entry["state"] == "undone" for entry in run.history())
    assert run.verify().ok


def test_a_rebuild_that_was_stopped_may_be_given_again(
    run: Run, model: Path, files: list[Path], tmp_path: Path
) -> None:
    """As it was: it trains the files that still wait. Once they are done, there is nothing to leave out."""
    stop = Wishes()
    stop.ask("test")
    run.rebuild("9.jsonl", stop=stop)
    assert 0 == run.status()["global_step"]
    result = run.rebuild("9.jsonl")
    assert ("9.jsonl", ["14.jsonl", "6.jsonl"]) == (result["without"], result["queued"])
    twin = new_run(tmp_path / "twin", model, **SETTINGS)
    twin.train(*files[1:])
    assert_same_state(twin.layout.root, run.layout.root)
    assert run.verify().ok
    with pytest.raises(UsageError, match=r"9\.jsonl' is skipped"):
        run.rebuild("9.jsonl")
