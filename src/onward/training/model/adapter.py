"""The adapter around a base model: its config, its weights, its dropout."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn
from transformers import PreTrainedModel

from onward.errors import ConfigError, ModelError, Unreadable, first_line
from onward.text import quoted
from onward.training.device.errors import is_of_the_device
from onward.training.layers.fused_lora import ADAPTER
from onward.training.model.base import ADAPTER_CONFIG

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ALL_LINEAR = "all-linear"
_WORDS = re.compile(r"[\w.]*\w(?:[,\s]+[\w.]*\w)*")
"""One or more names of modules, which may have dots: `q_proj`, `self_attn.q_proj, mlp.up_proj`."""
MODULES_TO_SAVE = ".modules_to_save."
"""Part of the name of a fully trained module in the model; PEFT's file omits it."""
_EXPERT = re.compile(r"\.experts\.\d+\.")
"""Part of the name of a weight of a single expert."""
_WITHOUT_DROPOUT = "Set lora.dropout: 0 in onward.yaml."


def named_targets(targets: str | list[str]) -> str | list[str]:
    """Return targets in PEFT's form: words are names, or ends of names, of modules; other text is a regular expression.

    PEFT matches every text against the whole name of a module, so that `q_proj` alone would match none.
    """
    if isinstance(targets, list) or targets == ALL_LINEAR or not _WORDS.fullmatch(targets):
        return targets
    return [word for word in re.split(r"[,\s]+", targets) if word]


def saved_adapter_config(folder: Path, *, dropout: float | None = None) -> PeftConfig:
    """Return the adapter that a folder describes.

    Args:
        dropout: the dropout to train it with; None for its own.

    Raises:
        ModelError: the description is missing or not PEFT's.
        Unreadable: it cannot be read now.
    """
    path = folder / ADAPTER_CONFIG
    try:
        adapter = PeftConfig.from_peft_type(**json.loads(_read(path)))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"the adapter's config is not valid for PEFT: {first_line(error)}", where=path) from None
    adapter.inference_mode = False
    if dropout is not None and isinstance(adapter, LoraConfig):
        adapter.lora_dropout = dropout
    return adapter


def adapter_message(model: nn.Module) -> dict[str, Any] | None:
    """Return the adapter of a model as JSON values, for another process to build it; None if there is none."""
    if not isinstance(model, PeftModel):
        return None
    shape = cast(dict[str, Any], cast(Any, model.peft_config[ADAPTER]).to_dict())
    return {key: sorted(value) if isinstance(value, set) else value for key, value in shape.items()}


def adapter_told(told: Mapping[str, Any] | None) -> PeftConfig | None:
    """Return the adapter that a message describes."""
    return None if told is None else PeftConfig.from_peft_type(**told)


