"""The handover: proof that the state after a boundary or a resume is the state before it."""

from __future__ import annotations

import contextlib
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
from onward.training.layers.twin import (
    keeps_process_state,
    let_write_nothing,
    with_weights,
    writers_in_evaluation,
    writes,
)
from onward.training.loss import TargetLoss
from onward.training.seeds import fold, seeded
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

    It is measured on a twin, so that nothing of the model changes: neither weights nor buffers.

    Args:
        model: the model that is trained, between two steps.
        seed: the run's seed.
        dtype: compute type.

    Raises:
        ModelError: the model cannot be evaluated without a change of its weights.
    """

    def __init__(self, model: nn.Module, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator,union-attr]
        self._batch = probe_batch(seed, vocabulary)
        self._model = model
        self._seed, self._device, self._dtype = fold(seed, "probe"), device, dtype
        self.writers = writers_in_evaluation(model, lambda twin: self._loss(twin)(_shortened(self._batch)))
        self._at_once = device.type != "cpu" or bool(self.writers) or keeps_process_state(model)
        self._twin = self._loss_of_twin({})
        self._copied: Mapping[str, torch.Tensor] = {}
        self._copy: TargetLoss | None = None

    def of_model(self) -> float:
        """Measure the model as it is now; nothing of it changes.

        Raises:
            TrainingError: the loss is not finite.
            ModelError: a weight changed all the same.
        """
        before = _places(self._model)
        loss = self._measure(self._twin)
        changed = [name for name, place in _places(self._model).items() if before[name] != place]
        if changed:
            raise writes(changed[0])
        return loss

    def of_copy(self, snapshot: Snapshot) -> Callable[[], float]:
        """Return a function that measures a copy of the state, in any thread, while training goes on.

        It is measured at once where the model computes elsewhere than in main memory, which holds the copies, or where
        its forward pass is not one to run beside another: it uses state of the process, or draws random numbers.
        """
        if self._at_once:
            loss = self.of_model()
            return lambda: loss
        if self._copy is None or any(self._copied[name] is not weight for name, weight in snapshot.weights.items()):
            self._copied, self._copy = snapshot.weights, self._loss_of_twin(snapshot.weights)
        return partial(self._measure, self._copy)

    def _loss_of_twin(self, weights: Mapping[str, torch.Tensor]) -> TargetLoss:
        return self._loss(let_write_nothing(with_weights(self._model, weights), self.writers))

    def _loss(self, twin: nn.Module) -> TargetLoss:
        return TargetLoss(twin, self._device, self._dtype)

    def _measure(self, loss_of: TargetLoss) -> float:
        draws = seeded(self._seed, self._device) if self.writers else contextlib.nullcontext()
        with torch.no_grad(), deterministic(self._device), draws:
            loss = loss_of(self._batch)
        mean = float(loss) / (PROBE_ROWS * (PROBE_LENGTH - 1))
        if not math.isfinite(mean):
            raise TrainingError(
                f"the model computes no finite loss any more ({mean})",
                where="the probe batch",
                hint="Nothing of this was committed. Lower learning_rate in the config, then: onward train",
            )
        return mean


def _shortened(batch: Batch) -> Batch:
    """Return what is enough of a batch to see what a forward pass does."""
    row = batch.rows[0]
    return Batch([Row(row.ids[:2], row.targets[:2])], batch.references[:1], batch.lines[:1])


def _places(model: nn.Module) -> dict[str, tuple[int, torch.Size, torch.dtype]]:
    """Return where each weight lies, and as what."""
    return {name: (weight.data_ptr(), weight.shape, weight.dtype) for name, weight in model.named_parameters()}


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
