"""Files that others may still write are read as one thing or not at all, and kept under names that are free."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onward.atomic import TEMPORARY_PREFIX
from onward.data.files.faults import FileError
from onward.service.intake.budget import Budget, BudgetSpent, Spending
from onward.service.intake.names import (
    NAME_BYTES,
    NAME_ENDING,
    NUMBERED,
    plain_name,
    rejected_name,
    report_of,
    unused_name,
)
from onward.service.intake.reading import CHUNK, Changed, identity, is_regular, look, move_durably, read_whole
from onward.service.wishes import Stopped, Wishes


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1])
def test_a_file_is_read_whole(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hash is that of all its bytes, which the writer receives, and they are forced to the disk if asked for."""
    path, data, forced = tmp_path / "a", os.urandom(size), list[int]()
    path.write_bytes(data)
    monkeypatch.setattr(os, "fsync", lambda descriptor: forced.append(os.fstat(descriptor).st_ino))
    writer = io.BytesIO()
    digest, status = read_whole(path, Spending(), writer=writer)
    assert (hashlib.sha256(data).hexdigest(), data, []) == (digest, writer.getvalue(), forced)
    assert identity(path.stat()) == identity(status)
    assert digest == read_whole(path, Spending(budget=Budget(rows=0, size=size, seconds=9.0)), flush=True)[0]
    assert [status.st_ino] == forced
    if size:
        with pytest.raises(BudgetSpent):
            read_whole(path, Spending(budget=Budget(rows=0, size=size - 1, seconds=9.0)))


def test_a_stop_is_noticed_between_two_buffers(tmp_path: Path) -> None:
    """However large the file is."""
    (tmp_path / "a").write_bytes(bytes(3 * CHUNK))
    wishes, writer = Wishes(), io.BytesIO()

    class Asking(io.BytesIO):
        def write(self, data: Any) -> int:
            wishes.ask("SIGTERM")
            return writer.write(data)

    with pytest.raises(Stopped):
        read_whole(tmp_path / "a", Spending(wishes.check), writer=Asking())
    assert CHUNK == len(writer.getvalue())


@pytest.mark.parametrize(
    "change",
    [
        Path.unlink,
        lambda path: path.write_bytes(b"longer"),
        lambda path: path.with_name("b").replace(path),
        lambda path: os.utime(path, (1, 1)),
        lambda path: path.rename(path.with_name("c")),
    ],
)
def test_what_changes_while_it_is_read_is_not_read(change: Callable[[Path], object], tmp_path: Path) -> None:
    """Whether its bytes, its time or its name: what was read may be of two files."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"bytes")

    class Writer(io.BytesIO):
        def write(self, data: object) -> int:
            change(tmp_path / "a")
            return 5

    with pytest.raises(Changed):
        read_whole(tmp_path / "a", Spending(), writer=Writer())


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A link only if asked for; nothing waits for the writer of a FIFO."""
    (tmp_path / "a").write_bytes(b"bytes")
    (tmp_path / "link").symlink_to("a")
    os.mkfifo(tmp_path / "fifo")
    names = ("a", "link", "fifo", "gone", "a/below", ".")
    assert [True, False, False, False, False, False] == [is_regular(tmp_path / name) for name in names]
    assert [None, None] == [look(tmp_path / name) for name in ("gone", "a/below")]
    assert hashlib.sha256(b"bytes").hexdigest() == read_whole(tmp_path / "link", Spending(), links=True)[0]
    for name in ("fifo", "."):
        with pytest.raises(FileError):
            read_whole(tmp_path / name, Spending())
    for name in ("link", "gone", "a/below"):
        with pytest.raises(Changed):
            read_whole(tmp_path / name, Spending())


def test_a_file_that_cannot_be_removed_leaves_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between mounts, the file is at one place only; what fails otherwise is told as it is."""
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"bytes")
    unlink = os.unlink

    def refuse(number: int) -> Callable[..., None]:
        def call(path: Path, *_: object, **__: object) -> None:
            if path == source:
                raise OSError(number, os.strerror(number), str(path))
            unlink(path)

        return call

    monkeypatch.setattr(os, "unlink", refuse(errno.EPERM))
    for number, told in ((errno.EXDEV, errno.EPERM), (errno.EIO, errno.EIO)):
        monkeypatch.setattr(os, "rename", refuse(number))
        with pytest.raises(OSError, match=os.strerror(told)):
            move_durably(source, target)
        assert ["a"] == [path.name for path in tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("a.jsonl", "a.jsonl"), ("a\nb\x1b.jsonl", "a_b_.jsonl"), (".tmp-a.jsonl", "_tmp-a.jsonl"),
        ("caf\udce9.jsonl", "caf_.jsonl"), ("a" * 255, "a" * (NAME_BYTES + NAME_ENDING)),
        ("é" * 115 + ".jsonl.zst", "é" * (NAME_BYTES // 2 + 2) + ".jsonl.zst"),
    ],
)  # fmt: skip
def test_names_are_plain_and_leave_room(name: str, plain: str, tmp_path: Path) -> None:
    """Printable, never that of an unfinished write, with their ending; short enough for all names made from them."""
    assert plain == plain_name(name)
    path = unused_name(tmp_path, plain, with_report=True)
    assert path == tmp_path / plain
    report_of(path).with_name(f"{TEMPORARY_PREFIX}{report_of(path).name}").touch()  # the longest of them
    assert path != unused_name(tmp_path, plain, with_report=True)


def test_a_name_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    """By a file, a link to nowhere, what is being written or what will be; at last by one that nobody has."""
    (tmp_path / "a.x.gz").touch()
    (tmp_path / "a-2.x.gz").symlink_to("nowhere")
    (tmp_path / ".tmp-a-3.x.gz").touch()
    assert "a-5.x.gz" == unused_name(tmp_path, "a.x.gz", reserved={"a-4.x.gz"}).name
    (tmp_path / "a-5.x.gz.report.json").touch()
    assert "a-5.x.gz" == unused_name(tmp_path, "a.x.gz", reserved={"a-4.x.gz"}).name
    assert "a-6.x.gz" == unused_name(tmp_path, "a.x.gz", reserved={"a-4.x.gz"}, with_report=True).name
    taken = {"b", *(f"b-{number}" for number in range(2, NUMBERED))}
    found = {unused_name(tmp_path, "b", reserved=taken).name for _ in range(2)}
    assert 2 == len(found - taken)


def test_a_refused_file_never_has_the_name_of_a_report() -> None:
    """Its own report lies next to it."""
    assert ("a.report_.json", "a.json") == (rejected_name("a.report.json"), rejected_name("a.json"))
    assert "a.report_.json.report.json" == report_of(Path(rejected_name("a.report.json"))).name
