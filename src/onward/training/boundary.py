"""Crossing a boundary: what changes in the state between two files, and nothing else does."""

from __future__ import annotations

from onward.config import Config
from onward.data.order import Plan
from onward.digest import sha256_json
from onward.training.model import set_dropout
from onward.training.optim import apply_config
from onward.training.state import Cursor, TrainState


def cross_boundary(state: TrainState, config: Config, plan: Plan, position: int) -> None:
    """Put the config in force, apply its boundary policy and set the cursor to the start of a file."""
    apply_config(state.optimizer, config)
    set_dropout(state.model, config.lora.dropout)
    if config.boundary == "reset_moments":
        state.reset_moments()
    stream = sha256_json([state.cursor.stream, plan.sha256])
    state.cursor = Cursor(position, plan.sha256, 0, plan.steps, stream)
