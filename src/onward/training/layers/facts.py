"""The kernels used in the layers of a model, for the record of the environment."""

from __future__ import annotations

import torch

from onward.training.layers.decoder_parts import kernels_version
from onward.training.layers.varlen import kernel_name


def layer_facts(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Return the kernels for attention and for norms, rotations and gates; empty on a CPU, which has only one kind."""
    facts = {"attention": kernel_name(device, dtype), "kernels": kernels_version(device)}
    return {name: value for name, value in facts.items() if value}
