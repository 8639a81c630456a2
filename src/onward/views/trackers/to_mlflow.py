"""MLflow: the store that `MLFLOW_TRACKING_URI` names, else one in SQLite below `trackers/mlflow/`."""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from onward.views.trackers.tracker import Held, Point, TrackedRun

EXPERIMENT = "onward"
"""The experiment, unless `MLFLOW_EXPERIMENT_NAME` names another."""
TAG = "onward.run"
"""The tag with the run's id, by which a run created right before a kill is found again."""
METRICS, PARAMS, VALUE_LENGTH, NAME_LENGTH = 1000, 100, 6000, 250
"""What MLflow accepts in one call, and the most characters of a parameter and of a metric's name."""
_REFUSED = re.compile(r"[^\w.\- :]|^\.+|^$")
"""What MLflow refuses in a part of a metric's name, which it takes for the path of a file."""


class MlflowTracker:
    """Logs to one MLflow run."""

    def __init__(self, run: TrackedRun) -> None:
        store = os.environ.get("MLFLOW_TRACKING_URI") or _local_store(run)
        self._client: Any = MlflowClient(store)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        experiment = self._experiment(name, run)
        self.id: str = self._known(run.known_as) or self._found(experiment, run) or self._made(experiment, run)

    def held(self) -> Held:
        """Return the newest values of `step` and `rollbacks`; MLflow writes each call whole or not at all."""
        metrics = self._client.get_run(self.id).data.metrics
        return Held(int(metrics.get("step", -1)), int(metrics.get("rollbacks", 0)))

    def log(self, points: Sequence[Point]) -> None:
        """Log the points, with as many whole points per call as one call takes."""
        batch: list[Metric] = []
        for point in points:
            time = int(point.time * 1000)
            metrics = [Metric(accepted(name), value, time, point.number) for name, value in point.values.items()]
            if len(batch) + len(metrics) > METRICS:
                self._client.log_batch(self.id, metrics=batch)
                batch = []
            batch += metrics
        self._client.log_batch(self.id, metrics=batch)

    def rolled_back(self, rollbacks: int, step: int, number: int) -> None:
        """Tag the run with the steps of MLflow that are undone."""
        text = f"back to step {step}: MLflow's steps up to {number} whose step is above it are undone"
        self._client.set_tag(self.id, f"onward.rollback.{rollbacks}", text)

    def close(self) -> None:
        """Do nothing: nothing is held open, and the run stays open because it continues."""

    def _experiment(self, name: str, run: TrackedRun) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        place = None if os.environ.get("MLFLOW_TRACKING_URI") else (run.folder / "artifacts").absolute().as_uri()
        return self._client.create_experiment(name, artifact_location=place)

    def _known(self, run_id: str | None) -> str | None:
        if run_id is None:
            return None
        try:
            return self._client.get_run(run_id).info.run_id
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _found(self, experiment: str, run: TrackedRun) -> str | None:
        found = self._client.search_runs([experiment], filter_string=f"tags.`{TAG}` = '{run.id}'", max_results=1)
        return found[0].info.run_id if found else None

    def _made(self, experiment: str, run: TrackedRun) -> str:
        made = self._client.create_run(experiment, run_name=run.name, tags={TAG: run.id})
        params = [Param(key, str(value)[:VALUE_LENGTH]) for key, value in run.config.items()]
        for start in range(0, len(params), PARAMS):
            self._client.log_batch(made.info.run_id, params=params[start : start + PARAMS])
        self._client.log_batch(made.info.run_id, tags=[RunTag("mlflow.source.name", "onward")])
        return made.info.run_id


def accepted(name: str) -> str:
    """Return the name under which MLflow accepts a metric: results of an evaluation have any (`acc@5`)."""
    return "/".join(_REFUSED.sub("_", part) for part in name.split("/"))[:NAME_LENGTH]


def _local_store(run: TrackedRun) -> str:
    run.folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{(run.folder / 'mlflow.db').absolute()}"
