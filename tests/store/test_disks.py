"""A ledger must be on a disk of one machine: how disks are distinguished, what is refused, and the remedy."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
import tiny
from commands import assert_refused, make_run, onward

from onward.errors import DamagedState, UsageError
from onward.layout import RunLayout
from onward.library.making import open_ledger, refuse_occupied
from onward.service.proof.doctor.examination import examine
from onward.store.disks import (
    LONGEST,
    NO_LOCKS,
    mount_of,
    require_local,
    require_locks,
    require_path,
    require_shared_memory,
)
from onward.store.ledger import Ledger, make_ledger

ONE_MACHINE = [
    ("ext4", "8:1"), ("xfs", "259:0"), ("f2fs", "179:2"), ("fuseblk", "8:17"), ("btrfs", "0:30"), ("zfs", "0:41"),
    ("tmpfs", "0:25"), ("overlay", "0:52"), ("fuse.fuse-overlayfs", "0:60"),
]  # fmt: skip
OF_OTHERS_TOO = [
    ("nfs", "0:50"), ("nfs4", "0:50"), ("cifs", "0:51"), ("smb3", "0:51"), ("lustre", "0:52"), ("ceph", "0:53"),
    ("beegfs", "0:54"), ("gpfs", "0:55"), ("gpfs", "251:3"), ("afs", "0:56"), ("pvfs2", "0:57"), ("wekafs", "0:58"),
    ("fuse.glusterfs", "0:63"), ("fuse.sshfs", "0:64"), ("fuse.s3fs", "0:65"), ("fuse.gcsfuse", "0:66"),
    ("fuse.rclone", "0:67"), ("ocfs2", "253:1"), ("gfs2", "253:2"),
]  # fmt: skip
UNTOLD = ["9p", "virtiofs", "vboxsf", "fuse", "fuse.bindfs", "fuse.mergerfs", "a-kind-of-next-year"]


def mounts(folder: Path, *lines: tuple[str, str, Path]) -> Path:
    """Write a mountinfo with `/` on ext4 and these: kind, device, place."""
    rows = [f"{27 + n} 1 {device} / {escaped(place)} rw,relatime shared:{n} - {kind} server:/export rw,vers=4.2"
            for n, (kind, device, place) in enumerate([("ext4", "8:1", Path("/")), *lines])]  # fmt: skip
    file = folder / "mountinfo"
    file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8", errors="surrogateescape")
    return file


def escaped(path: Path) -> str:
    """Write a path as the kernel does."""
    return re.sub(r"[ \t\n\\]", lambda match: f"\\{ord(match[0]):03o}", str(path))


@pytest.mark.parametrize(("kind", "device"), ONE_MACHINE)
def test_a_disk_of_this_machine_holds_a_ledger(kind: str, device: str, tmp_path: Path) -> None:
    """What has a block device, lies in memory or stacks on such a disk is the kernel's own."""
    assert require_local(RunLayout(tmp_path / "run"), mounts(tmp_path, (kind, device, tmp_path))) is None


@pytest.mark.parametrize(("kind", "device"), OF_OTHERS_TOO)
def test_a_disk_that_others_may_use_is_refused(kind: str, device: str, tmp_path: Path) -> None:
    """What other machines serve, themselves or through a program here, or mount at once, is refused."""
    with pytest.raises(UsageError, match=f"this is {re.escape(kind)} on {re.escape(str(tmp_path))}: its log"):
        require_local(RunLayout(tmp_path / "run"), mounts(tmp_path, (kind, device, tmp_path)))


@pytest.mark.parametrize("kind", UNTOLD)
def test_a_disk_of_which_nothing_is_known_is_named(kind: str, tmp_path: Path) -> None:
    """What a program, a host or a kind of another year answers for is neither refused nor called local."""
    file = mounts(tmp_path, (kind, "0:59", tmp_path))
    require_local(RunLayout(tmp_path / "run"), file)
    found = mount_of(tmp_path, file)
    assert found is not None
    assert (False, False) == (found.is_local, found.is_shared)


