"""Crossing a boundary: everything that changes in the state between two files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from onward.config import Config
from onward.data.plan.order import Plan
from onward.data.tokenized import TokenizedFile
from onward.digest import sha256_json
from onward.training.layers.buffers import Buffers
from onward.training.model.adapter import set_dropout
from onward.training.seeds import fold, seeded
from onward.training.state import Cursor, TrainState


@dataclass(frozen=True)
class Boundary:
    """A boundary that was reached but is not committed yet, as hooks see it: the model is in eval mode."""

    step: int
    file: str
    model: nn.Module
    tokens: TokenizedFile
    plan: Plan
    config: Config
    position: int = 0


AtBoundary = Callable[[Boundary], Mapping[str, Any]]
"""A hook at a boundary; returns JSON values by name, which the ledger keeps. It must not change weights."""


def run_hooks(hooks: Iterable[AtBoundary], boundary: Boundary, device: torch.device) -> dict[str, Any]:
    """Call hooks with the model in eval mode and random generators of their own; return all their results.

    The model's buffers are restored after their forward passes.
    """
    results: dict[str, Any] = {}
    buffers = Buffers(boundary.model)
    boundary.model.eval()
    try:
        for hook in hooks:
            with torch.no_grad(), seeded(fold(boundary.config.seed, "boundary", boundary.step), device):
                results.update(hook(boundary))
    finally:
        boundary.model.train()
        buffers.restore()
    return results


def cross_boundary(state: TrainState, config: Config, plan: Plan, position: int) -> None:
    """Put the config into force, apply its boundary policy and set the cursor to the start of a file."""
    state.method.configure(state.optimizer, config)
    set_dropout(state.model, config.lora.dropout)
    if config.boundary == "reset_moments":
        state.reset_moments()
    stream = sha256_json([state.cursor.stream, plan.sha256])
    state.cursor = Cursor(position, plan.sha256, 0, plan.steps, stream)
