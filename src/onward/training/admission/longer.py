"""The proof with longer rows, for models with a kind of attention of their own, whose result may depend on length.

Some select the tokens to attend to once there are more than a certain number, and some summarize tokens in blocks.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn

from onward.config import Config
from onward.training.admission import reach
from onward.training.admission.causality import as_float32, looks_ahead
from onward.training.admission.gradients import of_rows
from onward.training.admission.inputs import LONG, SHORT, rows
from onward.training.admission.rounding import Compared, compare, rows_alone
from onward.training.admission.small.narrow import lower_choices, still
from onward.training.device.errors import is_of_the_device
from onward.training.model.load import causal_lm
from onward.training.model.spec import ModelSpec

LONGEST = 288
"""Tokens of the longest row of a proof: more than two of the blocks of 128 that some summarize."""
SHARES = (1.0, 0.8, 0.6, 0.4, 0.25, 0.15)
"""The lengths of the rows of a step with a long row, as shares of the longest."""
COST = 100_000_000_000
"""Weights times tokens up to which the whole model processes a row of that length on a CPU: a few seconds."""


def longest_of(config: Config) -> int:
    """Return the number of tokens of the longest row of a proof, which is never longer than rows of the run."""
    return min(config.max_length, LONGEST)


def reached_by_long_rows(spec: ModelSpec, model: nn.Module, vocabulary: range, reached: Collection[str]) -> set[str]:
    """Return the trained weights that get a gradient from a row, including a long one if a short one misses some.

    Args:
        reached: the weights that get one from a short row.
    """
    found, longest = set(reached), longest_of(spec.config)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    cost = longest * sum(parameter.numel() for parameter in model.parameters())
    if not reach.without_gradient(trained, found) or (spec.device.type == "cpu" and cost > COST):
        return found
    try:
        found |= of_rows(spec, model, rows([longest], vocabulary)).of.keys()
    except Exception as error:  # it has fewer positions, which is reported later
        if is_of_the_device(error):
            raise
        model.zero_grad(set_to_none=True)
    return found


def causal_length(spec: ModelSpec, model: nn.Module, vocabulary: range) -> int | None:
    """Return the length up to which a model does not look ahead if it does in longer rows; None if it never does."""
    limit, longest = lower_choices(causal_lm(model), spec.config.max_length), longest_of(spec.config)
    model.eval()
    with as_float32(model):
        if not _looks_ahead(model, vocabulary, longest, spec.device):
            low = high = 0
        else:
            low, high = LONG, longest
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if _looks_ahead(model, vocabulary, middle, spec.device) else (middle, high)
    model.train()
    return (limit or low) if high else None


def compare_filled(spec: ModelSpec, model: nn.Module, vocabulary: range, *, by_length: bool) -> Compared:
    """Compare the gradients of a step with those of its single rows, including a long one.

    Args:
        by_length: whether rows are computed only with others of the same length, so that none is padded.
    """
    longest = longest_of(spec.config)
    lengths = [max(SHORT, int(share * longest)) for share in SHARES]
    batch = rows([*lengths, *(lengths[-2:] if by_length else ())], vocabulary)  # rows of one length do not mix either
    with still(model):
        return compare(spec, model, batch, rows_alone(spec, model, batch), by_length=by_length)


def _looks_ahead(model: nn.Module, vocabulary: range, length: int, device: torch.device) -> bool:
    return looks_ahead(cast(Any, model), vocabulary, device, length=length)
