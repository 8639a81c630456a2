"""How a model calls its layers: whether all of one kind are called alike, one after the other.

Stand-ins replace the layers and record their arguments. Each adds a number of its own to what it passes on, whose
gradient says how often the result uses it: equally often for all of them if only the last output is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from onward.training.admission.small.shorten import Layers


@dataclass(frozen=True)
class _Call:
    """What a layer was called with, and what its stand-in passed on."""

    given: tuple[Any, ...]
    named: Mapping[str, Any]
    passed: torch.Tensor


class _StandIn(nn.Module):
    """Passes on its input, shape (B, T, width); otherwise it looks like its layer.

    Args:
        calls: receives each call.
        in_tuple: whether layers of this model return a tuple.
    """

    def __init__(self, layer: nn.Module, calls: list[_Call], *, in_tuple: bool) -> None:
        super().__init__()
        vars(self).update(layer=layer, calls=calls, in_tuple=in_tuple)
        self.added = nn.Parameter(torch.zeros(()))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["layer"], name)

    def forward(self, hidden: torch.Tensor, *given: Any, **named: Any) -> Any:
        """Record the call."""
        pattern = torch.arange(hidden.numel(), device=hidden.device).view_as(hidden) % 7
        passed = hidden + (self.added.to(hidden.device) * pattern).to(hidden.dtype)
        vars(self)["calls"].append(_Call((hidden, *given), named, passed))
        return (passed,) if vars(self)["in_tuple"] else passed


def are_called_alike(layers: Layers, kinds: Sequence[object], logits: Callable[[], torch.Tensor]) -> bool:
    """Return whether each layer gets the output of the previous one, and otherwise what others of its kind get.

    Args:
        kinds: the kind of each layer.
        logits: computes what the model makes of a short row.
    """
    calls = _calls_of(layers, logits, in_tuple=False) or _calls_of(layers, logits, in_tuple=True)
    if calls is None:
        return False
    first: dict[object, _Call] = {}
    return all(_is_alike(first.setdefault(kind, call), call) for kind, call in zip(kinds, calls, strict=True))


def _calls_of(layers: Layers, logits: Callable[[], torch.Tensor], *, in_tuple: bool) -> list[_Call] | None:
    """Return the call of each layer; None if they are not called in turn, or other outputs than the last are used."""
    calls: list[_Call] = []
    stand_ins = [_StandIn(layer, calls, in_tuple=in_tuple) for layer in layers.layers]
    setattr(layers.parent, layers.name, nn.ModuleList(stand_ins))
    try:
        added = [each.added for each in stand_ins]
        used = torch.autograd.grad(logits().float().sum(), added)
    except Exception:  # it uses its layers in some other way
        return None
    finally:
        layers.restore()
    in_turn = all(after.given[0] is before.passed for before, after in pairwise(calls))
    is_used = all(bool(each) and torch.equal(each, used[0]) for each in used)
    return calls if len(calls) == len(stand_ins) and in_turn and is_used else None


def _is_alike(one: _Call, other: _Call) -> bool:
    return _is_same(one.given[1:], other.given[1:]) and _is_same(one.named, other.named)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values are the same to a layer; values of unknown types must be identical."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_is_same, one, other))  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)  # pyright: ignore
    return isinstance(one, bool | int | float | str) and one == other
