"""A reader gets all files of one committed step, whatever is committed meanwhile; what a commit did is reported."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
from faults import copy_run
from runs import new_run

from onward import Run
from onward.errors import DamagedState, UsageError
from onward.events import Committed
from onward.layout import RunLayout, step_of
from onward.service.session import open_session
from onward.service.state.commits import Commit
from onward.service.state.reading import find_newest, snapshot
from onward.service.state.writer import Writer
from onward.store.database import OPTIONS
from onward.store.ledger import Ledger
from onward.training.checkpoints.checkpoint import Manifest, inspect_checkpoint
from onward.training.checkpoints.loading import load_state
from onward.training.measuring.probe import Probe

SETTINGS: dict[str, Any] = {
    "evaluation": {"share": 0},
    "batch_size": 4,
    "max_length": 128,
    "warmup_steps": 0,
    "lora": {"rank": 2},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files, of three steps and two."""
    folder = tmp_path_factory.mktemp("files")
    return [tiny.write_jsonl(folder / f"{n}.jsonl", tiny.chat_rows(n, seed=n)) for n in (9, 6)]


@pytest.fixture(scope="module")
def trained(model: Path, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the first file."""
    run = new_run(tmp_path_factory.mktemp("trained") / "run", model, **SETTINGS)
    run.train(files[0])
    return run.layout.root


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Run:
    """A copy of the run of the first file."""
    return Run(copy_run(trained, tmp_path / "run"))


def test_a_run_gives_a_snapshot(run: Run, tmp_path: Path) -> None:
    """`Run.snapshot` makes a directory with all files of the newest commit, and says which it is."""
    manifest = run.snapshot(tmp_path / "copy")
    assert inspect_checkpoint(tmp_path / "copy").verified == manifest
    assert 3 == manifest.step


def test_a_snapshot_is_of_one_step(run: Run, files: list[Path], tmp_path: Path) -> None:
    """Commits between any two files that are linked lead to the newer state, never to a mix."""
    names = sorted(path.name for path in run.layout.checkpoint(3).iterdir())
    for place in (0, len(names) // 2, len(names) - 1):
        root = copy_run(run.layout.root, tmp_path / str(place))
        seen: list[str] = []

        def commit(name: str, root: Path = root, seen: list[str] = seen, place: int = place) -> None:
            if len(seen) == place:
                Run(root).train(files[1])
            seen.append(name)

        target = tmp_path / f"snapshot-{place}"
        manifest = snapshot(Run(root).layout, target, commit)
        assert 5 == manifest.step
        found = inspect_checkpoint(target)
        assert manifest == found.verified
        assert sorted([*manifest.files, "onward.json"]) == sorted(path.name for path in target.iterdir())
        assert len(seen) == place + 1 + len(names)
    assert [] == list(tmp_path.glob(".tmp-*"))


def test_a_snapshot_stays_when_training_goes_on(run: Run, files: list[Path], tmp_path: Path) -> None:
    """What was linked is still there when the run has moved on; a Trainer's directory is no newer state."""
    (run.layout.current / "checkpoint-900").mkdir()
    manifest = snapshot(run.layout, tmp_path / "mine")
    run.train(files[1])
    assert (3, 5) == (manifest.step, run.status()["global_step"])
    assert manifest == inspect_checkpoint(tmp_path / "mine").verified


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path: Path) -> None:
    """Also where steps get another digit; one of another run, or without a manifest, is none of the run's."""
    layout = RunLayout(tmp_path)
    for step, run in ((9, "r"), (100, "r"), (99, "r"), (1000, "other"), (10000, None)):
        for folder in (layout.checkpoint(step), layout.boundary(step)):
            folder.mkdir(parents=True)
            if run is not None:
                (folder / "onward.json").write_text(json.dumps({"run": run, "step": step}))
    assert (layout.checkpoint(100), None) == (find_newest(layout, "r"), find_newest(layout, "nobody"))
    for folders in (layout.checkpoints(), layout.restore_points()):
        assert [10000, 1000, 100, 99, 9] == [step_of(folder) for folder in folders]


