"""The probe: what a model computes for a fixed batch, forward and backward, without leaving a trace in the model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from onward.data.plan.loader import Batch
from onward.data.plan.order import RowReference
from onward.data.tokenized import Row
from onward.digest import sha256_json
from onward.errors import TrainingError
from onward.training.device.environment import deterministic
from onward.training.layers.recording import Recordable, Recorder, recorder_for
from onward.training.layers.twin import (
    keeps_process_state,
    let_write_nothing,
    types_named,
    with_weights,
    writers_in_evaluation,
    writes,
)
from onward.training.measuring.fingerprints import Fingerprints
from onward.training.model.load import causal_lm
from onward.training.seeds import fold, seeded
from onward.training.state import Snapshot
from onward.training.steps.loss import Placed, TargetLoss
from onward.training.transfer import fetch_later

PROBE_ROWS, PROBE_LENGTH = 2, 16
GRADIENT_LENGTH = {"cpu": 8}
"""The length of rows whose gradient is digested, by device; elsewhere `LONG_LENGTH`."""
LONG_LENGTH = 512
"""GPU kernels add in any order only if a row is longer than one of their blocks; long rows cost little there."""


@dataclass(frozen=True)
class Probed:
    """What was computed for the probe.

    Args:
        loss: mean loss (nats).
        gradient: digest of the gradient of every trained weight.
    """

    loss: float
    gradient: str


def probe_batch(seed: int, vocabulary: int, length: int = PROBE_LENGTH, *, given: int | None = None) -> Batch:
    """Return the run's fixed probe: token ids that are a function of the seed, all of them targets.

    Args:
        vocabulary: how many ids the model takes.
        given: how many ids it has logits for; by default as many.
    """
    cells = [[fold(seed, "probe", row, column) for column in range(length)] for row in range(PROBE_ROWS)]
    ids = np.array(cells, dtype=np.int64) % vocabulary % (given or vocabulary)
    targets = np.arange(length) > 0
    places = range(PROBE_ROWS)
    references = [RowReference("probe", place) for place in places]
    return Batch([Row(row, targets) for row in ids], references, list(places))


def probe_batches(model: nn.Module, seed: int, device: torch.device) -> tuple[Batch, Batch]:
    """Return the probes of a model and of its gradients; some models embed more ids than they have logits for."""
    base = causal_lm(model)
    embedded, head = (cast(Any, part) for part in (base.get_input_embeddings(), base.get_output_embeddings()))
    vocabulary = int(embedded.weight.shape[0])
    given = int(head.weight.shape[0]) if hasattr(head, "weight") else None
    lengths = (PROBE_LENGTH, length_with_gradient(model, device))
    short, long = (probe_batch(seed, vocabulary, length, given=given) for length in lengths)
    return short, long


@dataclass(frozen=True)
class _Computed:
    """What was computed on the device, where the next replay overwrites it."""

    total: torch.Tensor
    fingerprints: Fingerprints

    def later(self) -> Callable[[], Probed]:
        """Return a function that waits for it, in any thread."""
        totals, by_name = fetch_later([self.total]), self.fingerprints.later()
        return lambda: Probed(mean_loss(totals()[0]), sha256_json(by_name()))


@dataclass(frozen=True)
class _Twin:
    """A twin's computation, and where the weights that it was made with are."""

    places: list[int]
    compute: Recordable[_Computed]


