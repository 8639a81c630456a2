"""A Trainer's current learning rate, and the config under which the run continues as the Trainer would have.

Which schedule it was is not assumed but proven: the run's rates at the remaining steps are compared with those of
transformers' own scheduler, made from the Trainer's arguments and set to the position in `scheduler.pt`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers.optimization import get_scheduler

from onward.config import Config
from onward.config.keys import HORIZON_SCHEDULES
from onward.config.text import parse_config
from onward.errors import ConfigError, DamagedState, Unreadable, UsageError
from onward.text import quoted
from onward.training.checkpoints.huggingface import SCHEDULER
from onward.training.foreign.arguments import Arguments
from onward.training.foreign.folders import TrainerFolder, fresh_hint
from onward.training.foreign.pickles import NotAPickle, read_saved
from onward.training.schedule import learning_rate

COMPARED = 10_000
"""The most steps at which two schedules are compared."""
ENDLESS = 1000
"""How many steps ahead are compared if the schedule has no end."""
_NAMES: Mapping[str, str] = {
    "constant": "constant", "constant_with_warmup": "constant", "inverse_sqrt": "inverse_sqrt",
}  # fmt: skip


@dataclass(frozen=True)
class TrainerSchedule:
    """A Trainer's schedule and its position.

    Args:
        name: the Trainer's name for it; empty if unknown.
        peak: the rate that it multiplies.
        position: how often it was advanced.
        current: the rate of the Trainer's next step.
        step: steps that the Trainer had taken.
        total_steps: steps that the Trainer was set to take; 0 if unknown.
        warmup_steps: its warmup steps.
        factor: returns what the peak is multiplied by at a position; None if it is not such a function.
    """

    name: str
    peak: float
    position: int
    current: float
    step: int
    total_steps: int
    warmup_steps: int
    factor: Callable[[int], float] | None

    @property
    def finished(self) -> bool:
        """Whether the Trainer had taken all of its steps under a schedule that ends with them."""
        return 0 < self.total_steps <= self.step and self.name not in _NAMES

    def rate(self, step: int) -> float | None:
        """Return the Trainer's learning rate at a step; None if it is unknown, or there would not have been one."""
        if self.total_steps and step > self.total_steps and self.name not in _NAMES:
            return None
        if self.factor is None:
            return self.current if step == self.step + 1 and self.peak else None
        return self.peak * self.factor(self.position + step - self.step - 1)


def read_schedule(folder: TrainerFolder, arguments: Arguments, peak: float) -> TrainerSchedule:
    """Return the schedule of a checkpoint.

    Args:
        peak: the learning rate in the optimizer, for a checkpoint without `scheduler.pt`.

    Raises:
        DamagedState: `scheduler.pt` does not contain a scheduler's state.
        Unreadable: it cannot be read now.
    """
    name, total = arguments.text("lr_scheduler_type"), folder.total_steps
    saved = _saved(folder)
    base, last = _first(saved.get("base_lrs")), _first(saved.get("_last_lr"))
    peak = peak if base is None else base
    position = int(saved.get("last_epoch", folder.step))
    warmup = arguments.warmup_steps(total)
    factor = _factor(name, warmup, total, peak, arguments.values.get("lr_scheduler_kwargs"))
    current = last if last is not None else peak * factor(position) if factor else peak
    if factor is not None and not math.isclose(peak * factor(position), current, rel_tol=1e-9, abs_tol=1e-15):
        name, factor = f"{name} in another form", None  # a schedule of the user's own, under the default's name
    return TrainerSchedule(name, peak, position, current, folder.step, total, warmup, factor)


