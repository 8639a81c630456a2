"""A model with its first layers only, one of each kind at least: what holds for those holds for more of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

from torch import nn

FEWEST = 2
"""Layers that stay in any case: one that hands its output to another."""
_PLACES = ("layer_idx", "training")
"""Values of a layer's parts that do not tell its kind."""


Kind: TypeAlias = tuple[object, ...]
"""What a layer is made of, and every plain value that its parts hold."""


@dataclass(frozen=True)
class Layers:
    """A list of layers that has more of them than it takes to have one of each kind.

    Args:
        parent: the module that holds the list.
        name: under which name.
        path: the list's name in the model.
        layers: all of them.
        kinds: that of each.
        needed: how many of the first ones hold every kind.
    """

    parent: nn.Module
    name: str
    path: str
    layers: nn.ModuleList
    kinds: list[Kind]
    needed: int

    def shorten(self) -> None:
        """Leave the first ones."""
        setattr(self.parent, self.name, self.layers[: self.needed])

    def restore(self) -> None:
        """Have all of them again."""
        setattr(self.parent, self.name, self.layers)


def shorten(lists: Sequence[Layers], works: Callable[[], object]) -> None:
    """Leave the first layers of a model's lists, so many that each kind of its layers is among them.

    A kind is what a layer is made of and every plain value that its parts hold (whether it slides, turns, routes).
    A model that does not compute with fewer layers stays whole.

    Args:
        lists: what `layers_to_shorten` found.
        works: computes with the model; raises where that fails.
    """
    if not lists:
        return
    for each in lists:
        each.shorten()
    try:
        works()
    except Exception:  # it counts its layers in a way of its own
        for each in lists:
            each.restore()


def layers_to_shorten(model: nn.Module) -> list[Layers]:
    """Return the outermost lists of layers that can be shortened."""
    found: list[Layers] = []
    inside: set[nn.Module] = set()
    for path, parent in model.named_modules():
        for name, part in parent.named_children():
            if isinstance(part, nn.ModuleList) and part not in inside:
                inside |= set(part.modules())
                kinds = [kind_of_layer(layer) for layer in part]
                needed = max([FEWEST, *(kinds.index(kind) + 1 for kind in set(kinds))])
                if needed < len(part):
                    found.append(Layers(parent, name, f"{path}.{name}".lstrip("."), part, kinds, needed))
    return found


def kind_of_layer(layer: nn.Module) -> Kind:
    """Return what a layer is made of, and every plain value that its parts hold."""
    values: list[object] = []
    for name, part in layer.named_modules():
        plain = {key: value for key, value in vars(part).items() if isinstance(value, bool | int | float | str | None)}
        shapes = [tuple(weight.shape) for weight in part.parameters(recurse=False)]
        values += [name, type(part).__qualname__, *shapes]
        values += [cast(object, (key, _plain(plain[key]))) for key in sorted(plain) if key not in _PLACES]
    return tuple(values)


def _plain(value: object) -> object:
    return "nan" if isinstance(value, float) and math.isnan(value) else value
