"""PyTorch's AdamW, with moments in the type of the weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from onward.config import Config
from onward.training.optimizers.method import Entry, Named
from onward.training.transfer import in_main_memory

_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""As in `Trainer.get_decay_parameter_names` of transformers 5."""


class AdamW:
    """AdamW with the parameter groups of transformers' Trainer, so that each can load the other's `optimizer.pt`."""

    name = "adamw"
    slots: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    counter = "step"

    def groups(self, model: nn.Module) -> tuple[Named, Named]:
        """Return the trainable parameters with and without weight decay, in `named_parameters` order."""
        decayed = set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY))
        trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        return (
            [(name, parameter) for name, parameter in trainable if name in decayed],
            [(name, parameter) for name, parameter in trainable if name not in decayed],
        )

    def require(self, device: torch.device) -> None:
        """Accept any device: PyTorch has AdamW everywhere."""

    def build(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        """Return AdamW over two groups like the Trainer's."""
        groups = [{"params": [parameter for _, parameter in group]} for group in self.groups(model)]
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, eps=config.eps, fused=True)
        self.configure(optimizer, config)
        return optimizer

    def configure(self, optimizer: torch.optim.Optimizer, config: Config) -> None:
        """Set weight decay, betas, eps and the peak learning rate."""
        for group, weight_decay in zip(optimizer.param_groups, (config.weight_decay, 0.0), strict=True):
            group["weight_decay"] = weight_decay
            group["betas"] = config.betas
            group["eps"] = config.eps
            group["initial_lr"] = config.learning_rate

    def count(self, entries: Collection[Entry], parameters: int) -> int:
        """Return Adam's step counter; 0 before the first step."""
        counters = [torch.as_tensor(entry[self.counter]) for entry in entries]
        counts = {int(counter) for _, counter in in_main_memory(("", counter) for counter in counters)}
        if len(counts) > 1 or (counts and len(entries) != parameters):
            return -1
        return counts.pop() if counts else 0

    def bytes(self, weights: Mapping[str, torch.Tensor]) -> int:
        """Return the bytes of two moments, each of the weights' size."""
        return len(self.slots) * sum(tensor.numel() * tensor.element_size() for tensor in weights.values())

    def workspace(self, weights: Mapping[str, torch.Tensor]) -> int:
        """Return nothing: a step takes no more than the largest weight, which is little beside the moments."""
        return 0

    def problem(self, parameter: torch.Tensor, entry: Entry | None) -> str | None:
        """Return what is missing, or which moment has another shape than the parameter."""
        if entry is None or set(entry) != {self.counter, *self.slots}:
            return "the optimizer has no AdamW moments for it"
        shape = tuple(parameter.shape)
        wrong = [slot for slot in self.slots if tuple(entry[slot].shape) != shape]
        return f"its {wrong[0]} has shape {tuple(entry[wrong[0]].shape)} instead of {shape}" if wrong else None

    def to_file(self, entry: Entry) -> dict[str, Any]:
        """Return the entry, which has the form of the Trainer's `adamw_torch`."""
        return dict(entry)

    def from_file(self, entry: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the entry."""
        return dict(entry)


ADAMW = AdamW()
