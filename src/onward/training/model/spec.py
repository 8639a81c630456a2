"""What a model is built from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from onward.config import Config


@dataclass(frozen=True)
class ModelSpec:
    """What decides how the model of a run is built.

    Args:
        config: its method, adapter and seed.
        base: folder of the base model.
        device: the device on which it computes.
        dtype: compute type.
    """

    config: Config
    base: Path
    device: torch.device
    dtype: torch.dtype
