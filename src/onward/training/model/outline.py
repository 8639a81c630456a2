"""A model without its weights: every tensor has a shape and a type but no memory, and a forward pass costs nothing.

The memory of a step can be counted with it (`memory.profile_of`) without loading a model of many gigabytes.
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
from onward.training.layers.attention import lay_end_to_end
from onward.training.model.adapter import add_adapter, train_in_float32
from onward.training.model.adapter_shape import new_adapter_config
from onward.training.model.expert_lora import wrap_experts
from onward.training.model.load import causal_lm, make_fast, train_only
from onward.training.model.quiet import quiet
from onward.training.model.treatment import Treatment


@contextlib.contextmanager
def outlined(
    model_config: Any, config: Config, dtype: torch.dtype, treatment: Treatment, *, fuse: bool = True
) -> Generator[nn.Module]:
    """Yield the model of a run in training mode, as it would compute on a CPU; use it only in the body.

    Args:
        model_config: the base's transformers config.
        dtype: compute type.
        fuse: put the layers of an adapter into one node, as in training.

    Raises:
        Exception: an operation of the model needs the values of a tensor.
    """
    with quiet(), torch.device("meta"):
        model = _made(model_config, config, dtype, treatment)
        if fuse:
            make_fast(model, torch.device("cpu"), end_to_end=treatment.end_to_end)
        else:
            lay_end_to_end(causal_lm(model))
    with FakeTensorMode(allow_non_fake_inputs=True):
        _on_cpu(model)
        yield model.train()


def _made(model_config: Any, config: Config, dtype: torch.dtype, treatment: Treatment) -> nn.Module:
    whole = config.method == "full"
    base: Any = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32 if whole else dtype)
    base.config.use_cache = False
    if whole:
        train_only(base, config.train, treatment.left_out)
        return cast(nn.Module, base)
    base.requires_grad_(False)
    adapted = add_adapter(base, new_adapter_config(config, None, base, treatment.left_out))
    train_in_float32(adapted)
    wrap_experts(adapted)
    return adapted


def _on_cpu(model: nn.Module) -> None:
    """Replace a model's meta tensors with tensors that claim to be in main memory; ties stay.

    Buffers become plain attributes: code that restores buffers would compare their values.
    """
    made: dict[int, nn.Parameter] = {}

    def of(weight: nn.Parameter) -> nn.Parameter:
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(torch.empty_like(weight, device="cpu"), weight.requires_grad)
        return made[id(weight)]

    for part in model.modules():
        weights, buffers = vars(part)["_parameters"], vars(part)["_buffers"]
        weights.update((name, of(weight)) for name, weight in list(weights.items()) if weight is not None)
        for name, buffer in list(buffers.items()):
            del buffers[name]
            vars(part)[name] = None if buffer is None else torch.empty_like(buffer, device="cpu")