def test_the_printed_commands_mend_it(model: Path, tmp_path: Path) -> None:
    """The commands of the refusal, typed in, put a ledger on a disk of this machine, and the run goes on."""
    run, own = make_run(tmp_path / "run", model), tmp_path / "own"
    own.mkdir()
    file = mounts(tmp_path, ("nfs4", "0:50", run))
    with pytest.raises(UsageError) as refused:
        require_local(RunLayout(run), file)
    assert refused.value.hint is not None
    commands = refused.value.hint.partition("with a link to it: ")[2].partition("; ")[2].replace("LOCAL_DIR", str(own))
    subprocess.run(["bash", "-e", "-c", commands], check=True)
    require_local(RunLayout(run), file)
    assert 0 == onward("train", tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(4)), "--run", run).status


def test_the_deepest_and_latest_mount_counts(tmp_path: Path) -> None:
    """Of mounts one in another the innermost has a path, of two at one place the later one; names do not mislead."""
    inner, beside = tmp_path / "a b\\c", tmp_path / "a b\\c-not"
    lines = (("nfs4", "0:50", tmp_path), ("ext4", "8:2", inner), ("cifs", "0:51", beside), ("xfs", "8:3", beside))
    file = mounts(tmp_path, *lines)
    found = [
        str(mount_of(path, file)) for path in (tmp_path, tmp_path / "x/y", inner, inner / "x", beside / "x", Path("/"))
    ]
    places = ["nfs4", "nfs4", "ext4", "ext4", "xfs", "ext4"]
    assert places == [line.split(" on ")[0] for line in found]


def test_where_nothing_is_known_nothing_is_refused(tmp_path: Path) -> None:
    """macOS has no list of mounts."""
    assert mount_of(tmp_path, tmp_path / "no such file") is None
    assert require_local(RunLayout(tmp_path), tmp_path / "no such file") is None


def test_a_path_that_sqlite_cannot_open_is_refused(tmp_path: Path) -> None:
    """The longest path that is taken is the longest that SQLite takes; such a ledger was called lost."""
    length = LONGEST - len(os.fsencode(tmp_path)) - len("//ledger.sqlite3")
    layout = RunLayout(tmp_path / f"{'x' * 200}/{'x' * (length - 201)}")
    layout.root.mkdir(parents=True)
    refused = [f"has {length} bytes, and {most} are possible" for length, most in ((504, 499), (505, 504))]
    with pytest.raises(UsageError, match=refused[0]):
        refuse_occupied(layout)
    make_ledger(tmp_path / "made")
    (tmp_path / "made").replace(layout.ledger)
    open_ledger(layout).close()
    longer = RunLayout(layout.root.rename(f"{layout.root}x"))
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        sqlite3.connect(longer.ledger)
    with pytest.raises(UsageError, match=refused[1]):
        open_ledger(longer)
    shorter = RunLayout(tmp_path / f"{'x' * 200}/{'x' * (length - 201 - 5)}")
    shorter.root.mkdir()
    refuse_occupied(shorter)
    make_ledger(shorter.ledger)


def test_a_path_that_is_not_utf_8_is_refused_before_a_model_is_proven(model: Path, tmp_path: Path) -> None:
    """Nothing could be committed there; within the directory, a relative path can be used."""
    named = tmp_path / os.fsdecode(b"caf\xe9")
    assert_refused(onward("init", named, "--model", model), 2, "not UTF-8", "change to it (cd)")
    assert not named.exists()
    named.mkdir()
    with chdir(named):
        require_path(RunLayout(Path()))


def test_a_link_to_a_disk_of_this_machine_is_the_way_out(tmp_path: Path) -> None:
    """The run may lie anywhere: its ledger is where the link leads, before and after it is made."""
    layout, own = RunLayout(tmp_path / "shared" / "run"), tmp_path / "own"
    own.mkdir()
    layout.root.mkdir(parents=True)
    file = mounts(tmp_path, ("nfs4", "0:50", tmp_path / "shared"))
    with pytest.raises(UsageError, match="nfs4"):
        require_local(layout, file)
    layout.ledger.symlink_to(own / "ledger.sqlite3")
    require_local(layout, file)
    make_ledger(layout.ledger)
    require_local(layout, file)
    assert (True, True) == (layout.ledger.is_symlink(), (own / "ledger.sqlite3").is_file())
    with open_ledger(layout) as ledger:
        ledger.put(state="idle")
        assert {"ledger.sqlite3", "ledger.sqlite3-wal", "ledger.sqlite3-shm"} == {path.name for path in own.iterdir()}
        with Ledger(layout.ledger, read_only=True) as reader:
            assert "idle" == reader.get("state")
    assert [] == layout.temporaries()


