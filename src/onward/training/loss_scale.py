"""The scale of the loss under float16, as state: gradients below 6e-8 would vanish, so the loss is multiplied.

As in mixed precision training by Micikevicius et al., 2018 (arXiv:1710.03740), and PyTorch's `GradScaler`, whose
numbers and file these are, the scale is halved where a gradient overflows and doubled after many steps without. But a
step that overflowed is computed again, with the same rows and the same dropout, instead of being left out: so no row is
lost, and Adam counts what the run counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

FIRST, LEAST, LARGEST = 65536.0, 1.0, 2.0**24
"""Scale of the first step, and what none is below or above. All are powers of two: they change no digit."""
PATIENCE = 2000
"""Steps without overflow after which the scale is doubled."""


@dataclass(frozen=True)
class LossScale:
    """What the loss is multiplied by.

    Args:
        value: the factor, a power of two.
        steps: steps since it last changed.
    """

    value: float = FIRST
    steps: int = 0

    @property
    def can_fall(self) -> bool:
        """Whether a step that overflowed may be tried with half of it."""
        return self.value > LEAST

    def halved(self) -> Self:
        """Return what a step is tried with after it overflowed."""
        return type(self)(max(LEAST, self.value / 2))

    def after_step(self) -> Self:
        """Return what the next step is tried with, after one that did not overflow."""
        if self.steps + 1 < PATIENCE:
            return replace(self, steps=self.steps + 1)
        return type(self)(min(LARGEST, self.value * 2))

    def numbers(self) -> torch.Tensor:
        """Return both numbers, float64, shape (2,): what a digest is taken of."""
        return torch.tensor([self.value, self.steps], dtype=torch.float64)

    def to_file(self) -> dict[str, Any]:
        """Return it as `scaler.pt` holds it: as `GradScaler.state_dict` returns it."""
        return {
            "scale": self.value, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": PATIENCE,
            "_growth_tracker": self.steps,
        }  # fmt: skip

    @classmethod
    def from_file(cls, values: Mapping[str, Any]) -> Self:
        """Return the scale of a `scaler.pt`, in the bounds of ours; one that is empty says nothing.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: it is none.
        """
        if not values:
            return cls()
        value = 2.0 ** round(math.log2(float(values["scale"])))
        return cls(min(LARGEST, max(LEAST, value)), min(PATIENCE - 1, max(0, int(values["_growth_tracker"]))))
