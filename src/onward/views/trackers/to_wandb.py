"""Weights & Biases: offline below `trackers/wandb/`, unless `WANDB_MODE` says otherwise."""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb

from onward.views.trackers.tracker import Held, Point, TrackedRun
from onward.views.trackers.wandb_files import histories

PROJECT = "onward"
"""The project, unless `WANDB_PROJECT` names another."""


class WandbTracker:
    """Logs to one wandb run, resumed by its id."""

    def __init__(self, run: TrackedRun) -> None:
        self.id = run.known_as or run.id
        folder = run.folder
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = Path(os.environ.get("WANDB_DIR") or folder)
        self._held = self._held_offline() if _mode() == "offline" else None  # before this run has a file of its own
        self._run: Any = wandb.init(
            id=self.id,
            name=run.name,
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            dir=str(self._folder),
            mode=_mode(),
            resume="allow",
            reinit="create_new",
            config=dict(run.config),
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # drawn over the global step, which may go back

    def held(self) -> Held | None:
        """Return what the server reports to have; offline, what wandb's own files have."""
        if self._run.offline or not self._run.resumed:
            return self._held
        step, rollbacks = (self._run.summary.get(name) for name in ("step", "rollbacks"))
        return None if step is None or rollbacks is None else Held(int(step), int(rollbacks))

    def log(self, points: Sequence[Point]) -> None:
        """Pass the points to wandb, which writes them to its files before sending them."""
        for point in points:
            self._run.log(dict(point.values), step=point.number, commit=True)

    def rolled_back(self, rollbacks: int, step: int, number: int) -> None:
        """Record in the run's summary which of wandb's steps are undone."""
        self._run.summary[f"rollback_{rollbacks}"] = {"to_step": step, "undone_up_to": number}

    def close(self) -> None:
        """Wait until wandb has written, and online sent, everything; the run continues in another process."""
        self._run.finish()

    def _held_offline(self) -> Held | None:
        """Return the newest step in the files that still exist."""
        logged = histories(self._folder / "wandb", self.id)
        newest = max(((int(values["rollbacks"]), int(values["step"])) for values in logged), default=None)
        return None if newest is None else Held(newest[1], newest[0], is_all=False)


def _mode() -> Any:
    return os.environ.get("WANDB_MODE") or "offline"
