"""Files are taken out of the inbox: moved, never over another, whatever kills or changes come between."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from arrivals import NOW, write
from ledgers import empty_run
from runs import new_run
from users import with_mounts

from onward.data.files.faults import FileError
from onward.errors import ConfigError, OnwardError
from onward.layout import RunLayout
from onward.service.intake.arrivals import Arrivals
from onward.service.intake.budget import Spending
from onward.service.intake.checking import Intake
from onward.service.intake.inbox import STUCK
from onward.service.intake.rules import RowRules
from onward.service.owner import faults
from onward.service.state.retention import DAY, Retention
from onward.store.ledger import Ledger
from onward.store.rows import FileRow


@pytest.fixture
def layout(tmp_path: Path) -> RunLayout:
    """The directories and the ledger of a run without a model."""
    return empty_run(tmp_path / "run")


def move_in(layout: RunLayout, *paths: Path) -> list[str]:
    """Take files out of the inbox; returns their places in the archive."""
    with Ledger(layout.ledger) as ledger:
        arrivals = Arrivals(layout, ledger)
        arrivals.announce([(path, 0) for path in paths], "c")
        return [row.copy for row in arrivals.bring_in(ledger.announced(), Spending())]


def test_files_are_moved_never_over_another(layout: RunLayout) -> None:
    """The same name twice is two files in the archive, and the inbox is empty.

    So are names that a disk may take for one: of other case, or with accents coded in another way.
    """
    for number in range(3):
        write(layout.inbox / "a.jsonl", f'{{"text": "{number}"}}\n')
        move_in(layout, layout.inbox / "a.jsonl")
    write(layout.inbox / "high" / "b.jsonl")
    write(layout.inbox / "b.jsonl", '{"text": "other"}\n')
    assert ["archive/b.jsonl", "archive/b-2.jsonl"] == move_in(
        layout, layout.inbox / "high" / "b.jsonl", layout.inbox / "b.jsonl"
    )
    pairs = [("high/C.jsonl", "c.jsonl"), ("high/\u00e9.jsonl", "e\u0301.jsonl")]
    paths = [write(layout.inbox / name, f'{{"text": "{name}"}}\n') for pair in pairs for name in pair]
    odd = ["C.jsonl", "c-2.jsonl", "\u00e9.jsonl", "e\u0301-2.jsonl"]
    assert [f"archive/{name}" for name in odd] == move_in(layout, *paths)
    assert sorted(["a-2.jsonl", "a-3.jsonl", "a.jsonl", "b-2.jsonl", "b.jsonl", *odd]) == sorted(
        path.name for path in layout.archive.iterdir()
    )
    assert [] == [path for path in layout.inbox.rglob("*") if path.is_file()]


def test_what_is_no_training_file_is_rejected(layout: RunLayout, tmp_path: Path) -> None:
    """A link, a fifo, an unknown ending and a name that is no text are rejected; what a link points to is untouched."""
    secret = write(tmp_path / "secret.jsonl")
    (layout.inbox / "link.jsonl").symlink_to(secret)
    os.mkfifo(layout.inbox / "fifo.jsonl")
    write(layout.inbox / "notes.md")
    odd = write(layout.inbox / os.fsdecode(b"caf\xe9.jsonl"))
    assert [] == move_in(layout, odd, *(layout.inbox / name for name in ("link.jsonl", "fifo.jsonl", "notes.md")))
    names = ["caf_.jsonl", "fifo.jsonl", "link.jsonl", "notes.md"]
    assert sorted(names + [f"{name}.report.json" for name in names]) == sorted(
        path.name for path in layout.rejected.iterdir()
    )
    assert (layout.rejected / "link.jsonl").is_symlink()
    assert '{"text": "a"}\n' == secret.read_text()


def test_a_file_that_changes_while_it_is_copied_is_refused(layout: RunLayout, tmp_path: Path) -> None:
    """Its writer is not done; nothing of it stays."""
    path = write(tmp_path / "a.jsonl")
    with Ledger(layout.ledger) as ledger, pytest.raises(FileError, match="changed while it was read"):
        Arrivals(layout, ledger).copy(path, Spending(lambda: write(path, '{"text": "longer"}\n')))
    assert [] == list(layout.archive.iterdir())


def test_a_command_that_fails_takes_nothing_in(layout: RunLayout, tmp_path: Path) -> None:
    """No file is blamed for a config that cannot be read, and nothing is kept or done again."""

    def rules() -> RowRules:
        raise ConfigError("there is no such key")

    with Ledger(layout.ledger) as ledger:
        intent = ledger.add_intent([tmp_path], again=False, priority=0)
        intake, path = Intake(layout, ledger, rules=rules), write(tmp_path / "a.jsonl")
        with pytest.raises(ConfigError):
            intake.take([path], intent=intent)
        (row,) = ledger.files("arriving", "rejected")
        assert ("rejected", "the command was refused") == (row.state, row.note)
        assert ([], 0) == (ledger.intents(), ledger.queued())
        with pytest.raises(OnwardError, match="no longer arriving"):
            intake.withdraw(row, "too late")
    assert [] == [*layout.archive.iterdir(), *layout.rejected.iterdir()]


def killed_before_the_move(layout: RunLayout, path: Path) -> None:
    """Record a file of the inbox and die before it is moved."""

    class Killed(Arrivals):
        def complete(self, rows: object) -> None:
            raise KeyboardInterrupt

    with Ledger(layout.ledger) as ledger:
        arrivals = Killed(layout, ledger)
        arrivals.announce([(path, 0)], "c")
        with pytest.raises(KeyboardInterrupt):
            arrivals.bring_in(ledger.announced(), Spending())


def clean(layout: RunLayout) -> list[tuple[str, str]]:
    """Start again; returns name and state of each file."""
    with Ledger(layout.ledger) as ledger:
        Arrivals(layout, ledger).clean()
        return [(row.name, row.state) for row in ledger.files("arriving", "rejected")]


def test_a_kill_before_the_move_is_finished_by_the_next_start(layout: RunLayout) -> None:
    """What the ledger has and the archive has not is moved by the next start, also if it was touched since."""
    path = write(layout.inbox / "a.jsonl")
    killed_before_the_move(layout, path)
    os.utime(path, (1, 1))
    assert path.exists()
    assert [("a.jsonl", "arriving")] == clean(layout)
    assert (False, True) == (path.exists(), (layout.archive / "a.jsonl").exists())


@pytest.mark.parametrize("change", [Path.unlink, lambda path: write(path, '{"text": "another"}\n')])
def test_a_file_that_is_not_the_one_recorded_is_left(layout: RunLayout, change: Callable[[Path], object]) -> None:
    """A file that vanished or was replaced after it was recorded is dropped, and never taken for another."""
    path = write(layout.inbox / "a.jsonl")
    killed_before_the_move(layout, path)
    change(path)
    there = path.exists()
    assert [("a.jsonl", "rejected")] == clean(layout)
    assert (there, False) == (path.exists(), (layout.archive / "a.jsonl").exists())


def test_a_file_is_not_removed_for_another_of_its_name(layout: RunLayout) -> None:
    """What lies at its place in the archive is no copy of it: it stays in the inbox."""
    path = write(layout.inbox / "a.jsonl")
    killed_before_the_move(layout, path)
    write(layout.archive / "a.jsonl", '{"text": "another"}\n')
    clean(layout)
    assert '{"text": "a"}\n' == path.read_text()


def test_a_file_that_is_exchanged_at_the_last_moment_is_put_back(layout: RunLayout) -> None:
    """It is not the one that was read: it is in the inbox again and settles anew, and the one recorded is dropped."""
    path = write(layout.inbox / "a.jsonl")

    class Exchanged(Arrivals):
        def _is_as_recorded(self, row: FileRow, source: Path) -> bool:
            found = super()._is_as_recorded(row, source)
            source.unlink()
            write(source, '{"text": "another"}\n')
            return found

    with Ledger(layout.ledger) as ledger:
        arrivals = Exchanged(layout, ledger)
        arrivals.announce([(path, 0)], "c")
        assert [] == arrivals.bring_in(ledger.announced(), Spending())
        assert ["it was exchanged while it was taken"] == [row.note for row in ledger.files("arriving", "rejected")]
        (event,) = ledger.events()
        assert ("rejected", "a.jsonl was exchanged while it was taken") == (event.kind, event.message)
    assert ('{"text": "another"}\n', []) == (path.read_text(), list(layout.archive.iterdir()))


def other_disk(layout: RunLayout) -> Path:
    """Return a folder on another file system than a run's."""
    for folder in (Path(tempfile.gettempdir()), Path("/dev/shm")):
        if folder.is_dir() and folder.stat().st_dev != layout.root.stat().st_dev:
            return folder
    pytest.skip("no second file system to put an inbox on")


