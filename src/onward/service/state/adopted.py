"""What an adopted run took over from its checkpoint, what was set and what is unknown, in sentences."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from onward.config import Config
from onward.errors import OnwardError
from onward.training import huggingface
from onward.training.adapter import ADAPTER_CONFIG
from onward.training.loading import read_optimizer
from onward.training.schedule import learning_rate

OF_OPTIMIZER = ("learning_rate", "weight_decay", "betas")
OF_TRAINER = ("batch_size", "gradient_accumulation", "epochs", "max_length", "max_grad_norm", "seed")
"""Keys that the Trainer had in its arguments, which the checkpoint holds as Python objects only."""


def describe(checkpoint: Path, step: int, config: Config, settings: Mapping[str, Any]) -> list[str]:
    """Return one line for each thing that a person should know of the new run.

    Args:
        step: the step that the run stands at.
        settings: what was set by hand; it won over the checkpoint.
    """
    return [*_taken(config, settings), *_rates(checkpoint, step, config), *_of_trainer(checkpoint, config, settings)]


def _taken(config: Config, settings: Mapping[str, Any]) -> Iterator[str]:
    values = config.flat()
    sources = {huggingface.OPTIMIZER: [key for key in OF_OPTIMIZER if key not in settings]}
    if config.method != "full":
        sources[ADAPTER_CONFIG] = [key for key in values if key.startswith("lora.") and key not in settings]
    for source, keys in sources.items():
        if keys:
            yield f"from {source}: {_listed(values, keys)}"
    if settings:
        yield f"set by you: {_listed(values, [key for key in values if key in settings])}"


def _rates(checkpoint: Path, step: int, config: Config) -> Iterator[str]:
    """Compare the Trainer's last learning rate with the run's next one; the schedule itself is not in the files."""
    following = learning_rate(config, step + 1, 1)
    rule = f"schedule {config.schedule}, warmup_steps {config.warmup_steps}"
    last = _last_rate(checkpoint)
    if last is None:
        yield f"the next step has learning rate {following:g} ({rule}); the Trainer's last one is unknown"
    elif last == following:
        yield f"the learning rate goes on at {following:g} ({rule})"
    else:
        yield (
            f"the learning rate goes from {last:g}, the Trainer's last, to {following:g} ({rule}); the checkpoint does "
            "not say which schedule the Trainer had"
        )


def _last_rate(checkpoint: Path) -> float | None:
    """Return the learning rate that the Trainer's scheduler stood at."""
    try:
        return float(cast(list[float], read_optimizer(checkpoint / huggingface.SCHEDULER)["_last_lr"])[0])
    except (OnwardError, LookupError, TypeError, ValueError):
        return None


def _of_trainer(checkpoint: Path, config: Config, settings: Mapping[str, Any]) -> Iterator[str]:
    values = config.flat()
    rows = _rows_per_device(checkpoint)
    if rows is not None and "batch_size" not in settings:
        yield (
            f"batch_size {config.batch_size} is this run's default; the Trainer had {rows} rows per device, times "
            "devices and accumulated batches, which the checkpoint does not say"
        )
    defaults = [key for key in OF_TRAINER if key not in settings and values[key] is not None]
    if defaults:
        yield (
            f"the Trainer's own values are unknown (training_args.bin is never read, it could run code), so the "
            f"defaults hold: {_listed(values, defaults)}; onward.yaml changes them before the first file"
        )


def _rows_per_device(checkpoint: Path) -> int | None:
    rows = json.loads((checkpoint / huggingface.TRAINER_STATE).read_bytes()).get("train_batch_size")
    return rows if isinstance(rows, int) else None


def _listed(values: Mapping[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key} {_plain(values[key])}" for key in keys)


def _plain(value: Any) -> str:
    items = cast(list[object], value) if isinstance(value, list) else [value]
    return " ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in items)
