"""The surroundings of a worker: what it looks at and whom it tells while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onward.service.owner.heartbeat import Heartbeat
from onward.service.settings import Settings
from onward.service.shown import Shown
from onward.service.wishes import Wishes
from onward.training.boundary import AtBoundary
from onward.training.device_memory import ReadUsage, read_usage


@dataclass(frozen=True)
class Surroundings:
    """What a worker looks at and tells while it trains.

    Args:
        wishes: polled after every step; once it is true the state is committed and the file is left.
        settings: the config as it stands on disk.
        shown: where the run's state is shown.
        heartbeat: told when a step begins and ends.
        goes_on: asked at a boundary: whether the next file may begin while the boundary is committed behind it.
        hooks: called at each boundary, before it is committed.
        look: called while rows are read again; raises `Stopped` to leave the file.
        memory: asked for the device's memory when a step fails.
    """

    wishes: Wishes
    settings: Settings
    shown: Shown
    heartbeat: Heartbeat
    goes_on: Callable[[], bool] = lambda: True
    hooks: tuple[AtBoundary, ...] = ()
    look: Callable[[], None] = lambda: None
    memory: ReadUsage = read_usage
