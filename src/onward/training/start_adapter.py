"""A PEFT LoRA adapter as the start of a run: its weights are taken, moments and step are new.

The run keeps a copy in `adapter/`, so that it depends on no other folder and `reset` has something to go back to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from onward.atomic import fsync_file
from onward.config import Config
from onward.digest import sha256_json, xxh3_file
from onward.errors import ConfigError, DamagedState, ModelError, UsageError
from onward.training.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, add_adapter, load_adapter, saved_adapter_config
from onward.training.quiet import quiet

_KEYS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "r": ("rank", int),
    "lora_alpha": ("alpha", float),
    "target_modules": ("targets", lambda value: value if isinstance(value, str) else sorted(value or [])),
    "target_parameters": ("target_parameters", lambda value: list(value or [])),
    "layers_to_transform": ("layers", lambda value: [value] if isinstance(value, int) else list(value or [])),
    "rank_pattern": ("rank_pattern", lambda value: dict(value or {})),
    "alpha_pattern": ("alpha_pattern", lambda value: dict(value or {})),
    "use_dora": ("use_dora", bool),
    "use_rslora": ("use_rslora", bool),
    "bias": ("bias", str),
    "modules_to_save": ("modules_to_save", lambda value: list(value or [])),
}
"""PEFT's fields that a config key of `lora` tells of."""
_CARRIED = frozenset(
    {"peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
     "init_lora_weights", "lora_dropout", "trainable_token_indices", "fan_in_fan_out", "exclude_modules",
     "layers_pattern", "lora_bias", "ensure_weight_tying", "megatron_core", "qalora_group_size", "eva_config"}
)  # fmt: skip
"""Fields that change no base weight and are followed as the adapter's own config has them."""
_PLAIN_INIT = (True, False, None, "gaussian", "orthogonal", "eva")
"""First weights that leave the base as it is; nothing is left of them once an adapter is trained."""


@dataclass(frozen=True)
class StartAdapter:
    """An adapter's folder and what its config says, by config key of `lora`."""

    folder: Path
    base: str
    lora: dict[str, Any]


def read_start_adapter(folder: Path) -> StartAdapter:
    """Read what an adapter's folder says of itself.

    Raises:
        UsageError: the folder holds no adapter in safetensors.
        ModelError: the adapter is of a kind that cannot go on exactly.
    """
    path = folder / ADAPTER_CONFIG
    try:
        values = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        hint = "Name a folder with adapter_config.json and adapter_model.safetensors, as PEFT's save_pretrained writes."
        raise UsageError(f"this is no adapter of PEFT: {type(error).__name__}", where=path, hint=hint) from None
    if not (folder / ADAPTER_WEIGHTS).is_file():
        hint = "Load it once with PEFT and save it: save_pretrained writes safetensors."
        raise UsageError(f"{ADAPTER_WEIGHTS} is missing", where=folder, hint=hint)
    _require_plain(values, path)
    lora: dict[str, Any] = {key: read(values[name]) for name, (key, read) in _KEYS.items() if name in values}
    lora["dropout"] = float(values.get("lora_dropout") or 0.0)
    tokens = values.get("trainable_token_indices")
    lora["trainable_tokens"] = tokens if isinstance(tokens, dict) else list(tokens or [])
    return StartAdapter(folder, str(values.get("base_model_name_or_path") or ""), lora)


def _require_plain(values: Mapping[str, Any], path: Path) -> None:
    """Refuse kinds of adapter that this run could not go on with exactly."""
    merged = "Merge it into its base with PEFT (merge_and_unload, save_pretrained) and make a run of that folder: "
    if values.get("peft_type") != "LORA":
        raise ModelError(
            f"adapters of type {values.get('peft_type')} cannot go on here, LoRA can", where=path,
            hint=f"{merged}onward init NEW_RUN --model MERGED",
        )  # fmt: skip
    init = values.get("init_lora_weights")
    if init not in _PLAIN_INIT:
        hint = (
            "PEFT turns it into a plain LoRA adapter: model.save_pretrained(FOLDER, "
            f"path_initial_model_for_weight_conversion=INITIAL). Else: {merged[0].lower()}{merged[1:]}"
            "onward init NEW_RUN --model MERGED"
        )
        what = f"the adapter was begun with init_lora_weights {init!r}, which changes what its base is"
        raise ModelError(what, where=path, hint=hint)
    default = PeftLoraConfig().to_dict()
    others = sorted(
        name for name, value in values.items()
        if name not in _CARRIED and name not in _KEYS and (value or None) != (default.get(name) or None)
    )  # fmt: skip
    if others:
        what = f"the adapter has {', '.join(others)}, which cannot go on here exactly"
        raise ModelError(what, where=path, hint=f"{merged}onward init NEW_RUN --model MERGED")


def with_start_adapter(config: Config, start: StartAdapter) -> Config:
    """Return the config of a run that starts from an adapter: its shape is the adapter's.

    Raises:
        ConfigError: a key that was set asks for another shape.
        UsageError: the base is named nowhere.
    """
    given = {key for key in config.lora.model_fields_set if key in start.lora and key != "dropout"}
    conflicts = {
        key: getattr(config.lora, key) for key in sorted(given) if getattr(config.lora, key) != start.lora[key]
    }
    if config.lora.init != "default":
        conflicts["init"] = config.lora.init
    if conflicts:
        words = "; ".join(f"lora.{key}: {start.lora.get(key)!r} there, {conflicts[key]!r} asked" for key in conflicts)
        hint = "Leave these settings out: the adapter's config decides."
        raise ConfigError(f"the adapter has another shape: {words}", where=start.folder, hint=hint)
    lora = {**start.lora, **{key: getattr(config.lora, key) for key in config.lora.model_fields_set}}
    values = config.model_dump(mode="json", exclude_unset=True)
    if "model" not in config.model_fields_set:
        if not start.base:
            raise UsageError(
                "the adapter does not name its base model", where=start.folder, hint="--model NAME_OR_PATH"
            )
        values["model"] = start.base
    return Config.model_validate({**values, "lora": lora})


def require_fits_base(folder: Path, base: Path) -> None:
    """Refuse an adapter whose names or shapes are not those that the base model gives them; no weights are loaded.

    Raises:
        ModelError: it does not fit, or is damaged.
    """
    with quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        bare = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        try:
            load_adapter(add_adapter(bare, saved_adapter_config(folder)), folder)
        except ModelError as error:
            hint = (
                "Name the base that it was made on: --model NAME_OR_PATH. One with a vocabulary of its own goes on "
                "merged into its base (PEFT's merge_and_unload): onward init NEW_RUN --model MERGED"
            )
            raise ModelError(error.what, where=folder, hint=hint) from None


def keep_start_adapter(folder: Path, target: Path) -> None:
    """Copy an adapter into a run."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copyfile(folder / name, target / name)
        fsync_file(target / name)


def digest_adapter(folder: Path) -> str:
    """Return the digest of an adapter's config and weights.

    Raises:
        DamagedState: a file is missing.
    """
    try:
        return sha256_json({name: xxh3_file(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)})
    except FileNotFoundError as error:
        raise DamagedState(
            "the adapter that the run started from is gone", where=error.filename, hint="Put it back from a copy."
        ) from None
