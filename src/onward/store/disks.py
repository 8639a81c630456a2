"""The disk that a ledger is on, and whether it may be there.

SQLite's write-ahead log needs memory that all users of the file share, and locks that hold for all of them
(sqlite.org/wal.html: it "does not work over a network filesystem"). A disk that several machines mount guarantees
neither, and breaks silently, so no ledger may be on one; everything else of a run may. A disk served by a program or by
the host of a virtual machine (FUSE, 9p, virtiofs) may or may not be local: a container often has no other, so `doctor`
only warns of it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from onward.atomic import TEMPORARY_PREFIX
from onward.errors import UsageError
from onward.layout import LEDGER, RunLayout
from onward.text import printable, quoted

MOUNTS = Path("/proc/self/mountinfo")
"""The mounts of this process, as Linux reports them: proc_pid_mountinfo(5)."""

_IN_MEMORY_OR_STACKED = frozenset({"tmpfs", "ramfs", "rootfs", "overlay", "aufs", "ecryptfs", "fuse.fuse-overlayfs"})
_WITHOUT_ONE_DEVICE = frozenset({"btrfs", "zfs", "bcachefs", "ubifs"})
LOCAL = _IN_MEMORY_OR_STACKED | _WITHOUT_ONE_DEVICE
"""File systems of one machine that have no block device of their own."""
CLUSTERED = frozenset({"gfs2", "ocfs2", "gpfs", "vmfs"})
"""File systems of a block device that several machines mount at once."""
SERVED = CLUSTERED | {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "coda", "ceph", "lustre", "beegfs", "pvfs2", "orangefs",
    "wekafs", "panfs", "glusterfs",
}  # fmt: skip
"""File systems that other machines serve or mount as well."""
SERVED_BY_PROGRAM = frozenset({
    "sshfs", "s3fs", "gcsfuse", "rclone", "glusterfs", "ceph-fuse", "ceph", "juicefs", "goofys", "blobfuse",
    "blobfuse2", "mount-s3", "moosefs", "mfs", "davfs", "davfs2", "curlftpfs", "seaweedfs", "alluxio-fuse", "dbxfs",
})  # fmt: skip
"""FUSE programs that access other machines, by the names under which they are mounted."""
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL})
"""Error numbers of `flock` on a disk that has no locks, or whose lock server does not answer."""
NO_SHARED_MEMORY = frozenset({errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EACCES})
"""Error numbers of mapping a file on a disk that cannot, such as one that a program serves."""
LONGEST = 504
"""Bytes of the longest path at which SQLite opens a database: 512, less the ending of its log's name."""
MOUNT = "Mount it with locks (Lustre: -o flock; NFS: without nolock), or put the run on another disk."
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """A mounted file system: where, of which kind, and the major number of its block device (0 if it has none)."""

    point: Path
    kind: str
    major: int

    @property
    def is_local(self) -> bool:
        """Whether a single machine's kernel manages it."""
        return not self.is_shared and (self.kind in LOCAL or self.major != 0)

    @property
    def is_shared(self) -> bool:
        """Whether other machines use it too, as far as its kind tells."""
        family, _, program = self.kind.partition(".")
        return self.kind in SERVED or (family == "fuse" and program in SERVED_BY_PROGRAM)

    def __str__(self) -> str:
        return f"{printable(self.kind)} on {printable(str(self.point))}"


def mount_of(path: Path, mounts: Path = MOUNTS) -> Mount | None:
    """Return the mount that a path, existing or not, is on after following links; None if the system does not say."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    place = os.path.realpath(path)  # circular links are refused elsewhere
    found, depth = None, -1
    for line in lines:
        point = _unescaped(line.split(" ", 5)[4])
        inside = place == point or place.startswith(f"{point.rstrip('/')}/")
        if inside and len(point) >= depth:  # of two in one place, the later one
            found, depth = _parsed(line, point), len(point)
    return found


def require_local(layout: RunLayout, mounts: Path = MOUNTS) -> None:
    """Refuse a ledger on a disk that other machines use, whether it exists already or is about to be made.

    Raises:
        UsageError: it is; the hint shows how to put the ledger on a disk of this machine.
    """
    mount = mount_of(layout.ledger, mounts)
    if mount is None or not mount.is_shared:
        return
    raise UsageError(refusal(mount), where=layout.ledger.absolute(), hint=way_out(layout))


def require_path(layout: RunLayout, *, is_new: bool = False) -> None:
    """Refuse a path that the libraries below cannot open, though the system can.

    Args:
        is_new: whether the ledger is about to be made, under a temporary name first.

    Raises:
        UsageError: it is too long for SQLite, or has bytes that are not UTF-8, which safetensors requires.
    """
    length = len(os.fsencode(layout.ledger.resolve()))
    most = LONGEST - len(TEMPORARY_PREFIX) if is_new else LONGEST
    if length > most:
        what = f"this path is too long for SQLite: that of its ledger has {length} bytes, and {most} are possible"
        raise UsageError(what, where=layout.root.absolute(), hint="Use a directory with a shorter path.")
    try:
        os.fsencode(layout.root).decode("utf-8")
    except UnicodeDecodeError:
        hint = "Rename the directory, or change to it (cd) and leave out --run."
        raise UsageError("this path is not UTF-8, which model files require", where=layout.root, hint=hint) from None


def refusal(mount: Mount) -> str:
    """Return why a ledger must not be on a disk."""
    return f"the ledger needs a local disk, but this is {mount}: its log and its locks may not be reliable"


def way_out(layout: RunLayout) -> str:
    """Return the commands that put the ledger on a disk of this machine, for an existing or a new run."""
    root = layout.root.absolute()
    link = f"ln -s LOCAL_DIR/{LEDGER} {quoted(root / LEDGER)}"
    if layout.ledger.exists():
        steps = f"onward stop --run {quoted(root)}; mv -n {quoted(root)}/{LEDGER}* LOCAL_DIR/ && {link}"
    else:
        steps = f"mkdir -p {quoted(root)} && {link}, then the same command again"
    return f"Keep it in its own directory on a local disk, LOCAL_DIR, with a link to it: {steps}"


def require_locks(descriptor: int, where: Path, flock: Callable[[int, int], None] = fcntl.flock) -> None:
    """Refuse a disk without locks: take and release a shared lock on an open file, as observers do.

    Args:
        flock: the system call.

    Raises:
        UsageError: the file system has none.
    """
    try:
        flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        flock(descriptor, fcntl.LOCK_UN)
    except (BlockingIOError, PermissionError):  # held by another process, so there are locks
        return
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        what = "this disk has no locks, so two processes could own the run"
        raise UsageError(what, where=where, hint=MOUNT) from None


def require_shared_memory(descriptor: int, layout: RunLayout) -> None:
    """Refuse a disk on which a new ledger could not be used: map a page of an open file, which may be written to.

    Raises:
        UsageError: the file system cannot.
    """
    try:
        os.ftruncate(descriptor, mmap.PAGESIZE)
        mmap.mmap(descriptor, mmap.PAGESIZE).close()
    except OSError as error:
        if error.errno in NO_SHARED_MEMORY:
            what = f"the ledger needs a disk that maps files into memory, which this one does not: {error.strerror}"
            raise UsageError(what, where=layout.root.absolute(), hint=way_out(layout)) from None


def _parsed(line: str, point: str) -> Mount:
    """Read a line: ID, parent, major:minor, root, mount point, options, optional fields, `-`, kind, source, options."""
    before, _, after = line.partition(" - ")
    return Mount(Path(point), after.split(" ")[0], int(before.split(" ")[2].partition(":")[0]))


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)
