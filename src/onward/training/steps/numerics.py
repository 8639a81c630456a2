"""Which way of computing a step applies to a model: a number in the environment of every state.

A way that gives other last bits than an earlier release gets a new number, only for the models concerned. States with
different numbers are compared like those of different machines: weights and moments must be equal, the probe's loss
close.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from onward.config import Config
from onward.training.device.environment import NUMERICS
from onward.training.layers.attention import PADDING_FREE
from onward.training.layers.rope import angles_of
from onward.training.model.quiet import quiet

PROVEN_APART = 4
"""Padded rows in parts of similar length, a separate head; RoPE by length; a probe that leaves packed weights alone."""


IN_HALF = 5
"""Below float32: LoRA layers in one node, logits and sums over chunks of the head in float32, one attention call."""

ON_GPU = 6
"""On a GPU: norms, rotations and gates in one kernel each, few large parts of the head, grouped heads as they are."""


FILLED = 7
"""On a GPU: parts of steps that are short for the model are filled up to round sizes."""


def numerics_of(
    base: Path,
    config: Config,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    end_to_end: bool | None = None,
) -> int:
    """Return the number for a base model, from its config: `NUMERICS` if nothing changed since, else a later one.

    Args:
        base: folder of the base model.
        dtype: compute type.
        end_to_end: whether its rows are laid end to end; None if only the model's type decides.
    """
    if device.type == "cuda":
        return FILLED if dtype != torch.float32 else ON_GPU
    if dtype != torch.float32:
        return IN_HALF
    try:
        with quiet():
            model = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    except Exception:  # loading the model will show what is wrong with it
        return NUMERICS
    as_before = model.model_type in PADDING_FREE and end_to_end is not False and angles_of(model).are_constant
    packs = config.method == "qlora" and device.type == "cpu"
    return NUMERICS if as_before and not packs else PROVEN_APART
