"""The probe: what a model computes for a fixed batch, forward and backward, without leaving a trace in the model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from onward.data.loader import Batch
from onward.data.order import RowReference
from onward.data.tokenized import Row
from onward.digest import sha256_json
from onward.errors import TrainingError
from onward.training.environment import deterministic
from onward.training.layers.twin import (
    keeps_process_state,
    let_write_nothing,
    types_named,
    with_weights,
    writers_in_evaluation,
    writes,
)
from onward.training.loss import TargetLoss
from onward.training.model.load import causal_lm
from onward.training.seeds import fold, seeded
from onward.training.state import Snapshot, digest_tensors

PROBE_ROWS, PROBE_LENGTH = 2, 16
GRADIENT_LENGTH = {"cpu": 8}
"""The length of rows whose gradient is digested, by device; elsewhere `LONG_LENGTH`."""
LONG_LENGTH = 512
"""GPU kernels add in any order only if a row is longer than one of their blocks; long rows cost little there."""
PIECE = 1 << 24
"""How many elements of gradients are mixed at a time on a GPU."""
ROW = 1 << 12
"""How many elements of a gradient are added up together if many are mixed at once."""
_MIXERS = (-7046029254386353131, -4417276706812531889)
"""Odd 64-bit factors (golden ratio, and a prime of xxHash's)."""


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


class Probe:
    """The mean loss (nats) of a model on the run's fixed probe batch, and the digest of its gradients.

    Both are measured on a twin, so that nothing in the model changes: neither weights nor gradients nor buffers.

    Args:
        model: the model that is trained, between two steps.
        seed: the run's seed.
        dtype: compute type.
        exact: use only deterministic operations (`deterministic`).
        writers: types of modules that write to weights in evaluation mode; None to find out.

    Raises:
        ModelError: the model cannot be evaluated without changing its weights.
    """

    def __init__(
        self, model: nn.Module, seed: int, device: torch.device, dtype: torch.dtype, *, exact: bool = True,
        writers: Collection[str] | None = None,
    ) -> None:  # fmt: skip
        self._batch, self._with_gradient = probe_batches(model, seed, device)
        self._model = model
        self._seed, self._device, self._dtype, self._exact = fold(seed, "probe"), device, dtype, exact
        self.writers = self._find_writers() if writers is None else types_named(model, writers)
        self._keeps_state = keeps_process_state(model)
        self._at_once = device.type != "cpu" or bool(self.writers) or self._keeps_state
        self._twins: dict[str, tuple[list[int], TargetLoss]] = {}

    def _find_writers(self) -> frozenset[type[nn.Module]]:
        return writers_in_evaluation(self._model, lambda twin: self._loss(twin)(_shortened(self._batch)))

    def of_model(self) -> Probed:
        """Measure the model as it is now, without changing it.

        Raises:
            TrainingError: the loss is not finite.
            ModelError: a weight changed nevertheless.
        """
        before = self._places()
        trained = {name: weight.detach() for name, weight in self._model.named_parameters() if weight.requires_grad}
        probed = self._measure(self._twin("model", trained))
        changed = [name for name, place in self._places().items() if before[name] != place]
        if changed:
            raise writes(changed[0])
        return probed

    def of_copy(self, snapshot: Snapshot) -> Callable[[], Probed]:
        """Return a function that measures a copy of the state, in any thread, while training continues.

        It is measured immediately if the model is not in main memory, where the copies are, or if its forward pass
        cannot run concurrently with another, because it uses process-wide state or draws random numbers.
        """
        if self._at_once:
            probed = self.of_model()
            return lambda: probed
        return partial(self._measure, self._twin("copy", snapshot.weights))

    def _twin(self, kind: str, weights: Mapping[str, torch.Tensor]) -> TargetLoss:
        """Return the loss of a twin with these weights; the twin is made anew if their memory has changed."""
        places = [weight.data_ptr() for weight in weights.values()]
        if kind not in self._twins or self._twins[kind][0] != places:
            twin = let_write_nothing(with_weights(self._model, weights), self.writers)
            self._twins[kind] = places, self._loss(twin)
        return self._twins[kind][1]

    def _loss(self, twin: nn.Module) -> TargetLoss:
        return TargetLoss(twin, self._device, self._dtype)

    def _measure(self, loss_of: TargetLoss) -> Probed:
        with self._repeatably(), torch.no_grad():
            mean = mean_loss(loss_of(self._batch))
        with self._repeatably(), torch.enable_grad():
            return Probed(mean, _digest_of_gradients(loss_of, self._with_gradient))

    def _places(self) -> dict[str, tuple[int, int, torch.Size, torch.dtype]]:
        """Return each weight's address, how often it was written to, its shape and its type.

        Parametrizing a weight for a forward pass sets it to itself, which counts as a write.
        """
        return {
            name: (weight.data_ptr(), 0 if self._keeps_state else weight._version, weight.shape, weight.dtype)
            for name, weight in self._model.named_parameters()
        }

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


def _digest_of_gradients(loss_of: TargetLoss, batch: Batch) -> str:
    """Return the digest of the gradients of a batch's loss, keeping only a few at a time."""
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
    finally:
        for hook in hooks:
            hook.remove()
        loss_of.forget()
    return sha256_json(fingerprints.by_name())


class Fingerprints:
    """Computes `fingerprint` for a series of gradients with few launches and waits on a GPU.

    There, small gradients are kept until it pays to mix them together, and the process waits for the device only when
    it asks for the results.

    Args:
        home: the type of device whose tensors are digested immediately.
    """

    def __init__(self, home: str = "cpu") -> None:
        self._home = home
        self._found: dict[str, str] = {}
        self._waiting: dict[str, torch.Tensor] = {}
        self._kind: tuple[torch.dtype, torch.device] | None = None
        self._rows = 0
        self._sums: list[tuple[dict[str, int], torch.Tensor]] = []
        """Names with the number of sums of each, and these sums."""

    def add(self, name: str, gradient: torch.Tensor) -> None:
        """Add a gradient, which must not be written to any more."""
        if gradient.device.type == self._home:
            self._found[name] = fingerprint(gradient)
            return
        bits = _integers(gradient)
        if len(bits) > PIECE // 4:
            self._sums.append(({name: 1}, _mixed_sum(bits).reshape(1)))
            return
        kind = bits.dtype, bits.device
        if kind != self._kind or (self._rows + _rows(bits)) * ROW > PIECE:
            self._mix()
        self._waiting[name], self._kind, self._rows = bits, kind, self._rows + _rows(bits)

    def by_name(self) -> dict[str, str]:
        """Return the fingerprints of all gradients."""
        self._mix()
        for counts, sums in self._sums:
            left = iter(sums.tolist())
            for name, count in counts.items():
                self._found[name] = f"{sum(islice(left, count)) % (1 << 64):016x}"
        self._sums = []
        return self._found

    def _mix(self) -> None:
        """Mix the waiting gradients, each in rows of its own, filled up with zeros, which add nothing."""
        bits, counts = list(self._waiting.values()), {name: _rows(each) for name, each in self._waiting.items()}
        if not bits:
            return
        laid_out = bits[0].new_zeros(self._rows * ROW)
        places = laid_out.split([count * ROW for count in counts.values()])
        parts = [place[: len(each)] for place, each in zip(places, bits, strict=True)]
        torch._foreach_copy_(parts, bits)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        self._sums.append((counts, _mixed(laid_out).view(-1, ROW).sum(1)))
        self._waiting, self._rows = {}, 0


def fingerprint(gradient: torch.Tensor) -> str:
    """Return a digest of a tensor's bits, computed on its device: only one number leaves a GPU.

    On a GPU, elements are mixed one by one and added up as integers, whose sum does not depend on the order.
    """
    if gradient.device.type == "cpu":
        return digest_tensors([("", gradient)])
    return f"{mixed_sum(_integers(gradient)):016x}"


def mixed_sum(bits: torch.Tensor) -> int:
    """Return the sum (modulo 2**64) of integers, each mixed so that several changes do not cancel out."""
    return int(_mixed_sum(bits)) % (1 << 64)


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits of a tensor's elements as integers of their size, one dimension."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().reshape(-1).view(width)


def _rows(bits: torch.Tensor) -> int:
    return -(-len(bits) // ROW)


def _mixed_sum(bits: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for piece in bits.split(PIECE):
        total += _mixed(piece).sum()
    return total


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    """Return integers mixed one by one; 0 stays 0."""
    mixed = bits.to(torch.int64) * _MIXERS[0]
    mixed ^= mixed >> 29
    mixed *= _MIXERS[1]
    mixed ^= mixed >> 32
    return mixed


def _shortened(batch: Batch) -> Batch:
    """Return as much of a batch as is needed to see what a forward pass does."""
    row = batch.rows[0]
    return Batch([Row(row.ids[:2], row.targets[:2])], batch.references[:1], batch.lines[:1])
