"""Describes what an adopted run took over from its checkpoint, what it did not and why, and its next learning rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from onward.config import Config
from onward.config.keys import HORIZON_SCHEDULES
from onward.errors import ConfigError
from onward.service.state.adopted_config import SCHEDULE_SOURCE, Adopted
from onward.training.checkpoints.huggingface import TRAINING_ARGUMENTS
from onward.training.foreign.schedules import TrainerSchedule
from onward.training.foreign.settings import batch_words, left_out
from onward.training.schedule import learning_rate

ADAMS = ("adamw", "paged_adamw")
"""Beginnings of the names of a Trainer's optimizers for which a learning rate means the same as in a run."""
AHEAD = 3
"""How many steps' learning rates are listed."""
UNKNOWN = ("batch_size", "gradient_accumulation", "max_grad_norm", "seed", "max_length", "epochs")
"""Keys whose values the Trainer had in its arguments."""


def describe(adopted: Adopted, settings: Mapping[str, Any], notes: list[str]) -> list[str]:
    """Return one line for each thing that the user should know about the new run.

    Args:
        settings: what the user set; it took precedence over the checkpoint.
        notes: what else was found while the state was loaded.
    """
    return [*_taken(adopted, settings), *_fresh(adopted, settings), *_left(adopted, settings), *notes, *_rates(adopted)]


def _taken(adopted: Adopted, settings: Mapping[str, Any]) -> Iterator[str]:
    values = adopted.config.flat()
    named: set[str] = set(settings)
    for source, found in reversed(list(adopted.sources.items())):  # a later source takes precedence
        keys = [key for key in found if key not in named and key in values]
        named.update(keys)
        if source == TRAINING_ARGUMENTS and "batch_size" in keys:
            rows = f" ({batch_words(adopted.folder, adopted.arguments)})"
            others = _listed(values, [key for key in keys if key != "batch_size"])
            yield f"from {source}: batch_size {values['batch_size']}{rows}, {others}"
        elif keys:
            kind = adopted.schedule.name if source == SCHEDULE_SOURCE and adopted.schedule else ""
            yield f"from {source}{f' ({kind})' if kind else ''}: {_listed(values, keys)}"
    if settings:
        yield f"set by you: {_listed(values, [key for key in values if key in settings])}"


def _fresh(adopted: Adopted, settings: Mapping[str, Any]) -> Iterator[str]:
    if adopted.moments is not None:
        return
    step = f"step {adopted.folder.step}" if adopted.folder.state else "an unknown number of steps, counted as 1"
    yield f"weights only: the optimizer's moments start fresh, after {step}"
    used, rate = adopted.arguments.text("optim"), f"learning_rate {adopted.config.learning_rate:g}"
    if used and not used.startswith(ADAMS) and "learning_rate" not in settings:
        way = "--set schedule=constant --set learning_rate=RATE"
        yield f"the Trainer's optimizer was {used}, the run's is AdamW, which {rate} may not suit: {way} sets another"


def _left(adopted: Adopted, settings: Mapping[str, Any]) -> Iterator[str]:
    """Name what is not taken over, and what is a default of the run because nothing says what it was."""
    values = adopted.config.flat()
    left = list(left_out(adopted.arguments))
    if left:
        yield f"not taken: {'; '.join(left)}"
    known = {key for found in adopted.sources.values() for key in found} | set(settings)
    defaults = [key for key in UNKNOWN if key not in known and values[key] is not None]
    if defaults:
        why = adopted.arguments.missing or f"{TRAINING_ARGUMENTS} does not say"
        yield f"defaults, for {why}: {_listed(values, defaults)}; onward.yaml changes them before the first file"


def _rates(adopted: Adopted) -> Iterator[str]:
    """Compare the run's next learning rates with those that the Trainer would have used."""
    config, schedule, first = adopted.config, adopted.schedule, adopted.folder.step + 1
    ended = config.schedule in HORIZON_SCHEDULES and (config.total_steps or 0) < first
    if schedule is not None and schedule.finished and ended:
        yield _finished(schedule)
        return
    steps = range(first, first + AHEAD)
    pairs = [f"step {step}: {_rate(config, step)}{_of_trainer(schedule, step)}" for step in steps]
    yield f"learning rates (schedule {config.schedule}): {', '.join(pairs)}"


def _finished(schedule: TrainerSchedule) -> str:
    return (
        f"the Trainer's schedule ({schedule.name}) is finished: step {schedule.step} was its last of "
        f"{schedule.total_steps}. The next file is refused until onward.yaml says how to go on, such as "
        f"schedule: constant and learning_rate: {schedule.peak:g} (its peak was {schedule.peak:g}); "
        "with adopt: --set schedule=constant --set learning_rate=RATE"
    )


def _rate(config: Config, step: int) -> str:
    try:
        return f"{learning_rate(config, step, step):.6g}"
    except ConfigError:
        return "none, the schedule ends before"


def _of_trainer(schedule: TrainerSchedule | None, step: int) -> str:
    if schedule is None:
        return ""
    rate = schedule.rate(step)
    return " (the Trainer's: unknown)" if rate is None else f" (the Trainer's: {rate:.6g})"


def _listed(values: Mapping[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key} {_plain(values[key])}" for key in keys)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | list | dict) and not value:
        return "none"
    items = cast(list[object], value) if isinstance(value, list) else [value]
    return " ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in items)
