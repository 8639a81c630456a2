"""AdamW with the parameter groups of transformers' Trainer, so that each can load the other's `optimizer.pt`."""

from __future__ import annotations

import torch
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from onward.config import Config

_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""As in `Trainer.get_decay_parameter_names` of transformers 5."""

Named = list[tuple[str, nn.Parameter]]


def parameter_groups(model: nn.Module) -> tuple[Named, Named]:
    """Return the trainable parameters with and without weight decay, by name, in `named_parameters` order."""
    decayed = set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY))
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return (
        [(name, parameter) for name, parameter in trainable if name in decayed],
        [(name, parameter) for name, parameter in trainable if name not in decayed],
    )


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Return AdamW over the model's trainable parameters: two groups, as the Trainer makes them."""
    decayed, plain = parameter_groups(model)
    groups = [{"params": [p for _, p in decayed]}, {"params": [p for _, p in plain]}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    apply_config(optimizer, config)
    return optimizer


def apply_config(optimizer: torch.optim.AdamW, config: Config) -> None:
    """Put the config's settings in force, also over what a loaded `optimizer.pt` says."""
    for group, weight_decay in zip(optimizer.param_groups, (config.weight_decay, 0.0), strict=True):
        group["weight_decay"] = weight_decay
        group["betas"] = config.betas
        group["initial_lr"] = config.learning_rate


def set_learning_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    """Put a learning rate in force for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
