"""One tracker's feed: what it lacks is read from the ledger, sent to it, and recorded as sent.

The cursor is in the ledger, so an outage, a kill or a move to another machine loses nothing: the feed continues where
it was. The tracker is asked for what was sent right before a kill but not recorded, so that nothing is sent twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

from onward.store.ledger import Ledger
from onward.store.rows import FileRow, StepRecord, TrackerRow
from onward.views.trackers.tracker import Held, Point, Tracker

BATCH = 500
"""How many points are sent at a time."""
FAILURES = (Exception, SystemExit)
"""What a tracker may fail with: some libraries end the process where a key or a login is missing."""


class Feed:
    """Sends a run's steps to one tracker.

    Args:
        ledger: the run's ledger, used by the calling thread.
        open_tracker: connects to the tracker, given the id that it had when last reached.
    """

    def __init__(self, ledger: Ledger, name: str, open_tracker: Callable[[str | None], Tracker]) -> None:
        self.name = name
        self._ledger = ledger
        self._open = open_tracker
        self._tracker: Tracker | None = None

    def tell(self) -> int:
        """Send the tracker everything that it lacks; return how many points that were.

        It is not even connected to while there is nothing to send. What the tracker raises is passed on, and the next
        call connects anew.
        """
        told = 0
        while (count := self._tell_batch()) > 0:
            told += count
        return told

    def close(self) -> None:
        """Close the tracker."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.close()

    @property
    def cursor(self) -> TrackerRow:
        """Return how far the tracker has got; a new one begins at the first step, whatever was undone before."""
        row = self._ledger.tracker(self.name)
        if row is not None:
            return row
        return TrackerRow(self.name, None, -1, 0, 0, 0, self._ledger.last_rewind(), None, 0.0)

    def _tell_batch(self) -> int:
        if not self._has_news(self.cursor):
            return 0
        try:
            tracker = self._reached()
            cursor = self._go_back(tracker, self.cursor)
            cursor, points = self._read(cursor)
            if points:
                tracker.log(points)
                self._ledger.keep_tracker(cursor)
        except FAILURES:
            self._forget()
            raise
        return len(points)

    def _has_news(self, cursor: TrackerRow) -> bool:
        if any(rewind.step < cursor.step for rewind in self._ledger.rewinds_after(cursor.rewind)):
            return True
        return bool(self._ledger.steps_after(cursor.step, 1))

    def _reached(self) -> Tracker:
        """Connect to the tracker once; what it holds beyond the cursor was sent right before a process died."""
        if self._tracker is not None:
            return self._tracker
        cursor = self.cursor
        tracker = self._tracker = self._open(cursor.run_id)
        self._ledger.keep_tracker(replace(cursor, run_id=tracker.id, step=self._received(cursor, tracker.held())))
        return tracker

    def _received(self, cursor: TrackerRow, held: Held | None) -> int:
        """Return the last step that a tracker has of the run as it is, by what it says and what the ledger knows."""
        if held is None or held.rollbacks > cursor.rollbacks:
            return cursor.step
        if not held.is_all:
            return max(held.step, cursor.step) if held.rollbacks == cursor.rollbacks else cursor.step
        lost = cursor.rollbacks - held.rollbacks
        if lost == 0:
            return held.step
        # it lost all that replaced what was undone: if more than once, maybe from the deepest rollback on
        steps = [cursor.since] if lost == 1 else [rewind.step for rewind in self._ledger.rewinds_after(0)]
        return min(held.step, cursor.step, *steps)

    def _go_back(self, tracker: Tracker, cursor: TrackerRow) -> TrackerRow:
        """Follow the run back if it was rolled back past what the tracker received."""
        for rewind in self._ledger.rewinds_after(cursor.rewind):
            if rewind.step < cursor.step:
                number = cursor.shift + cursor.step
                cursor = replace(
                    cursor,
                    step=rewind.step,
                    shift=number - rewind.step,
                    since=rewind.step,
                    rollbacks=cursor.rollbacks + 1,
                )
                tracker.rolled_back(cursor.rollbacks, rewind.step, number)
            cursor = replace(cursor, rewind=rewind.id)
            self._ledger.keep_tracker(cursor)
        return cursor

    def _read(self, cursor: TrackerRow) -> tuple[TrackerRow, list[Point]]:
        """Return the next points, and the cursor after them; none if the run was rolled back while they were read."""
        steps = self._ledger.steps_after(cursor.step, BATCH)
        points = [self._point(cursor, row, record) for row, record in steps]
        if not points or self._ledger.last_rewind() != cursor.rewind:
            return cursor, []
        return replace(cursor, step=points[-1].step), points

    def _point(self, cursor: TrackerRow, row: FileRow, record: StepRecord) -> Point:
        values = _values(row, record)
        if record.step == row.last_step:
            results = self._ledger.boundary_results(row.id)
            values |= {name: value for key, inner in results.items() for name, value in _numbers(key, inner)}
        time = self._ledger.step_time(record) or row.finished or row.arrived
        return Point(cursor.shift + record.step, record.step, time, {**values, "rollbacks": float(cursor.rollbacks)})

    def _forget(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            try:
                tracker.close()
            except FAILURES:  # its failure was already reported
                return


def _values(row: FileRow, record: StepRecord) -> dict[str, float]:
    names = ("step", "epoch", "loss", "learning_rate", "grad_norm", "rows", "tokens", "target_tokens", "seconds")
    values = {name: float(getattr(record, name)) for name in names}
    pace = record.tokens / record.seconds if record.seconds else 0.0
    return {**values, "file": float(row.place), "file_step": float(record.step_in_file), "tokens_per_second": pace}


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield the numbers in a JSON value, each under its path."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, Mapping):
        for key, inner in cast(Mapping[str, Any], value).items():
            yield from _numbers(f"{name}/{key}", inner)
