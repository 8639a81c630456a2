"""Whatever stops a run, it goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
from daemons import hold, is_in, until
from faults import FULL_SIZE
from processes import kill_after, start, start_command, train
from runs import new_run
from states import assert_same_state, temporary_files

from onward import Run
from onward.errors import DamagedState, TrainingError
from onward.service.state.commits import Commits
from onward.service.state.retention import Retention
from onward.service.state.settle import Settlement
from onward.store.ledger import Ledger

SETTINGS: dict[str, Any] = {
    "evaluation": {"share": 0},
    "batch_size": 2,
    "save_steps": 3,
    "max_length": 256,
    "learning_rate": 1e-2,
    "lora": {"rank": 4, "dropout": 0.1},
}
KILLS = int(os.environ.get("ONWARD_KILLS", "5"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files of unequal length."""
    folder = tmp_path_factory.mktemp("files")
    return [tiny.write_jsonl(folder / f"{n}.jsonl", tiny.chat_rows(n, seed=n)) for n in (20, 45, 11)]


@pytest.fixture(scope="module")
def uninterrupted(model: Path, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the three files that nothing stopped."""
    root = tmp_path_factory.mktemp("whole") / "run"
    new_run(root, model, **SETTINGS)
    assert train(root, files) == 0
    return root


@pytest.fixture
def copy(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of the uninterrupted run whose restore points are hard links of the same checkpoints, as in the run."""
    root = tmp_path / "run"
    shutil.copytree(uninterrupted, root, ignore=shutil.ignore_patterns("current_model"))
    (checkpoint,) = (uninterrupted / "current_model").glob("checkpoint-*")
    point = root / "boundaries" / checkpoint.name.replace("checkpoint", "step")
    target = root / "current_model" / checkpoint.name
    target.mkdir(parents=True)
    for path in point.iterdir():
        (target / path.name).hardlink_to(path)
        if path.name != "onward.json":
            (target.parent / path.name).hardlink_to(path)
    assert Run(root).verify().ok
    return root


@pytest.mark.parametrize("seed", [1, 2] if FULL_SIZE else [1])
@pytest.mark.slow
def test_killed_at_random_instants(
    seed: int, model: Path, files: list[Path], uninterrupted: Path, tmp_path: Path
) -> None:
    """Killed repeatedly at random instants, a run ends in the state of an undisturbed one."""
    root = tmp_path / "run"
    new_run(root, model, **SETTINGS)
    Run(root).add(*files)
    source = random.Random(seed)
    for _ in range(KILLS):
        kill_after(start(root), source.uniform(0.05, 0.7))
    assert train(root) == 0
    assert_same_state(uninterrupted, root)
    assert temporary_files(root) == []
    assert Run(root).verify().ok


def never_commits() -> None:
    """Make every commit of this process wait for ever."""
    Commits.commit = lambda *_: threading.Event().wait()  # type: ignore[assignment,method-assign]


def test_killed_before_anything_was_committed(
    model: Path, files: list[Path], uninterrupted: Path, tmp_path: Path
) -> None:
    """Steps taken while the state of step 0 was still being written are lost; their file is owed from its start."""
    run = new_run(tmp_path / "run", model, **SETTINGS)
    run.add(*files)
    process = start_command(tmp_path / "output", "train", "--run", run.layout.root, prepare=never_commits)
    until(is_in(run, "20.jsonl", 2), process)
    kill_after(process, 0)
    assert ["training", "queued", "queued"] == [entry["state"] for entry in run.history()]
    with Ledger(run.layout.ledger) as ledger:
        settled = Settlement(run.layout, ledger, Retention.of(run.config)).settle()
        owed = ledger.files("queued")
        assert (None, 3, []) == (settled.manifest, len(owed), ledger.steps(owed[0].id))
    assert train(run.layout.root) == 0
    assert_same_state(uninterrupted, run.layout.root)
    assert run.verify().ok


@pytest.mark.parametrize("delay", [0.02, 0.1, 0.25, 0.4] if FULL_SIZE else [0.1, 0.4])
def test_killed_while_files_arrive(
    delay: float, model: Path, files: list[Path], uninterrupted: Path, tmp_path: Path
) -> None:
    """A command killed while it takes files in can be given again: what it had taken is neither lost nor doubled."""
    root = tmp_path / "run"
    new_run(root, model, **SETTINGS)
    kill_after(start(root, files), delay)
    assert train(root, files) in (0, 3)  # 3: everything was trained before the kill already
    assert_same_state(uninterrupted, root)
    assert temporary_files(root) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(
    number: signal.Signals, model: Path, files: list[Path], uninterrupted: Path, tmp_path: Path
) -> None:
    """SIGTERM and SIGINT finish the step, commit it and exit 0; the next process goes on from exactly there."""
    root = tmp_path / "run"
    new_run(root, model, **{**SETTINGS, "save_steps": 1000})
    process = start_command(tmp_path / "output", "train", *files, "--run", root, prepare=hold(Run(root), step=4))
    until(lambda: Run(root).status()["global_step"] >= 4, process)
    kill_after(process, 0, number)
    assert process.exitcode == 0
    stopped_at = Run(root).status()
    assert 4 <= stopped_at["global_step"] < 38
    assert "stopped" == stopped_at["state"]
    assert f"checkpoint-{stopped_at['global_step']}" == stopped_at["checkpoint"]
    assert train(root) == 0
    expected = read_without_log(uninterrupted)
    assert expected == read_without_log(root)


def read_without_log(root: Path) -> Any:
    """The measurement and cursor in the manifest of the newest checkpoint."""
    from onward.training.checkpoints.checkpoint import inspect_checkpoint

    manifest = inspect_checkpoint(Run(root).layout.checkpoints()[0]).verified
    assert manifest is not None
    return manifest.measurement, manifest.state


def names(checkpoint: Path) -> list[str]:
    """The files of a checkpoint."""
    return sorted(path.name for path in checkpoint.iterdir())


def cut(path: Path) -> None:
    """Cut a file in the middle."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


DAMAGES = (cut, flip, Path.unlink)


@pytest.mark.parametrize("first", range(len(DAMAGES)) if FULL_SIZE else [0])
def test_damaged_checkpoint_is_named_and_repaired(first: int, uninterrupted: Path, copy: Path) -> None:
    """Each file of the newest checkpoint, damaged in one way and the next in another, is named and replayed exactly."""
    (checkpoint,) = Run(copy).layout.checkpoints()
    for number, name in enumerate(names(checkpoint), start=first):
        DAMAGES[number % len(DAMAGES)](checkpoint / name)
        proof = Run(copy).verify()
        assert not proof.ok
        assert name in next(check.detail for check in proof.checks if check.name == "state files")
        notes: list[str] = []
        Run(copy).train(observe=lambda event, notes=notes: notes.append(getattr(event, "message", "")))
        assert any(name in note for note in notes)
        assert_same_state(uninterrupted, copy)
        assert Run(copy).verify().ok


def test_nothing_verifiable_is_refused(copy: Path) -> None:
    """With every checkpoint and restore point damaged, the run refuses; it never starts afresh."""
    for weights in copy.rglob("adapter_model.safetensors"):
        if weights.stat().st_size:
            os.truncate(weights, 0)
    before = sorted(copy.rglob("*"))
    with pytest.raises(DamagedState, match="no checkpoint or restore point verifies"):
        Run(copy).train()
    assert before == sorted(path for path in copy.rglob("*") if path.suffix not in (".sqlite3-wal", ".sqlite3-shm"))


def test_removed_model_is_refused(copy: Path) -> None:
    """`rm -rf current_model` is no fresh start while the ledger claims progress; `reset` is."""
    shutil.rmtree(copy / "current_model")
    with pytest.raises(DamagedState, match="onward reset"):
        Run(copy).train()
    Run(copy).reset()
    assert Run(copy).status()["global_step"] == 0


def test_replay_that_differs_is_refused(files: list[Path], copy: Path) -> None:
    """A replayed step must give the state that was lost; where it does not, the run stops."""
    from onward.errors import VerificationFailed
    from onward.store.ledger import Ledger

    layout = Run(copy).layout
    for folder in (*layout.checkpoints(), layout.restore_points()[0]):
        shutil.rmtree(folder)
    with Ledger(copy / "ledger.sqlite3") as ledger:
        ledger.write("UPDATE checkpoints SET state_digest = 'another' WHERE step = (SELECT max(step) FROM checkpoints)")
    with pytest.raises(VerificationFailed, match="gave a different state"):
        Run(copy).train()


def test_changed_base_is_refused(model: Path, files: list[Path], tmp_path: Path) -> None:
    """A base model that changed on disk is refused before anything is trained on it."""
    base = shutil.copytree(model, tmp_path / "base")
    run = Run.create(tmp_path / "run", str(base), **SETTINGS)
    run.train(files[2])
    flip(base / "model.safetensors")
    from onward.errors import ModelError

    with pytest.raises(ModelError, match="changed on disk"):
        run.train(files[0])
    assert (0, 6) == (run.status()["queue"], run.status()["global_step"])


def test_loss_that_is_not_finite(model: Path, tmp_path: Path) -> None:
    """A loss that is not finite stops the file, names step and lines, and commits nothing of that step."""
    run = new_run(tmp_path / "run", model, **{**SETTINGS, "learning_rate": 1e30, "warmup_steps": 0})
    with pytest.raises(TrainingError, match=r"not finite|no longer finite") as caught:
        run.train(tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chat_rows(12)))
    assert "lines" in caught.value.what
    assert "step" in str(caught.value.where)
    assert 0 == run.status()["global_step"]
    assert "failed" == run.status()["state"]
