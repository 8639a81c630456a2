"""A checkpoint is written whole or not at all, and only where there is room."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from onward.errors import NoSpace
from onward.training import huggingface
from onward.training.checkpoint import inspect_checkpoint, require_space


def test_no_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    """A checkpoint larger than the free space is refused with both figures and the remedy."""
    with pytest.raises(NoSpace, match=r"MB are free[\s\S]*onward train"):
        require_space(tmp_path, 1 << 60)
    require_space(tmp_path, 1)


def test_a_directory_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    """Missing, unreadable or foreign manifests are named, and never taken for a state."""
    assert (None, ["onward.json is missing"]) == inspect_checkpoint(tmp_path)
    (tmp_path / "onward.json").write_text('{"format": 1}')
    assert (None, ["onward.json cannot be read"]) == inspect_checkpoint(tmp_path)


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
