"""Narrows a model's perceptrons to some of their inner columns: what holds for those holds for more of them.

Each column is the product of one row of the preceding matrices with a hidden state. That all columns are then treated
alike is proven on the perceptron itself, by giving it known values in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from onward.training.admission.small.narrow import still
from onward.training.device.errors import is_of_the_device
from onward.training.layers.fused_lora import ADAPTER
from onward.training.layers.twin import HOOKS
from onward.training.seeds import seeded

COLUMNS = 256
"""How many inner columns stay."""
_ROWS = 2
"""How many hidden states a perceptron is tested on."""
_WEIGHTS = frozenset(
    ("weight", "bias", "base_layer.weight", "base_layer.bias", f"lora_A.{ADAPTER}.weight", f"lora_B.{ADAPTER}.weight")
)
"""What a linear layer may contain, with or without an adapter."""


@dataclass(frozen=True)
class _Perceptron:
    """Linear layers from the width of a model to the inner width, and one back; nothing else has weights.

    Args:
        parent: the module they belong to.
        into: the first layer, or two of which one is the gate.
        back: the last one.
        inner, outer: the widths.
    """

    parent: nn.Module
    into: tuple[nn.Module, ...]
    back: nn.Module
    inner: int
    outer: int

    def treats_columns_alike(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Return whether permuted inner columns come out permuted, to the last bit, and nothing else is done."""
        values = [torch.randn(1, _ROWS, self.inner, device=device).to(dtype) for _ in self.into]
        order = torch.randperm(self.inner, device=device)
        before = self._inner_states(values, device, dtype)
        after = self._inner_states([each[..., order] for each in values], device, dtype)
        return before is not None and after is not None and torch.equal(before[..., order], after)

    def _inner_states(
        self, values: list[torch.Tensor], device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Return what the last layer gets if the first ones return these values; None if more is done."""
        state, result = (torch.randn(1, _ROWS, self.outer, device=device).to(dtype) for _ in range(2))
        taken: list[torch.Tensor] = []
        asked: list[bool] = []

        def give(value: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda given: (asked.append(torch.equal(given, state)), value)[1]

        def take(given: torch.Tensor) -> torch.Tensor:
            taken.append(given)
            return result

        stand_ins = [*zip(self.into, map(give, values), strict=True), (self.back, take)]
        for layer, forward in stand_ins:
            vars(layer)["forward"] = forward
        try:
            returned = self.parent(state)
        finally:
            for layer, _ in stand_ins:
                del vars(layer)["forward"]
        plain = returned is result and asked == [True] * len(self.into) and len(taken) == 1
        return taken[0] if plain and taken[0].shape == values[0].shape else None

    def cut(self) -> Callable[[], None]:
        """Keep only the first columns; return a function that restores all of them."""
        whole = [(weight, weight.data) for layer in (*self.into, self.back) for weight in layer.parameters()]
        for layer in self.into:
            plain = _plain(layer)
            rows = [plain.weight, plain.bias, *([] if plain is layer else [cast(Any, layer).lora_B[ADAPTER].weight])]
            for weight in rows:
                if weight is not None:
                    weight.data = weight.data[:COLUMNS]
        last = _plain(self.back)
        for weight in [last.weight, *([] if last is self.back else [cast(Any, self.back).lora_A[ADAPTER].weight])]:
            weight.data = weight.data[:, :COLUMNS].contiguous()

        def restore() -> None:
            for weight, data in whole:
                weight.data = data

        return restore


def narrow_width(model: nn.Module, device: torch.device, dtype: torch.dtype, works: Callable[[], object]) -> int:
    """Keep only the first inner columns of a model's perceptrons, if the others could not show anything else.

    Args:
        works: computes with the model; raises where that fails.

    Returns:
        The number of perceptrons that were narrowed.
    """
    with still(model), seeded(0, device), torch.no_grad():
        found = [each for each in _perceptrons(model) if _is_alike(each, device, dtype)]
    restores = [each.cut() for each in found]
    try:
        if found:
            works()
    except Exception as error:  # it depends on the width in some way of its own
        for restore in restores:
            restore()
        if is_of_the_device(error):
            raise
        return 0
    return len(found)


def _is_alike(perceptron: _Perceptron, device: torch.device, dtype: torch.dtype) -> bool:
    try:
        return perceptron.treats_columns_alike(device, dtype)
    except Exception as error:  # it needs more than hidden states
        if is_of_the_device(error):
            raise
        return False


def _perceptrons(model: nn.Module) -> Iterator[_Perceptron]:
    """Yield modules that look like perceptrons with many inner columns and share no weight with anything else."""
    holders: dict[int, int] = {}
    for part in model.modules():
        for weight in part.parameters(recurse=False):
            holders[id(weight)] = holders.get(id(weight), 0) + 1
    for parent in model.modules():
        layers = [part for part in parent.children() if next(part.parameters(), None) is not None]
        if list(parent.parameters(recurse=False)) or not 2 <= len(layers) <= 3 or not all(map(_is_linear, layers)):
            continue
        widths = [(_plain(layer).in_features, _plain(layer).out_features) for layer in layers]
        outer, inner = widths[0]
        is_shaped = widths[-1] == (inner, outer) != (outer, inner) and set(widths[:-1]) == {(outer, inner)}
        is_own = all(holders[id(weight)] == 1 for layer in layers for weight in layer.parameters())
        if is_shaped and is_own and inner >= 2 * COLUMNS:
            yield _Perceptron(parent, tuple(layers[:-1]), layers[-1], inner, outer)


def _is_linear(layer: nn.Module) -> bool:
    """Whether a layer multiplies by a matrix and adds a bias, with at most a plain adapter, and has no hooks."""
    if type(layer) is LoraLinear:
        plain: Any = layer.base_layer
        if layer.lora_variant or layer.fan_in_fan_out or list(layer.lora_A) != [ADAPTER]:
            return False
    else:
        plain = layer
    held = vars(layer)
    return (
        type(plain) is nn.Linear
        and {name for name, _ in layer.named_parameters()} <= _WEIGHTS
        and all(type(weight) is nn.Parameter for weight in layer.parameters())
        and "forward" not in held
        and not any(held[name] for name in HOOKS)
    )


def _plain(layer: nn.Module) -> nn.Linear:
    return cast(nn.Linear, layer.base_layer if isinstance(layer, LoraLinear) else layer)
