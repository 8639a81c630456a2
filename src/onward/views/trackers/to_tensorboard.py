"""TensorBoard: event files below `trackers/tensorboard/`.

Each opening writes a new event file that begins with TensorBoard's own mark of a restart (`SessionLog.START` with a
step): its readers then ignore what earlier files say about that step and later ones. So a step is shown once, even
after a kill or a rollback.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from onward.views.trackers.tracker import Point, TrackedRun


class TensorboardTracker:
    """Writes event files; the directory is the run."""

    def __init__(self, run: TrackedRun) -> None:
        self._folder = run.folder / (run.known_as or run.name)
        self._writer: Any = None

    @property
    def id(self) -> str:
        """The directory below that of the run's trackers."""
        return self._folder.name

    @property
    def folder(self) -> Path:
        """The folder of the event files."""
        return self._folder

    def held(self) -> None:
        """Return None, because a step that is sent again replaces itself."""
        return

    def log(self, points: Sequence[Point]) -> None:
        """Write the points, and force them to the system."""
        writer = self._begun(points[0])
        for point in points:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in point.values.items()]
            writer.add_event(Event(wall_time=point.time, step=point.step, summary=Summary(value=values)))
        writer.flush()

    def rolled_back(self, rollbacks: int, step: int, number: int) -> None:
        """Continue in another file, whose beginning undoes the later steps."""
        del rollbacks, step, number
        self.close()

    def close(self) -> None:
        """Close the file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _begun(self, first: Point) -> Any:
        """Return the writer; a new one invalidates earlier files from the first point's step on."""
        if self._writer is None:
            self._writer = EventFileWriter(str(self._folder))
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=first.time, step=first.step, session_log=start))
        return self._writer
