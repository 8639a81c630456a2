"""Durable writes: nothing is written over what is there, and a power cut leaves the old or the new, whole."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onward.atomic import (
    discard_tree,
    fsync_directory,
    fsync_file,
    is_own_folder,
    link_or_copy,
    link_tree,
    move_to_free_name,
    publish_directory,
    read_checked,
    remove_temporaries,
    remove_tree,
    replace_checked,
    replace_file,
    replace_files,
    system_errors,
    why_less,
)
from onward.config import Config
from onward.config.schema import MODELINE, SCHEMA, config_files, schema_text
from onward.config.text import render_yaml
from onward.data.templates.own_template import write_template
from onward.errors import OnwardError
from onward.service.intake.reading import move_durably


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


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done on the disk, in order: what is forced to it, a file with its size, and what gets or loses a name."""
    done: list[str] = []

    def named(word: int | str | Path) -> str:
        if not isinstance(word, int):
            return Path(word).name
        status, name = os.fstat(word), Path(f"/proc/self/fd/{word}").readlink().name
        return name if stat.S_ISDIR(status.st_mode) else f"{name} of {status.st_size}"

    def watch(name: str) -> None:
        function = getattr(os, name)

        def call(*words: Any, **options: Any) -> Any:
            done.append(" ".join([name, *map(named, words)]))
            return function(*words, **options)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "rename", "replace", "link", "unlink"):
        watch(name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("new")
    return done


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux names an open file")
@pytest.mark.parametrize(
    ("write", "steps"),
    [
        (
            lambda folder: replace_file(folder / "b", b"x"),
            ["fsync .tmp-b of 1", "replace .tmp-b b", "fsync folder"],
        ),
        (
            lambda folder: publish_directory(folder, folder.with_name("final")),
            ["fsync folder", "rename folder final", "fsync PARENT"],
        ),
        (
            lambda folder: link_tree(folder, folder.with_name("other")),
            ["link a a", "fsync .tmp-other", "rename .tmp-other other", "fsync PARENT"],
        ),
        (
            lambda folder: move_to_free_name(folder / "a", folder / "b"),
            ["link a b", "unlink a", "fsync folder"],
        ),
        (lambda folder: move_durably(folder / "a", folder / "b"), ["rename a b", "fsync folder"]),
        (lambda folder: fsync_file(folder / "a"), ["fsync a of 3"]),
        (
            lambda folder: write_template("b", "x", folder),
            ["fsync .tmp-b of 1", "replace .tmp-b b", "fsync folder"],
        ),
        (
            lambda folder: replace_files(config_files(folder / "onward.yaml", Config())),
            [
                *(
                    f"fsync .tmp-{SCHEMA} of {len(schema_text().encode())}",
                    f"replace .tmp-{SCHEMA} {SCHEMA}",
                    "fsync folder",
                ),
                f"fsync .tmp-onward.yaml of {len(render_yaml(Config())) + len(MODELINE) + 1}",
                *("replace .tmp-onward.yaml onward.yaml", "fsync folder"),
            ],
        ),
    ],
)
def test_what_gets_a_name_is_on_the_disk_before_and_the_name_after(
    write: Callable[[Path], object], steps: list[str], order: list[str], tmp_path: Path
) -> None:
    """A power cut at any moment leaves the old or the new, whole; once a write returns, it leaves the new."""
    write(tmp_path / "folder")
    assert [step.replace("PARENT", tmp_path.name) for step in steps] == order


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux names an open file")
def test_a_copy_is_on_the_disk_before_its_original_is_removed(
    order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between mounts, and where there are no hard links, a copy is as durable as what it is made from."""
    folder, rename = tmp_path / "folder", os.rename

    def between_mounts(source: Path, target: Path) -> None:
        if source.parent != target.parent:
            raise OSError(errno.EXDEV, "another mount", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", between_mounts)
    move_durably(folder / "a", tmp_path / "b")
    assert ["fsync .tmp-b of 3", "replace .tmp-b b", f"fsync {tmp_path.name}", "unlink a"] == order
    order.clear()
    monkeypatch.setattr(os, "link", _refused)
    link_or_copy(tmp_path / "b", folder / "c")
    assert ["fsync c of 3"] == order


@pytest.mark.parametrize(
    ("number", "is_told"),
    [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True), (errno.ENOSPC, True), (errno.EACCES, True)],
)
def test_a_folder_that_cannot_be_forced_to_the_disk_is_told_of(
    number: int, is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the file system, as some of a network, has no such call for folders."""

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(number)) if is_told else contextlib.nullcontext():
        fsync_directory(tmp_path)
    with pytest.raises(OSError, match=os.strerror(number)):
        replace_file(tmp_path / "a", b"x")


def test_nothing_is_published_in_place_of_a_folder(tmp_path: Path) -> None:
    """Not even of an empty one, which the system would let go."""
    for name in ("new", "there"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match="there"):
        publish_directory(tmp_path / "new", tmp_path / "there")
    assert ["new", "there"] == sorted(path.name for path in tmp_path.iterdir())


def test_only_what_an_interrupted_write_left_is_removed(tmp_path: Path) -> None:
    """Not a folder with a name that others gave it, nor what a link leads to."""
    other = tmp_path / "other"
    for name in (".tmp-own", "own", ".tmp-strange", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("strange" if "strange" in name else "x")).touch()
    (tmp_path / ".tmp-link").symlink_to(other)
    (tmp_path / ".tmp-file").touch()
    remove_temporaries(sorted(tmp_path.iterdir()), lambda entry: is_own_folder(entry, lambda name: name == "x"))
    assert [".tmp-file", ".tmp-link", ".tmp-strange", "other", "own"] == sorted(
        path.name for path in tmp_path.iterdir()
    )
    remove_tree(tmp_path / ".tmp-link")
    remove_tree(tmp_path / ".tmp-file")
    remove_tree(tmp_path / "gone")
    assert (["x"], 3) == ([path.name for path in other.iterdir()], len(list(tmp_path.iterdir())))


def test_what_is_not_what_was_written_is_not_read(tmp_path: Path) -> None:
    """A body that is damaged, cut, of another kind or not there is none; an empty one is one."""
    path = tmp_path / "a"
    for body in (b"", b"body", b"two\nlines"):
        replace_checked(path, body, "kind 1 ")
        assert body == read_checked(path, "kind 1 ")
        assert read_checked(path, "kind 2 ") is None
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole + b"x", b""):
            path.write_bytes(damaged)
            assert read_checked(path, "kind 1 ") is None
    assert read_checked(tmp_path / "gone") is None


@pytest.mark.parametrize("words", ["I/O error: No space left on device (os error 28)", "Os { code: 28, kind: Full }"])
def test_what_a_library_says_in_words_is_an_error_of_the_system(words: str, tmp_path: Path) -> None:
    """With its number and the place; what is an error of the system or of Onward already stays as it is."""
    with pytest.raises(OSError, match="No space left") as caught, system_errors(tmp_path):
        raise RuntimeError(words)
    assert (errno.ENOSPC, str(tmp_path)) == (caught.value.errno, caught.value.filename)
    for other in (OSError(errno.EIO, words), OnwardError(words), ValueError("os error 28")):
        with pytest.raises(type(other)) as caught, system_errors(tmp_path):
            raise other
        assert other is caught.value


@pytest.mark.parametrize(
    ("files", "left", "expected"),
    [(9, 0, "no more files (inodes) are left"), (9, 1, "a quota is used up"), (0, 0, "a quota is used up")],
)
def test_what_keeps_files_from_a_disk_with_room_is_told_apart(
    files: int, left: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its count of files may be used up, or this user's quota; some file systems do not count files."""
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_files=files, f_favail=left))
    assert expected == why_less(tmp_path)
