"""Processes that compute together over gloo, forked where everything is imported already."""

from __future__ import annotations

import datetime
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import processes
import torch
import torch.distributed as dist

PATIENCE = datetime.timedelta(seconds=60)
"""How long a rank waits for another one that does not answer; one that is gone is noticed at once."""


def _member(rank: int, size: int, store: str, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    status = 0
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=PATIENCE)
        function(*arguments)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status)


def together(size: int, folder: Path, function: Callable[..., None], *arguments: object) -> list[int | None]:
    """Call a function in `size` processes that are one group; returns their exit statuses, negative for a signal.

    Args:
        folder: where they meet.
        function: one of a module, not of a test.
    """
    store = folder / f"group-{size}-{len(list(folder.iterdir()))}"
    members = [processes.start_apart(_member, rank, size, str(store), function, arguments) for rank in range(size)]
    for member in members:
        member.join()
    return [member.exitcode for member in members]
