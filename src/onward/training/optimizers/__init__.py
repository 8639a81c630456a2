"""Optimizers as named methods: everything that reads an optimizer's state goes through its method."""

from __future__ import annotations

from onward.training.optimizers.adamw import ADAMW, AdamW
from onward.training.optimizers.adamw_8bit import ADAMW_8BIT, AdamW8bit
from onward.training.optimizers.choice import OPTIMIZERS, optimizer_method
from onward.training.optimizers.method import (
    Entry,
    OptimizerMethod,
    file_state,
    saved_count,
    saved_groups,
    set_learning_rate,
)

__all__ = [
    "ADAMW", "ADAMW_8BIT", "OPTIMIZERS", "AdamW", "AdamW8bit", "Entry", "OptimizerMethod", "file_state",
    "optimizer_method", "saved_count", "saved_groups", "set_learning_rate",
]  # fmt: skip
