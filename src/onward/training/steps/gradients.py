"""Gradients taken off weights, added to others and put back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch


def taken(weights: Iterable[torch.Tensor]) -> list[Any]:
    """Return the gradients of weights, None for a weight without one, and leave the weights without any."""
    found: list[Any] = []
    for weight in weights:
        found.append(weight.grad)
        weight.grad = None
    return found


def put(weights: Iterable[torch.Tensor], gradients: Sequence[Any]) -> None:
    """Give weights these gradients, None for none."""
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient


def added(before: Sequence[Any], more: Sequence[Any]) -> list[Any]:
    """Add gradients to earlier ones where there are both, in the memory of the earlier ones; return what there is."""
    pairs = list(zip(before, more, strict=True))
    both = [pair for pair in pairs if pair[0] is not None and pair[1] is not None]
    if both:
        torch._foreach_add_(*map(list, zip(*both, strict=True)))  # pyright: ignore
    return [one if one is not None else other for one, other in pairs]
