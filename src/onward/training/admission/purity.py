"""What must not happen: an evaluation that changes the model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from onward.training.state import digest_tensors

_EDGE = 1 << 12
"""Elements of a weight looked at from each end: what is done in place is done to all of it."""


class Marks:
    """What every weight and buffer of a model was at one moment: which tensor, and the digest of its ends."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = dict(_marks(model))

    def changed(self) -> list[str]:
        """Return the names of weights and buffers that are not what they were."""
        now = dict(_marks(self._model))
        return sorted(name for name in now.keys() | self._before.keys() if now.get(name) != self._before.get(name))


def _marks(model: nn.Module) -> Iterator[tuple[str, tuple[int, str]]]:
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        yield name, (id(parameter), digest_tensors([("ends", torch.cat([flat[:_EDGE], flat[-_EDGE:]]))]))
    for name, buffer in model.named_buffers():
        yield name, (id(buffer), digest_tensors([("all", buffer)]))
