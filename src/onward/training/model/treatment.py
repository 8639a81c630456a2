"""How the model at hand is treated in training, as its admission found; whoever builds a model asks it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Treatment:
    """What was found to be right for a model.

    Args:
        end_to_end: rows may be laid end to end; else they are padded.
        left_out: what no gradient reaches: modules for an adapter, weights where all are trained.
        by_length: rows that are not laid end to end are computed with those of their own length only.
    """

    end_to_end: bool
    left_out: tuple[str, ...] = ()
    by_length: bool = False
