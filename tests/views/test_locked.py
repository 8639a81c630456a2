"""Folders of processes that may die: nobody takes one that is in use for one that was left."""

from __future__ import annotations

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from processes import open_descriptors

from onward.views.locked import make_locked


def test_a_folder_in_use_is_never_removed(tmp_path: Path) -> None:
    """Many make folders at the same time, and each removes what others left: all that are locked are there, and no
    descriptor is left of one that was removed before it was locked.
    """

    def work(number: int) -> list[bool]:
        found: list[bool] = []
        for turn in range(60):
            folder, lock = make_locked(tmp_path, "work-")
            (folder / "file").write_text(f"{number} {turn}")
            for _ in range(3):
                _, other = make_locked(tmp_path, "work-")
                os.close(other)  # as if its process had died
            found.append((folder / "file").read_text() == f"{number} {turn}")
            os.close(lock)
        return found

    before = open_descriptors()
    with ThreadPoolExecutor(6) as threads:
        assert all(all(found) for found in threads.map(work, range(6)))
    assert before == open_descriptors()
    _, lock = make_locked(tmp_path, "work-")
    assert 1 == len(list(tmp_path.iterdir()))
    os.close(lock)


def test_a_parent_that_somebody_locked_is_no_reason_to_wait(tmp_path: Path) -> None:
    """Not even if it was this process: an export into a folder of its own, for an upload, is made there."""
    parent, lock = make_locked(tmp_path)
    another = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(another, fcntl.LOCK_EX)
    for place in (parent, tmp_path):
        inner, held = make_locked(place, "inner-")
        assert inner.is_dir()
        os.close(held)
    os.close(another)
    os.close(lock)


def test_others_files_stay(tmp_path: Path) -> None:
    """A file, a link or a folder of another name is not a left folder."""
    (tmp_path / "work-file").write_text("mine")
    (tmp_path / "target").mkdir()
    (tmp_path / "work-link").symlink_to("target")
    (tmp_path / "other").mkdir()
    (tmp_path / "work-left").mkdir()
    folder, lock = make_locked(tmp_path, "work-")
    assert {"work-file", "work-link", "target", "other", folder.name} == {each.name for each in tmp_path.iterdir()}
    os.close(lock)


def test_nothing_is_left_open(tmp_path: Path) -> None:
    """Of folders that others have locked, of left ones that were removed, and of what is no folder."""
    (tmp_path / "work-file").write_text("mine")
    (tmp_path / "work-left").mkdir()
    before = open_descriptors()
    held = [make_locked(tmp_path, "work-")[1] for _ in range(3)]
    assert before + 3 == open_descriptors()
    for lock in held:
        os.close(lock)
