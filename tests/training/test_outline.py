"""A model without weights takes the same memory as the real one, which is therefore known without loading it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import CPU
from transformers import AutoConfig

from onward.config import Config
from onward.training.model.load import build_model
from onward.training.model.outline import outlined
from onward.training.model.spec import ModelSpec
from onward.training.model.treatment import Treatment
from onward.training.optimizers import OPTIMIZERS, optimizer_method
from onward.training.steps.loss import TargetLoss
from onward.training.steps.memory import Profile
from onward.training.steps.model_memory import profile_of

END_TO_END = Treatment(end_to_end=True)
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 4, "dropout": 0.1}},
    "half": {"lora": {"rank": 4}, "dtype": "bfloat16"},
    "full": {"method": "full"},
}


def profile(model: torch.nn.Module, config: Config, dtype: torch.dtype) -> Profile:
    """Count what a model takes."""
    return profile_of(model, optimizer_method(config), TargetLoss(model, CPU, dtype), config, "cpu")


@pytest.mark.parametrize("name", SETTINGS)
def test_an_outline_takes_what_the_model_takes(name: str, model: Path) -> None:
    """Weights, moments and what backward keeps of rows are equal to the byte, with recomputation too."""
    config = Config.model_validate({"model": str(model), **SETTINGS[name]})
    dtype = torch.bfloat16 if name == "half" else torch.float32
    built = build_model(ModelSpec(config, model, CPU, dtype), treatment=END_TO_END)
    expected = profile(built, config, dtype)
    with outlined(AutoConfig.from_pretrained(model), config, dtype, END_TO_END) as outline:
        actual = profile(outline, config, dtype)
    buffers = sum(buffer.nbytes for buffer in built.buffers())
    assert expected == replace(actual, base=actual.base + buffers)
    assert actual.recomputed is not None


def test_moments_of_8_bits_are_told_without_the_package_that_makes_them(model: Path) -> None:
    """A machine without bitsandbytes can say what a run with it would take."""
    config = Config.model_validate({"model": str(model), "method": "full", "optimizer": "adamw_8bit"})
    with outlined(AutoConfig.from_pretrained(model), config, torch.float32, END_TO_END) as outline:
        found = profile(outline, config, torch.float32)
        weights = dict(outline.named_parameters())
    assert OPTIMIZERS["adamw_8bit"].bytes(weights) == found.moments < OPTIMIZERS["adamw"].bytes(weights)
    largest = max(weight.nbytes for weight in weights.values())
    assert largest < found.workspace  # the kernels for CPUs expand the moments of one weight at a time
