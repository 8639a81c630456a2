"""The handover: proof that the state after a boundary or a resume is the state before it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from onward.data.loader import Batch
from onward.data.order import RowReference
from onward.data.tokenized import Row
from onward.digest import sha256_json
from onward.errors import TrainingError, VerificationFailed
from onward.training.environment import deterministic
from onward.training.loss import TargetLoss
from onward.training.seeds import fold
from onward.training.state import Snapshot

PROBE_ROWS, PROBE_LENGTH = 2, 16

CLOSE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Relative difference of the probe loss up to which two environments count as close, by compute type."""

HandoverClass = Literal["bitwise", "close", "not comparable"]


@dataclass(frozen=True)
class Measurement:
    """A state as measured: digests of weights and moments, Adam's counter, learning rate, probe loss (nats)."""

    weights: str
    moments: str
    adam_step: int
    learning_rate: float
    probe_loss: float

    @property
    def state_digest(self) -> str:
        """One digest for weights, moments and Adam's counter together."""
        return sha256_json([self.weights, self.moments, self.adam_step])

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as JSON values."""
        return asdict(self)


def probe_batch(seed: int, vocabulary: int) -> Batch:
    """Return the run's fixed probe: token ids that are a function of the seed, all of them targets."""
    cells = [[fold(seed, "probe", row, column) for column in range(PROBE_LENGTH)] for row in range(PROBE_ROWS)]
    ids = np.array(cells, dtype=np.int64) % vocabulary
    targets = np.arange(PROBE_LENGTH) > 0
    places = range(PROBE_ROWS)
    references = [RowReference("probe", place) for place in places]
    return Batch([Row(row, targets) for row in ids], references, list(places))


class Probe:
    """The mean loss (nats) of a model on the run's fixed probe batch.

    Args:
        model: the model that is trained.
        seed: the run's seed.
        dtype: compute type.
    """

    def __init__(self, model: nn.Module, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator,union-attr]
        self._batch = probe_batch(seed, vocabulary)
        self._model = model
        self._twin = with_weights(model, {})
        self._device, self._dtype = device, dtype
        self._copied: Mapping[str, torch.Tensor] = {}
        self._copy: nn.Module | None = None

    def of_model(self) -> float:
        """Measure the model as it is now; nothing of it changes.

        Raises:
            TrainingError: the loss is not finite.
        """
        return self._measure(self._twin)

    def of_copy(self, snapshot: Snapshot) -> Callable[[], float]:
        """Return a function that measures a copy of the state, in any thread, while training goes on.

        Where the model computes elsewhere than in main memory, which holds the copies, it is measured at once.
        """
        if self._device.type != "cpu":
            loss = self.of_model()
            return lambda: loss
        if self._copy is None or any(self._copied[name] is not weight for name, weight in snapshot.weights.items()):
            self._copied, self._copy = snapshot.weights, with_weights(self._model, snapshot.weights)
        return partial(self._measure, self._copy)

    def _measure(self, model: nn.Module) -> float:
        with torch.no_grad(), deterministic(self._device):
            loss = TargetLoss(model, self._device, self._dtype)(self._batch)
        mean = float(loss) / (PROBE_ROWS * (PROBE_LENGTH - 1))
        if not math.isfinite(mean):
            raise TrainingError(
                f"the model computes no finite loss any more ({mean})",
                where="the probe batch",
                hint="Nothing of this was committed. Lower learning_rate in the config, then: onward train",
            )
        return mean


def with_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a model for inference that has these weights, by name of `model`'s parameters, and shares all others.

    Modules are copied, not what they hold: a deep copy takes longer than a step of a small model.
    """
    own: dict[int, nn.Parameter] = {
        id(parameter): nn.Parameter(weights[name], requires_grad=False)
        for name, parameter in model.named_parameters()
        if name in weights
    }
    made: dict[int, nn.Module] = {}

    def twin(module: nn.Module) -> nn.Module:
        if id(module) in made:
            return made[id(module)]
        new = made[id(module)] = copy.copy(module)
        weights, parts = vars(module)["_parameters"], vars(module)["_modules"]
        vars(new)["_parameters"] = {name: own.get(id(weight), weight) for name, weight in weights.items()}
        vars(new)["_modules"] = {name: None if part is None else twin(part) for name, part in parts.items()}
        return new

    return twin(model).eval()


def measure(snapshot: Snapshot, probe_loss: float) -> Measurement:
    """Measure a state whose probe loss is known."""
    digest = snapshot.digest()
    return Measurement(digest.weights, digest.moments, snapshot.adam_step(), snapshot.learning_rate, probe_loss)


def compare(
    before: Mapping[str, Any], after: Measurement, environment_before: Mapping[str, Any], environment: Mapping[str, Any]
) -> tuple[HandoverClass, float]:
    """Say which class holds between two measurements, and the relative difference of their probe losses.

    Weights, moments, Adam's counter and the learning rate must be equal everywhere; the probe loss must be equal
    in the same environment and close in another one of the same compute type.

    Raises:
        VerificationFailed: the state after is not the state before.
    """
    here = after.to_dict()
    changed = [key for key in ("weights", "moments", "adam_step", "learning_rate") if here[key] != before[key]]
    if changed:
        raise _difference(", ".join(f"{key}: {before[key]} before, {here[key]} after" for key in changed))
    if here["probe_loss"] == before["probe_loss"]:
        return "bitwise", 0.0
    difference = abs(here["probe_loss"] - before["probe_loss"]) / max(abs(before["probe_loss"]), 1e-12)
    if environment_before == environment:
        raise _difference(f"the probe loss was {before['probe_loss']!r} and is {here['probe_loss']!r}")
    if environment_before["dtype"] != environment["dtype"]:
        return "not comparable", difference
    if difference > CLOSE[environment["dtype"]]:
        raise _difference(f"the probe loss differs by {difference:.1e} (relative) from another environment's")
    return "close", difference


def _difference(reason: str) -> VerificationFailed:
    return VerificationFailed(
        f"the state after the stop is not the state before it: {reason}",
        where="handover",
        hint="Nothing was trained on it. onward verify looks closer; onward rollback --to FILE goes back.",
    )
