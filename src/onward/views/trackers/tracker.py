"""What a tracker is: all you need to read to add another one.

A package adds a tracker with an entry point in the group `onward.trackers`: its name is used in the config key `track`,
its object is called with a `TrackedRun` and returns a `Tracker`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class TrackedRun:
    """A run as described to trackers.

    Args:
        id: the run's own id (32 hexadecimal digits), the same on every machine and after every restart.
        name: a name for people: that of its directory, with the beginning of its id.
        folder: where the tracker may keep data unless it was told to keep it elsewhere; it moves with the run.
        config: the config without its secrets, by dotted key.
        known_as: `Tracker.id` when this tracker was last reached; None the first time.
    """

    id: str
    name: str
    folder: Path
    config: Mapping[str, Any]
    known_as: str | None = None


@dataclass(frozen=True)
class Point:
    """The data of one step; the last one of a file also has what hooks measured at its boundary.

    Args:
        number: grows from point to point and never goes back, even if the run does, for trackers whose own step may
            only grow. As long as nothing was undone, it is the step.
        step: the global step.
        time: when the step ended, in seconds since the epoch.
        values: the values to draw. They include `step` and `rollbacks`: how often steps that the tracker had received
            were undone before this one.
    """

    number: int
    step: int
    time: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Held:
    """The newest step that a tracker has: its values `step` and `rollbacks`; -1 and 0 if it has none.

    `is_all` says that it certainly has no later one, so that anything sent beyond that is lost and sent again.
    """

    step: int
    rollbacks: int
    is_all: bool = True


class Tracker(Protocol):
    """Receives the points of one run, in order, from one thread. A failure is reported once and tried again."""

    @property
    def id(self) -> str:
        """The tracker's own name for the run; kept in the ledger."""
        ...

    def held(self) -> Held | None:
        """Return what it has, or None if receiving a point twice does no harm or if it cannot say."""
        ...

    def log(self, points: Sequence[Point]) -> None:
        """Log points; when this returns, they are safe as far as the tracker can tell."""
        ...

    def rolled_back(self, rollbacks: int, step: int, number: int) -> None:
        """Record that steps after `step` are undone; points after `number` are those of the steps that replace them."""
        ...

    def close(self) -> None:
        """Close the run, which continues in another process."""
        ...


Factory = Callable[[TrackedRun], Tracker]
