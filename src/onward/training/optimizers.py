"""Optimizers as named methods: what is built, which tensors it keeps, how it counts and what its settings are.

Whoever reads the state of an optimizer (checkpoints, the handover, `verify`) asks its method.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from onward.config import Config

_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""As in `Trainer.get_decay_parameter_names` of transformers 5."""

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
        """Names of the tensors that it keeps for each parameter, its step counter not among them."""
        ...

    @property
    def counter(self) -> str:
        """Name of the step counter that it keeps for each parameter."""
        ...

    def groups(self, model: nn.Module) -> tuple[Named, ...]:
        """Return the trainable parameters by name, group by group, in the order of `optimizer.pt`."""
        ...

    def build(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        """Return the optimizer of a model's trainable parameters, with the config's settings in force."""
        ...

    def configure(self, optimizer: torch.optim.Optimizer, config: Config) -> None:
        """Put the config's settings in force, also over what a loaded `optimizer.pt` says."""
        ...

    def count(self, entries: Collection[Entry], parameters: int) -> int:
        """Return the steps that the optimizer has counted, on which all parameters must agree (-1: they do not).

        Args:
            entries: what is kept, one entry for each parameter that has any.
            parameters: how many parameters there are.
        """
        ...

    def bytes(self, weights: Mapping[str, torch.Tensor]) -> int:
        """Return the size of the state kept for these weights, counters aside."""
        ...

    def problem(self, parameter: torch.Tensor, entry: Entry | None) -> str | None:
        """Return why an entry cannot belong to a parameter; None where it fits."""
        ...


class AdamW:
    """AdamW with the parameter groups of transformers' Trainer, so that each can load the other's `optimizer.pt`."""

    name = "adamw"
    slots = ("exp_avg", "exp_avg_sq")
    counter = "step"

    def groups(self, model: nn.Module) -> tuple[Named, Named]:
        """Return the trainable parameters with and without weight decay, in `named_parameters` order."""
        decayed = set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY))
        trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        return (
            [(name, parameter) for name, parameter in trainable if name in decayed],
            [(name, parameter) for name, parameter in trainable if name not in decayed],
        )

    def build(self, model: nn.Module, config: Config) -> torch.optim.AdamW:
        """Return AdamW over two groups, as the Trainer makes them."""
        groups = [{"params": [parameter for _, parameter in group]} for group in self.groups(model)]
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, eps=config.eps, fused=True)
        self.configure(optimizer, config)
        return optimizer

    def configure(self, optimizer: torch.optim.Optimizer, config: Config) -> None:
        """Put weight decay, betas, eps and the peak learning rate in force."""
        for group, weight_decay in zip(optimizer.param_groups, (config.weight_decay, 0.0), strict=True):
            group["weight_decay"] = weight_decay
            group["betas"] = config.betas
            group["eps"] = config.eps
            group["initial_lr"] = config.learning_rate

    def count(self, entries: Collection[Entry], parameters: int) -> int:
        """Return Adam's step counter; 0 before the first step."""
        counts = {int(entry[self.counter]) for entry in entries}
        if len(counts) > 1 or (counts and len(entries) != parameters):
            return -1
        return counts.pop() if counts else 0

    def bytes(self, weights: Mapping[str, torch.Tensor]) -> int:
        """Return the bytes of two moments, each of the weights' size."""
        return len(self.slots) * sum(tensor.numel() * tensor.element_size() for tensor in weights.values())

    def problem(self, parameter: torch.Tensor, entry: Entry | None) -> str | None:
        """Return what is missing, or which moment has another shape than the parameter."""
        if entry is None or set(entry) != {self.counter, *self.slots}:
            return "the optimizer holds no AdamW moments for it"
        shape = tuple(parameter.shape)
        wrong = [slot for slot in self.slots if tuple(entry[slot].shape) != shape]
        return f"its {wrong[0]} has shape {tuple(entry[wrong[0]].shape)} instead of {shape}" if wrong else None


ADAMW = AdamW()
OPTIMIZERS: Mapping[str, OptimizerMethod] = {ADAMW.name: ADAMW}
"""Every method by name."""


def optimizer_method(config: Config) -> OptimizerMethod:
    """Return the method that a config names; there is one so far, so no key names it yet."""
    del config
    return OPTIMIZERS[ADAMW.name]


def saved_groups(saved: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parameter groups of an `optimizer.pt`.

    Raises:
        KeyError, TypeError: it holds none.
    """
    return [dict(group) for group in cast(list[Mapping[str, Any]], saved["param_groups"])]


def saved_count(method: OptimizerMethod, saved: Mapping[str, Any]) -> int:
    """Return the steps that an `optimizer.pt` has counted; -1 where its parameters differ."""
    entries = cast(dict[int, Entry], saved["state"])
    return method.count(list(entries.values()), sum(len(group["params"]) for group in saved_groups(saved)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Put a learning rate in force for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
