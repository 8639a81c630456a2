"""The real trackers, offline: one run in each, over processes, an outage and a rollback.

They are not part of `dev`: `pip install 'onward[trackio,wandb,mlflow,tensorboard]'` lets these tests run.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import apart
from streams import Stream

from onward import startup
from onward.layout import RunLayout
from onward.store.ledger import Ledger

TOLD = [(1, 1, 0), (2, 2, 0), (3, 3, 0), (4, 4, 0), (5, 5, 0), (6, 6, 0), (7, 4, 1), (8, 5, 1), (9, 6, 1), (10, 7, 1)]
"""Number, step and rollbacks of each point that the scenario below tells."""


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    """Its own reader shows the curve of the run as it is after the rollback, from several files."""
    held = scenario(tmp_path, "tensorboard", _of_tensorboard)
    assert [(step, step) for step in range(1, 8)] == [tuple(pair) for pair in held["steps"]]
    assert held["losses"] == [1.0, 2.0, 3.0, 7.0, 8.0, 9.0, 10.0]
    assert 1 == held["runs"]


@pytest.mark.parametrize("name", ["mlflow", "trackio", "wandb"])
def test_a_tracker_holds_one_run_with_each_point_once(tmp_path: Path, name: str) -> None:
    """One run over two processes; steps that replace undone ones come under new numbers and say so."""
    held = scenario(tmp_path, name, {"mlflow": _of_mlflow, "trackio": _of_trackio, "wandb": _of_wandb}[name])
    assert TOLD == [tuple(point) for point in held["points"]]
    assert 1 == held["runs"]
    assert held["config"] == 16


def test_a_store_of_mlflow_that_was_lost_is_filled_again(tmp_path: Path) -> None:
    """A run that is no longer there holds nothing: another is made, and gets every step, also those of before."""
    pytest.importorskip("mlflow", reason="pip install 'onward[mlflow]'")
    stream = Stream(tmp_path / "run")
    layout = stream.layout
    layout.config.write_text("model: smollm2-135m\ntrack: [mlflow]\n")
    for steps in (3, 2):
        stream.train(steps, last=True)
    assert 0 == apart(_tell, str(layout.root))
    stream.roll_back(1)
    stream.train(1, last=True)
    assert 0 == apart(_tell, str(layout.root))
    (layout.trackers / "mlflow" / "mlflow.db").unlink()
    stream.train(1, last=True)
    stream.ledger.close()
    assert 0 == apart(_tell_and_look, str(layout.root), _points_of_mlflow, str(tmp_path / "held.json"))
    points = json.loads((tmp_path / "held.json").read_text())["points"]
    assert [(step + 2, step, 1) for step in range(1, 6)] == [tuple(point) for point in points]


def test_mlflow_takes_results_of_any_name() -> None:
    """What it refuses in a name becomes an underscore; all else stays."""
    pytest.importorskip("mlflow", reason="pip install 'onward[mlflow]'")
    from mlflow.utils.validation import _validate_metric_name

    from onward.views.trackers.to_mlflow import accepted

    names = ["loss", "eval/acc@5", "eval/été 1.jsonl", "a//b", "/a", "../a/..", "a:b", "", "a" * 300, "tab\t/new\nline"]
    for name in names:
        _validate_metric_name(accepted(name))
    assert ["loss", "eval/acc_5", "eval/été 1.jsonl", "a/_/b", "_/a", "_/a/_"] == [accepted(name) for name in names[:6]]


def scenario(folder: Path, name: str, look: Callable[[RunLayout], dict[str, Any]]) -> dict[str, Any]:
    """Tell a tracker of a run from several processes, with a rollback in between; return what it then holds."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install 'onward[{name}]'")
    stream = Stream(folder / "run")
    layout = stream.layout
    layout.config.write_text(f"model: smollm2-135m\ntrack: [{name}]\n")
    stream.train(3, last=True)
    assert 0 == apart(_tell, str(layout.root))
    stream.train(3, last=True)
    stream.ledger.close()
    assert 0 == apart(_tell, str(layout.root))
    with Ledger(layout.ledger) as ledger:  # what was told is not written down: killed
        row = ledger.tracker(name)
        assert row is not None
        ledger.write("UPDATE trackers SET step = 4 WHERE name = ?", name)
        stream.ledger = ledger
        stream.roll_back(1)
        stream.train(3, last=True)
        ledger.write("UPDATE trackers SET step = 6 WHERE name = ?", name)
    assert 0 == apart(_tell, str(layout.root))
    with Ledger(layout.ledger) as ledger:
        stream.ledger = ledger
        ledger.write("UPDATE trackers SET step = 5 WHERE name = ?", name)
        stream.train(1, last=True)
    assert 0 == apart(_tell_and_look, str(layout.root), look, str(folder / "held.json"))
    held: dict[str, Any] = json.loads((folder / "held.json").read_text())
    return held


def _tell(root: str) -> None:
    from onward.views.trackers.telling import tell_once

    layout = RunLayout(Path(root))
    for variable in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
        del os.environ[variable]
    startup.set_tracker_environment(layout.trackers)
    (name,) = layout.config.read_text().split("[")[1].split("]")[0].split(",")
    assert {name: None} == tell_once(layout, [name])


def _tell_and_look(root: str, look: Callable[[RunLayout], dict[str, Any]], target: str) -> None:
    _tell(root)
    Path(target).write_text(json.dumps(look(RunLayout(Path(root)))))


def _of_tensorboard(layout: RunLayout) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = list((layout.trackers / "tensorboard").iterdir())
    events = EventAccumulator(str(folders[0])).Reload()
    return {
        "steps": [(event.step, event.value) for event in events.Scalars("step")],
        "losses": [event.value for event in events.Scalars("loss")],
        "runs": len(folders),
    }


def _of_mlflow(layout: RunLayout) -> dict[str, Any]:
    found = _points_of_mlflow(layout)
    assert "back to step 3" in found["tags"]["onward.rollback.1"]
    return found


def _points_of_mlflow(layout: RunLayout) -> dict[str, Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{layout.trackers}/mlflow/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    history = {key: client.get_metric_history(runs[0].info.run_id, key) for key in ("step", "rollbacks")}
    return {
        "points": [(a.step, a.value, b.value) for a, b in zip(history["step"], history["rollbacks"], strict=True)],
        "runs": len(runs),
        "config": int(runs[0].data.params["lora.rank"]),
        "tags": dict(runs[0].data.tags),
    }


def _of_trackio(layout: RunLayout) -> dict[str, Any]:
    del layout
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("onward")
    logs = SQLiteStorage.get_logs("onward", run)
    config = SQLiteStorage.get_run_config("onward", run) or {}
    return {
        "points": [(log["step"], log["global_step"], log["rollbacks"]) for log in logs],
        "runs": 1,
        "config": config["lora.rank"],
    }


def _of_wandb(layout: RunLayout) -> dict[str, Any]:
    from onward.views.trackers.wandb_files import histories

    folder = layout.trackers / "wandb" / "wandb"
    (run_id,) = {path.stem.removeprefix("run-") for path in folder.glob("offline-run-*/run-*.wandb")}
    return {
        "points": [(log["_step"], log["step"], log["rollbacks"]) for log in histories(folder, run_id)],
        "runs": 1,
        "config": 16,
    }
