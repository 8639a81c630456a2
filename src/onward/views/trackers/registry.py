"""The available trackers: four that Onward knows, and those from other packages."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
from typing import cast

from onward.errors import UsageError
from onward.views.trackers.tracker import Factory

GROUP = "onward.trackers"
"""The entry point group by which packages provide trackers."""
BUILT_IN = {
    "trackio": ("trackio", "onward.views.trackers.to_trackio:TrackioTracker"),
    "wandb": ("wandb", "onward.views.trackers.to_wandb:WandbTracker"),
    "mlflow": ("mlflow", "onward.views.trackers.to_mlflow:MlflowTracker"),
    "tensorboard": ("tensorboard", "onward.views.trackers.to_tensorboard:TensorboardTracker"),
}
"""The package that each needs, and its factory."""


def find_tracker(name: str) -> Factory:
    """Return the factory of a tracker.

    Raises:
        UsageError: its package is not installed, or there is no such tracker.
    """
    if name in BUILT_IN:
        package, place = BUILT_IN[name]
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{package} is not installed", hint=f"pip install 'onward[{name}]'")
        module, _, attribute = place.partition(":")
        return cast(Factory, getattr(importlib.import_module(module), attribute))
    brought = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    if name not in brought:
        names = sorted({*BUILT_IN, *brought})
        close = difflib.get_close_matches(name, names, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise UsageError(
            f"there is no such tracker{meant}",
            hint=f"track in onward.yaml takes: {', '.join(names)}. {GROUP} adds others.",
        )
    return cast(Factory, brought[name].load())
