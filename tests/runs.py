"""Runs that tests make by the hundred: a model is proven once for its settings, and every further run gets the proof.

Only tests of the admission itself, and of `init`, need it to be made again.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onward import Run
from onward.events import StepTaken
from onward.store.ledger import Ledger
from onward.training.admission.findings import FACT, Findings

UNRELATED = frozenset(
    {"save_steps", "settle_seconds", "disk_margin_mb", "log_steps", "keep_boundaries", "keep_days", "evaluation"}
)
"""Keys that the admission of a model does not ask for."""
UNMEASURED: dict[str, Any] = {"evaluation": {"share": 0}}
_FOUND: dict[str, dict[str, Any]] = {}


def new_run(directory: Path, model: Path | str, **settings: Any) -> Run:
    """Make a run as `Run.create` does, with the findings of an equal model if they are known.

    It is not measured at boundaries unless `settings` say so: that takes longer than training a small file.
    """
    settings = {**UNMEASURED, **settings}
    asked = {key: value for key, value in settings.items() if key not in UNRELATED}
    key = json.dumps([str(model), asked], sort_keys=True)
    known = _FOUND.get(key)
    run = Run.create(directory, str(model), later=known is not None, **settings)
    with Ledger(run.layout.ledger) as ledger:
        if known is not None:
            ledger.put(**{FACT: known})
            return run
        found = ledger.get(FACT)
    findings = Findings.of(found)
    if findings is not None and not findings.settings:  # else the config is another one, too
        _FOUND[key] = found
    return run


def kill_at(step: int) -> Callable[[object], None]:
    """Return an observer that kills its process when a step was taken."""

    def observe(event: object) -> None:
        if isinstance(event, StepTaken) and event.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return observe