class Probe:
    """The mean loss (nats) of a model on the run's fixed probe batch, and the digest of its gradients.

    Both are measured on a twin, so that nothing in the model changes: neither weights nor gradients nor buffers.

    Args:
        model: the model that is trained, between two steps.
        seed: the run's seed.
        dtype: compute type.
        exact: use only deterministic operations (`deterministic`).
        writers: types of modules that write to weights in evaluation mode; None to find out.
        recorder: records what is computed for `again`; by default the device's, if it has one.

    Raises:
        ModelError: the model cannot be evaluated without changing its weights.
    """

    def __init__(
        self, model: nn.Module, seed: int, device: torch.device, dtype: torch.dtype, *, exact: bool = True,
        writers: Collection[str] | None = None, recorder: Recorder | None = None,
    ) -> None:  # fmt: skip
        self._batch, self._with_gradient = probe_batches(model, seed, device)
        self._model, self._weights = model, dict(model.named_parameters())
        self._seed, self._device, self._dtype, self._exact = fold(seed, "probe"), device, dtype, exact
        self.writers = self._find_writers() if writers is None else types_named(model, writers)
        self._keeps_state = keeps_process_state(model)
        self._at_once = device.type != "cpu" or bool(self.writers) or self._keeps_state
        can_record = not self.writers and not self._keeps_state
        self._recorder = (recorder or recorder_for(device)) if can_record else None
        self._twins: dict[str, _Twin] = {}

    def _find_writers(self) -> frozenset[type[nn.Module]]:
        return writers_in_evaluation(self._model, lambda twin: self._loss(twin)(_shortened(self._batch)))

    def of_model(self) -> Probed:
        """Measure the model as it is now, without changing it.

        Raises:
            TrainingError: the loss is not finite.
            ModelError: a weight changed nevertheless.
        """
        return self.begin()()

    def begin(self) -> Callable[[], Probed]:
        """Begin to measure the model as it is now; return a function that waits for the result, in any thread.

        On a GPU, the next steps may be computed meanwhile.

        Raises:
            ModelError: a weight changed nevertheless.
        """
        before = [self._place(weight) for weight in self._weights.values()]
        probed = self._twin_of_model().compute().later()
        for (name, weight), place in zip(self._weights.items(), before, strict=True):
            if self._place(weight) != place:
                raise writes(name)
        return probed

    @property
    def can_record(self) -> bool:
        """Whether the model's computation was watched and can be recorded."""
        return "model" in self._twins and self._twins["model"].compute.can_record

    @property
    def hindrance(self) -> str:
        """What went wrong when the model's computation was recorded or replayed; empty if nothing did."""
        return self._twins["model"].compute.hindrance if "model" in self._twins else ""

    def again(self, before: Probed, *, records: bool = True) -> Probed:
        """Measure the model a second time, in a state for which it gave `before`.

        On a GPU this time is recorded, if it can be; if that gives the same, every later one replays it.

        Args:
            records: whether it may be recorded.
        """
        twin = self._twin_of_model()
        if records and twin.compute.record():
            if self.of_model() == before:
                return before
            twin.compute.forget()
        return self.of_model()

    def of_copy(self, snapshot: Snapshot) -> Callable[[], Probed]:
        """Return a function that measures a copy of the state, in any thread, while training continues.

        The model is measured instead, now, if it is not in main memory, where the copies are, or if its forward pass
        cannot run concurrently with another, because it uses process-wide state or draws random numbers.
        """
        if self._at_once:
            return self.begin()
        twin = self._twin("copy", snapshot.weights)
        return lambda: twin.compute().later()()

    def _twin_of_model(self) -> _Twin:
        trained = {name: weight.detach() for name, weight in self._weights.items() if weight.requires_grad}
        return self._twin("model", trained)

    def _twin(self, kind: str, weights: Mapping[str, torch.Tensor]) -> _Twin:
        """Return a twin with these weights; it is made anew if their memory has changed."""
        places = [weight.data_ptr() for weight in weights.values()]
        if kind not in self._twins or self._twins[kind].places != places:
            loss_of = self._loss(let_write_nothing(with_weights(self._model, weights), self.writers))
            compute = partial(self._compute, loss_of, *map(loss_of.placed, (self._batch, self._with_gradient)))
            self._twins[kind] = _Twin(places, Recordable(compute, self._device, self._recorder))
        return self._twins[kind]

    def _loss(self, twin: nn.Module) -> TargetLoss:
        return TargetLoss(twin, self._device, self._dtype)

    def _compute(self, loss_of: TargetLoss, batch: Batch | Placed, with_gradient: Batch | Placed) -> _Computed:
        with self._repeatably(), torch.no_grad():
            total = loss_of(batch)
        with self._repeatably(), torch.enable_grad():
            return _Computed(total, _fingerprints(loss_of, with_gradient))

    def _place(self, weight: torch.Tensor) -> tuple[int, int, torch.Size, torch.dtype]:
        """Return a weight's address, how often it was written to, its shape and its type.

        Parametrizing a weight for a forward pass sets it to itself, which counts as a write.
        """
        return weight.data_ptr(), 0 if self._keeps_state else weight._version, weight.shape, weight.dtype

    @contextlib.contextmanager
    def _repeatably(self) -> Generator[None]:
        draws = seeded(self._seed, self._device) if self.writers else contextlib.nullcontext()
        with deterministic(self._device, exact=self._exact), draws:
            yield


def mean_loss(total: torch.Tensor) -> float:
    """Return the mean loss (nats) of the probe from the total over its targets.

    Raises:
        TrainingError: it is not finite.
    """
    mean = float(total) / (PROBE_ROWS * (PROBE_LENGTH - 1))
    if not math.isfinite(mean):
        raise TrainingError(
            f"the model's loss is no longer finite ({mean})",
            where="the probe batch",
            hint="None of this was committed. Lower learning_rate in the config, then: onward train",
        )
    return mean


def length_with_gradient(model: nn.Module, device: torch.device) -> int:
    """Return the length in tokens of rows whose gradient is digested."""
    positions = getattr(causal_lm(model).config, "max_position_embeddings", None)
    return min(GRADIENT_LENGTH.get(device.type, LONG_LENGTH), positions or LONG_LENGTH)


def _fingerprints(loss_of: TargetLoss, batch: Batch | Placed) -> Fingerprints:
    """Return those of the gradients of a batch's loss, keeping only a few gradients at a time."""
    fingerprints = Fingerprints()

    def take(name: str, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        fingerprints.add(name, weight.grad)
        weight.grad = None

    hooks = [
        weight.register_post_accumulate_grad_hook(partial(take, name))
        for name, weight in loss_of.model.named_parameters()
        if weight.requires_grad
    ]
    try:
        loss_of(batch).backward()
        fingerprints.mix()
    finally:
        for hook in hooks:
            hook.remove()
        loss_of.forget()
    return fingerprints


def _shortened(batch: Batch) -> Batch:
    """Return as much of a batch as is needed to see what a forward pass does."""
    row = batch.rows[0]
    return Batch([Row(row.ids[:2], row.targets[:2])], batch.references[:1], batch.lines[:1])
