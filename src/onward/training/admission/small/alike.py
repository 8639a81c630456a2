"""Finds which weights a gradient reaches from the first layers of a model, for all layers like one of them.

Layers of one kind are reached alike unless something depends on which of them is running: the loop that calls them,
which is inspected or tried with stand-ins, or their own code, which gets a number that cannot be used. Otherwise the
whole model has to be tried.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any, NoReturn, cast

import torch
from torch import nn

from onward.training.admission.small.calls import are_called_alike
from onward.training.admission.small.shorten import Kind, Layers

NUMBER = "layer_idx"
"""The attribute in which transformers stores the index of a layer in its parts."""
PLAIN = (bool, int, float, str, type(None))
"""Types of values by which layers are already distinguished."""
PLACE = re.compile(r"\.\d+\.")
"""The index of a layer in the name of a module, which PEFT keeps in its layers."""
COUNTS = frozenset(("enumerate", "range", "zip", "len"))
"""Functions by which a loop over layers may know which one it has reached."""


class _NoNumber:
    """Takes the place of a layer's index; any use of it is an error."""

    def _asked(self, *_: object) -> NoReturn:
        raise LookupError("a layer asks for its number")

    __eq__ = __ne__ = __hash__ = __bool__ = __str__ = __repr__ = __format__ = _asked  # pyright: ignore


def reached_by_kinds(
    model: nn.Module,
    lists: Sequence[Layers],
    reached: Callable[[], Collection[str]],
    logits: Callable[[], torch.Tensor],
) -> set[str] | None:
    """Return the names of the trained weights that a gradient reaches; None if the whole model has to be tried.

    Args:
        lists: what `layers_to_shorten` found.
        reached: runs the model, and returns the weights that were reached.
        logits: computes the model's logits of a short row.
    """
    kinds_of = [[_kind(*one) for one in zip(each.layers, each.kinds, strict=True)] for each in lists]
    together = list(zip(lists, kinds_of, strict=True))
    if not lists or not all(_calls_each_alike(each) or are_called_alike(each, own, logits) for each, own in together):
        return None
    found = _of_first_layers(model, lists, reached)
    if found is None:
        return None
    for each, kinds in together:
        for number in range(each.needed, len(kinds)):
            like = _layer_like(each, [place for place in range(each.needed) if kinds[place] == kinds[number]], found)
            if like is None:
                return None
            place = f"{each.path}.{like}."
            found |= {f"{each.path}.{number}.{name.removeprefix(place)}" for name in found if name.startswith(place)}
    return found


def _of_first_layers(
    model: nn.Module, lists: Collection[Layers], reached: Callable[[], Collection[str]]
) -> set[str] | None:
    numbered = [part for each in lists for part in each.layers.modules() if isinstance(vars(part).get(NUMBER), int)]
    numbers = [vars(part)[NUMBER] for part in numbered]
    try:
        for each in lists:
            each.shorten()
        for part in numbered:
            vars(part)[NUMBER] = _NoNumber()
        return set(reached())
    except Exception:  # it counts its layers, or cannot do with fewer
        model.zero_grad(set_to_none=True)
        return None
    finally:
        for part, number in zip(numbered, numbers, strict=True):
            vars(part)[NUMBER] = number
        for each in lists:
            each.restore()


def _layer_like(layers: Layers, own: Sequence[int], found: Collection[str]) -> int | None:
    """Return one of the first layers of a kind; None if only the last of those is, or if they are not reached alike.

    Args:
        own: the indices of that kind among the first layers.
    """
    told = [{name.removeprefix(f"{layers.path}.{place}.") for name in found
             if name.startswith(f"{layers.path}.{place}.")} for place in own]  # fmt: skip
    if not own or own[0] == layers.needed - 1 or any(names != told[0] for names in told):
        return None
    return own[0]


def _kind(layer: nn.Module, kind: Kind) -> Kind:
    """Return the kind of a layer, which of its weights are trained, and everything else that it holds."""
    weights = [(name, weight.requires_grad, weight.dtype) for name, weight in layer.named_parameters()]
    return (kind, *weights, *_held(layer))


def _held(layer: nn.Module) -> Iterator[object]:
    for part in layer.modules():
        for key, value in sorted(vars(part).items()):
            if not key.startswith("_") and not isinstance(value, PLAIN):
                is_container = isinstance(value, list | tuple | dict | set | torch.device | torch.dtype)
                yield key, PLACE.sub(".*.", repr(cast(object, value))) if is_container else id(value)


def _calls_each_alike(layers: Layers) -> bool:
    """Whether the module that holds a list of layers goes through it regardless of their indices."""
    forward: Any = inspect.unwrap(type(layers.parent).forward)
    if "forward" in vars(layers.parent) or not isinstance(forward, FunctionType):
        return False
    names = set(_names(forward.__code__))
    return layers.name in names and not names & COUNTS


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)
