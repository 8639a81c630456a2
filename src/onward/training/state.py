"""TrainState: the one object that owns everything which evolves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import xxhash
from torch import nn

from onward.training.optim import parameter_groups


@dataclass(frozen=True)
class Cursor:
    """Where the run stands in the stream.

    `position` is the file's place in the stream (from 1; 0 before the first), `step` how many of its `steps` are
    done. `stream` chains the digests of all files up to this one, so that it names their order too.
    """

    position: int = 0
    sha256: str = ""
    step: int = 0
    steps: int = 0
    stream: str = ""

    @property
    def at_boundary(self) -> bool:
        """Whether the file is done (or none has begun)."""
        return self.step == self.steps


@dataclass
class Counters:
    """What was trained so far. `adam_origin` is the step at which the moments were last started from nothing."""

    step: int = 0
    rows: int = 0
    tokens: int = 0
    target_tokens: int = 0
    adam_origin: int = 0


@dataclass(frozen=True)
class StateDigest:
    """Digests (xxh3-128, hex) of all trained weights and of all optimizer moments, by name."""

    weights: str
    moments: str


class TrainState:
    """Trainable weights, optimizer moments, counters and cursor.

    Args:
        model: the model, trainable weights marked by `requires_grad`.
        optimizer: AdamW with the groups of `parameter_groups`.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
        self.model = model
        self.optimizer = optimizer
        self.counters = Counters()
        self.cursor = Cursor()
        decayed, plain = parameter_groups(model)
        self.parameters = dict(decayed + plain)
        """Trainable parameters by name, in the order of `optimizer.pt`."""

    @property
    def step(self) -> int:
        """Optimizer steps taken since the run began."""
        return self.counters.step

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def adam_step(self) -> int:
        """Return Adam's own step counter, on which all parameters must agree (-1 where they do not)."""
        counts = {int(moment["step"]) for moment in self.optimizer.state.values()}
        if len(counts) > 1 or (counts and len(self.optimizer.state) != len(self.parameters)):
            return -1
        return counts.pop() if counts else 0

    def describe_parameters(self) -> dict[str, list[Any]]:
        """Return `{name: [shape, dtype]}` in optimizer order."""
        return {name: [list(p.shape), str(p.dtype).removeprefix("torch.")] for name, p in self.parameters.items()}

    def digest(self) -> StateDigest:
        """Hash every trained weight and every moment, in order of name."""
        return StateDigest(digest_tensors(self._weights()), digest_tensors(self._moments()))

    def reset_moments(self) -> None:
        """Start Adam's moments and its counter from nothing."""
        self.optimizer.state.clear()
        self.counters.adam_origin = self.step

    def state_dict(self) -> dict[str, Any]:
        """Return what is neither weight nor moment, as JSON values."""
        return {"counters": asdict(self.counters), "cursor": asdict(self.cursor)}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.counters = Counters(**values["counters"])
        self.cursor = Cursor(**values["cursor"])

    def _weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        return ((name, parameter) for name, parameter in sorted(self.parameters.items()))

    def _moments(self) -> Iterable[tuple[str, torch.Tensor]]:
        for name, parameter in sorted(self.parameters.items()):
            for key, value in sorted(self.optimizer.state.get(parameter, {}).items()):
                yield f"{name}.{key}", value


def digest_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the xxh3-128 of names, types, shapes and bytes, in the order given."""
    digest = xxhash.xxh3_128()
    for name, tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