def test_no_snapshot_of_what_is_damaged_or_not_there(run: Run, model: Path, tmp_path: Path) -> None:
    """A name that is taken, a run that has committed nothing and a checkpoint that is missing, or damaged at two looks,
    are refused by what they are; nothing is left.
    """
    with pytest.raises(UsageError, match="of this name"):
        snapshot(run.layout, tmp_path)
    with pytest.raises(UsageError, match="nothing has been committed"):
        snapshot(new_run(tmp_path / "new", model).layout, tmp_path / "none")
    (run.layout.checkpoint(3) / "optimizer.pt").unlink()
    linked: list[str] = []
    with pytest.raises(DamagedState, match=r"optimizer\.pt is missing"):
        snapshot(run.layout, tmp_path / "damaged", linked.append)
    assert 2 == linked.count("onward.json")
    for missing, said in ((run.layout.checkpoint(3), "step 3 is missing"), (run.layout.current, "ledger claims 3")):
        shutil.rmtree(missing)
        with pytest.raises(DamagedState, match=said):
            snapshot(run.layout, tmp_path / "missing")
    assert ["new", "run"] == sorted(path.name for path in tmp_path.iterdir())


def test_a_commit_says_what_it_did(run: Run, files: list[Path]) -> None:
    """Each commit names the checkpoint that it replaced, and its restore point at a boundary only."""
    config = run.layout.config
    config.write_text(config.read_text().replace("save_steps: 100", "save_steps: 1"))
    seen: list[Committed] = []
    run.train(files[1], observe=lambda event: seen.append(event) if isinstance(event, Committed) else None)
    assert [Committed(4, ("checkpoint-3",)), Committed(5, ("checkpoint-4",), "step-5")] == seen


class Watched(sqlite3.Connection):
    """A connection that notes the threads in which it executes something."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.threads = set[str]()
        MADE.append(self)

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        """Execute a statement."""
        self.threads.add(threading.current_thread().name)
        return super().execute(sql, *values)


MADE: list[Watched] = []


def test_a_commit_uses_no_connection_of_others(run: Run, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its statements would hold the owner's view of the ledger, in which steps taken since would be missing."""
    config = run.layout.config
    config.write_text(config.read_text().replace("save_steps: 100", "save_steps: 1"))
    MADE.clear()
    monkeypatch.setitem(OPTIONS, "factory", Watched)
    run.train(files[1])
    used = [each.threads for each in MADE if "onward-writer" in each.threads]
    assert [{"onward-writer"}] * len(used) == used != []


def test_after_a_commit(run: Run) -> None:
    """Callbacks get the committed folder and manifest; one that fails is recorded, and called again next time."""
    calls: list[tuple[str, int]] = []

    def mirror(folder: Path, manifest: Manifest) -> None:
        calls.append((folder.name, manifest.step))
        assert manifest == inspect_checkpoint(folder).verified
        if len(calls) == 1:
            raise OSError("the bucket is away")

    reached: list[int] = []
    with Ledger(run.layout.ledger) as ledger:
        session = open_session(run.layout, ledger, report=lambda _: None)
        folder = run.layout.checkpoint(3)
        manifest = inspect_checkpoint(folder).verified
        assert manifest is not None
        state = load_state(folder, manifest, session.spec)
        probe = Probe(state.model, session.config.seed, session.device, session.dtype)
        writer = Writer(run.layout, ledger, [mirror, lambda _, manifest: reached.append(manifest.step)])
        for _ in range(2):
            commit = Commit(state.model, state.view(), session.config, probe.of_model, session.facts())
            writer.submit(commit, is_awaited=True)
            written = writer.collect(wait=True)
            assert written is not None
            assert 3 == written.manifest.step
        told = [event.message for event in ledger.events(1000) if event.message.startswith("mirror")]
    assert [("checkpoint-3", 3)] * 2 == calls
    assert [3, 3] == reached
    assert [
        "mirror failed after the commit of step 3: the bucket is away; it is tried again after the next commit"
    ] == (told)
    assert run.verify().ok
