"""How the rows of a step may be computed together: laid end to end, padded, or only with rows of their length."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn

from onward.data.plan.loader import Batch
from onward.errors import first_line
from onward.training.admission import longer
from onward.training.admission.causality import as_float32
from onward.training.admission.gradients import TOLERANCE
from onward.training.admission.inputs import LONG, MIDDLE, SHORT, rows
from onward.training.admission.neighbours import influence
from onward.training.admission.proof import Found, Proof
from onward.training.admission.remedies import NO_REMEDY
from onward.training.admission.rounding import Alone, Compared, compare, rows_alone
from onward.training.admission.small.narrow import still
from onward.training.device.environment import HALF, deterministic
from onward.training.device.errors import is_of_the_device
from onward.training.model.load import causal_lm, make_fast
from onward.training.model.spec import ModelSpec


def examine_together(proof: Proof, model: nn.Module, vocabulary: range, found: Found) -> None:
    """Find the fastest way that gives the gradients of the rows computed separately.

    Raises:
        ModelError: there is none.
    """
    is_equal = _compare(proof, model, vocabulary, found)
    if not found.end_to_end and not (is_equal and longer.longest_of(proof.spec.config) <= LONG):
        is_equal = _compare_longer(proof, model, vocabulary, found, is_equal=is_equal)
    if not is_equal:
        what = "the gradients of a step differ from those of its rows computed separately"
        proof.refuse(f"{what} (relative difference {found.difference:.0e})", NO_REMEDY)


def _compare(proof: Proof, model: nn.Module, vocabulary: range, found: Found) -> bool:
    """Compare the gradients of a step with those of its single rows: laid end to end or, failing that, padded.

    Returns:
        Whether they are equal but for rounding.
    """
    batch = rows([MIDDLE, SHORT, LONG], vocabulary)
    with still(model):
        alone = rows_alone(proof.spec, model, batch)
        plain = cast(Any, causal_lm(model).config)._attn_implementation
        compared, why = _try_end_to_end(proof.spec, model, batch, vocabulary, alone)
        if why:
            causal_lm(model).set_attn_implementation(plain)
            compared = compare(proof.spec, model, batch, alone)
    found.end_to_end, found.why_padded, found.difference = not why, why, compared.largest
    return compared.is_rounding


def _compare_longer(proof: Proof, model: nn.Module, vocabulary: range, found: Found, *, is_equal: bool) -> bool:
    """Check a model's own kind of attention with a long row; if padding changes results, rows are not padded.

    Args:
        is_equal: whether padded rows were equal but for rounding so far.

    Returns:
        Whether rows of the layout that was found are.
    """
    limit = longer.causal_length(proof.spec, model, vocabulary)
    if limit is not None:
        what = "the model looks ahead in longer rows: later tokens change logits before them"
        proof.refuse(what, f"Up to {limit} tokens it does not: --set max_length={limit}")
    different, row = found.difference, "rows have"
    if is_equal:
        filled, row = longer.compare_filled(proof.spec, model, vocabulary, by_length=False), "a long row has"
        different, found.difference = filled.largest, max(found.difference, filled.largest)
        if filled.is_rounding:
            return True
    found.by_length = True
    found.why_padded = f"padded, {row} different gradients (relative difference {different:.0e})"
    by_length = longer.compare_filled(proof.spec, model, vocabulary, by_length=True)
    found.difference = by_length.largest
    return by_length.is_rounding


def _try_end_to_end(
    spec: ModelSpec, model: nn.Module, batch: Batch, vocabulary: range, alone: Alone
) -> tuple[Compared, str]:
    """Make the model fast; return how rows laid end to end compare, and any reason against these."""
    try:
        make_fast(model, spec.device, end_to_end=True)
    except ValueError as error:
        make_fast(model, spec.device, end_to_end=False)
        return Compared(math.inf, False), first_line(error)
    try:
        compared = compare(spec, model, batch, alone)
        is_apart = _is_apart(spec, model, batch, vocabulary)
    except Exception as error:  # whatever a model does with rows that it was not made for, padded ones are left
        if is_of_the_device(error):
            raise
        model.zero_grad(set_to_none=True)
        return Compared(math.inf, False), first_line(error)
    if not compared.is_rounding:
        how = f"relative difference {compared.largest:.0e}"
        return compared, f"laid end to end, they have different gradients ({how})"
    return compared, "" if is_apart else "laid end to end, one row changes the logits of another"


def _is_apart(spec: ModelSpec, model: nn.Module, batch: Batch, vocabulary: range) -> bool:
    """Whether rows laid end to end change each other by no more than rounding, where plain rows do too.

    In half precision, an expert's last bits may lead a token to another expert, so float32 decides.
    """
    with deterministic(spec.device, exact=spec.config.deterministic):
        changed = influence(model, batch, vocabulary, spec.device, spec.dtype)
        if changed <= TOLERANCE[spec.dtype]:
            return True
        if spec.dtype not in HALF or not math.isfinite(changed):
            return False
        with as_float32(model) as fits:
            least = TOLERANCE[torch.float32]
            return fits and influence(model, batch, vocabulary, spec.device, torch.float32) <= least
