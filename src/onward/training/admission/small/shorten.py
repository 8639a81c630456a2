"""Shortens a model to its first layers, at least one of each kind: what holds for those holds for more of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

from torch import nn

FEWEST = 2
"""How many layers always stay, so that one passes its output to another."""
_PLACES = ("layer_idx", "training")
"""Attributes of a layer's parts that do not belong to its kind."""


Kind: TypeAlias = tuple[object, ...]
"""The types that a layer is made of, and every plain value that its parts hold."""


@dataclass(frozen=True)
class Layers:
    """A list of layers that is longer than needed to have one of each kind.

    Args:
        parent: the module that holds the list.
        name: the attribute of the parent.
        path: the name of the list in the model.
        layers: all of them.
        kinds: the kind of each.
        needed: how many of the first layers contain every kind.
    """

    parent: nn.Module
    name: str
    path: str
    layers: nn.ModuleList
    kinds: list[Kind]
    needed: int

    def shorten(self) -> None:
        """Keep only the first layers."""
        setattr(self.parent, self.name, self.layers[: self.needed])

    def restore(self) -> None:
        """Restore all layers."""
        setattr(self.parent, self.name, self.layers)


def shorten(lists: Sequence[Layers], works: Callable[[], object]) -> None:
    """Keep only the first layers of a model's lists, enough to have each kind among them.

    A kind is what a layer is made of and every plain value that its parts hold (sliding window, rotary position,
    routing). A model that does not run with fewer layers stays whole.

    Args:
        lists: what `layers_to_shorten` found.
        works: runs the model; raises if that fails.
    """
    if not lists:
        return
    for each in lists:
        each.shorten()
    try:
        works()
    except Exception:  # it counts its layers in its own way
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
    """Return the types that a layer is made of, and every plain value that its parts hold."""
    values: list[object] = []
    for name, part in layer.named_modules():
        plain = {key: value for key, value in vars(part).items() if isinstance(value, bool | int | float | str | None)}
        shapes = [tuple(weight.shape) for weight in part.parameters(recurse=False)]
        values += [name, type(part).__qualname__, *shapes]
        values += [cast(object, (key, _plain(plain[key]))) for key in sorted(plain) if key not in _PLACES]
    return tuple(values)


def _plain(value: object) -> object:
    return "nan" if isinstance(value, float) and math.isnan(value) else value