def add_adapter(model: PreTrainedModel, adapter: PeftConfig) -> PeftModel:
    """Put an adapter around a base model; its weights are drawn from the global generator.

    Raises:
        ModelError: the model has none of the layers that the adapter is for, or has layers that PEFT cannot adapt so.
    """
    names = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)})
    try:
        adapted = cast(PeftModel, get_peft_model(model, adapter))
    except Exception as error:  # PEFT refuses some settings with whatever error its code meets
        if is_of_the_device(error):
            raise
        where, hint = "lora", f"Linear layers of this model: {', '.join(names)}; or all-linear."
        if "target module" in str(error).lower():
            where = "lora.targets"
        elif "lora_dropout" in str(error):
            where, hint = "lora.dropout", _WITHOUT_DROPOUT
        raise ModelError(f"the adapter does not fit: {first_line(error)}", where=where, hint=hint) from None
    for part in adapted.modules():
        if isinstance(part, ModulesToSaveWrapper):  # `bias: all` would train a bias that is never used
            part.original_module.requires_grad_(False)
    return adapted


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Load an adapter's weights into a model that was built from its config.

    Raises:
        ModelError: the weights are missing or damaged, or names or shapes do not fit.
        Unreadable: they cannot be read now.
    """
    try:
        tensors = load(_read(folder / ADAPTER_WEIGHTS))
    except SafetensorError as error:
        raise ModelError(f"the adapter's weights are damaged: {first_line(error)}", where=folder) from None
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    expected = adapter_tensors(model, trained)
    wrong = sorted(set(tensors) ^ set(expected)) or sorted(n for n in expected if expected[n].shape != tensors[n].shape)
    if wrong:
        hint = _experts_apart(folder) if any(_EXPERT.search(name) for name in wrong if name in tensors) else None
        raise ModelError(
            f"the adapter's weights do not fit its config: {', '.join(wrong[:3])}", where=folder, hint=hint
        )
    set_peft_model_state_dict(model, tensors)


def merge_command(folder: Path, base: str | None) -> str:
    """Return the command with which PEFT merges an adapter into its base, into the folder MERGED.

    Args:
        base: what the adapter names as its base; None if it names none.
    """
    tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else base or "BASE"
    program = (
        "from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; "
        f"M.from_pretrained({str(folder)!r}, dtype='float32').merge_and_unload().save_pretrained('MERGED'); "
        f"T.from_pretrained({tokenizer!r}).save_pretrained('MERGED')"
    )
    return f"python -c {quoted(program)}"


def _experts_apart(folder: Path) -> str:
    """Return what to do about an adapter with weights for each expert on a model that has experts in one tensor."""
    command = merge_command(folder, saved_adapter_config(folder).base_model_name_or_path)
    return (
        "They are weights of single experts, as under transformers before 5; since then, experts are one tensor. Merge "
        f"it in an environment with 'transformers<5' and PEFT: {command}; then: onward init NEW_RUN --model MERGED"
    )


def adapter_tensors(model: PeftModel, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter's file, by PEFT's names.

    Args:
        weights: trained weights, by the names of the model's parameters. A weight that two modules share has one name
            here but two in the file.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters() if name in weights}
    every = model.named_parameters(remove_duplicate=False)
    tensors = {name: weights[names[id(parameter)]] for name, parameter in every if id(parameter) in names}
    named = get_peft_model_state_dict(model, state_dict=tensors, save_embedding_layers=False)
    return {name: tensor for name, tensor in named.items() if MODULES_TO_SAVE not in name}  # named twice by `bias: all`


def train_in_float32(model: nn.Module) -> None:
    """Keep every trained weight in float32, including those that PEFT leaves in the base's type."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def _read(path: Path) -> bytes:
    """Read a file with Python, whose errors say what failed; safetensors reports every failure as 'not found'."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path.name} is missing", where=path.parent) from None
    except OSError as error:
        raise Unreadable.of(error, path) from None


def head_weight(head: nn.Module) -> torch.Tensor | None:
    """Return the matrix of a head that only multiplies by it; None for any other head.

    With an adapter, the head may be trained in full or in some of its rows.
    """
    if type(head) is ModulesToSaveWrapper:
        head = cast(Any, head.modules_to_save)[ADAPTER]
    plain = head.original_module if type(head) is TrainableTokensWrapper else head
    return cast(Any, head).weight if type(plain) is nn.Linear and cast(Any, plain).bias is None else None


def require_droppable(model: nn.Module, probability: float) -> None:
    """Refuse dropout where PEFT does: it would not load what was saved.

    Raises:
        ConfigError: the adapter covers experts that are stored as one tensor.
    """
    if probability and any(isinstance(part, ParamWrapper) for part in model.modules()):
        raise ConfigError(
            f"lora.dropout is {probability}, but adapters of experts that are stored as one tensor cannot have dropout",
            where="lora.dropout",
            hint=_WITHOUT_DROPOUT,
        )


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set the adapter's dropout (the key may change at a boundary)."""
    if isinstance(model, PeftModel) and cast(Any, model.peft_config[ADAPTER]).lora_dropout != probability:
        cast(Any, model.peft_config[ADAPTER]).lora_dropout = probability
        for name in [name for name, _ in model.named_modules()]:
            if name.endswith("lora_dropout.default"):
                parent = model.get_submodule(name.rpartition(".")[0])
                cast(Any, parent)["default"] = nn.Dropout(probability) if probability else nn.Identity()
