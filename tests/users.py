"""Doing things as another user of the machine, or with a disk mounted elsewhere, which only root can."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

NOBODY = 65534
OPEN = all(folder.stat().st_mode & 0o001 for folder in Path(torch.__file__).parents)
"""Whether other users can import what Onward needs."""


def let_others_reach(folder: Path) -> None:
    """Let other users into a folder of a test, and the folders above it."""
    for path in [folder, *folder.parents][: len(folder.parts) - 2]:
        path.chmod(path.stat().st_mode | 0o055)


def as_nobody(look: Callable[[], Any]) -> Any:
    """Return what a user without any right to write gets, in a process of its own."""

    def become_nobody() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    return _in_child(become_nobody, look)


def with_mounts(mounts: dict[Path, Path], look: Callable[[], Any]) -> Any:
    """Return what a process of its own gets for which places are also mounted elsewhere, as in a container.

    Args:
        mounts: by the path of the mount, the place that is seen there.
    """
    private, bind, new_mounts = 1 << 18 | 1 << 14, 1 << 12, 1 << 17  # as in <linux/mount.h> and <linux/sched.h>
    refused = "mounts are not allowed here"

    def mount() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        done = not libc.unshare(new_mounts) and not libc.mount(b"none", b"/", None, private, None)
        pairs = [(os.fsencode(place), os.fsencode(at)) for at, place in mounts.items()]
        if not done or any(libc.mount(place, at, None, bind, None) for place, at in pairs):
            raise PermissionError(refused)

    answer = _in_child(mount, look)
    if refused in str(answer):
        pytest.skip(refused)
    return answer


def _in_child(prepare: Callable[[], None], look: Callable[[], Any]) -> Any:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            prepare()
            answer = look()
        except BaseException as error:
            answer = repr(error)
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        return json.loads(pipe.read())
