"""The available optimizers, and the one that a config names."""

from __future__ import annotations

from collections.abc import Mapping

from onward.config import Config
from onward.training.optimizers.adamw import ADAMW
from onward.training.optimizers.adamw_8bit import ADAMW_8BIT
from onward.training.optimizers.method import OptimizerMethod

OPTIMIZERS: Mapping[str, OptimizerMethod] = {ADAMW.name: ADAMW, ADAMW_8BIT.name: ADAMW_8BIT}
"""Every method by name."""


def optimizer_method(config: Config) -> OptimizerMethod:
    """Return the method that a config names."""
    return OPTIMIZERS[config.optimizer]
