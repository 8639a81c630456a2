"""Where and how steps are computed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from onward.training.world import Message, World


@dataclass(frozen=True)
class Execution:
    """Where and how steps are computed; nothing of it is state.

    Args:
        world: the processes that train, and the device of this one.
        dtype: compute type; below float32 the forward runs under autocast.
        pad_id: token id that shorter rows are padded with, where rows are padded.
        by_length: rows are computed with those of their own length only, as the model's admission found.
        model: what other ranks build the same model from, beside the config.
    """

    world: World
    dtype: torch.dtype
    pad_id: int = 0
    by_length: bool = False
    model: Message = field(default_factory=Message)
