"""Adapters of parameters that hold several matrices in one tensor: the experts of a mixture, in most models.

PEFT's `ParamWrapper` puts the adapted tensor in place through `torch.nn.utils.parametrize`, whose cache is
process-wide: while the probe is measured in another thread, a training step may find the tensor of the previous step.
Here the adapted tensor is an attribute of the module itself during its forward pass. Arithmetic, names and order of
parameters are PEFT's.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from onward.training.layers.fused_lora import ADAPTER


def wrap_experts(model: nn.Module) -> None:
    """Replace PEFT's wrappers of parameters in a model with `ExpertLora`; everything else stays as it is."""
    for parent in list(model.modules()):
        for name, part in list(parent.named_children()):
            if type(part) is ParamWrapper:
                setattr(parent, name, ExpertLora(part))


class ExpertLora(ParamWrapper):
    """A parameter with one adapter: `W + scaling * B A` for each of its matrices.

    Args:
        wrapper: PEFT's wrapper, whose parameters, adapters and settings are taken over.
    """

    def __init__(self, wrapper: ParamWrapper) -> None:  # pyright: ignore[reportMissingSuperCall]
        nn.Module.__init__(self)
        vars(self).update(vars(wrapper))

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Generator[None]:
        """Let the wrapped module find the adapted tensor under the parameter's name."""
        if ADAPTER not in active_adapters or ADAPTER not in self.lora_A:
            yield
            return
        attributes = vars(self.get_base_layer())  # looked up before parameters, which are stored elsewhere
        attributes[self.parameter_name] = self.adapted()
        try:
            yield
        finally:
            del attributes[self.parameter_name]

    def adapted(self) -> torch.Tensor:
        """Return the parameter with its adapter added, in the parameter's shape and type."""
        weight = cast(torch.Tensor, self.get_param())
        if self.num_experts == 1:
            return weight + cast(torch.Tensor, self.get_delta_weight(ADAPTER))
        left, right, scaling = cast(Any, self).get_delta_factors(ADAPTER)
        with torch.autocast(weight.device.type, enabled=False):
            return torch.baddbmm(weight, left, right, alpha=scaling)
