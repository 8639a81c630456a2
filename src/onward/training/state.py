"""TrainState: the one object that owns everything that evolves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import chain
from operator import is_, itemgetter
from typing import Any, Self

import torch
import xxhash
from peft import PeftModel
from torch import nn

from onward.config import Config
from onward.training.loss_scale import LossScale
from onward.training.optimizers import Entry, OptimizerMethod, optimizer_method
from onward.training.transfer import Copied, Marks, Wait, at_once, equal_marks, in_main_memory, transfer_of

SCALE = "loss_scale"


@dataclass(frozen=True)
class Cursor:
    """The run's place in the stream.

    `position` is the file's place in the stream (from 1; 0 before the first). `step` of its `steps` are done.
    `stream` chains the digests of all files up to this one, so that it depends on their order too.
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
    """What was trained so far. `adam_origin` is the step at which the optimizer last started from nothing."""

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


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is written from: a TrainState at one step.

    Args:
        weights: trained weights by name, in the order of `optimizer.pt`.
        optimizer: the optimizer's `state_dict`: what it keeps for each parameter, and its groups.
        method: what the optimizer's state means.
        frozen: bytes of weights that are written but not trained.
        wait: returns when the tensors are complete; called before they are read.
        known: the digest, if it was computed of a copy and nothing has changed since.
        scale: the loss scale, under float16.
        copied: the copy that the tensors belong to, if any.
    """

    counters: Counters
    cursor: Cursor
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    method: OptimizerMethod
    frozen: int = 0
    wait: Wait = at_once
    known: StateDigest | None = None
    scale: LossScale | None = None
    copied: Copied | None = None

    @property
    def step(self) -> int:
        """Optimizer steps taken since the run began."""
        return self.counters.step

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last step."""
        return float(self.optimizer["param_groups"][0]["lr"])

    @property
    def marks(self) -> Marks | None:
        """The marks of what was copied; None if only digests can tell."""
        return None if self.copied is None else self.copied.marks

    @property
    def moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """The optimizer's counter and moments by name of their parameter; empty before the first step."""
        held = self.optimizer["state"]
        return {name: held[index] for index, name in enumerate(self.weights) if index in held}

    @property
    def size(self) -> int:
        """Bytes of the weights, trained or written with them, and of the optimizer's state."""
        weights = self.frozen + sum(tensor.numel() * tensor.element_size() for tensor in self.weights.values())
        return weights + self.method.bytes(self.weights)

    def adam_step(self) -> int:
        """Return the optimizer's own step counter, on which all parameters must agree (-1 if they do not)."""
        return self.method.count(self.moments.values(), len(self.weights))

    def describe_parameters(self) -> dict[str, list[Any]]:
        """Return `{name: [shape, dtype]}` in optimizer order."""
        return {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in self.weights.items()}

    def digest(self) -> StateDigest:
        """Hash every trained weight, and every moment with the scale of the loss, in the order of their names."""
        if self.known is not None:
            return self.known
        self.wait()
        moments = (
            (f"{name}.{key}", value)
            for name, entry in sorted(self.moments.items())
            for key, value in sorted(entry.items())
        )
        scale: list[tuple[str, torch.Tensor]] = [] if self.scale is None else [(SCALE, self.scale.numbers())]
        return StateDigest(digest_tensors(sorted(self.weights.items())), digest_tensors(chain(moments, scale)))

    def plain(self) -> dict[str, Any]:
        """Return everything but weights and moments, as JSON values."""
        scale: dict[str, Any] = {} if self.scale is None else {SCALE: asdict(self.scale)}
        return {"counters": asdict(self.counters), "cursor": asdict(self.cursor), **scale}

    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor, in an order that depends only on their names."""
        entries = (value for entry in self.moments.values() for _, value in sorted(entry.items()))
        return [*self.weights.values(), *entries]


class TrainState:
    """Trainable weights, optimizer moments, counters and cursor.

    Args:
        model: the model, trainable weights marked by `requires_grad`.
        optimizer: an optimizer that `method` built over them.
        scale: the loss scale, for a run that computes in float16.
        held: this rank's shards, which replace the model's parameters, by name and in the same order.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: OptimizerMethod,
        *,
        scale: LossScale | None = None,
        held: dict[str, nn.Parameter] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.method = method
        self.scale = scale
        self.counters = Counters()
        self.cursor = Cursor()
        self.parameters = held or _by_name(model, optimizer)
        """Trainable parameters by name, in the order of `optimizer.pt`."""
        self.transfer = transfer_of(next(iter(self.parameters.values())).device)
        """How its copies are made."""
        rest = (
            []
            if isinstance(model, PeftModel)
            else [weight for weight in model.parameters() if not weight.requires_grad]
        )
        self._frozen = sum(weight.numel() * weight.element_size() for weight in rest)

    @classmethod
    def start(cls, model: nn.Module, config: Config) -> Self:
        """Return the state of step 0: a model with a fresh optimizer of the config's method."""
        method = optimizer_method(config)
        return cls(model, method.build(model, config), method, scale=LossScale() if config.dtype == "float16" else None)

    @property
    def step(self) -> int:
        """Optimizer steps taken since the run began."""
        return self.counters.step

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def view(self) -> Snapshot:
        """Return the current state, in the memory that training changes."""
        weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
        optimizer = self.optimizer.state_dict()
        counters = replace(self.counters)
        return Snapshot(counters, self.cursor, weights, optimizer, self.method, self._frozen, scale=self.scale)

    def snapshot(self, into: Snapshot | None = None) -> Snapshot:
        """Return a copy of the state in main memory, which may still be incomplete: see `Snapshot.wait`.

        Args:
            into: an earlier copy that is no longer needed; its memory is reused.
        """
        before = None if into is None else into.copied
        copied = self.transfer.copy(*self._tensors(), before)
        if into is not None and before is not None and copied.memory is not None and copied.memory is before.memory:
            weights, optimizer = into.weights, self._regrouped(into.optimizer)
        else:
            weights, optimizer = self._named(copied.tensors)
        return Snapshot(
            replace(self.counters), self.cursor, weights, optimizer, self.method, self._frozen, copied.wait,
            scale=self.scale, copied=copied,
        )  # fmt: skip

    def _tensors(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return all weights, and all that the optimizer keeps, in the order of `Snapshot.tensors`."""
        weights: list[torch.Tensor] = list(self.parameters.values())
        state = self.optimizer.state
        entries = (
            state.values() if all(map(is_, state, weights)) else [state[each] for each in weights if each in state]
        )
        return weights, list(chain.from_iterable(_in_order(tuple(entry))(entry) for entry in entries))

    def _named(self, copies: Iterable[torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return copies of `_tensors` as weights by name and as the optimizer's `state_dict`."""
        now, left = self.optimizer.state_dict(), iter(copies)
        weights = {name: next(left) for name in self.parameters}
        held = now["state"]
        own = {index: dict(zip(sorted(held[index]), left, strict=False)) for index in sorted(held)}
        state = {index: {key: own[index][key] for key in entry} for index, entry in held.items()}
        return weights, {**now, "state": state}

    def _regrouped(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """Return an earlier `state_dict` of the same optimizer with the current settings of its groups."""
        groups = [
            {**before, **{key: value for key, value in group.items() if key != "params"}}
            for before, group in zip(optimizer["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        return {**optimizer, "param_groups": groups}

    def marks(self) -> Marks | None:
        """Return marks of all bits, computed on their device; None if a digest costs no more."""
        return self.transfer.marks(*self._tensors())

    def is_proven(self, copy: Snapshot) -> bool:
        """Return whether it is proven, by marks on the device, that a copy was made of this state as it is now.

        It is not if only digests can tell, or if the copy was made of another state.
        """
        if copy.marks is None or (copy.learning_rate, copy.scale) != (self.learning_rate, self.scale):
            return False
        marks = self.marks()
        return marks is not None and equal_marks(marks, copy.marks)

    def reset_moments(self) -> None:
        """Start the optimizer's moments and its counter from nothing."""
        self.optimizer.state.clear()
        self.counters.adam_origin = self.step

    def load_plain(self, values: dict[str, Any]) -> None:
        """Restore what `Snapshot.plain` returned."""
        self.counters = Counters(**values["counters"])
        self.cursor = Cursor(**values["cursor"])
        if self.scale is not None:
            self.scale = LossScale(**values[SCALE])


def _by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Return the parameters of an optimizer by their names in the model."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: parameter for group in optimizer.param_groups for parameter in group["params"]}


@cache
def _in_order(keys: tuple[str, ...]) -> Callable[[Entry], Iterable[torch.Tensor]]:
    """Return a function that gives the values of an entry with these keys, in the order of their names."""
    names = sorted(keys)
    return itemgetter(*names) if len(names) > 1 else lambda entry: [entry[name] for name in names]


def digest_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the xxh3-128 of names, types, shapes and bytes, in the order given."""
    digest = xxhash.xxh3_128()
    for name, plain in in_main_memory(tensors):
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
