"""The loss scale under float16, as state: gradients below 6e-8 would vanish, so the loss is multiplied.

As in mixed precision training by Micikevicius et al., 2018 (arXiv:1710.03740), and PyTorch's `GradScaler`, whose
numbers and file format these are, the scale is halved if a gradient overflows and doubled after many steps without
overflow. But a step that overflowed is computed again, with the same rows and the same dropout, instead of being
skipped: so no row is lost, and Adam's step count equals the run's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

FIRST, LEAST, LARGEST = 65536.0, 1.0, 2.0**24
"""The scale of the first step, and the lowest and the highest scale. All are powers of two, so they change no digit."""
PATIENCE = 2000
"""The number of steps without overflow after which the scale is doubled."""


@dataclass(frozen=True)
class LossScale:
    """The factor that the loss is multiplied by.

    Args:
        value: the factor, a power of two.
        steps: the steps since it last changed.
    """

    value: float = FIRST
    steps: int = 0

    @property
    def can_fall(self) -> bool:
        """Whether a step that overflowed may be tried again with half the scale."""
        return self.value > LEAST

    def halved(self) -> Self:
        """Return the scale with which a step is tried again after it overflowed."""
        return type(self)(max(LEAST, self.value / 2))

    def after_step(self) -> Self:
        """Return the scale for the next step, after one that did not overflow."""
        if self.steps + 1 < PATIENCE:
            return replace(self, steps=self.steps + 1)
        return type(self)(min(LARGEST, self.value * 2))

    def numbers(self) -> torch.Tensor:
        """Return both numbers, float64, shape (2,), for the digest."""
        return torch.tensor([self.value, self.steps], dtype=torch.float64)

    def to_file(self) -> dict[str, Any]:
        """Return the content of `scaler.pt`, in the form of `GradScaler.state_dict`."""
        return {
            "scale": self.value, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": PATIENCE,
            "_growth_tracker": self.steps,
        }  # fmt: skip

    @classmethod
    def from_file(cls, values: Mapping[str, Any]) -> Self:
        """Return the scale of a `scaler.pt`, within the bounds here; an empty one gives the first scale.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: it is not a scale.
        """
        if not values:
            return cls()
        value = 2.0 ** round(math.log2(float(values["scale"])))
        return cls(min(LARGEST, max(LEAST, value)), min(PATIENCE - 1, max(0, int(values["_growth_tracker"]))))
