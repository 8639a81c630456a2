"""A checkpoint is written whole or not at all, and only where there is room."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from onward.config import Config
from onward.errors import NoSpace
from onward.training import huggingface
from onward.training.checkpoint import Inspection, inspect_checkpoint, require_space
from onward.training.model import build_model
from onward.training.state import TrainState


def test_no_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    """A checkpoint larger than the free space is refused with both figures and the remedy."""
    with pytest.raises(NoSpace, match=r"MB are free[\s\S]*onward train"):
        require_space(tmp_path, 1 << 60)
    require_space(tmp_path, 1)


def test_a_directory_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    """Missing, unreadable or foreign manifests are named, and never taken for a state."""
    assert Inspection(None, ["onward.json is missing"], is_ours=False) == inspect_checkpoint(tmp_path)
    (tmp_path / "onward.json").write_text('{"format": 1}')
    assert Inspection(None, ["onward.json was changed"]) == inspect_checkpoint(tmp_path)


@pytest.mark.parametrize("room", [0, 1 << 12, 1 << 20])
def test_what_the_disk_refuses_in_the_middle_of_a_file_is_told_as_the_disks(tmp_path: Path, room: int) -> None:
    """PyTorch's writer hides what made it fail; whoever waits for room on the disk has to see it."""
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


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_copied_state_is_the_state_and_its_moments_share_one_storage(
    method: str, model: Path, tmp_path: Path
) -> None:
    """Digests are equal, and so is what is loaded from the file, of which one storage is most of the bytes."""
    config, cpu = Config.model_validate({"model": str(model), "method": method}), torch.device("cpu")
    built = build_model(config, model, cpu, torch.float32)
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
