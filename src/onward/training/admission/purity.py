"""Detects evaluations that change the model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from onward.training.state import digest_tensors

_EDGE = 1 << 12
"""How many elements of a weight are checked at each end: an operation in place changes all of them."""


class Marks:
    """The state of every weight and buffer of a model at one moment: which tensor, and the digest of its ends."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = dict(_marks(model))

    def changed(self) -> list[str]:
        """Return the names of weights and buffers that have changed."""
        now = dict(_marks(self._model))
        return sorted(name for name in now.keys() | self._before.keys() if now.get(name) != self._before.get(name))


def _marks(model: nn.Module) -> Iterator[tuple[str, tuple[int, str]]]:
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        yield name, (id(parameter), digest_tensors([("ends", torch.cat([flat[:_EDGE], flat[-_EDGE:]]))]))
    for name, buffer in model.named_buffers():
        yield name, (id(buffer), digest_tensors([("all", buffer)]))