def test_an_inbox_on_another_disk(layout: RunLayout) -> None:
    """The file is copied, then removed; a kill in between makes no duplicate, and what took its name since stays."""
    folder = other_disk(layout) / f"onward-test-{os.getpid()}"
    folder.mkdir()
    try:
        layout.inbox.rmdir()
        layout.inbox.symlink_to(folder)
        path = write(layout.inbox / "a.jsonl")
        killed_before_the_move(layout, path)
        shutil.copy(path, layout.archive)
        assert [("a.jsonl", "arriving")] == clean(layout)
        assert [] == list(folder.iterdir())
        write(layout.inbox / "b.jsonl", '{"text": "b"}\n')
        assert ["archive/b.jsonl"] == move_in(layout, layout.inbox / "b.jsonl")
        assert [] == list(folder.iterdir())
        path = write(layout.inbox / "c.jsonl")
        killed_before_the_move(layout, path)
        shutil.copy(path, layout.archive)
        write(path, '{"text": "another"}\n')
        clean(layout)
        assert ['{"text": "another"}\n'] == [path.read_text() for path in folder.iterdir()]
    finally:
        shutil.rmtree(folder)


def test_an_inbox_that_cannot_be_emptied_takes_nothing(layout: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a read-only mount nothing is recorded that could not be moved."""
    path = write(layout.inbox / "a.jsonl")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="cannot be taken out of the inbox"):
        move_in(layout, path)
    with Ledger(layout.ledger) as ledger:
        assert 0 == ledger.queued()


def stuck(layout: RunLayout) -> list[str]:
    """Return the files that could not be taken out of the inbox, as the ledger names them."""
    with Ledger(layout.ledger) as ledger:
        return sorted(ledger.get(STUCK, {}))


def test_an_inbox_that_is_a_mount_of_the_same_disk(layout: RunLayout, tmp_path: Path) -> None:
    """A folder that a container mounts as inbox has the run's device number: files are copied and removed all the same.

    A kill in between makes no duplicate there either.
    """
    dropped = tmp_path / "dropped"
    for name in ("a.jsonl", "b.jsonl"):
        write(dropped / name, f'{{"text": "{name}"}}\n')

    def take() -> object:
        killed_before_the_move(layout, layout.inbox / "a.jsonl")
        shutil.copy(layout.inbox / "a.jsonl", layout.archive)
        return [clean(layout), move_in(layout, layout.inbox / "b.jsonl")]

    assert [[["a.jsonl", "arriving"]], ["archive/b.jsonl"]] == with_mounts({layout.inbox: dropped}, take)
    assert [] == list(dropped.iterdir())


@pytest.mark.parametrize(
    ("number", "name"),
    [(errno.ENOSPC, "a.jsonl"), (errno.EIO, "a.jsonl"), (errno.EACCES, "b.jsonl"), (errno.EPERM, "")],
)
def test_what_concerns_more_than_one_file_is_not_noted_of_it(layout: RunLayout, number: int, name: str) -> None:
    """A disk that is full or fails, or another path that cannot be written, holds up every file."""
    path = write(layout.inbox / "a.jsonl")
    error = OSError(number, os.strerror(number), *([str(layout.inbox / name)] if name else []))
    with Ledger(layout.ledger) as ledger, pytest.raises(OSError, match=os.strerror(number)):
        Arrivals(layout, ledger)._leave(path, error)
    assert [] == stuck(layout)


@pytest.mark.parametrize("on_another_mount", [False, True])
def test_what_cannot_be_taken_out_holds_up_nothing(layout: RunLayout, tmp_path: Path, on_another_mount: bool) -> None:
    """A file that cannot be moved stays, unrecorded; the others are taken. It is not tried again at every scan.

    One that would be refused stays without a report. Both are taken as soon as they changed.
    """
    odd = os.fsdecode(b"\xe9.jsonl")
    names = ["a.jsonl", "notes.md", odd]
    mounts = {layout.inbox / name: write(tmp_path / "elsewhere" / name) for name in names}
    for path in (*mounts, layout.inbox / "z.jsonl"):
        write(path, '{"text": "z"}\n')
    if on_another_mount:
        mounts = {layout.inbox: layout.inbox, **mounts}

    def take() -> object:
        taken = move_in(layout, *sorted(layout.inbox.iterdir()))
        with Ledger(layout.ledger) as ledger:
            again = Arrivals(layout, ledger).announce([(path, 0) for path in layout.inbox.iterdir()], "d")
        return [taken, again, clean(layout), stuck(layout), sorted(path.name for path in layout.archive.iterdir())]

    expected = [["archive/z.jsonl"], 0, [["z.jsonl", "arriving"]], sorted(names), ["z.jsonl"]]
    assert expected == with_mounts(mounts, take)
    assert [] == list(layout.rejected.iterdir())
    assert ["archive/a.jsonl"] == move_in(layout, *(layout.inbox / name for name in names))
    assert ["_.jsonl", "_.jsonl.report.json", "notes.md", "notes.md.report.json"] == sorted(
        path.name for path in layout.rejected.iterdir()
    )
    move_in(layout)
    assert [] == stuck(layout)


def test_compressed_originals_still_train(model: Path, tmp_path: Path) -> None:
    """With `compress_archive` finished originals are packed; the proof and a replay read them as before, and a file
    that is quarantined is put into `rejected/` as it came.
    """
    run = new_run(tmp_path / "run", model, max_length=256, compress_archive=True, lora={"rank": 2})
    files = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.chat_rows(n, seed=n)) for n in (9, 5)]
    run.train(*files)
    assert ["5.jsonl.zst", "9.jsonl.zst"] == sorted(path.name for path in run.layout.archive.iterdir())
    shutil.rmtree(run.layout.tokens)
    assert run.verify(deep=True).ok
    run.rollback("9.jsonl", requeue=True)
    run.layout.rejected.rmdir()
    with Ledger(run.layout.ledger) as ledger:
        faults.quarantine(run.layout, ledger, *ledger.files("queued"), reason="it cannot be trained")
    assert ["5.jsonl", "5.jsonl.report.json"] == sorted(path.name for path in run.layout.rejected.iterdir())
    assert files[1].read_bytes() == (run.layout.rejected / "5.jsonl").read_bytes()
    packed = run.layout.archive / "9.jsonl.zst"
    packed.write_bytes(packed.read_bytes()[:-3])
    assert ["originals"] == [check.name for check in run.verify().checks if not check.ok]


def test_retention_keeps_the_newest_and_one_a_day() -> None:
    """The newest and the last of each recent day are kept, and the adopted one; a clock that was set back removes none
    of them.
    """
    created = {Path(f"step-{95 + n}"): NOW - (9 - n) * DAY / 2 for n in range(10)}

    def kept(boundaries: int, days: int, now: float = NOW) -> list[int]:
        gone = Retention(boundaries, days).superfluous(created, now)
        return sorted(int(point.name[5:]) - 95 for point in created if point not in gone)

    assert [8, 9] == kept(1, 0)
    assert [7, 8, 9] == kept(1, 2)
    assert [3, 5, 7, 8, 9] == kept(1, 4)
    assert set(kept(1, 2)) <= set(kept(1, 2, NOW - DAY))
    adopted = Retention(0, 0).superfluous(created, NOW, adopted=98)
    assert [103, 102, 101, 100, 99, 97, 96, 95] == [int(point.name[5:]) for point in adopted]
    years = {Path(f"step-{n}"): NOW + n * 365 * DAY for n in range(2)}
    assert [] == Retention(0, 400).superfluous(years, NOW + 365 * DAY)
    assert list(range(10)) == kept(9, 0)
