"""Finds out whether a file is still being written, as far as the kernel can tell."""

from __future__ import annotations

import errno
import fcntl
import os
import signal

UNKNOWN = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO)
"""Errors on opening what must not be read or is not a file: it is refused by name when it is taken in."""


def is_being_written(path: str) -> bool:
    """Whether some process has a file open for writing: the kernel then grants no read lease.

    If a writer opens the file while the lease is held, the kernel sends a signal to this process. That is SIGIO, which
    ends a process, unless another signal is set first: SIGURG is ignored by every process that does not handle it, and
    one that does has to expect it at any time. The kernel falls back to SIGIO for real-time signals only.

    Raises:
        OSError: the machine cannot open the file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in UNKNOWN:
            return False
        raise
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN  # other errors: this file system has no leases
    except AttributeError:  # not Linux
        return False
    finally:
        os.close(descriptor)
    return False
