"""Which kernels compute in the layers of a model, for the record of the environment."""

from __future__ import annotations

import torch

from onward.training.layers.decoder_parts import kernels_version
from onward.training.layers.varlen import kernel_name


def layer_facts(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Return the kernels that attend to rows, and those of norms, rotations and gates; on a CPU there is one kind."""
    facts = {"attention": kernel_name(device, dtype), "kernels": kernels_version(device)}
    return {name: value for name, value in facts.items() if value}
