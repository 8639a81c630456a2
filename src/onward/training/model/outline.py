"""A model without its weights: every tensor has shape and type, none has memory, and its forward pass costs nothing.

What a step takes can be counted on it (`memory.profile_of`) without loading a model of many gigabytes.
(PyTorch's `FakeTensorMode`.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from onward.config import Config
from onward.training.model.adapter import add_adapter, train_in_float32
from onward.training.model.adapter_shape import new_adapter_config
from onward.training.model.expert_lora import wrap_experts
from onward.training.model.load import make_fast, train_only
from onward.training.model.quiet import quiet
from onward.training.model.treatment import Treatment


@contextlib.contextmanager
def outlined(
    model_config: Any, config: Config, dtype: torch.dtype, treatment: Treatment, *, fuse: bool = True
) -> Generator[nn.Module]:
    """Yield the model of a run in training mode, as it would compute on a CPU; it is computed with in the body only.

    Args:
        model_config: that of the base, as transformers has it.
        dtype: compute type.
        fuse: put the layers of an adapter in one node, as in training.

    Raises:
        Exception: an operation of the model needs the values of a tensor.
    """
    whole = config.method == "full"
    with FakeTensorMode(allow_non_fake_inputs=True), quiet():
        model: Any = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32 if whole else dtype)
        model.config.use_cache = False
        if whole:
            train_only(model, config.train, treatment.left_out)
        else:
            model.requires_grad_(False)
            model = add_adapter(model, new_adapter_config(config, None, model, treatment.left_out))
            train_in_float32(model)
            wrap_experts(model)
        if fuse or whole:
            make_fast(model, end_to_end=treatment.end_to_end)
        yield cast(nn.Module, model.train())
