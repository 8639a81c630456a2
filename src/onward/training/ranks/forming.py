"""Forms the group: every rank says who it is, their environments are compared, and connections are made."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from onward.errors import RankLost, UsageError, first_line
from onward.ranks import UNSET, Place
from onward.text import how_many
from onward.training.device.environment import describe_environment, same_environment
from onward.training.device.support import require_support
from onward.training.ranks.group import Group
from onward.training.ranks.meeting import meet
from onward.training.ranks.watch import Watch
from onward.version import __version__

SLACK = 2.0
"""Seconds beyond its time that a connection gets to say why it failed: it counts whole seconds, and the last one."""
GLANCE = 0.1
"""Seconds between two checks of whether to go on waiting."""
FOREVER = timedelta(days=365)
"""The timeout of a collective; while waiting, Onward itself watches the others."""
NEEDS: Mapping[type[object], Sequence[str]] = {
    cast(Any, distributed).Store: ("clone",),
    distributed.ProcessGroup: ("set_timeout",),
}
"""What is called here and is missing in older releases of PyTorch."""


def form(
    place: Place, patience: float, report: Callable[[str], None], check: Callable[[], None] = lambda: None
) -> Group:
    """Form the group of all ranks; return when all have joined.

    Args:
        patience: seconds to wait for a rank, now and later.
        report: receives, on rank 0, differences between ranks.
        check: called while this rank waits for others to come; may raise to end that.

    Raises:
        ConfigError: PyTorch is too old.
        UsageError: this machine has no device for the rank, or ranks have different releases of Onward.
        RankLost: a rank did not join.
    """
    require_support("training on several devices", NEEDS, where="devices", instead="train on one")
    device = device_of(place)
    store, watched = _stores(place, patience, check)
    own: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname(), "release": __version__}
    own["environment"] = describe_environment(device, torch.float32)
    name, found = meet(store, (place.rank, place.size), own, patience, check)
    require_one_release(found)
    store, watched = (cast(Any, distributed).PrefixStore(name, each) for each in (store, watched))
    unequal = equalize(found, report if place.rank == 0 else lambda _: None)
    names = [f"rank {rank} (pid {each['pid']} on {each['host']})" for rank, each in enumerate(found)]
    watch = Watch(watched, place.rank, names, patience)
    watch.start()
    _connect(store, place, device, patience)
    return Group(place.rank, place.size, device, watch, is_uniform=not unequal)


def device_of(place: Place) -> torch.device:
    """Return the device of a rank: the GPU with its number on this machine, or the CPU if there are no GPUs.

    Raises:
        UsageError: there are fewer GPUs than ranks here.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if place.local_size > count:
        raise UsageError(
            f"{place.local_size} processes were started on a machine with {how_many(count, 'GPU')}",
            where="devices",
            hint=f"Start {count} here: onward train --devices all, or torchrun --nproc-per-node {count}.",
        )
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    return device


def _stores(place: Place, patience: float, check: Callable[[], None]) -> tuple[Any, Any]:
    """Return two connections to the store by which torchrun's processes find each other.

    They are made in a thread: an unrelated program that listens on the port may never answer.
    """
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    made: list[tuple[Any, Any]] = []
    failed: list[Exception] = [TimeoutError(f"no answer within {patience:.0f} s")]

    def connect() -> None:
        try:
            store: Any = next(iter(rendezvous("env://", place.rank, place.size, timeout=timedelta(seconds=patience))))[
                0
            ]
            made.append((store, store.clone()))
        except (RuntimeError, ValueError, OSError) as error:
            failed.append(error)

    thread = threading.Thread(target=connect, name="onward-store", daemon=True)
    thread.start()
    ends = time.monotonic() + patience + SLACK
    while thread.is_alive() and time.monotonic() < ends:
        check()
        thread.join(GLANCE)
    if made:
        return made[0]
    raise RankLost(
        f"the processes cannot find each other: {first_line(failed[-1])}",
        where=address,
        hint="MASTER_ADDR and MASTER_PORT must be reachable from every machine, and the port must be free. "
        f"If this shell has them from elsewhere: {UNSET}",
    )


def require_one_release(found: Sequence[Mapping[str, Any]]) -> None:
    """Refuse ranks that may not understand each other.

    Args:
        found: what each rank said about itself.

    Raises:
        UsageError: one has another release of Onward than rank 0.
    """
    releases = [each.get("release", "an earlier release") for each in found]
    for rank, release in enumerate(releases):
        if release != releases[0]:
            raise UsageError(
                f"rank {rank} on {found[rank]['host']} has Onward {release}, rank 0 has {releases[0]}",
                where="devices",
                hint="Install the same release on every machine.",
            )


def equalize(found: Sequence[Mapping[str, Any]], report: Callable[[str], None]) -> list[str]:
    """Compute with as many threads as the rank with the fewest; return in what ranks still differ.

    Args:
        found: what each rank said about itself, with its environment.
        report: receives a line for each kind of difference.
    """
    records = [dict(each["environment"]) for each in found]
    threads = sorted({record["threads"] for record in records})
    if len(threads) > 1:
        torch.set_num_threads(threads[0])
        counts = ", ".join(map(str, threads))
        report(f"the ranks had {counts} threads: all use {threads[0]} now (OMP_NUM_THREADS)")
        for record in records:
            record["threads"] = threads[0]
    unequal = sorted(
        {
            key
            for record in records
            for key in record.keys() | records[0].keys()
            if not same_environment(*({key: each[key]} if key in each else {} for each in (record, records[0])))
        }
    )
    if unequal:
        report(f"the ranks differ in {', '.join(unequal)}: equal bits are not promised, and handovers say so")
    return unequal


def _connect(store: Any, place: Place, device: torch.device, patience: float) -> None:
    """Connect all ranks for collectives: through gloo, and through NCCL between GPUs."""
    has_gpu = device.type == "cuda"
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpu else "gloo",
            store=cast(Any, distributed).PrefixStore("collectives", store),
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=patience),
            device_id=device if has_gpu else None,
        )
    except (RuntimeError, ValueError) as error:
        raise RankLost(
            f"the ranks cannot connect to each other: {first_line(error)}",
            where="devices",
            hint="GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network between the machines.",
        ) from None
    group = distributed.group.WORLD
    assert group is not None
    group.set_timeout(FOREVER)
