"""Only what a run made is ever removed or replaced; what others put into its directory is named and left alone."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import onward, snapshot
from faults import copy_run
from runs import UNMEASURED, new_run
from states import assert_same_state

from onward import Run
from onward.errors import DamagedState, NotMadeHere
from onward.events import Event, Note, StepTaken
from onward.service.wishes import Wishes
from onward.store.ledger import Ledger

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


@pytest.fixture(scope="module")
def twin(trained: Path, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with both files, undisturbed."""
    root = copy_run(trained, tmp_path_factory.mktemp("twin") / "run")
    Run(root).train(files[1])
    return root


@pytest.fixture(scope="module")
def stranger(model: Path, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run of both files, with another seed."""
    run = new_run(tmp_path_factory.mktemp("stranger") / "run", model, seed=1, **SETTINGS)
    run.train(*files)
    return run.layout.root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run of the first file."""
    return copy_run(trained, tmp_path / "a run")


def without_manifest(source: Path, target: Path) -> Path:
    """Copy a checkpoint as transformers' Trainer would write it."""
    return shutil.copytree(source, target, ignore=shutil.ignore_patterns("onward.json"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put_in_the_way(target: Path, made: str, stranger: Path) -> None:
    """Put what others made where a run has its states."""
    source = stranger / "boundaries/step-5"
    if made == "as a file":
        target.write_text("notes")
    elif made == "by a trainer":
        without_manifest(source, target)
    else:
        shutil.copytree(stranger / "boundaries" / target.name.replace("checkpoint", "step"), target)


def notes_of(run: Run, name: str) -> list[str]:
    """What the ledger says about a directory."""
    with Ledger(run.layout.ledger, read_only=True) as ledger:
        return [event.message for event in ledger.events(1000) if name in event.message]


def test_what_others_put_there_stays(root: Path, twin: Path, stranger: Path, files: list[Path], tmp_path: Path) -> None:
    """A Trainer's checkpoints, a user's copy and another run's are left alone during training, and named once."""
    current, boundaries = root / "current_model", root / "boundaries"
    others = [
        without_manifest(current / "checkpoint-3", current / "checkpoint-400"),
        without_manifest(current / "checkpoint-3", current / "checkpoint-0"),
        shutil.copytree(current / "checkpoint-3", current / "checkpoint-999"),
        shutil.copytree(stranger / "current_model/checkpoint-5", current / "checkpoint-6"),
        shutil.copytree(stranger / "current_model/checkpoint-5", boundaries / "step-500"),
    ]
    (current / ".tmp-download").mkdir()
    (root / ".tmp-notes").write_text("mine")
    (current / ".tmp-link-notes").write_text("mine")
    (current / ".tmp-shards").mkdir()
    (current / ".tmp-shards/notes").write_text("mine")
    for place in (current / ".tmp-checkpoint-9", boundaries / ".tmp-step-9"):
        place.mkdir()
        (place / "notes").write_text("mine")
    (current / ".tmp-removed-checkpoint-3").mkdir()
    (current / ".tmp-link-optimizer.pt").write_text("half of a copy")
    before = [contents(folder) for folder in others]
    run = Run(root)
    run.train(files[1])
    assert_same_state(twin, root)
    assert before == [contents(folder) for folder in others]
    mine = [".tmp-checkpoint-9", ".tmp-download", ".tmp-link-notes", ".tmp-shards"]
    assert mine == sorted(path.name for path in current.iterdir() if path.name.startswith(".tmp-"))
    kept = [current / ".tmp-checkpoint-9/notes", boundaries / ".tmp-step-9/notes", current / ".tmp-shards/notes"]
    for place in (*kept, current / ".tmp-link-notes", root / ".tmp-notes"):
        assert "mine" == place.read_text()
    proof = run.verify(deep=True)
    assert [] == [check for check in proof.checks if not check.ok]
    assert all(folder.name in next(c.detail for c in proof.checks if c.name == "one checkpoint") for folder in others)
    run.train()
    for folder in others:
        name = str(folder.relative_to(root))
        assert [f"{name} was not made by this run and is left alone"] == notes_of(run, name)
    run.reset()
    assert before == [contents(folder) for folder in others]
    assert ["checkpoint-999", "checkpoint-400", "checkpoint-6", "checkpoint-0"] == [
        folder.name for folder in run.layout.checkpoints()
    ]


@pytest.mark.parametrize(
    ("place", "made"),
    [
        ("current_model/checkpoint-5", "by a trainer"),
        ("current_model/checkpoint-5", "by another run"),
        ("current_model/checkpoint-3", "by another run"),
        ("current_model/checkpoint-3", "by a trainer"),
        ("boundaries/step-5", "by a trainer"),
        ("boundaries/step-5", "by another run"),
        ("current_model/checkpoint-4", "by a trainer"),
        ("boundaries/step-5", "as a file"),
    ],
)
def test_what_stands_in_the_way_is_moved_by_a_person(
    place: str, made: str, root: Path, twin: Path, stranger: Path, files: list[Path]
) -> None:
    """Where a commit may need the name it refuses before a step is taken, with the command that moves the directory.

    A stop commits at any step; once the directory is away the run goes on.
    """
    run, target = Run(root), root / place
    run.add(files[1])
    shutil.rmtree(target, ignore_errors=True)
    put_in_the_way(target, made, stranger)
    before = contents(target.parent)
    hints, told = list[str](), list[Event]()
    for _ in range(2):  # a refusal permits nothing
        with pytest.raises(NotMadeHere) as caught:
            run.train(observe=told.append)
        hints.append(str(caught.value.hint))
        assert before == contents(target.parent)
    assert [] == [event for event in told if isinstance(event, StepTaken)]
    before = contents(target)
    assert hints[0] == hints[1]
    words = shlex.split(hints[0].partition(": ")[2])
    assert ["mv", str(target)] == words[:2]
    subprocess.run(words, check=True)
    assert before == contents(Path(words[2]))
    run.train()
    assert_same_state(twin, root)
    assert run.verify().ok


def test_a_daemon_names_what_stands_in_the_way(root: Path, twin: Path, files: list[Path]) -> None:
    """It takes no step, says which directory it is, and goes on by itself once that is away."""
    run, target = Run(root), root / "current_model/checkpoint-4"
    run.add(files[1])
    without_manifest(root / "current_model/checkpoint-3", target)
    told = list[Event]()

    def observe(event: Event) -> None:
        told.append(event)
        if isinstance(event, Note) and "was not made by this run, but" in event.message:
            target.rename(root / "mine")

    assert 0 == run.watch(once=True, observe=observe)
    steps = [event for event in told if isinstance(event, StepTaken)]
    (said,) = [event for event in told if isinstance(event, Note) and "was not made by this run, but" in event.message]
    assert f"[{target}]; tried again in 1 s" in said.message
    assert told.index(said) < told.index(steps[0])
    assert_same_state(twin, root)


def fresh_ledger(root: Path, model: Path) -> None:
    """Put a new run's ledger into a directory."""
    new = new_run(root.with_name("new"), model, **SETTINGS)
    (root / "ledger.sqlite3").write_bytes(new.layout.ledger.read_bytes())


def test_a_new_ledger_beside_a_model_is_refused(root: Path, model: Path, files: list[Path], tmp_path: Path) -> None:
    """With an empty ledger nothing starts afresh; the command that the refusal names makes a run of the model."""
    fresh_ledger(root, model)
    before = contents(root / "current_model")
    with pytest.raises(DamagedState, match="not from the same moment") as caught:
        Run(root).train(files[1])
    assert before == contents(root / "current_model")
    words = shlex.split(str(caught.value.hint).partition("onward ")[2])
    assert ["adopt", str(root / "current_model/checkpoint-3"), "--run", "NEW_RUN"] == words
    adopted = Run.adopt(words[1], tmp_path / "adopted", str(model), settings=UNMEASURED)
    assert 3 == adopted.status()["global_step"]


@pytest.mark.parametrize("also_boundaries", [True, False])
def test_an_older_ledger_is_refused(also_boundaries: bool, root: Path, twin: Path, files: list[Path]) -> None:
    """A ledger from before the newest checkpoint is not brought up to it: the files in between are not in it."""
    shutil.copytree(twin / "current_model", root / "current_model", dirs_exist_ok=True)
    if also_boundaries:
        shutil.copytree(twin / "boundaries", root / "boundaries", dirs_exist_ok=True)
    before = contents(root / "current_model")
    with pytest.raises(DamagedState, match="the ledger ends at step 3"):
        Run(root).train()
    assert before == contents(root / "current_model")


CHANGES: list[list[str]] = [
    ["train"], ["watch", "--once"], ["verify"], ["rollback", "--to", "step:3", "--yes"],
    ["rollback", "--to", "step:5", "--yes"], ["reset", "--yes"], ["rebuild", "--without", "9.jsonl", "--yes"],
    ["rebuild", "--without", "6.jsonl", "--yes"], ["skip"], ["skip", "6.jsonl"], ["accept", "9.jsonl"], ["add", "FILE"],
]  # fmt: skip
"""Every command that changes a run, and the one that proves it."""


@pytest.mark.parametrize("words", CHANGES, ids=" ".join)
@pytest.mark.parametrize("age", ["older", "new"])
def test_no_command_works_on_a_ledger_of_another_moment(
    age: str, words: list[str], root: Path, twin: Path, model: Path, files: list[Path]
) -> None:
    """Every command that changes the run refuses an older ledger, and a new one, by name and with the way out, and
    changes nothing; `doctor` says the same.
    """
    for name in ("current_model", "boundaries"):
        shutil.rmtree(root / name)
        shutil.copytree(twin / name, root / name)
    if age == "new":
        fresh_ledger(root, model)
    before = snapshot(root)
    outcome = onward(*[str(files[1]) if word == "FILE" else word for word in words], "--run", root)
    said = outcome.err + outcome.out
    assert 5 == outcome.status, said
    assert "they are not from the same moment" in said
    way = shlex.join(["onward", "adopt", str(root / "current_model/checkpoint-5"), "--run", "NEW_RUN"])
    assert way in said
    assert before == snapshot(root)
    examined = onward("doctor", "--run", root)
    assert (1, True) == (examined.status, way in examined.out)


@pytest.mark.parametrize("rate", [None, 0.01], ids=["undone", "trained again under another config"])
def test_a_state_of_an_undone_history_is_refused(
    rate: float | None, root: Path, twin: Path, files: list[Path], tmp_path: Path
) -> None:
    """After a rollback, a copy of the states from before it is not taken for those of the ledger, be its steps undone
    or trained again in another way; without the copy the run is what it was.
    """
    shutil.rmtree(root)
    run = Run(copy_run(twin, root))
    run.rollback("step:3", requeue=True)
    if rate is not None:
        run.layout.config.write_text(f"{run.layout.config.read_text()}\nlearning_rate: {rate}\n")
        run.train()
    expected = copy_run(root, tmp_path / "expected")
    Run(expected).train()
    for name in ("current_model", "boundaries"):
        shutil.rmtree(root / name)
        shutil.copytree(twin / name, root / name)
    assert "one checkpoint" in [check.name for check in run.verify().checks if not check.ok]
    for folder in (root / "current_model/checkpoint-5", root / "boundaries/step-5"):
        with pytest.raises(DamagedState, match=r"5: they are not from the same moment") as refused:
            run.train()
        assert (str(folder), True) == (str(refused.value.where), "move this directory" in str(refused.value.hint))
        folder.rename(tmp_path / folder.name)
    run.train()
    assert_same_state(expected, root)
    assert run.verify(deep=True).ok


def lose_name(folder: Path) -> None:
    """Make a manifest no JSON."""
    (folder / "onward.json").write_text("{")


@pytest.mark.parametrize("damage", [lose_name, lambda folder: (folder / "onward.json").unlink()], ids=["torn", "gone"])
def test_the_runs_own_damaged_checkpoint_is_repaired(damage: Callable[[Path], None], root: Path, trained: Path) -> None:
    """Where the ledger says that a checkpoint is, one with a damaged manifest is the run's own."""
    damage(root / "current_model/checkpoint-3")
    Run(root).train()
    assert_same_state(trained, root)
    assert Run(root).verify().ok


def test_a_manifest_that_is_lost_within_a_file_costs_its_steps(root: Path, twin: Path, files: list[Path]) -> None:
    """The run's own checkpoint is known by what it shares with the links; its steps are trained again."""
    run, stop = Run(root), Wishes()
    run.train(files[1], stop=stop, observe=lambda event: stop.ask("test") if isinstance(event, StepTaken) else None)
    (root / "current_model/checkpoint-4/onward.json").unlink()
    run.train()
    assert_same_state(twin, root)
    assert ["checkpoint-5"] == [folder.name for folder in run.layout.checkpoints()]
