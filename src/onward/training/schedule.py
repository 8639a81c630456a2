"""The learning rate as a pure function of the step. Steps count from 1: the step about to be taken.

`inverse_sqrt` is the schedule of Vaswani et al. 2017; `wsd` (warmup, stable, decay) is that of Hu et al. 2024
(MiniCPM), whose decay happens only on a release, so inside the stream it is warmup and then constant.
"""

from __future__ import annotations

import math

from onward.config import Config
from onward.config.keys import HORIZON_SCHEDULES
from onward.errors import ConfigError


def learning_rate(config: Config, step: int, step_in_file: int) -> float:
    """Return the learning rate of optimizer step `step`, the `step_in_file`-th of its file (both from 1).

    Raises:
        ConfigError: `step` is beyond the horizon of a schedule that has one.
    """
    require_horizon(config, step)
    if config.schedule_offset:
        return lagging_rate(config, step, step_in_file)
    peak, floor, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    warmed = step_in_file if config.boundary == "rewarm" else step
    factor = min(1.0, warmed / warmup) if warmup else 1.0
    return factor * max(floor, _unwarmed(config, step, peak, floor, warmup))


def lagging_rate(config: Config, step: int, step_in_file: int) -> float:
    """Return the learning rate of a step under a schedule that lags behind the step count, also beyond its horizon."""
    return _lagging(config, max(0, step - config.schedule_offset), step_in_file)


def _unwarmed(config: Config, step: int, peak: float, floor: float, warmup: int) -> float:
    if config.schedule == "inverse_sqrt":
        return peak * math.sqrt(max(warmup, 1) / max(step, warmup, 1))
    if config.schedule in HORIZON_SCHEDULES:
        progress = max(0, step - warmup) / ((config.total_steps or 0) - warmup)
        shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
        return floor + (peak - floor) * shape
    return peak


def _lagging(config: Config, position: int, step_in_file: int) -> float:
    """Return the learning rate at a position that lags behind the step.

    Such a schedule was begun by a Trainer: it is computed as in `transformers.optimization`, to the last bit.
    """
    peak, warmup, total = config.learning_rate, config.warmup_steps, config.total_steps or 0
    warmed = step_in_file if config.boundary == "rewarm" else position
    factor = 1.0
    if position >= warmup and config.schedule == "inverse_sqrt":
        factor = 1.0 / math.sqrt(position / max(1, warmup)) if position else 1.0
    elif position >= warmup and config.schedule == "linear":
        factor = max(0.0, (total - position) / (total - warmup))
    elif position >= warmup and config.schedule == "cosine":
        factor = max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((position - warmup) / (total - warmup)))))
    if config.min_learning_rate:
        lowest = config.min_learning_rate / peak
        factor = factor * (1.0 - lowest) + lowest if config.schedule in HORIZON_SCHEDULES else max(factor, lowest)
    return peak * (factor if warmed >= warmup else factor * (warmed / warmup))


def cooling(peak: float, step: int, steps: int) -> float:
    """Return the learning rate of the `step`-th (from 1) of `steps` steps in which it decays from `peak` to zero.

    The shape is the 1 - sqrt of Haegele et al. ("Scaling Laws and Compute-Optimal Training Beyond Fixed Training
    Durations", 2024). It reaches zero one step after the last, because a step with a learning rate of zero does
    nothing.
    """
    return peak * (1.0 - math.sqrt(step / (steps + 1)))


def require_unstretched(used: Config, wanted: Config) -> None:
    """Refuse another horizon for a schedule that has been used: every learning rate so far depended on it.

    Raises:
        ConfigError: `total_steps` of the same schedule differs.
    """
    same = used.schedule in HORIZON_SCHEDULES and wanted.schedule == used.schedule
    if same and wanted.total_steps != used.total_steps:
        raise ConfigError(
            f"total_steps of a used {used.schedule} schedule cannot go from {used.total_steps} to {wanted.total_steps}",
            where="total_steps",
            hint="Restore the old value. To train further, set schedule: constant and a learning_rate.",
        )


def require_horizon(config: Config, last_step: int) -> None:
    """Refuse steps beyond `total_steps` under a schedule that ends there.

    Raises:
        ConfigError: `last_step` passes the horizon.
    """
    if config.schedule in HORIZON_SCHEDULES and last_step > (config.total_steps or 0):
        raise ConfigError(
            f"schedule {config.schedule} ends at step {config.total_steps} (total_steps), this file at {last_step}",
            where="schedule",
            hint="A used schedule is not stretched. Set schedule: constant and learning_rate: "
            f"{config.min_learning_rate or config.learning_rate / 10:g} in the config, then: onward train",
        )
