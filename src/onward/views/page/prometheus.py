"""What Prometheus scrapes: the state of each run in its text format, version 0.0.4."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from onward.service.shown import DOING

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
GAUGES = {
    "global_step": ("onward_step", "Optimizer step at which the run is."),
    "file_step": ("onward_file_step", "Step within the file in training."),
    "file_steps": ("onward_file_steps", "Total steps of the file in training."),
    "queue": ("onward_queue_files", "Files that wait in the queue."),
    "loss": ("onward_loss", "Loss of the newest step, the mean over its target tokens."),
    "learning_rate": ("onward_learning_rate", "Learning rate of the newest step."),
    "tokens_per_second": ("onward_tokens_per_second", "Tokens trained per second, over the newest steps."),
    "eta_seconds": ("onward_eta_seconds", "Seconds until the file in training is done."),
    "disk_free_bytes": ("onward_disk_free_bytes", "Free bytes on the run's disk."),
    "heartbeat_seconds": ("onward_heartbeat_age_seconds", "Seconds since the last sign of life of the run's process."),
}
"""Keys of `onward status --json` with the name and the help of their metric."""


def exposition(
    statuses: Mapping[str, Mapping[str, Any]], files: Mapping[str, Mapping[str, int]], unreadable: Iterable[str] = ()
) -> str:
    """Return the metrics of runs, given by name; missing values are left out.

    Args:
        statuses: as `onward status --json` prints them.
        files: how many files of each run are in which state.
        unreadable: runs that cannot be read, which is a problem in itself.
    """
    lines: list[str] = []
    for key, (name, meaning) in GAUGES.items():
        samples = [({"run": run}, status[key]) for run, status in statuses.items() if status[key] is not None]
        lines += _family(name, meaning, samples)
    states = [
        ({"run": run, "state": state}, int(status["state"] == state))
        for run, status in statuses.items() for state in DOING
    ]  # fmt: skip
    lines += _family("onward_state", "1 for the state that the run is in.", states)
    problems = [({"run": run}, int(status["problem"] is not None)) for run, status in statuses.items()]
    problems += [({"run": run}, 1) for run in unreadable]
    lines += _family("onward_problem", "1 if something keeps the run from going on.", problems)
    counts = [({"run": run, "state": state}, count) for run, found in files.items() for state, count in found.items()]
    lines += _family("onward_files", "Files by state.", counts)
    return "".join(f"{line}\n" for line in lines)


def _family(name: str, meaning: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> list[str]:
    shown = [f"{name}{{{_labels(labels)}}} {float(value)!r}" for labels, value in samples]
    return [f"# HELP {name} {meaning}", f"# TYPE {name} gauge", *shown] if shown else []


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
