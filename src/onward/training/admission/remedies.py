"""Remedies for a refusal: settings of the model or of the run, tried if that costs little."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from onward.config import Config
from onward.errors import ConfigError, first_line
from onward.training.admission.causality import looks_ahead
from onward.training.device.environment import HALF
from onward.training.device.errors import is_of_the_device
from onward.training.model.adapter_shape import new_adapter_config, unsuitable_init
from onward.training.model.quiet import one_load, quiet
from onward.training.model.spec import ModelSpec

NO_REMEDY = "No setting changes that: train another model."
_TRIES = 8
"""The most kinds of modules that are left out, one after another, until an adapter fits."""


def working_config(config: Config, base: Path, chosen: bool) -> tuple[Config, dict[str, Any]]:
    """Return a config whose adapter fits the model, and the keys that were changed from their defaults for it.

    Args:
        chosen: whether the user chose `lora.dropout`; then it is not changed.

    Raises:
        ConfigError: the adapter does not fit; the message names settings that were tried and work.
    """
    if config.method == "full":
        return config, {}
    problem = _problem(config, base)
    if problem is None:
        return config, {}
    without = config.model_copy(update={"lora": config.lora.model_copy(update={"dropout": 0.0})})
    left = _problem(without, base) if config.lora.dropout else problem
    if left is None:
        if not chosen:
            return without, {"lora.dropout": 0.0}
        raise ConfigError(
            f"the model stores experts as single tensors, whose adapters cannot have dropout ({problem})",
            where="lora.dropout", hint="--set lora.dropout=0",
        )  # fmt: skip
    plain = config.model_copy(update={"lora": without.lora.model_copy(update={"init": "default"})})
    if config.lora.init != "default" and _problem(plain, base) is None:
        raise unsuitable_init(config.lora.init, left, "gaussian")
    targets = _working_targets(config, base)
    if targets is None:
        return config, {}  # building the model will show its modules
    words = f"--set 'lora.targets=[{', '.join(targets)}]'"
    raise ConfigError(f"the adapter does not fit: {problem}", where="lora.targets", hint=f"These fit: {words}")


def causal_hint(base: Path, device: torch.device) -> str:
    """Return how to keep a model from looking ahead, if its own config has a key for that."""
    try:
        with one_load, quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                base, dtype=torch.float32, local_files_only=True, trust_remote_code=False, is_decoder=True
            )
        model: PreTrainedModel = loaded.to(device).eval()
        vocabulary = range(len(cast(Any, model.get_input_embeddings()).weight))
        works = not looks_ahead(model, vocabulary, device)
    except Exception as error:
        if is_of_the_device(error):
            raise
        works = False
    if not works:
        return "The model does not generate text from left to right; train a causal language model."
    return f'Set "is_decoder": true in {base / "config.json"}: then it attends only to earlier tokens.'


def working_hint(config: Config, base: Path, device: torch.device, dtype: torch.dtype) -> str:
    """Return a setting with which a model works that fails as it is trained: float32, or targets that are plain layers.

    PyTorch's layer norms on a CPU take no input of another type than their weights, as trained embeddings make it.
    Experts of some models add what autocast multiplied to what it did not.
    """
    if dtype in HALF and _computes(ModelSpec(config, base, device, torch.float32)):
        return "In float32 it works: --set dtype=float32"
    if config.method == "full":
        return NO_REMEDY
    skeleton = _skeleton(base)
    head = skeleton.get_output_embeddings()
    kinds: dict[str, set[type]] = {}
    for name, part in skeleton.named_modules():
        if isinstance(part, nn.Linear) and part is not head:
            kinds.setdefault(name.rpartition(".")[2], set()).add(type(part))
    targets = sorted(kind for kind, types in kinds.items() if types == {nn.Linear})
    tried = config.model_copy(update={"lora": config.lora.model_copy(update={"targets": targets})})
    if not _computes(ModelSpec(tried, base, device, dtype)):  # then the adapter is not the cause
        return NO_REMEDY
    return f"With these targets it works: --set 'lora.targets=[{', '.join(targets)}]'"


def _computes(spec: ModelSpec) -> bool:
    """Return whether a model computes the logits of a row."""
    from onward.training.admission.small.vocabulary import vocabulary_of
    from onward.training.model.load import build_plain

    try:
        model = build_plain(spec).eval()
        looks_ahead(model, vocabulary_of(model), spec.device)
    except Exception as error:
        if is_of_the_device(error):
            raise
        return False
    return True


def _skeleton(base: Path) -> PreTrainedModel:
    """Return the model without allocating memory for its weights."""
    with one_load, quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _problem(config: Config, base: Path) -> str | None:
    """Return why the adapter does not fit the model; None if it does, or if that cannot be tried."""
    try:
        skeleton = _skeleton(base)
    except Exception as error:  # loading the model gives a better error
        if is_of_the_device(error):
            raise
        return None
    return _refusal(skeleton, new_adapter_config(config, base, skeleton))


def _refusal(skeleton: PreTrainedModel, adapter: LoraConfig) -> str | None:
    try:
        with quiet():
            get_peft_model(skeleton, adapter)
    except Exception as error:
        if is_of_the_device(error):
            raise
        return first_line(error)
    return None


def _working_targets(config: Config, base: Path) -> list[str] | None:
    """Return kinds of linear layers that an adapter can have, found by leaving out those that attempts refuse."""
    skeleton = _skeleton(base)
    head = skeleton.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, part in skeleton.named_modules()
        if isinstance(part, nn.Linear) and part is not head
    }
    for _ in range(_TRIES):
        targets = sorted(linear)
        if not targets:
            return None
        tried = config.model_copy(update={"lora": config.lora.model_copy(update={"targets": targets})})
        skeleton = _skeleton(base)
        refusal = _refusal(skeleton, new_adapter_config(tried, base, skeleton))
        if refusal is None:
            return targets
        named_there = {name for name in linear if f"'{name}'" in refusal}
        if not named_there:
            return None
        linear -= named_there
    return None
