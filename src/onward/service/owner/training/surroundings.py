"""The surroundings of a worker: what it consults and what it informs while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onward.service.owner.alongside.heartbeat import Heartbeat
from onward.service.settings import Settings
from onward.service.shown import Shown
from onward.service.wishes import Wishes
from onward.training.boundary import AtBoundary
from onward.training.device.memory import ReadUsage, read_usage


@dataclass(frozen=True)
class Surroundings:
    """What a worker consults and informs while it trains.

    Args:
        wishes: polled after every step; once true, the state is committed and the file is left.
        settings: the config as it is on disk.
        shown: shows the run's state.
        heartbeat: told when a step begins and ends.
        goes_on: called at a boundary; returns whether the next file may begin while the boundary is being committed.
        hooks: called at each boundary, before it is committed.
        look: called while rows are read again; raises `Stopped` to leave the file.
        memory: returns the device's memory; called if a step fails.
    """

    wishes: Wishes
    settings: Settings
    shown: Shown
    heartbeat: Heartbeat
    goes_on: Callable[[], bool] = lambda: True
    hooks: tuple[AtBoundary, ...] = ()
    look: Callable[[], None] = lambda: None
    memory: ReadUsage = read_usage
