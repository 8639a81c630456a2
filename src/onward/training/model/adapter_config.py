"""Reads PEFT's `adapter_config.json`: the config keys that it becomes, or what in it cannot be continued here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from onward.config import known_keys
from onward.errors import DamagedState, ModelError, UsageError
from onward.text import quoted
from onward.training.model.adapter import ADAPTER_WEIGHTS, merge_command
from onward.training.model.base import ADAPTER_CONFIG

KEYS: Mapping[str, str] = {
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "target_parameters": "lora.target_parameters",
    "layers_to_transform": "lora.layers",
    "rank_pattern": "lora.rank_pattern",
    "alpha_pattern": "lora.alpha_pattern",
    "use_dora": "lora.use_dora",
    "use_rslora": "lora.use_rslora",
    "bias": "lora.bias",
    "modules_to_save": "lora.modules_to_save",
    "trainable_token_indices": "lora.trainable_tokens",
}
"""Fields of PEFT's LoRA, and the config keys that they become. One whose key this release lacks is refused by name."""

ALWAYS = ("r", "lora_alpha", "target_modules")
"""Fields that every adapter has; torchtune leaves out others, for which PEFT has a default."""

DROPOUT = "lora_dropout"

LISTS = ("layers_to_transform",)
"""Fields that may be one number instead of a list."""

CARRIED = frozenset(
    {
        "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode",
        "revision", "fan_in_fan_out", "megatron_core", "megatron_config", "loftq_config", "eva_config", "corda_config",
        "lora_ga_config", "runtime_config", "qalora_group_size", "init_lora_weights", "exclude_modules",
        "layers_pattern", "ensure_weight_tying",
    }
)  # fmt: skip
"""Fields that change no base weight and are kept as they are (`init_lora_weights` has a check of its own)."""

OWN_WEIGHTS = (True, False, None, "gaussian", "orthogonal", "eva", "default")
"""Values of `init_lora_weights` that leave the base as it is; the others take the initial weights out of it."""

UNMERGED = ("alora_invocation_tokens", "arrow_config", "layer_replication", "lora_bias")
"""Fields with which PEFT cannot merge an adapter into its base (`lora_bias` where the base has no biases)."""

MADE_AGAIN = ("pissa", "olora")
"""Values with which PEFT takes the same initial weights out of the base wherever it loads the adapter."""


def read_adapter(checkpoint: Path) -> dict[str, Any]:
    """Return the content of an adapter's config.

    Raises:
        DamagedState: it cannot be read.
        ModelError: the adapter is not a LoRA, or cannot be continued exactly; the message says why.
        UsageError: its weights are missing.
    """
    path = checkpoint / ADAPTER_CONFIG
    try:
        values = dict(cast(dict[str, Any], json.loads(path.read_bytes())))
    except (OSError, ValueError, TypeError) as error:
        raise DamagedState(f"{ADAPTER_CONFIG} cannot be read: {type(error).__name__}", where=path) from None
    if values.get("peft_type") != "LORA":
        raise ModelError(f"adapters of type {values.get('peft_type')} cannot be continued here, only LoRA", where=path)
    _require_weights(checkpoint)
    _require_own_weights(values, path)
    if values.get("bias", "none") != "none" and not _holds_biases(checkpoint / ADAPTER_WEIGHTS):
        values["bias"] = "none"  # the base has none: then PEFT silently trains none
    refused = [f"{name} {values[name]}" for name in sorted(values) if not _is_taken(name, values[name])]
    if refused:
        what = f"the adapter has settings that a run cannot take over: {'; '.join(refused)}"
        raise ModelError(what, where=path, hint=merge_hint(checkpoint, values))
    return values


def _require_weights(checkpoint: Path) -> None:
    """Refuse an adapter without safetensors; releases of PEFT before 0.7 wrote `adapter_model.bin`."""
    weights, older = checkpoint / ADAPTER_WEIGHTS, checkpoint / "adapter_model.bin"
    if weights.is_file():
        return
    program = (
        "import torch; from safetensors.torch import save_file as s; "
        f"s({{k: v.contiguous() for k, v in torch.load({str(older)!r}, weights_only=True).items()}}, {str(weights)!r})"
    )
    hint = f"Write it as one: python -c {quoted(program)}; then adopt again." if older.is_file() else None
    raise UsageError(f"{ADAPTER_WEIGHTS} is missing", where=checkpoint, hint=hint)


def _holds_biases(weights: Path) -> bool:
    """Whether an adapter's weights include biases of the base; unreadable files are reported later."""
    try:
        with safe_open(weights, framework="pt") as file:
            names: list[str] = file.keys()
            return any(name.endswith(".bias") and ".lora_" not in name for name in names)
    except (OSError, SafetensorError):
        return True


def adapter_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config keys that an adapter's config becomes."""
    try:
        taken = {KEYS[name]: values[name] for name in ALWAYS} | {KEYS[DROPOUT]: values.get(DROPOUT, 0.0)}
    except KeyError as error:
        raise DamagedState(f"{ADAPTER_CONFIG} does not say {error}", where=ADAPTER_CONFIG) from None
    others = [name for name in KEYS if name not in (*ALWAYS, DROPOUT) and not _is_default(name, values.get(name))]
    taken |= {KEYS[name]: values[name] for name in others}
    for name in LISTS:
        if isinstance(value := taken.get(KEYS[name]), int):
            taken[KEYS[name]] = [value]
    targets: Any = taken["lora.targets"]
    return taken | {"lora.targets": sorted(targets) if isinstance(targets, list) else targets or []}


def _require_own_weights(values: Mapping[str, Any], path: Path) -> None:
    """Refuse adapters whose initial weights were taken out of the base: on the unchanged base they differ."""
    begun = values.get("init_lora_weights")
    if begun in OWN_WEIGHTS:
        return
    hint = merge_hint(path.parent, values) if begun in MADE_AGAIN else _changed_base_hint(path)
    what = f"the adapter was begun by {begun}, which changes the base: on the original base it is a different model"
    raise ModelError(what, where=path, hint=hint)


def merge_hint(checkpoint: Path, values: Mapping[str, Any]) -> str:
    """Return the command that merges an adapter into its base, or what else to do if PEFT cannot."""
    stuck = [name for name in UNMERGED if values.get(name)]
    if stuck:
        base = quoted(values.get("base_model_name_or_path") or "BASE")
        return (
            f"PEFT cannot merge it into its base ({', '.join(stuck)}): continue it where it was trained, or begin "
            f"again from the base: onward init NEW_RUN --model {base}"
        )
    command = merge_command(checkpoint, values.get("base_model_name_or_path"))
    return f"Merge it into its base: {command}; then: onward init NEW_RUN --model MERGED"


def _changed_base_hint(path: Path) -> str:
    return (
        "If you have the base that it left, as a folder: write true for init_lora_weights in a copy of "
        f"{path.parent.name}, and adopt that with --model FOLDER. Otherwise convert the adapter where it was trained: "
        "save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL) of PEFT"
    )


def _is_taken(name: str, value: Any) -> bool:
    return name in CARRIED or KEYS.get(name) in known_keys() or _is_default(name, value)


def _is_default(name: str, value: Any) -> bool:
    """Whether a field has PEFT's default or is empty. Layer 0 is a layer."""
    is_layer = name in LISTS and value is not None and value != []
    says_nothing = not value and not is_layer
    return says_nothing or value == getattr(LoraConfig, name, None)
