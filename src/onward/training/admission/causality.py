"""Finds out whether a model looks ahead."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any, cast

import torch
from torch import nn

from onward.training.admission.inputs import LONG, others, rows, tokens
from onward.training.device.environment import HALF, autocast, without_tf32
from onward.training.device.memory import read_usage

TOLERANCE = 1e-5
"""The change of an earlier logit, relative to the spread of the logits, up to which it is rounding."""
PLACES = 5
"""How many tokens of a longer row are tried."""
LARGEST = 2_000_000_000
"""The number of weights up to which a model is checked in float32 whatever its type: rounding hides small effects."""
COMPUTE_TYPE = "compute_dtype"
"""The attribute of bitsandbytes' 4-bit layers with the type to which they convert what they multiply."""
ROOM = 0.5
"""The share of a GPU's free memory that a larger model may take in float32."""


@contextlib.contextmanager
def as_float32(model: nn.Module) -> Generator[bool]:
    """Let a model compute in float32 in the body, if that fits, and yield whether it does.

    It gets its own weights back, but what the body writes into a weight stays there. 4-bit weights stay as they are;
    what they are multiplied by is no longer rounded, which would make large differences of tiny ones. Nor does a GPU
    round to TF32.
    """
    tensors = [*model.parameters(), *model.buffers()]
    lower = [tensor for tensor in tensors if tensor.dtype in HALF]
    fits = sum(tensor.numel() for tensor in tensors) <= LARGEST or _has_room(lower)
    quantized = [(part, kind) for part in model.modules() if (kind := getattr(part, COMPUTE_TYPE, None)) in HALF]
    changed: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    try:
        for part, _ in quantized if fits else []:
            setattr(part, COMPUTE_TYPE, torch.float32)
        for tensor in lower if fits else []:
            own, tensor.data = tensor.data, tensor.data.float()
            changed.append((tensor, own, tensor._version))
        with without_tf32(tensors[0].device):
            yield fits
    finally:
        for part, kind in quantized:
            setattr(part, COMPUTE_TYPE, kind)
        for tensor, own, version in changed:
            is_own = tensor._version == version and _equal_ends(tensor.data, own)
            tensor.data = own if is_own else tensor.data.to(own.dtype)


def _has_room(lower: Sequence[torch.Tensor]) -> bool:
    """Whether a GPU has room for these tensors in float32."""
    usage = read_usage(lower[0].device) if lower and lower[0].device.type == "cuda" else None
    return usage is not None and sum(4 * tensor.numel() for tensor in lower) <= ROOM * usage.free


def _equal_ends(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the first and the last row of two tensors are equal: an operation in place changes all rows."""
    pairs = [(one, other)] if one.dim() < 2 else [(one[place], other[place]) for place in (0, -1) if len(one)]
    return all(torch.equal(left, right.to(left.dtype)) for left, right in pairs)


def looks_ahead(model: nn.Module, vocabulary: range, device: torch.device, *, length: int = LONG) -> bool:
    """Return whether another token at the end, or in the middle, of a row changes an earlier logit.

    Args:
        vocabulary: the token ids that the row may have.
        length: tokens of the row; in a longer one, more tokens are tried.

    Raises:
        ValueError: the logits are not finite.
    """
    ids = tokens(rows([length], vocabulary).rows[0], device)
    before = _logits(model, ids, device)
    eps = max(torch.finfo(parameter.dtype).eps for parameter in model.parameters() if parameter.is_floating_point())
    tolerance = TOLERANCE * eps / torch.finfo(torch.float32).eps
    places = (length - 1, length // 2) if length <= LONG else range(length - 1, 0, -(length // PLACES))
    for place in places:
        changed = ids.clone()
        changed[0, place] = others(changed[0, place], vocabulary)
        after = _logits(model, changed, device)
        moved = (after[:place] - before[:place]).abs().max()
        if float(moved) > tolerance * float(before.std()):
            return True
    return False


def _logits(model: nn.Module, ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the logits of one row, shape (tokens, vocabulary)."""
    with torch.no_grad(), autocast(device, _lowest(model)):
        logits = cast(Any, model)(input_ids=ids, use_cache=False).logits[0].float()
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("its logits are not finite")
    return logits


def _lowest(model: nn.Module) -> torch.dtype:
    """Return the type to compute in: a 16-bit type if a weight still has one."""
    return next((each.dtype for each in model.parameters() if each.dtype in HALF), torch.float32)
