"""A profile of some steps: a trace for Perfetto (ui.perfetto.dev) and the top costs as text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onward.events import Event, FileDone, FileStarted, Observe, StepTaken

STEPS = 5
TOP = 12


class StepProfile:
    """An observer that profiles the first steps of a command.

    Args:
        folder: where `trace.json` goes.
        observe: an observer to pass every event on to.
    """

    def __init__(self, folder: Path, observe: Observe) -> None:
        self.path = folder / "trace.json"
        self._observe = observe
        self._profiler: Any = None
        self._steps = 0
        self._table: str | None = None

    def __call__(self, event: Event) -> None:
        """Start the profile with a file; end it after `STEPS` steps or with the file."""

        if isinstance(event, FileStarted) and self._profiler is None:
            self._begin()
        self._steps += isinstance(event, StepTaken)
        if isinstance(event, FileDone) or self._steps == STEPS:
            self.end()
        self._observe(event)

    def _begin(self) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def end(self) -> None:
        """Write the trace, once."""
        if self._profiler is None or self._table is not None:
            return
        self._profiler.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self.path))
        self._table = table_of(self._profiler.key_averages())

    def describe(self) -> str:
        """Return the top costs, by time spent in the operation itself."""
        if self._table is None:
            return "nothing was profiled: no step was taken"
        count = min(self._steps, STEPS)
        return f"steps profiled: {count}; trace for ui.perfetto.dev: {self.path}\n{self._table}"


def table_of(averages: Iterable[Any]) -> str:
    """Return the top costs as lines: the share of all time, the time and the number of calls of each.

    If a device ran kernels, only they count: the operations that launched them have the same time again, and the
    processor's time besides.
    """
    every = list(averages)
    kernels = [cost for cost in every if cost.device_type.name != "CPU" and not cost.is_user_annotation]
    times = {id(cost): float(cost.self_device_time_total) for cost in kernels}
    times = times or {id(cost): float(cost.self_cpu_time_total) for cost in every}
    total = sum(times.values()) or 1.0
    top = sorted((cost for cost in every if id(cost) in times), key=lambda cost: -times[id(cost)])[:TOP]
    return "\n".join(
        f"{times[id(cost)] / total:6.1%} {times[id(cost)] / 1e3:9.0f} ms {cost.count:8} calls  {cost.key}"
        for cost in top
    )
