"""trackio: below `trackers/trackio/`, or the Space or server that `TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL` names.

Its own client drops what it cannot write, with a warning. Locally, points are therefore written by its storage layer,
which raises, takes the time of each, and skips what it already has. A Space or a server is reached through the client,
which keeps what could not be sent and sends it later.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from onward.views.trackers.tracker import Held, Point, TrackedRun

PROJECT = "onward"
"""The project, unless `TRACKIO_PROJECT` names another."""


class TrackioTracker:
    """Logs to one run of trackio."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        self._client: Any = None
        if os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"):
            self._client = self._reach()

    @property
    def id(self) -> str:
        """The run's name in the project."""
        return self._run.known_as or self._run.name

    def held(self) -> Held | None:
        """Return None: locally, a point that is sent again is skipped; otherwise trackio cannot be asked."""
        return None

    def log(self, points: Sequence[Point]) -> None:
        """Write or send the points."""
        if self._client is not None:
            for point in points:
                self._client.log(_named(point), step=point.number)
            return
        from trackio.sqlite_storage import SQLiteStorage

        SQLiteStorage.bulk_log(
            project=self._project,
            run=self.id,
            run_id=self._run.id,
            metrics_list=[_named(point) for point in points],
            steps=[point.number for point in points],
            timestamps=[datetime.fromtimestamp(point.time, UTC).isoformat() for point in points],
            config=dict(self._run.config),
            log_ids=[_log_id(self._run, point) for point in points],
        )

    def rolled_back(self, rollbacks: int, step: int, number: int) -> None:
        """Do nothing: trackio has no marks, so the value `rollbacks` of each point serves as one."""

    def close(self) -> None:
        """Wait until the client has sent what it holds."""
        client, self._client = self._client, None
        if client is not None:
            client.finish()

    def _reach(self) -> Any:
        import trackio

        return trackio.init(
            project=self._project, name=self.id, config=dict(self._run.config), resume="allow", embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip


def _named(point: Point) -> dict[str, float]:
    """Return the values of a point; `step` is a column of trackio's own."""
    return {("global_step" if name == "step" else name): value for name, value in point.values.items()}


def _log_id(run: TrackedRun, point: Point) -> str:
    """Return trackio's id of a point, which is the same each time it is sent."""
    return f"{run.id}-{point.number}"
