"""The inbox: what is settled is taken, in order, moved and never lost; the rest is left alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from arrivals import NOW, taken, write

from onward.service.intake.inbox import Inbox
from onward.service.state.retention import DAY


class Clocks:
    """A wall clock and one that never jumps, both moved by hand."""

    def __init__(self) -> None:
        self.wall = NOW
        self.seconds = 0.0

    def tick(self, seconds: float) -> None:
        self.wall += seconds
        self.seconds += seconds


@pytest.fixture
def clocks() -> Clocks:
    """Clocks that stand still."""
    return Clocks()


@pytest.fixture
def inbox(tmp_path: Path, clocks: Clocks) -> Inbox:
    """An empty inbox in which a file settles in 3 seconds."""
    folder = tmp_path / "inbox"
    folder.mkdir()
    return Inbox(folder, 3.0, clock=lambda: clocks.wall, monotonic=lambda: clocks.seconds)


def test_a_file_settles_by_standing_still(inbox: Inbox, clocks: Clocks) -> None:
    """It is taken once size and time stood still for `settle_seconds`, counted again whenever it grows."""
    path = write(inbox.folder / "a.jsonl")
    assert [] == taken(inbox)
    clocks.tick(2.9)
    write(path, '{"text": "longer"}\n')
    assert [] == taken(inbox)
    clocks.tick(2.9)
    assert [] == taken(inbox)
    assert 1 == inbox.scan().unsettled
    clocks.tick(0.2)
    assert ["a.jsonl"] == taken(inbox)
    assert 0 == inbox.scan().unsettled


def test_a_file_that_is_open_for_writing_is_left(inbox: Inbox, clocks: Clocks) -> None:
    """However long it stands still, a file whose writer has it open is not taken."""
    path = inbox.folder / "a.jsonl"
    with path.open("w") as writer:
        writer.write("{")
        writer.flush()
        taken(inbox)
        clocks.tick(1000)
        assert [] == taken(inbox)
    assert ["a.jsonl"] == taken(inbox)


def test_a_file_that_was_renamed_in_is_taken_at_once(inbox: Inbox) -> None:
    """A file that is renamed into the inbox is settled at once."""
    part = write(inbox.folder / "a.jsonl.part")
    os.utime(part, ns=(part.stat().st_mtime_ns - 10, part.stat().st_mtime_ns - 10))  # finer than the system's clock
    assert [] == taken(inbox)
    part.rename(inbox.folder / "a.jsonl")
    assert ["a.jsonl"] == taken(inbox)


@pytest.mark.parametrize(
    "name",
    [".a.jsonl", "a.part", "a.partial", "a.tmp", "a.temp", "a.jsonl~", "a.crdownload", "a.filepart", "a.jsonl.swp"],
)
def test_what_is_not_done_is_ignored(inbox: Inbox, clocks: Clocks, name: str) -> None:
    """Names by which writers and editors mark unfinished files are ignored."""
    write(inbox.folder / name)
    taken(inbox)
    clocks.tick(1000)
    scan = inbox.scan()
    assert ([], 0) == (scan.settled, scan.unsettled)


def test_order_is_priority_then_first_sight_then_name(inbox: Inbox, clocks: Clocks) -> None:
    """high, normal, low; among equals the one seen in an earlier scan, whatever the wall clock does meanwhile."""
    write(inbox.folder / "z.jsonl")
    taken(inbox)
    clocks.wall -= DAY
    for name in ("low/y.jsonl", "a.jsonl", "high/x.jsonl"):
        write(inbox.folder / name)
    inbox.scan()
    clocks.tick(4)
    assert ["x.jsonl", "z.jsonl", "a.jsonl", "y.jsonl"] == taken(inbox)
    assert [1, 0, 0, -1] == [priority for _, priority in inbox.scan().settled]


def test_other_directories_are_named_and_left(inbox: Inbox) -> None:
    """A directory without a priority is not looked into; an inbox that is gone is an error of the system."""
    for name in ("other", "normal"):
        write(inbox.folder / name / "a.jsonl")
    (inbox.folder / "high" / "deep").mkdir(parents=True)
    scan = inbox.scan()
    assert ([], ["high/deep", "normal", "other"]) == (scan.settled, sorted(scan.strange))
    inbox.folder.rename(inbox.folder.with_name("away"))
    with pytest.raises(FileNotFoundError):
        inbox.scan()


def test_a_priority_may_be_a_link_to_a_folder(inbox: Inbox, clocks: Clocks, tmp_path: Path) -> None:
    """Its files are taken; the link is not one of them."""
    write(tmp_path / "urgent" / "a.jsonl")
    (inbox.folder / "high").symlink_to(tmp_path / "urgent")
    inbox.scan()
    clocks.tick(1000)
    assert ([(inbox.folder / "high" / "a.jsonl", 1)], []) == (inbox.scan().settled, inbox.scan().strange)


@pytest.mark.parametrize("make", [write, lambda path: path.symlink_to("no"), lambda path: path.symlink_to(path)])
def test_a_file_with_the_name_of_a_priority_holds_up_nothing(
    inbox: Inbox, clocks: Clocks, make: Callable[[Path], object]
) -> None:
    """Moved to `inbox/high` before there was such a folder, it is taken as any file is; so are the others."""
    make(inbox.folder / "high")
    write(inbox.folder / "a.jsonl")
    inbox.scan()
    clocks.tick(1000)
    assert {"a.jsonl", "high"} == set(taken(inbox))
