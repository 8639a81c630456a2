"""What tests of the admission share: small models, their configs, and what is found of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import small
import tiny
import torch

from onward.config import Config
from onward.training.admission.admit import admit
from onward.training.admission.findings import Findings
from onward.training.model.spec import ModelSpec

CPU = torch.device("cpu")


def save(folder: Path, family: str, **settings: Any) -> Path:
    """Save a small model of a family with a tokenizer."""
    small.small_model(family, **settings).save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder


def config(folder: Path, **settings: Any) -> Config:
    """Return a config for a model."""
    return Config.model_validate({"model": str(folder), "max_length": 64, **settings})


def prove(folder: Path, family: str, **settings: Any) -> Findings:
    """Return what the admission of a small model of a family finds, with the default settings."""
    return admit(ModelSpec(config(save(folder, family, **settings)), folder, CPU, torch.float32))
