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
    bind = 1 << 12  # as in <linux/mount.h>
    return _mounted([(os.fsencode(place), os.fsencode(at), None, bind, None) for at, place in mounts.items()], look)


def _mounted(mounts: list[tuple[object, ...]], look: Callable[[], Any]) -> Any:
    private, new_mounts = 1 << 18 | 1 << 14, 1 << 17  # as in <linux/mount.h> and <linux/sched.h>
    refused = "mounts are not allowed here"

    def mount() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        done = not libc.unshare(new_mounts) and not libc.mount(b"none", b"/", None, private, None)
        if not done or any(libc.mount(*arguments) for arguments in mounts):
            raise PermissionError(refused)

    answer = _in_child(mount, look)
    if refused in str(answer):
        pytest.skip(refused)
    return answer


def on_overlay(below: Path, at: Path, look: Callable[[], Any]) -> Any:
    """Return what a process of its own gets for which a folder is the layer below one in which it can write.

    Args:
        below: the folder; what is written goes to another one next to it.
    """
    layers = {"lowerdir": below, "upperdir": below.with_name("upper"), "workdir": below.with_name("work")}
    for folder in (*layers.values(), at):
        folder.mkdir(exist_ok=True)
    options = ",".join(f"{name}={folder}" for name, folder in layers.items())
    return _mounted([(b"overlay", os.fsencode(at), b"overlay", 0, os.fsencode(options))], look)


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
