"""Doing things as another user of the machine, which only root can."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            answer = look()
        except BaseException as error:
            answer = repr(error)
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        return json.loads(pipe.read())
