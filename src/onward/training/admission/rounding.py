"""Compares the gradients of a step with those of its rows alone, and tells rounding from a fault.

Half precision can hide which of them it is. Experts are chosen by numbers that it rounds: a token whose best experts
are nearly equal goes to one or the other, in plain transformers too, and the gradients of their weights then differ by
any amount. It also hides what is no rounding: rows at wrong positions may change gradients by a few per cent. Float32
shows both: there, the same two computations must have equal gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from onward.data.plan.loader import Batch
from onward.training.admission.causality import as_float32
from onward.training.admission.gradients import TOLERANCE, Gradients, difference, of_rows, of_step, pooled_difference
from onward.training.device.environment import HALF
from onward.training.device.errors import forget_frames, is_device_lost
from onward.training.model.spec import ModelSpec

POOLED = 0.2
"""The relative difference of all gradients together up to which it may be rounding in half precision. Measured with
five families, most with experts, six models each: 0.01 to 0.09, and 0.32 or more if one row sees another."""


@dataclass(frozen=True)
class Alone:
    """The gradients that plain transformers computes for rows one by one.

    Args:
        taken: in the type that steps compute in.
        in_float32: the same in float32, if that type is a lower one and the model fits.
    """

    taken: Gradients
    in_float32: Gradients | None


@dataclass(frozen=True)
class Compared:
    """How the gradients of a step differ from those of its rows alone.

    Args:
        largest: the largest relative difference of a weight's gradient.
        is_rounding: whether rounding explains it.
    """

    largest: float
    is_rounding: bool


def rows_alone(spec: ModelSpec, model: nn.Module, batch: Batch) -> Alone:
    """Compute rows one by one, as the model is now."""
    return Alone(of_rows(spec, model, batch), _in_float32(spec, model, lambda single: of_rows(single, model, batch)))


def compare(spec: ModelSpec, model: nn.Module, batch: Batch, alone: Alone, *, by_length: bool = False) -> Compared:
    """Compare a step of a run with its rows alone.

    Args:
        by_length: whether all rows of a part of the step have the same length.
    """
    actual = _step(spec, model, batch, by_length)
    largest = difference(alone.taken, actual)
    is_equal = _is_equal_in_float32(alone, spec, model, lambda single: _step(single, model, batch, by_length))
    if is_equal is None:
        return Compared(largest, largest <= TOLERANCE[spec.dtype])
    return Compared(largest, is_equal and pooled_difference(alone.taken, actual) <= POOLED)


def _is_equal_in_float32(
    alone: Alone, spec: ModelSpec, model: nn.Module, compute: Callable[[ModelSpec], Gradients]
) -> bool | None:
    """Whether a step has the gradients of its rows there; None if that cannot be seen."""
    actual = None if alone.in_float32 is None else _in_float32(spec, model, compute)
    if alone.in_float32 is None or actual is None:
        return None
    return difference(alone.in_float32, actual) <= TOLERANCE[torch.float32]


def _step(spec: ModelSpec, model: nn.Module, batch: Batch, by_length: bool) -> Gradients:
    return of_step(model, batch, spec.config, spec.device, spec.dtype, by_length=by_length)


def _in_float32(spec: ModelSpec, model: nn.Module, compute: Callable[[ModelSpec], Gradients]) -> Gradients | None:
    """Return what is computed in float32; None if that is the compute type anyway, or the model does not fit or fails.

    Its code may ask for the lower type.
    """
    if spec.dtype not in HALF:
        return None
    try:
        with as_float32(model) as fits:
            return compute(replace(spec, dtype=torch.float32)) if fits else None
    except Exception as error:
        if is_device_lost(error):
            raise
        forget_frames(error)
        model.zero_grad(set_to_none=True)
        return None
