"""What a tracker is: the one page that whoever adds another one needs to read.

A package adds a tracker by an entry point in the group `onward.trackers`: its name is what the config key `track` says,
its object is called with a `TrackedRun` and returns a `Tracker`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers know it.

    Args:
        id: the run's own id (32 hexadecimal digits): the same on every machine and after every restart.
        name: for people; the name of its directory with the beginning of its id.
        folder: where the tracker may keep data if it was not told to keep it elsewhere; it moves with the run.
        config: the config without its secrets, by dotted key.
        known_as: what `Tracker.id` was when this tracker was reached before; None the first time.
    """

    id: str
    name: str
    folder: Path
    config: Mapping[str, Any]
    known_as: str | None = None


@dataclass(frozen=True)
class Point:
    """What is told of one step; of the last one of a file also what hooks measured at its boundary.

    Args:
        number: grows from point to point and never goes back, also when the run does: for trackers whose own step may
            only grow. As long as nothing was undone it is the step.
        step: the global step.
        time: when the step ended, in seconds since the epoch.
        values: what is drawn. Each has `step` and `rollbacks`: how often steps that the tracker was told of were
            undone before this one.
    """

    number: int
    step: int
    time: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Held:
    """The newest step that a tracker holds: its values `step` and `rollbacks`.

    `is_all` says that it holds no later one for certain, so that what it was told beyond is lost and told again.
    """

    step: int
    rollbacks: int
    is_all: bool = True


class Tracker(Protocol):
    """Is told of the points of one run, in order, from one thread. Whatever it raises is told once and tried again."""

    @property
    def id(self) -> str:
        """The tracker's own name of the run; kept in the ledger."""
        ...

    def held(self) -> Held | None:
        """Return what it holds, or None where telling it a point twice does no harm, or where it cannot say."""
        ...

    def log(self, points: Sequence[Point]) -> None:
        """Take points; when this returns they are safe, as far as the tracker can tell."""
        ...

    def rolled_back(self, rollbacks: int, step: int, number: int) -> None:
        """Take note that steps after `step` are undone; points after `number` are of the steps that replace them."""
        ...

    def close(self) -> None:
        """Let go of the run, which goes on in another process."""
        ...


Factory = Callable[[TrackedRun], Tracker]