def _saved(folder: TrainerFolder) -> dict[str, Any]:
    """Return the content of `scheduler.pt`; empty if there is none."""
    path = folder.path / SCHEDULER
    try:
        saved = read_saved(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise Unreadable.of(error, path) from None
    except NotAPickle as error:
        raise DamagedState(f"{SCHEDULER} cannot be read: {error}", where=path, hint=fresh_hint(folder.path)) from None
    return cast(dict[str, Any], saved) if isinstance(saved, dict) else {}


def _first(values: Any) -> float | None:
    """Return the first of several rates; None if it is not a rate."""
    first = cast(list[Any], values)[0] if isinstance(values, list) and values else None
    return float(first) if isinstance(first, (int, float)) else None


def _factor(name: str, warmup: int, total: int, peak: float, extra: Any) -> Callable[[int], float] | None:
    """Return transformers' own function of the position, if it has one with that name."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak or 1.0)
    keywords = cast(dict[str, Any], extra) if isinstance(extra, dict) else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = get_scheduler(name, optimizer, warmup, total or None, dict(keywords))
        functions = cast(Any, made).lr_lambdas
        functions[0](0)
    except (ValueError, TypeError, AttributeError, ArithmeticError):
        return None
    return functions[0]


def schedule_settings(schedule: TrainerSchedule) -> dict[str, Any] | None:
    """Return the config values under which the run has the Trainer's learning rates; None if there are none."""
    for values in _candidates(schedule):
        try:
            config = parse_config(values)
        except ConfigError:
            continue
        if _is_proven(schedule, config):
            return values
    return None


def _candidates(schedule: TrainerSchedule) -> Iterator[dict[str, Any]]:
    """Yield configs that may have these rates, the plainest first."""
    offset = schedule.step + 1 - schedule.position
    if schedule.factor is None or offset < 0 or schedule.peak <= 0:
        return
    shared = {"learning_rate": schedule.peak, "warmup_steps": schedule.warmup_steps, "schedule_offset": offset}
    yield {**shared, "schedule": "constant"}
    yield {**shared, "schedule": "constant", "warmup_steps": 0}
    yield {**shared, "schedule": "inverse_sqrt"}
    floor = max(0.0, schedule.peak * schedule.factor(schedule.total_steps)) if schedule.total_steps else 0.0
    ends = {"total_steps": schedule.total_steps or None, "min_learning_rate": floor}
    for name in HORIZON_SCHEDULES:
        yield {**shared, **ends, "schedule": name}


def _is_proven(schedule: TrainerSchedule, config: Config) -> bool:
    """Whether config and Trainer agree at every remaining step or, for a finished schedule, at every past one."""
    first = schedule.step + 1
    last = schedule.total_steps if schedule.name not in _NAMES else first + ENDLESS
    if last < first:
        first = max(1, schedule.step + 1 - schedule.position)
    stride = max(1, (last - first) // COMPARED)
    steps = [*range(first, last + 1, stride), last]
    agree = (_close(schedule.rate(step), learning_rate(config, step, step)) for step in steps)
    return last >= first and all(agree)


def _close(expected: float | None, actual: float) -> bool:
    return expected is not None and math.isclose(expected, actual, rel_tol=1e-9, abs_tol=1e-15)


def require_schedule(schedule: TrainerSchedule, folder: TrainerFolder) -> dict[str, Any]:
    """Return the config values of the Trainer's schedule.

    Raises:
        UsageError: no config has its rates; the message has a command that says how to continue.
    """
    values = schedule_settings(schedule)
    if values is not None:
        return values
    if schedule.factor is None and not schedule.name and schedule.current == schedule.peak > 0:
        return {"learning_rate": schedule.peak, "warmup_steps": 0}  # nothing names it, and it is at its peak
    rate = schedule.current or schedule.peak or 1e-5
    name = schedule.name or "whose name is not recorded"
    raise UsageError(
        f"the Trainer's schedule ({name}, now at {schedule.current:g}) is not one that Onward has",
        where=folder.path,
        hint=f"Choose how to go on: onward adopt {quoted(folder.path)} --run NEW_RUN --set schedule=constant "
        f"--set learning_rate={rate:g}",
    )
