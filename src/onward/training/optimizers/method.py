"""The interface of an optimizer: how it is built, which tensors it keeps, how it counts steps, and its file format.

Everything that reads an optimizer's state (checkpoints, the handover, `verify`, `adopt`) goes through its method.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol, cast

import torch
from torch import nn

from onward.config import Config

Named = list[tuple[str, nn.Parameter]]
Entry = Mapping[str, torch.Tensor]
"""What an optimizer keeps for one parameter, by slot."""


class OptimizerMethod(Protocol):
    """One way to turn gradients into steps."""

    @property
    def name(self) -> str:
        """Its key in `OPTIMIZERS`."""
        ...

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the moments that it keeps for each parameter, without its step counter."""
        ...

    @property
    def counter(self) -> str:
        """Name of the step counter that it keeps for each parameter."""
        ...

    def groups(self, model: nn.Module) -> tuple[Named, ...]:
        """Return the trainable parameters by name, group by group, in the order of `optimizer.pt`."""
        ...

    def require(self, device: torch.device) -> None:
        """Refuse a device on which it cannot compute, or a missing package.

        Raises:
            ModelError: steps cannot be taken here; the hint says what is missing.
        """
        ...

    def build(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        """Return the optimizer of a model's trainable parameters, with the config's settings.

        Raises:
            ModelError: steps cannot be taken on the model's device.
        """
        ...

    def configure(self, optimizer: torch.optim.Optimizer, config: Config) -> None:
        """Apply the config's settings, overriding those of a loaded `optimizer.pt`."""
        ...

    def count(self, entries: Collection[Entry], parameters: int) -> int:
        """Return the steps that the optimizer has counted, on which all parameters must agree (-1: they do not).

        Args:
            entries: what is kept, one entry per parameter that has any.
            parameters: how many parameters there are.
        """
        ...

    def bytes(self, weights: Mapping[str, torch.Tensor]) -> int:
        """Return the size of the state kept for these weights, without counters."""
        ...

    def workspace(self, weights: Mapping[str, torch.Tensor]) -> int:
        """Return what a step on a CPU takes for a moment beside the state, if that is much."""
        ...

    def problem(self, parameter: torch.Tensor, entry: Entry | None) -> str | None:
        """Return why an entry cannot belong to a parameter; None if it fits."""
        ...

    def to_file(self, entry: Entry) -> dict[str, Any]:
        """Return an entry in the form of `optimizer.pt`, as the Trainer's optimizer of this kind saves it."""
        ...

    def from_file(self, entry: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return an entry of an `optimizer.pt` in the optimizer's own form.

        Raises:
            ValueError: its numbers mean something else here.
        """
        ...


def file_state(method: OptimizerMethod, optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's `state_dict` in the form of `optimizer.pt`."""
    held = cast(Mapping[int, Entry], optimizer["state"])
    return {**optimizer, "state": {index: method.to_file(entry) for index, entry in held.items()}}


def saved_groups(saved: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parameter groups of an `optimizer.pt`.

    Raises:
        KeyError, TypeError: it has none.
    """
    return [dict(group) for group in cast(list[Mapping[str, Any]], saved["param_groups"])]


def saved_count(method: OptimizerMethod, saved: Mapping[str, Any]) -> int:
    """Return the steps that an `optimizer.pt` has counted; -1 if its parameters disagree."""
    entries = cast(dict[int, Entry], saved["state"])
    return method.count(list(entries.values()), sum(len(group["params"]) for group in saved_groups(saved)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
