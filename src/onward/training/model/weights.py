"""Writes trained weights as Hugging Face files: an adapter with its config, or a full model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from onward.atomic import system_errors
from onward.training.model.adapter import ADAPTER_WEIGHTS, adapter_tensors
from onward.training.model.base import ADAPTER_CONFIG
from onward.training.model.quiet import quiet

CONFIG = "config.json"


def save_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write trained weights into a folder: an adapter with its config, or a full model.

    Every file gets the mode of a new file under the process's umask.

    Args:
        model: provides names, config and what is not trained.
        weights: the trained weights, by the names of `model`'s parameters.

    Raises:
        OSError: the disk is full or failing.
    """
    if not isinstance(model, PeftModel):
        own = {id(parameter): weights[name] for name, parameter in model.named_parameters() if name in weights}
        tensors = {name: own.get(id(value), value) for name, value in model.state_dict(keep_vars=True).items()}
        with quiet(), system_errors(folder):
            cast(PreTrainedModel, model).save_pretrained(folder, state_dict=tensors)
        _share_mode(folder, CONFIG)
        return
    save_adapter(model, weights, folder)


def save_adapter(model: PeftModel, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write an adapter's trained weights and its config into a folder.

    Raises:
        OSError: the disk is full or failing.
    """
    tensors = adapter_tensors(model, weights)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    with system_errors(folder / ADAPTER_WEIGHTS):
        save_file(_apart(contiguous), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    values = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    text = json.dumps(values, indent=2, sort_keys=True, default=sorted)  # the order of a set differs between processes
    (folder / ADAPTER_CONFIG).write_text(text + "\n")
    _share_mode(folder, ADAPTER_CONFIG)


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give every name memory of its own: safetensors refuses two names for the same memory."""
    seen: set[int] = set()
    apart: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return apart


def _share_mode(folder: Path, name: str) -> None:
    """Give weights the mode of an ordinary new file: safetensors makes them readable only by their owner."""
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / name, path)
