"""How a model is treated in training, as its admission found; everything that builds a model needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Treatment:
    """What was found to be right for a model.

    Args:
        end_to_end: whether rows may be laid end to end; otherwise they are padded.
        left_out: what no gradient reaches: modules for an adapter, weights in full training.
        by_length: whether rows that are not laid end to end are computed only with others of the same length.
    """

    end_to_end: bool
    left_out: tuple[str, ...] = ()
    by_length: bool = False

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return the treatment that another process sent, as JSON values."""
        return cls(values["end_to_end"], tuple(values["left_out"]), values["by_length"])
