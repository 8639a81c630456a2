"""A model with its first layers only, one of each kind at least: what holds for those holds for more of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

from torch import nn

FEWEST = 2
"""Layers that stay in any case: one that hands its output to another."""
_PLACES = ("layer_idx", "training")
"""Values of a layer's parts that do not tell its kind."""


def shorten(model: nn.Module, works: Callable[[], object]) -> None:
    """Leave the first layers of a model, so many that each kind of its layers is among them.

    A kind is what a layer is made of and every plain value that its parts hold (whether it slides, turns, routes).
    A model that does not compute with fewer layers stays whole.

    Args:
        works: computes with the model; raises where that fails.
    """
    lists = list(_lists_of_layers(model))
    if not lists:
        return
    for parent, name, layers in lists:
        setattr(parent, name, layers[: _needed(layers)])
    try:
        works()
    except Exception:  # it counts its layers in a way of its own
        for parent, name, layers in lists:
            setattr(parent, name, layers)


def _lists_of_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.ModuleList]]:
    """Return the outermost lists of modules that can be shortened: parent, name, list."""
    found: list[tuple[nn.Module, str, nn.ModuleList]] = []
    inside: set[nn.Module] = set()
    for parent in model.modules():
        for name, part in parent.named_children():
            if isinstance(part, nn.ModuleList) and part not in inside:
                inside |= set(part.modules())
                if _needed(part) < len(part):
                    found.append((parent, name, part))
    return found


def _needed(layers: nn.ModuleList) -> int:
    """Return how many of the first layers hold every kind."""
    kinds = [_kind(layer) for layer in layers]
    return max([FEWEST, *(kinds.index(kind) + 1 for kind in set(kinds))])


def _kind(layer: nn.Module) -> tuple[object, ...]:
    values: list[object] = []
    for name, part in layer.named_modules():
        plain = {key: value for key, value in vars(part).items() if isinstance(value, bool | int | float | str | None)}
        shapes = [tuple(weight.shape) for weight in part.parameters(recurse=False)]
        values += [name, type(part).__qualname__, *shapes]
        values += [cast(object, (key, _plain(plain[key]))) for key in sorted(plain) if key not in _PLACES]
    return tuple(values)


def _plain(value: object) -> object:
    return "nan" if isinstance(value, float) and math.isnan(value) else value
