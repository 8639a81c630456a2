"""A checkpoint is written whole or not at all, and only where there is room."""

from __future__ import annotations

from pathlib import Path

import pytest

from onward.errors import NoSpace
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
