"""The adapter around a base model: its config, its weights, its dropout."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn
from transformers import PreTrainedModel

from onward.config import Config
from onward.errors import ModelError, Unreadable, first_line

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ALL_LINEAR = "all-linear"
_WORDS = re.compile(r"[\w.]*\w(?:[,\s]+[\w.]*\w)*")
"""Names of modules, one or some, with dots at most: `q_proj`, `self_attn.q_proj, mlp.up_proj`."""


def new_adapter_config(config: Config, base: Path, left_out: Sequence[str] = ()) -> LoraConfig:
    """Return the adapter that a run's config asks for.

    Args:
        left_out: modules that get none, by their whole names.
    """
    return LoraConfig(
        r=config.lora.rank,
        lora_alpha=cast(int, config.lora.alpha),
        lora_dropout=config.lora.dropout,
        target_modules=named_targets(config.lora.targets),
        exclude_modules=list(left_out) or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    )


def named_targets(targets: str | list[str]) -> str | list[str]:
    """Return targets as PEFT takes them: words are names, or ends of names, of modules; else text is an expression.

    PEFT holds every text against the whole name of a module, so that `q_proj` alone would fit none.
    """
    if isinstance(targets, list) or targets == ALL_LINEAR or not _WORDS.fullmatch(targets):
        return targets
    return [word for word in re.split(r"[,\s]+", targets) if word]


def saved_adapter_config(folder: Path, *, dropout: float | None = None) -> PeftConfig:
    """Return the adapter that a folder describes.

    Args:
        dropout: train it with this dropout; None loads it for inference.

    Raises:
        ModelError: the description is missing or is not one of PEFT's.
        Unreadable: it cannot be read now.
    """
    path = folder / ADAPTER_CONFIG
    try:
        adapter = PeftConfig.from_peft_type(**json.loads(_read(path)))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"the adapter's config is not one of PEFT's: {first_line(error)}", where=path) from None
    adapter.inference_mode = dropout is None
    if dropout is not None and isinstance(adapter, LoraConfig):
        adapter.lora_dropout = dropout
    return adapter


def add_adapter(model: PreTrainedModel, adapter: PeftConfig) -> PeftModel:
    """Put an adapter around a base model; its weights are drawn from the global generator.

    Raises:
        ModelError: the model has none of the layers that the adapter is for.
    """
    try:
        return cast(PeftModel, get_peft_model(model, adapter))
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)})
        raise ModelError(
            f"the adapter does not fit: {first_line(error)}",
            where="lora.targets",
            hint=f"Linear layers of this model: {', '.join(names)}; or all-linear.",
        ) from None


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Load an adapter's weights into the model that was built from its config.

    Raises:
        ModelError: the weights are missing or damaged, or names or shapes do not fit.
        Unreadable: they cannot be read now.
    """
    try:
        tensors = load(_read(folder / ADAPTER_WEIGHTS))
    except SafetensorError as error:
        raise ModelError(f"the adapter's weights are damaged: {first_line(error)}", where=folder) from None
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = sorted(set(tensors) ^ set(expected)) or sorted(n for n in expected if expected[n].shape != tensors[n].shape)
    if wrong:
        raise ModelError(f"the adapter's weights do not fit its config: {', '.join(wrong[:3])}", where=folder)
    set_peft_model_state_dict(model, tensors)


def _read(path: Path) -> bytes:
    """Read a file by Python, whose errors say what the system refused; safetensors calls every failure 'not found'."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path.name} is missing", where=path.parent) from None
    except OSError as error:
        raise Unreadable.of(error, path) from None


def set_dropout(model: nn.Module, probability: float) -> None:
    """Put another adapter dropout in force (the key may change at a boundary)."""
    if isinstance(model, PeftModel):
        cast(Any, model.peft_config["default"]).lora_dropout = probability
        for name in [name for name, _ in model.named_modules()]:
            if name.endswith("lora_dropout.default"):
                parent = model.get_submodule(name.rpartition(".")[0])
                cast(Any, parent)["default"] = nn.Dropout(probability) if probability else nn.Identity()
