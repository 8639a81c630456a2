"""Durable writes: nothing is written over what is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from onward.atomic import discard_tree, link_or_copy, move_to_free_name, remove_tree


@pytest.mark.parametrize("links", [True, False], ids=["with hard links", "without"])
@pytest.mark.parametrize("write", [link_or_copy, move_to_free_name])
def test_a_name_that_is_taken_stays_as_it_is(
    write: Callable[[Path, Path], None], links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file may have other names, so not even its content is written over; a free name is taken either way."""
    source, taken = tmp_path / "source", tmp_path / "taken"
    source.write_text("new")
    taken.write_text("old")
    if not links:
        monkeypatch.setattr(os, "link", _refused)
    with pytest.raises(FileExistsError):
        write(source, taken)
    assert ("new", "old") == (source.read_text(), taken.read_text())
    write(source, tmp_path / "free")
    assert ("new", write is link_or_copy) == ((tmp_path / "free").read_text(), source.exists())


def test_what_is_removed_after_an_error_cannot_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that fails, a write fails, and so does the removal of what it left: only the former is told."""
    monkeypatch.setattr(shutil, "rmtree", _refused)
    discard_tree(tmp_path)
    with pytest.raises(OSError, match=str(tmp_path)):
        remove_tree(tmp_path)


def _refused(*_: object, **__: object) -> None:
    raise PermissionError(1, "no hard links here")
