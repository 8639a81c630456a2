"""The row lengths at which a model's rotary angles change.

Most kinds of RoPE rotate a position by the same angle in every row. Two depend on the longest position in the forward
pass: `longrope` uses other factors beyond the original length, and `dynamic` (NTK) another base for every length beyond
the model's own. Rows with different angles must not be in the same forward pass: they would all get those of the
longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn


@dataclass(frozen=True)
class Angles:
    """Which rows are rotated by the same angles.

    Args:
        bounds: lengths beyond which a row has other angles.
        own_beyond: the length beyond which every length has angles of its own; None if there is none.
    """

    bounds: tuple[int, ...] = ()
    own_beyond: int | None = None

    @property
    def are_constant(self) -> bool:
        """Whether every row has the same angles."""
        return not self.bounds and self.own_beyond is None

    def regime(self, length: int) -> tuple[int, int]:
        """Return a value that is equal for two rows if and only if they have the same angles."""
        own = length if self.own_beyond is not None and length > self.own_beyond else 0
        return sum(length > bound for bound in self.bounds), own


CONSTANT = Angles()
"""The same angles for rows of every length."""

EVERY_LENGTH = Angles(own_beyond=0)
"""Treats every length as having its own angles, so that rows of different lengths are never in one forward pass."""


def angles_of(config: Any, model: nn.Module | None = None) -> Angles:
    """Return the angles of a model, from its config (`transformers.PreTrainedConfig`).

    A config may have parameters for each kind of layer, and a nested config for text.

    Args:
        model: the model itself, whose modules know the length at which `dynamic` begins; without it, the config's is
            used.
    """
    text = config.get_text_config(decoder=True)
    own = int(getattr(text, "max_position_embeddings", None) or 0)
    bounds: set[int] = set()
    dynamic = False
    for parameters in _parameters(getattr(text, "rope_parameters", None)):
        kind = str(parameters.get("rope_type", parameters.get("type")))
        if "dynamic" in kind:
            dynamic = True
        elif kind == "longrope" or "long_mscale" in parameters:  # PhiMoE scales any kind by one of two values
            bounds.add(int(parameters.get("original_max_position_embeddings") or own))
    return Angles(tuple(sorted(bounds)), min(_beginnings(model), default=own) if dynamic else None)


def _beginnings(model: nn.Module | None) -> Iterator[int]:
    """Yield the length beyond which each `dynamic` module of a model has other angles."""
    for module in model.modules() if model is not None else ():
        if "dynamic" in str(vars(module).get("rope_type")) and "original_max_seq_len" in vars(module):
            yield int(vars(module)["original_max_seq_len"])


def _parameters(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield each set of RoPE parameters: the value itself, or the sets for each kind of layer inside it."""
    if not isinstance(value, Mapping):
        return
    held = cast(Mapping[str, Any], value)
    if "rope_type" in held or "type" in held:
        yield held
    for inner in held.values():
        yield from _parameters(inner)
