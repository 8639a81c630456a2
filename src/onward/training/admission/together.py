"""How the rows of a step may be computed together: laid end to end, padded, or only with rows of their length."""

from __future__ import annotations

import math
from typing import Any, cast

from torch import nn

from onward.data.plan.loader import Batch
from onward.errors import first_line
from onward.training.admission import gradients, longer
from onward.training.admission.inputs import LONG, MIDDLE, SHORT, rows
from onward.training.admission.neighbours import influence
from onward.training.admission.proof import Found, Proof
from onward.training.admission.remedies import NO_REMEDY
from onward.training.admission.small.narrow import still
from onward.training.device.environment import deterministic
from onward.training.device.errors import is_of_the_device
from onward.training.model.load import causal_lm, make_fast


def examine_together(proof: Proof, model: nn.Module, vocabulary: range, found: Found) -> None:
    """Find the fastest way that gives the gradients of the rows computed separately.

    Raises:
        ModelError: there is none.
    """
    _compare(proof, model, vocabulary, found)
    is_equal = found.difference <= gradients.TOLERANCE[proof.spec.dtype]
    if not found.end_to_end and not (is_equal and longer.longest_of(proof.spec.config) <= LONG):
        _compare_longer(proof, model, vocabulary, found)
    _require_equal(proof, found.difference)


def _compare(proof: Proof, model: nn.Module, vocabulary: range, found: Found) -> None:
    """Compare the gradients of a step with those of its single rows: laid end to end or, failing that, padded."""
    batch = rows([MIDDLE, SHORT, LONG], vocabulary)
    with still(model):
        expected = proof.row_by_row(model, batch)
        plain = cast(Any, causal_lm(model).config)._attn_implementation
        largest, why = _try_end_to_end(proof, model, batch, vocabulary, expected)
        if why:
            causal_lm(model).set_attn_implementation(plain)
            largest = _difference(proof, model, batch, expected)
    found.end_to_end, found.why_padded, found.difference = not why, why, largest


def _compare_longer(proof: Proof, model: nn.Module, vocabulary: range, found: Found) -> None:
    """Check a model's own kind of attention with a long row; if padding changes results, rows are not padded."""
    limit = longer.causal_length(proof.spec, model, vocabulary)
    if limit is not None:
        what = "the model looks ahead in longer rows: later tokens change logits before them"
        proof.refuse(what, f"Up to {limit} tokens it does not: --set max_length={limit}")
    tolerance, difference, row = gradients.TOLERANCE[proof.spec.dtype], found.difference, "rows have"
    if difference <= tolerance:
        difference, row = longer.filling_difference(proof.spec, model, vocabulary, by_length=False), "a long row has"
        found.difference = max(found.difference, difference)
    if difference <= tolerance:
        return
    found.by_length = True
    found.why_padded = f"padded, {row} different gradients (relative difference {difference:.0e})"
    found.difference = longer.filling_difference(proof.spec, model, vocabulary, by_length=True)


def _require_equal(proof: Proof, difference: float) -> None:
    if not difference <= gradients.TOLERANCE[proof.spec.dtype]:
        what = "the gradients of a step differ from those of its rows computed separately"
        proof.refuse(f"{what} (relative difference {difference:.0e})", NO_REMEDY)


def _try_end_to_end(
    proof: Proof, model: nn.Module, batch: Batch, vocabulary: range, expected: gradients.Gradients
) -> tuple[float, str]:
    """Make the model fast; return the relative difference of rows laid end to end, and any reason against these."""
    try:
        make_fast(model, proof.spec.device, end_to_end=True)
    except ValueError as error:
        make_fast(model, proof.spec.device, end_to_end=False)
        return math.inf, first_line(error)
    try:
        largest = _difference(proof, model, batch, expected)
        mixed = _influence(proof, model, batch, vocabulary)
    except Exception as error:  # whatever a model does with rows that it was not made for, padded ones are left
        if is_of_the_device(error):
            raise
        model.zero_grad(set_to_none=True)
        return math.inf, first_line(error)
    if not largest <= gradients.TOLERANCE[proof.spec.dtype]:
        return largest, f"laid end to end, they have different gradients (relative difference {largest:.0e})"
    if not mixed <= gradients.TOLERANCE[proof.spec.dtype]:
        return largest, "laid end to end, one row changes the logits of another"
    return largest, ""


def _influence(proof: Proof, model: nn.Module, batch: Batch, vocabulary: range) -> float:
    spec = proof.spec
    with deterministic(spec.device, exact=spec.config.deterministic):
        return influence(model, batch, vocabulary, spec.device, spec.dtype)


def _difference(proof: Proof, model: nn.Module, batch: Batch, expected: gradients.Gradients) -> float:
    actual = gradients.of_step(model, batch, proof.spec.config, proof.spec.device, proof.spec.dtype)
    return gradients.difference(expected, actual)
