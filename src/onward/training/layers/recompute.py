"""Recomputes layers in the backward pass, so that only their inputs are kept: activation checkpointing.

It gives the same bits: the second pass of a layer draws the same random numbers as the first one. That is proven on the
model itself before it is used, so it may be switched on and off between two parts of a step. (Chen et al., 2016,
"Training Deep Nets with Sublinear Memory Cost"; `torch.utils.checkpoint`.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

FLAG, FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"
"""Attributes that make a layer of transformers pass its forward pass to a function that repeats it."""


class Recomputation:
    """Switches the recomputation of a model's layers on and off.

    Args:
        model: any model, with or without an adapter around it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parts = [part for part in model.modules() if isinstance(getattr(part, FLAG, None), bool)]

    @contextlib.contextmanager
    def on(self, wanted: bool = True) -> Generator[None]:
        """Make forward passes in the body keep only the inputs of layers, if `wanted`."""
        if not wanted:
            yield
            return
        before = [(part, getattr(part, FLAG), getattr(part, FUNCTION, None)) for part in self._parts]
        repeat = partial(checkpoint, use_reentrant=False, preserve_rng_state=True)
        for part in self._parts:
            _switch(part, True, repeat)
        try:
            yield
        finally:
            for part, flag, function in before:
                _switch(part, flag, function)

    def is_exact(self, gradients: Callable[[], dict[str, torch.Tensor]]) -> bool:
        """Return whether layers of this model are recomputed at all, and with the same bits.

        Args:
            gradients: computes the gradient of a small batch, each time with the same seed and without other effects.
        """
        expected = gradients()
        with self.on(), _counted(self._model) as calls:
            actual = gradients()
        again = any(count > 1 for count in calls.values())
        same = expected.keys() == actual.keys() and all(
            torch.equal(gradient, actual[name]) for name, gradient in expected.items()
        )
        return again and same


def _switch(part: nn.Module, flag: bool, function: object) -> None:
    """Set both attributes; if there was no function, it is removed again."""
    setattr(part, FLAG, flag)
    if function is None:
        vars(part).pop(FUNCTION, None)
    else:
        setattr(part, FUNCTION, function)


@contextlib.contextmanager
def _counted(model: nn.Module) -> Generator[dict[nn.Module, int]]:
    """Count how often each module inside a list of layers runs."""
    calls: dict[nn.Module, int] = {}

    def count(part: nn.Module, _arguments: object) -> None:
        calls[part] = calls.get(part, 0) + 1

    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    inside = {inner for layers in lists for layer in layers for inner in layer.children()}
    handles = [cast(Any, part).register_forward_pre_hook(count) for part in inside]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
