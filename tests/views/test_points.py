"""`--at` finds a committed state by what the user types, and its files stay while they are read."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from faults import copy_run
from processes import apart, open_descriptors

from onward import Run
from onward.errors import DamagedState, UsageError
from onward.layout import RunLayout
from onward.training.checkpoints.checkpoint import inspect_checkpoint
from onward.views.points import describe, hold, own_folder, state_mark

INFERENCE = ["adapter_config.json", "adapter_model.safetensors", "onward.json"]


@pytest.fixture
def layout(stream: Path, tmp_path: Path) -> RunLayout:
    """A copy of the run."""
    return RunLayout(copy_run(stream, tmp_path / "run"))


@pytest.mark.parametrize(
    ("at", "step", "label"),
    [
        (None, 5, "step 5, after file 3 (c.jsonl)"),
        ("b.jsonl", 3, "step 3, after file 2 (b.jsonl)"),
        ("file:2", 3, "step 3, after file 2 (b.jsonl)"),
        ("2", 3, "step 3, after file 2 (b.jsonl)"),
        ("step:3", 3, "step 3, after file 2 (b.jsonl)"),
        ("5", 5, "step 5, after file 3 (c.jsonl)"),
    ],
)
def test_a_state_is_found(layout: RunLayout, at: str | None, step: int, label: str) -> None:
    """By nothing (the newest commit), by file or by step; the label says which, and no moments lie in the folder."""
    with hold(layout, at) as point:
        assert (step, label) == (point.step, point.label)
        names = {path.name for path in point.folder.iterdir()}
        assert set(INFERENCE) <= names
        assert not {"optimizer.pt", "trainer_state.json"} & names
        assert point.manifest == inspect_checkpoint(layout.boundary(step)).verified
    assert [] == list(layout.reading.iterdir())


def test_a_state_has_a_mark_of_its_own(layout: RunLayout) -> None:
    """However it is named; and another one once its step was trained again."""
    marks = [state_mark(layout, at) for at in (None, "step:5", "c.jsonl", "b.jsonl")]
    assert marks[0] == marks[1] == marks[2] != marks[3]
    run = Run(layout.root)
    run.rollback("step:3")
    run.train(next(layout.archive.glob("*c.jsonl")))
    assert marks[2:] != [state_mark(layout, at) for at in ("c.jsonl", "b.jsonl")]
    assert marks[3] == state_mark(layout, "b.jsonl")
    with pytest.raises(UsageError, match="no longer kept"):
        state_mark(layout, "a.jsonl")


def test_a_state_is_found_by_a_hash(layout: RunLayout) -> None:
    """A hash prefix of four digits names a file here as everywhere."""
    sha256 = Run(layout.root).history()[1]["sha256"]
    with hold(layout, sha256[:12]) as point:
        assert 3 == point.step


@pytest.mark.parametrize(
    ("at", "what"),
    [
        (
            "a.jsonl",
            r"the state of step 1 is no longer kept(.|\n)*States of these steps are kept: 3, 5. Give one as",
        ),
        ("3", r"'3' is file 3 (.|\n)*Say which one: --at file:3 or --at step:3"),
        ("d.jsonl", "neither a finished file nor the step of a boundary"),
        ("step:4", "neither a finished file nor the step of a boundary"),
        ("release:..", r"there is no release '\.\.'"),
        ("../run", "neither a finished file"),
    ],
)
def test_what_is_not_there_is_refused(layout: RunLayout, at: str, what: str) -> None:
    """With what is there, and how to name it."""
    with pytest.raises(UsageError, match=what), hold(layout, at):
        pass
    assert [] == list(layout.reading.iterdir())
    with pytest.raises(UsageError, match="there is no run"), hold(RunLayout(layout.inbox), at):
        pass


def test_a_commit_inside_a_file_is_found(layout: RunLayout, tmp_path: Path) -> None:
    """The newest commit may lie inside a file: it is found as the newest, and by its step."""
    tiny.write_jsonl(tmp_path / "d.jsonl", tiny.chat_rows(12, seed=12))
    run = Run(layout.root)

    def stop_at_step_7(event: Any) -> None:
        if getattr(event, "step", 0) == 7:
            wishes.ask("enough")

    from onward.service.wishes import Wishes

    wishes = Wishes()
    run.train(tmp_path / "d.jsonl", observe=stop_at_step_7, stop=wishes)
    for at in (None, "step:7"):
        with hold(layout, at) as point:
            assert "step 7, in file 4 (d.jsonl), step 2 of 3" == point.label


def test_what_is_held_stays(layout: RunLayout, tmp_path: Path) -> None:
    """Training on, rolling back and a reset take the state out of the run, not from under its reader."""
    with hold(layout) as newest, hold(layout, "b.jsonl") as older:
        run = Run(layout.root)
        run.train(tiny.write_jsonl(tmp_path / "e.jsonl", tiny.chat_rows(4, seed=4)))
        run.reset()
        assert (5, 3) == (newest.step, older.step)
        for point in (newest, older):
            found = inspect_checkpoint(point.folder, ["optimizer.pt", *_training_files()])
            assert point.manifest == found.verified
    with pytest.raises(UsageError, match="nothing has been committed yet"), hold(layout):
        pass


def _training_files() -> list[str]:
    return ["scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"]


def test_a_damaged_state_is_refused(layout: RunLayout) -> None:
    """What is read is verified first; moments that nobody reads may be missing."""
    (layout.boundary(3) / "optimizer.pt").unlink()
    with hold(layout, "step:3") as point:
        assert 3 == point.step
    weights = layout.boundary(3) / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedState, match=r"adapter_model\.safetensors was changed"), hold(layout, "step:3"):
        pass


def test_a_release_is_found_by_its_name(layout: RunLayout) -> None:
    """A folder in `releases/` is a state too; where a file has its name, `file:` and `release:` tell them apart."""
    for name in ("v1", "b.jsonl"):
        shutil.copytree(layout.boundary(3), layout.releases / name)
    with hold(layout, "v1") as point:
        assert ("release v1", 3, "v1") == (point.label, point.step, point.release)
        assert not {"optimizer.pt", "trainer_state.json"} & {path.name for path in point.folder.iterdir()}
    (layout.releases / "v1" / "onward.json").unlink()  # made by other means: nothing to verify it with
    with hold(layout, "v1") as point:
        assert (None, None) == (point.step, point.manifest)


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("b.jsonl", ["file:2"]),
        ("2", ["file:2"]),
        ("5", ["step:5"]),
        ("step-3", ["step:3"]),
        ("3", ["file:3", "step:3"]),
    ],
)
def test_what_names_a_release_and_another_state_is_refused(name: str, others: list[str], layout: RunLayout) -> None:
    """Nobody gets a file's or a step's state for a release, or the other way round; the hint names each."""
    shutil.copytree(layout.boundary(3), layout.releases / name)
    with pytest.raises(UsageError, match="is the name of a release, and a file or a step") as refused:
        state_mark(layout, name)
    with pytest.raises(UsageError, match=re.escape(refused.value.what)), hold(layout, name):
        pass
    ways = re.findall(r"--at ([^\s,]+)", str(refused.value.hint))
    assert [*others, f"release:{name}"] == ways
    held: list[str | None] = []
    for way in ways:
        with hold(layout, way) as point:
            held.append(point.release)
    assert [*(None for _ in others), name] == held


def test_only_whole_folders_are_releases(layout: RunLayout) -> None:
    """Not a file, nor what is hidden, such as one that is being made; nor is `file:` the beginning of a name."""
    for name in ("v1", ".tmp-release-x", "file:2"):
        shutil.copytree(layout.boundary(3), layout.releases / name)
    (layout.releases / "file").write_text("")
    (layout.releases / "v1" / "folder").mkdir()
    for name in (".tmp-release-x", "file"):
        with pytest.raises(UsageError, match="there is no release"), hold(layout, f"release:{name}"):
            pass
    with hold(layout, "file:2") as point:
        assert None is point.release
    with hold(layout, "v1") as point:
        assert set(INFERENCE) <= {path.name for path in point.folder.iterdir()}


def test_a_release_with_a_manifest_is_verified_by_it(layout: RunLayout) -> None:
    """A byte that was changed is found, as in a state of the run."""
    weights = shutil.copytree(layout.boundary(3), layout.releases / "v1") / INFERENCE[1]
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedState, match="the release is not what was published"), hold(layout, "v1"):
        pass


def test_a_release_that_was_made_again_has_another_mark(layout: RunLayout) -> None:
    """However it is named; so whoever has it in memory loads it again."""
    marks: list[tuple[int, int]] = []
    for name in ("v0", "v1"):
        shutil.copytree(layout.boundary(3), layout.releases / name)
        marks.append(state_mark(layout, name))
        assert marks[-1] == state_mark(layout, f"release:{name}")
    (layout.releases / "v0").rename(layout.releases / "old")
    (layout.releases / "v1").rename(layout.releases / "v0")
    assert marks[1] == state_mark(layout, "v0") != marks[0]


def test_a_label_says_how_far_the_run_was(layout: RunLayout) -> None:
    """Before the first file, after one or inside of it; the name only if the file there still is that one."""
    with hold(layout) as point:
        manifest = point.manifest
    assert manifest is not None

    def told(**changed: Any) -> str:
        state = {**manifest.state, "cursor": {**manifest.state["cursor"], **changed}}
        return describe(layout, manifest.model_copy(update={"state": state}))

    first = Run(layout.root).history()[0]["sha256"]
    assert "step 5, before the first file" == told(position=0)
    assert "step 5, after file 1 (a.jsonl)" == told(position=1, sha256=first)
    assert "step 5, in file 1 (a.jsonl), step 0 of 2" == told(position=1, sha256=first, step=0)
    assert "step 5, after file 1" == told(position=1)
    assert "step 5, after file 9" == told(position=9)


def test_a_reader_leaves_nothing_open_and_shows_others_nothing(layout: RunLayout) -> None:
    """A server holds states as long as it runs: no descriptor is left, and no other user reads the folder meanwhile."""
    with hold(layout):
        before = open_descriptors()
    shutil.rmtree(layout.cache)
    for _ in range(3):
        with hold(layout) as point:
            assert layout.reading == point.folder.parent.parent
            assert 0o700 == point.folder.parent.stat().st_mode & 0o777
            assert before == open_descriptors()


def _die_while_holding(root: Path) -> None:
    with hold(RunLayout(root)):
        os._exit(9)


def test_folders_of_dead_readers_are_removed(layout: RunLayout) -> None:
    """A reader that was killed leaves its folder; the next one removes it, and never that of a living one."""
    with hold(layout) as living:
        assert 9 == apart(_die_while_holding, layout.root)
        assert 2 == len(list(layout.reading.iterdir()))
        with own_folder(layout):
            assert living.folder.is_dir()
            assert 2 == len(list(layout.reading.iterdir()))
    assert [] == list(layout.reading.iterdir())


def test_a_run_that_cannot_be_written_to_is_read(layout: RunLayout) -> None:
    """Where no folder can be made in the run's directory, the system's temporary files have one."""
    shutil.rmtree(layout.reading, ignore_errors=True)
    layout.reading.write_text("in the way")
    with hold(layout) as point:
        assert layout.root not in point.folder.parents
        assert 5 == point.step
    assert not point.folder.exists()