def test_a_run_whose_ledger_is_on_another_machine(tmp_path: Path) -> None:
    """A link that leads nowhere is said to be one; nothing is made in its place."""
    layout = RunLayout(tmp_path / "run")
    layout.make()
    layout.ledger.symlink_to(tmp_path / "elsewhere" / "ledger.sqlite3")
    with pytest.raises(DamagedState, match=r"the ledger is not on this machine: .*elsewhere/ledger\.sqlite3"):
        layout.require()
    assert_refused(onward("status", "--run", layout.root), 5, "not on this machine", "run this command there")
    assert ["ledger"] == [entry.subject for entry in examine(layout) if entry.level == "error"]


@pytest.mark.parametrize("code", sorted(NO_LOCKS))
def test_a_disk_without_locks_is_refused(code: int, tmp_path: Path) -> None:
    """What a file system answers that knows no locks, or whose server of locks is gone, is refused with the way out."""

    def flock(_descriptor: int, _how: int) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(UsageError, match=r"no locks[\s\S]*nolock"), (tmp_path / "lock").open("w") as file:
        require_locks(file.fileno(), tmp_path, flock)


def test_a_lock_that_others_hold_is_one(tmp_path: Path) -> None:
    """A file that another process has locked shows that there are locks; other failures are what they are."""
    with (tmp_path / "held").open("w") as one, (tmp_path / "held").open("w") as other:
        fcntl.flock(one, fcntl.LOCK_EX)
        require_locks(other.fileno(), tmp_path)
    descriptor = os.open(tmp_path, os.O_PATH)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        require_locks(descriptor, tmp_path)
    os.close(descriptor)


def test_a_disk_that_maps_no_files_is_refused(tmp_path: Path) -> None:
    """SQLite's log needs a file as memory: what cannot be mapped, here a pipe, is refused with the way out."""
    layout, ends = RunLayout(tmp_path / "run"), os.pipe()
    with (tmp_path / "file").open("w+") as file, os.fdopen(ends[0]), os.fdopen(ends[1], "w") as pipe:
        require_shared_memory(file.fileno(), layout)
        with pytest.raises(UsageError, match=r"maps files into memory[\s\S]*ln -s LOCAL_DIR/ledger.sqlite3"):
            require_shared_memory(pipe.fileno(), layout)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Path]:
    """A folder that a program answers for: bindfs over `behind`."""
    unmount = shutil.which("fusermount3") or shutil.which("fusermount")
    if shutil.which("bindfs") is None or unmount is None or not Path("/dev/fuse").exists():
        pytest.skip("needs bindfs and FUSE")
    behind, point = tmp_path / "behind", tmp_path / "served"
    behind.mkdir()
    point.mkdir()
    done = subprocess.run(["bindfs", behind, point], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"FUSE cannot be used here: {done.stderr.strip()}")
    try:
        yield point
    finally:
        subprocess.run([unmount, "-u", "-z", point], check=True)  # tokens of the run are still mapped here


def test_a_real_mount_of_a_program(served: Path, model: Path, tmp_path: Path) -> None:
    """On a FUSE disk of this machine a run is made, trained and verified; doctor says what is to be known."""
    run = make_run(served / "run", model)
    assert 0 == onward("train", tiny.write_jsonl(tmp_path / "a.jsonl", tiny.chat_rows(4)), "--run", run).status
    assert 0 == onward("verify", "--run", run).status
    found = next(entry for entry in examine(RunLayout(run)) if entry.subject == "ledger's disk")
    assert ("warning", True) == (found.level, "fuse" in found.message)
