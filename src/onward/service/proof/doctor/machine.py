"""What of the machine would stop a run: its device, its memory, its disks."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator

import torch

from onward.atomic import can_be_written, why_less
from onward.config import Config
from onward.config.text import read_config
from onward.errors import ConfigError, OnwardError
from onward.layout import RunLayout
from onward.service.proof.doctor.finding import Finding
from onward.service.proof.memory import memory_in_words
from onward.store.disks import mount_of, refusal, require_locks, way_out
from onward.text import how_many
from onward.training.device.control_groups import read_processors
from onward.training.device.environment import pick_device, require_whole_teams
from onward.training.device.errors import LESS_MEMORY

LITTLE_DISK = 2 << 30
"""Free bytes below which there is a warning, however small the checkpoints are."""
FEW_FILES = 1000
"""Files for which the disk must have room."""


def check_device() -> Iterator[Finding]:
    """Name what computes."""
    device = pick_device()
    if device.type == "cuda":
        yield Finding("ok", "device", torch.cuda.get_device_name(device))
        return
    capability = torch.backends.cpu.get_cpu_capability()
    threads = how_many(torch.get_num_threads(), "thread")
    yield Finding("ok", "device", f"CPU ({capability}), {threads}; float32 is the fast type here")


def check_threads() -> Iterator[Finding]:
    """Check that PyTorch gets its threads, and warn where a control group lets them wait for each other."""
    try:
        require_whole_teams(pick_device())
    except ConfigError as error:
        yield Finding("error", "threads", error.what, error.hint)
        return
    threads, processors = torch.get_num_threads(), read_processors()
    if pick_device().type != "cpu" or processors is None or threads <= math.ceil(processors):
        return
    share = "1 processor" if processors == 1 else f"{processors:g} processors"
    what = f"PyTorch computes with {threads} threads; a control group gives them the time of {share}"
    fewer = f"OMP_NUM_THREADS={math.ceil(processors)}"
    yield Finding("warning", "threads", what, f"Set {fewer}, from a run's first file on: bits depend on it")


def check_memory(layout: RunLayout) -> Iterator[Finding]:
    """Report what a step takes, without loading the model, because a process may be training."""
    found = memory_in_words(layout)
    if found is None:
        yield Finding("ok", "memory", "the memory of a step was not measured on this machine; onward init measures it")
        return
    words, has_room = found
    hint = f"{LESS_MEMORY} A smaller max_length or method: qlora also needs less"
    yield Finding("ok" if has_room else "warning", "memory", words, None if has_room else hint)


def check_ledger_disk(layout: RunLayout) -> Iterator[Finding]:
    """Report which disk the ledger is on; one that other machines use is an error, with a remedy."""
    mount = mount_of(layout.ledger)
    if mount is None:
        yield Finding(
            "ok", "ledger's disk", "the system does not say what kind of disk it is; machines must not share it"
        )
    elif mount.is_shared:
        yield Finding("error", "ledger's disk", refusal(mount), way_out(layout))
    elif not mount.is_local:
        what = f"{mount}, which may or may not be a local disk; only processes on this machine may use the run"
        yield Finding("warning", "ledger's disk", what, way_out(layout))
    else:
        yield Finding("ok", "ledger's disk", f"{mount}, a local disk")
    if layout.lock.exists():
        with layout.lock.open("rb") as file:
            require_locks(file.fileno(), layout.root.absolute())


def check_disk(layout: RunLayout) -> Iterator[Finding]:
    """Report whether there is room for the next checkpoints."""
    free = shutil.disk_usage(layout.root).free
    needed = _size_of_newest(layout)
    config = _config_or_defaults(layout)
    kept = (config.keep_boundaries + 1 + config.keep_days) * needed
    message = (
        f"{free / 1e9:.1f} GB free; a checkpoint takes {needed / 1e6:.0f} MB, restore points up to {kept / 1e6:.0f} MB"
    )
    level, hint = "ok", None
    if free < needed + (config.disk_margin_mb << 20):
        level, hint = "error", "Free some space: training pauses until there is room for the next checkpoint"
    elif not can_be_written(layout.root, needed):
        level, hint = (
            "error",
            f"Less can be written, as {why_less(layout.root)}: remove files; training pauses until then",
        )
    elif free <= max(kept, LITTLE_DISK):
        level, hint = "warning", "Free some space, or lower keep_boundaries or keep_days"
    yield Finding(level, "disk", message, hint)
    yield from _inodes(layout)


def _size_of_newest(layout: RunLayout) -> int:
    """Return the bytes of the newest checkpoint; 0 if there is none."""
    newest = next(iter(layout.checkpoints()), None)
    if newest is None:
        return 0
    try:
        return sum(path.stat().st_size for path in newest.iterdir())
    except FileNotFoundError:
        if newest.exists():
            raise
        return _size_of_newest(layout)  # a newer one replaced it


def _inodes(layout: RunLayout) -> Iterator[Finding]:
    """Report disks with room for bytes but none for files; some file systems do not count files."""
    disk = os.statvfs(layout.root)
    if disk.f_files and disk.f_favail < FEW_FILES:
        hint = "Remove files from this disk; each checkpoint makes about ten"
        yield Finding("warning", "disk", f"room for only {disk.f_favail} more files (inodes)", hint)


def _config_or_defaults(layout: RunLayout) -> Config:
    try:
        return read_config(layout.config)
    except OnwardError:
        return Config()
