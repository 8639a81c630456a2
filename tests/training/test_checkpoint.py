"""A checkpoint is written whole or not at all, and only where there is room."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from users import on_overlay

from onward.config import Config
from onward.digest import canonical_json, sha256_json
from onward.errors import DamagedState, NoSpace, NotMadeHere, Unreadable
from onward.layout import MANIFEST
from onward.training.checkpoints import huggingface
from onward.training.checkpoints.checkpoint import (
    SMALL_FILES,
    Inspection,
    estimate_size,
    inspect_checkpoint,
    remove_checkpoint,
    require_space,
    write_checkpoint,
)
from onward.training.checkpoints.loading import load_state
from onward.training.device.execution import Execution
from onward.training.measuring.probe import Probe, probe_batch
from onward.training.model.load import build_model
from onward.training.model.spec import ModelSpec
from onward.training.seeds import seeded
from onward.training.state import TrainState
from onward.training.trainer import Trainer
from onward.training.world import SingleProcess


def test_no_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    """A checkpoint larger than the free space is refused with both figures and the remedy."""
    with pytest.raises(NoSpace, match=r"MB are free[\s\S]*onward train"):
        require_space(tmp_path, 1 << 60)
    require_space(tmp_path, 1)


def test_a_directory_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    """Missing, unreadable or foreign manifests are named, and never taken for a state."""
    assert Inspection(None, ["onward.json is missing"]) == inspect_checkpoint(tmp_path)
    (tmp_path / "onward.json").write_text('{"format": 1}')
    assert Inspection(None, ["onward.json was changed"]) == inspect_checkpoint(tmp_path)


@pytest.mark.parametrize("room", [0, 1 << 12, 1 << 20])
def test_what_the_disk_refuses_in_the_middle_of_a_file_is_told_as_the_disks(tmp_path: Path, room: int) -> None:
    """PyTorch's writer hides what made it fail; a full disk must still be recognized."""
    value = {"moments": torch.zeros(1 << 20)}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            huggingface.save(value, tmp_path / "optimizer.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    huggingface.save(value, tmp_path / "optimizer.pt")
    assert (tmp_path / "optimizer.pt").read_bytes() == huggingface.to_bytes(value)


def test_what_training_does_not_change_is_read_beside_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole model of which little is trained is written, and read back, without a step waiting for the rest.

    It takes the space that was asked for.
    """
    import onward.training.checkpoints.checkpoint as module

    came: list[str] = []

    @contextlib.contextmanager
    def beside(device: torch.device) -> Generator[None]:
        came.append(f"begin on {device}")
        yield
        came.append("end")

    monkeypatch.setattr(module, "beside_training", beside)
    for name in ("save_weights", "prove_roundtrip"):
        inner = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, name=name, inner=inner: (came.append(name), inner(*given)))
    contents = checkpoints.make_contents(model, method="full", train=["norm"])
    manifest = write_checkpoint(tmp_path / "checkpoint", contents)
    assert 0 < estimate_size(contents.state, contents.facts) - manifest.size < SMALL_FILES
    assert ["begin on cpu", "save_weights", "prove_roundtrip", "end"] == came


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_copied_state_is_the_state_and_its_moments_share_one_storage(
    method: str, model: Path, tmp_path: Path
) -> None:
    """Digests are equal, and so is what is loaded from the file, of which one storage is most of the bytes."""
    config, cpu = Config.model_validate({"model": str(model), "method": method}), torch.device("cpu")
    built = build_model(ModelSpec(config, model, cpu, torch.float32))
    state, copy = TrainState.start(built, config), None
    torch.manual_seed(0)
    for _ in range(3):
        copy = state.snapshot(into=copy)
        assert state.view().digest() == copy.digest()
        for parameter in state.parameters.values():
            parameter.grad = torch.randn_like(parameter)
        state.optimizer.step()
    assert copy is not None
    huggingface.save(copy.optimizer, tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)["state"]
    loaded = [value for index in sorted(saved) for _, value in sorted(saved[index].items())]
    assert all(map(torch.equal, loaded, copy.tensors()[len(copy.weights) :]))
    assert 1 == len({value.untyped_storage().data_ptr() for value in loaded})


@pytest.fixture
def checkpoint(model: Path, tmp_path: Path) -> Path:
    """A checkpoint that verifies."""
    write_checkpoint(tmp_path / "checkpoint-1", checkpoints.make_contents(model))
    return tmp_path / "checkpoint-1"


def rewrite(**values: Any) -> Callable[[Path], None]:
    """Return a function that changes a manifest and seals it again."""

    def change(folder: Path) -> None:
        manifest = {**json.loads((folder / MANIFEST).read_bytes()), **values}
        del manifest["digest"]
        (folder / MANIFEST).write_bytes(canonical_json({**manifest, "digest": sha256_json(manifest)}))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "manifest cut": (lambda folder: os.truncate(folder / MANIFEST, 100), f"{MANIFEST} was changed"),
    "manifest empty": (lambda folder: os.truncate(folder / MANIFEST, 0), f"{MANIFEST} was changed"),
    "manifest of something else": (lambda folder: (folder / MANIFEST).write_text("[1]"), f"{MANIFEST} was changed"),
    "manifest without end": (lambda folder: (folder / MANIFEST).write_text("[" * 99999), f"{MANIFEST} was changed"),
    "manifest not a number": (lambda folder: (folder / MANIFEST).write_text('{"a": NaN}'), f"{MANIFEST} was changed"),
    "no text": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe\xfd"), f"{MANIFEST} was changed"),
    "file gone": (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "file cut": (lambda folder: os.truncate(folder / "optimizer.pt", 7), "optimizer.pt has 7 bytes instead of"),
    "folder for a file": (
        lambda folder: ((folder / "optimizer.pt").unlink(), (folder / "optimizer.pt").mkdir()),
        "optimizer.pt is not a regular file",
    ),
    "pipe for a file": (
        lambda folder: ((folder / "optimizer.pt").unlink(), os.mkfifo(folder / "optimizer.pt")),
        "optimizer.pt is not a regular file",
    ),
    "bytes changed": (
        lambda folder: (folder / "rng_state.pth").write_bytes((folder / "rng_state.pth").read_bytes()[::-1]),
        "rng_state.pth was changed (its hash differs)",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_was_read_and_differs_is_damage(kind: str, checkpoint: Path) -> None:
    """Damage is named."""
    damage, words = DAMAGE[kind]
    damage(checkpoint)
    found = inspect_checkpoint(checkpoint)
    assert found.verified is None
    assert [words] == [problem[: len(words)] for problem in found.problems]


@pytest.mark.parametrize("values", [{"format": 2}, {"format": None}, {"colour": "red"}, {"step": "later"}], ids=str)
def test_a_checkpoint_of_another_release_is_not_damaged(values: dict[str, Any], checkpoint: Path) -> None:
    """A sound manifest that this release does not understand is raised, so that a downgrade removes nothing."""
    rewrite(**values)(checkpoint)
    with pytest.raises(Unreadable, match="release"):
        inspect_checkpoint(checkpoint)


FOREIGN: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "another run's": rewrite(run="another"),
    "a damaged manifest": lambda folder: os.truncate(folder / MANIFEST, 100),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_this_run_did_not_make_is_never_removed(kind: str, checkpoint: Path, model: Path) -> None:
    """It is named, left as it is, and nothing is left behind; what the ledger has on record may go."""
    FOREIGN[kind](checkpoint)
    before = checkpoints.files_of(checkpoint.parent)
    contents = checkpoints.make_contents(model, steps=2)
    with pytest.raises(NotMadeHere, match=r"checkpoint-1[\s\S]*Move it out"):
        write_checkpoint(checkpoint, contents)
    with pytest.raises(NotMadeHere):
        remove_checkpoint(checkpoint, run=checkpoints.RUN)
    assert before == checkpoints.files_of(checkpoint.parent)
    manifest = write_checkpoint(checkpoint, contents, recorded=True)
    assert manifest == inspect_checkpoint(checkpoint).verified
    assert [checkpoint] == list(checkpoint.parent.iterdir())


def test_a_checkpoint_of_a_lower_layer_is_removed(checkpoint: Path, tmp_path: Path) -> None:
    """A run that came with a container's image is on an overlay, where no directory of the image can be renamed."""
    image, seen = tmp_path / "image", tmp_path / "seen"
    image.mkdir()
    checkpoint.rename(image / checkpoint.name)

    def remove() -> list[str]:
        before = [path.name for path in seen.iterdir()]
        remove_checkpoint(seen / checkpoint.name, run=checkpoints.RUN)
        return [*before, *(path.name for path in seen.iterdir())]

    assert [checkpoint.name] == on_overlay(image, seen, remove)


def test_a_runs_own_checkpoint_is_removed_whole(checkpoint: Path) -> None:
    """It disappears in one act; one that is not there is no error."""
    remove_checkpoint(checkpoint, run=checkpoints.RUN)
    assert [] == list(checkpoint.parent.iterdir())
    remove_checkpoint(checkpoint, run=checkpoints.RUN)


@pytest.fixture(params=[0o077, 0o022, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each of some umasks, in force."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_files_have_the_mode_that_the_umask_gives(method: str, umask: int, model: Path, tmp_path: Path) -> None:
    """No file of a checkpoint is more open or less open than one that `open` makes."""
    write_checkpoint(tmp_path / "checkpoint-1", checkpoints.make_contents(model, method=method))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "checkpoint-1").iterdir()}
    assert dict.fromkeys(modes, 0o666 & ~umask) == modes


def test_training_arguments_are_those_of_the_commit(model: Path, tmp_path: Path) -> None:
    """A key that changed at a boundary is in the next checkpoint's file, whatever the session began with."""
    for step, rate, schedule, eps in ((1, 1e-3, "wsd", 1e-6), (2, 5e-4, "inverse_sqrt", 1e-7)):
        config: dict[str, Any] = {"learning_rate": rate, "schedule": schedule, "eps": eps, "warmup_steps": step}
        others = dict[str, Any](batch_size=step + 1, epochs=step, weight_decay=rate / 2, max_grad_norm=rate, seed=7)
        write_checkpoint(tmp_path / f"checkpoint-{step}", checkpoints.make_contents(model, **config, **others))
        found = torch.load(tmp_path / f"checkpoint-{step}" / "training_args.bin", weights_only=False)
        kind = {"wsd": "constant_with_warmup"}.get(schedule, schedule)
        assert (rate, kind, eps, step) == (
            found.learning_rate, found.lr_scheduler_type.value, found.adam_epsilon, found.warmup_steps,
        )  # fmt: skip
        assert list(others.values()) == [
            found.per_device_train_batch_size, found.num_train_epochs, found.weight_decay, found.max_grad_norm,
            found.seed,
        ]  # fmt: skip


def test_a_checkpoint_names_the_one_before_it(model: Path, tmp_path: Path) -> None:
    """By step and by the digest of its manifest; the first one names none."""
    first = write_checkpoint(tmp_path / "checkpoint-1", checkpoints.make_contents(model))
    contents = replace(checkpoints.make_contents(model, steps=2), parent=first)
    second = write_checkpoint(tmp_path / "checkpoint-2", contents)
    assert (None, {"step": 1, "digest": first.digest}) == (first.parent, second.parent)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_state_that_is_let_go_is_freed(method: str, model: Path, tmp_path: Path) -> None:
    """Nothing keeps model, optimizer or copies alive once the state, its trainer and its probe are gone."""
    contents = checkpoints.make_contents(model, method=method)
    manifest = write_checkpoint(tmp_path / "checkpoint-1", contents)
    config = contents.config
    state = load_state(tmp_path / "checkpoint-1", manifest, ModelSpec(config, model, checkpoints.CPU, torch.float32))
    probe, trainer = Probe(state.model, 0, checkpoints.CPU, torch.float32), make_trainer(state, config)
    copy = state.snapshot()
    assert probe.of_model() == probe.of_copy(copy)()
    with seeded(0, checkpoints.CPU):
        trainer.loss(probe_batch(0, 9)).backward()
    held = [state.model, state.optimizer, trainer.loss, *state.parameters.values(), *copy.weights.values()]
    references = [weakref.ref(thing) for thing in held]
    del state, probe, trainer, copy, contents, held
    gc.collect()
    assert [] == [reference() for reference in references if reference() is not None]


def make_trainer(state: TrainState, config: Config) -> Trainer:
    """Return a trainer of a state on this processor."""
    return Trainer(state, config, Execution(SingleProcess(checkpoints.CPU), torch.float32))


def test_parameters_of_another_model_are_refused(checkpoint: Path, model: Path) -> None:
    """A checkpoint whose trained parameters are not those that its config builds is damaged, not loaded in part."""
    manifest = inspect_checkpoint(checkpoint).verified
    assert manifest is not None
    other = manifest.model_copy(update={"parameters": {"weight": [[1], "float32"]}})
    with pytest.raises(DamagedState, match="trained parameters"):
        load_state(
            checkpoint, other, ModelSpec(Config.model_validate(manifest.config), model, checkpoints.CPU, torch.float32)
        )
