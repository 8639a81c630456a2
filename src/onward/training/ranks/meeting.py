"""How the processes of one start find each other in a store that processes of earlier starts may have written to.

torchrun's agents keep one store for all starts of a command, and each counts the starts by itself. So every process has
a unique name: rank 0 publishes its name, the others answer under it, and those in rank 0's list are in.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from onward.errors import RankLost
from onward.training.ranks.watch import HINT

PAUSE = 0.02
"""Seconds between two checks."""
_FIRST, _ALL = "first", "all"


def meet(
    store: Any,
    place: tuple[int, int],
    own: dict[str, Any],
    patience: float,
    check: Callable[[], None] = lambda: None,
) -> tuple[str, list[dict[str, Any]]]:
    """Meet all ranks; return a name for keys of this group alone, and what each rank said about itself.

    Args:
        store: holds bytes by key; keys of earlier groups may be in it.
        place: this rank, and how many there are.
        own: what this rank says about itself, as JSON values.
        patience: seconds to wait.
        check: called while it waits; may raise to end that.

    Raises:
        RankLost: a rank did not come.
    """
    rank, size = place
    own = {**own, "name": uuid.uuid4().hex}
    ends = time.monotonic() + patience
    first: str | None = None
    if rank == 0:
        first = own["name"]
        store.set(_here(first, 0), json.dumps(own))
        store.set(_FIRST, first)
    while time.monotonic() < ends:
        check()
        if rank == 0:
            if not _missing(store, first, size):
                store.set(f"{first}/{_ALL}", json.dumps(_said(store, first, size)))
        elif store.check([_FIRST]) and (now := store.get(_FIRST).decode()) != first:
            first = now
            store.set(_here(first, rank), json.dumps(own))
        if first is not None and store.check([f"{first}/{_ALL}"]):
            found: list[dict[str, Any]] = json.loads(store.get(f"{first}/{_ALL}"))
            if own["name"] in [each["name"] for each in found]:
                return first, found
        time.sleep(PAUSE)
    ranks = ", ".join(f"rank {number}" for number in _missing(store, first, size) or [0])
    raise RankLost(f"{ranks} did not join within {patience:.0f} s", where="devices", hint=HINT)


def _here(first: str | None, rank: int) -> str:
    return f"{first}/here/{rank}"


def _missing(store: Any, first: str | None, size: int) -> Sequence[int]:
    return [rank for rank in range(size) if first is None or not store.check([_here(first, rank)])]


def _said(store: Any, first: str | None, size: int) -> list[dict[str, Any]]:
    return [json.loads(said) for said in store.multi_get([_here(first, rank) for rank in range(size)])]
