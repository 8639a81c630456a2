"""Loss and gradients of a step, as plain transformers computes them row by row and as Onward does, compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from onward.config import Config
from onward.data.plan.loader import Batch
from onward.training.admission.inputs import tokens
from onward.training.device.environment import autocast, deterministic
from onward.training.layers.buffers import Buffers
from onward.training.model.spec import ModelSpec
from onward.training.seeds import fold, seeded
from onward.training.state import digest_tensors
from onward.training.steps.loss import TargetLoss, add_gradients
from onward.training.steps.parts import parts_of

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 1e-1}
"""The relative difference up to which it is rounding, by compute type."""
_SMALL = 1e-3
"""The share of the largest gradient below which a weight's own gradient is too small to be a scale."""


@dataclass(frozen=True)
class Gradients:
    """The mean loss (nats) of a step, and the gradient of each trained weight that has one."""

    loss: float
    of: Mapping[str, torch.Tensor]

    def digest(self) -> str:
        """Return the digest of all bits."""
        loss = torch.tensor(self.loss, dtype=torch.float64)
        return digest_tensors([("loss", loss), *sorted(self.of.items())])


def shift_adapter(model: nn.Module, device: torch.device) -> None:
    """Give other values to matrices that are initially zero in an adapter: else half of its gradients are zero."""
    with torch.no_grad(), seeded(fold(0, "admission"), device):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_" in name and not bool(parameter.any()):
                parameter.normal_(std=0.02)


def logits_of(
    model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype, *, exact: bool = True
) -> torch.Tensor:
    """Return the logits of the first row, shape (tokens, vocabulary); arguments as for `row_by_row`."""
    with autocast(device, dtype), deterministic(device, exact=exact):
        return model(input_ids=tokens(batch.rows[0], device), use_cache=False).logits[0]


def row_by_row(
    model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype, *, exact: bool = True
) -> Gradients:
    """Return the gradients that plain transformers computes for rows one by one: no padding, no mask, whole logits.

    Args:
        exact: use only deterministic operations (`deterministic`).
    """
    total, buffers = 0.0, Buffers(model)
    for row in batch.rows:
        ids = tokens(row, device)
        wanted = torch.from_numpy(row.targets[1:]).to(device)
        with autocast(device, dtype), deterministic(device, exact=exact):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            loss = functional.cross_entropy(logits[wanted].float(), ids[0, 1:][wanted], reduction="sum")
        with deterministic(device, exact=exact):
            (loss / batch.target_tokens).backward()
        buffers.restore()  # each row as if it were the first
        total += float(loss.detach())
    return _take(model, total / batch.target_tokens)


def of_rows(spec: ModelSpec, model: nn.Module, batch: Batch) -> Gradients:
    """Return what `row_by_row` returns on the device, and in the type, that a run computes on and in."""
    return row_by_row(model, batch, spec.device, spec.dtype, exact=spec.config.deterministic)


def of_step(
    model: nn.Module, batch: Batch, config: Config, device: torch.device, dtype: torch.dtype, *, by_length: bool = False
) -> Gradients:
    """Return the gradients that a step of a run computes for rows, part by part, with the seeds of the first step.

    Args:
        by_length: whether all rows of a part have the same length.
    """
    loss_of = TargetLoss(model, device, dtype, by_length=by_length)
    total = 0.0
    for part in parts_of(batch, config, 0, loss_of.layout):
        with deterministic(device, exact=config.deterministic), seeded(part.seed, device):
            loss = loss_of(part.batch) / batch.target_tokens
            add_gradients(loss)
        total += float(loss.detach())
    loss_of.forget()
    return _take(model, total)


def difference(expected: Gradients, actual: Gradients) -> float:
    """Return the largest relative difference of loss and gradients; infinity if one is missing or not finite."""
    if expected.of.keys() != actual.of.keys():
        return math.inf
    sizes = {name: float(gradient.norm()) for name, gradient in expected.of.items()}
    least = _SMALL * max(sizes.values(), default=0.0)
    found = [abs(actual.loss - expected.loss) / max(abs(expected.loss), 1e-12)]
    for name, gradient in expected.of.items():
        found.append(float((actual.of[name] - gradient).norm()) / max(sizes[name], least, 1e-30))
    return max(found) if all(map(math.isfinite, found)) else math.inf


def pooled_difference(expected: Gradients, actual: Gradients) -> float:
    """Return the relative difference of all gradients taken together; infinity if one is missing or not finite."""
    if expected.of.keys() != actual.of.keys():
        return math.inf
    squares = sum(float((actual.of[name] - gradient).norm()) ** 2 for name, gradient in expected.of.items())
    size = sum(float(gradient.norm()) ** 2 for gradient in expected.of.values())
    found = math.sqrt(squares / max(size, 1e-30))
    return found if math.isfinite(found) else math.inf


def _take(model: nn.Module, loss: float) -> Gradients:
    taken = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return Gradients(loss, taken)
