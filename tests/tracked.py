"""A tracker that keeps what it is told in memory, and fails, loses points or says less when a test says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from onward.views.trackers.tracker import Held, Point, TrackedRun


class Store:
    """What a tracker holds, apart from the process that tells it; `fails` says whether it takes points now."""

    def __init__(self, *, can_say: bool = True) -> None:
        self.points: list[Point] = []
        self.marks: list[tuple[int, int, int]] = []
        self.fails: str | None = None
        self.failure: type[BaseException] = ConnectionError
        self.can_say = can_say
        self.is_all = True
        self.runs: list[TrackedRun] = []
        self.told = threading.Event()
        self.when_marked: Callable[[], None] = lambda: None
        self.closed = 0
        self.fails_to_close: str | None = None
        self.was_closed = threading.Event()

    def open(self, run: TrackedRun) -> Recorder:
        self.runs.append(run)
        return Recorder(self)


class Recorder:
    """A tracker that keeps points in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.id = "id-of-the-tracker"

    def held(self) -> Held | None:
        if not self._store.can_say:
            return None
        newest = self._store.points[-1].values if self._store.points else {"step": -1, "rollbacks": 0}
        return Held(int(newest["step"]), int(newest["rollbacks"]), self._store.is_all)

    def log(self, points: Sequence[Point]) -> None:
        if self._store.fails is not None:
            raise self._store.failure(self._store.fails)
        self._store.points += points
        self._store.told.set()

    def rolled_back(self, rollbacks: int, step: int, number: int) -> None:
        self._store.marks.append((rollbacks, step, number))
        self._store.when_marked()

    def close(self) -> None:
        self._store.closed += 1
        self._store.was_closed.set()
        if self._store.fails_to_close is not None:
            raise self._store.failure(self._store.fails_to_close)


def shown(points: Sequence[Point]) -> list[tuple[int, float]]:
    """Return step and loss of the points that no later one replaces."""
    kept: list[tuple[int, float]] = []
    for point in points:
        while kept and kept[-1][0] >= point.step:
            kept.pop()
        kept.append((point.step, point.values["loss"]))
    return kept
