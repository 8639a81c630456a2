"""What tests of adoption share: checkpoints of a stock Trainer, and a run that goes on from one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stock
import torch
from states import read_state
from stock import HORIZON, STEPS, Saved

from onward import Run

RATE = 3e-3
OPTIMIZER: dict[str, Any] = {"learning_rate": RATE, "adam_beta1": 0.85, "adam_beta2": 0.97, "weight_decay": 0.1}
SETTINGS: dict[str, Any] = {"evaluation": {"share": 0}, "batch_size": 4, "max_length": 128}


def train_stock(model: Any, output: Path, **settings: Any) -> Saved:
    """Train a few steps with the stock Trainer, its last one saved."""
    steps = settings.pop("steps", STEPS)
    stop: dict[str, Any] = {"max_steps": HORIZON, "callbacks": [stock.StopAt(steps)]}
    trainer = stock.trainer(model, output, **{**OPTIMIZER, **stop, **settings})
    trainer.train()
    return Saved(output / f"checkpoint-{steps}", model, stock.moments(model, trainer.optimizer))


def assert_went_on(run: Path, first: int, *, adam: int | None = None) -> None:
    """The run stands five steps after `first`, Adam's counters too, and proves itself, also by training again."""
    state = read_state(run)
    assert (first + 5, {(first if adam is None else adam) + 5}) == (state["global_step"], state["adam"])
    opened = Run(run)
    proof = opened.verify(deep=True)
    assert [] == [check for check in proof.checks if not check.ok]
    assert opened.verify().ok
    (entry,) = opened.history()
    assert (first + 1, first + 5, "done") == (entry["first_step"], entry["last_step"], entry["state"])


def change(name: str, edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Return a function that edits a value that `torch.save` or JSON wrote."""

    def put(folder: Path) -> None:
        path = folder / name
        if path.suffix == ".json":
            values = json.loads(path.read_text())
            edit(values)
            path.write_text(json.dumps(values))
            return
        values = torch.load(path, weights_only=True)
        edit(values)
        torch.save(values, path)

    return put
