"""A PEFT LoRA adapter as the start of a run: its weights are taken over; moments and step are new.

The run keeps a copy in `adapter/`, so that it depends on no other folder and `reset` has something to go back to.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from onward.atomic import fsync_file
from onward.config import Config
from onward.config.sections import LoraConfig
from onward.digest import sha256_json, xxh3_file
from onward.errors import ConfigError, DamagedState, ModelError, UsageError
from onward.training.model.adapter import ADAPTER_WEIGHTS, add_adapter, load_adapter, saved_adapter_config
from onward.training.model.adapter_config import KEYS, adapter_settings, read_adapter
from onward.training.model.base import ADAPTER_CONFIG
from onward.training.model.quiet import one_load, quiet


@dataclass(frozen=True)
class StartAdapter:
    """An adapter's folder, the base that it names, with its revision, and its config as config keys of `lora`."""

    folder: Path
    base: str
    lora: dict[str, Any]
    revision: str | None = None


def read_start_adapter(folder: Path) -> StartAdapter:
    """Read an adapter's folder.

    Raises:
        DamagedState: its config cannot be read.
        UsageError: the folder does not contain an adapter in safetensors format.
        ModelError: the adapter is of a kind that cannot be continued exactly.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        hint = "Name a folder that PEFT's save_pretrained wrote: adapter_config.json and adapter_model.safetensors."
        raise UsageError("this is not a PEFT adapter", where=folder, hint=hint)
    values = read_adapter(folder)
    default = LoraConfig().model_dump(mode="json")
    shape = {_name_of(key): value for key, value in adapter_settings(values).items()}
    lora = {name: shape.get(name, default[name]) for name in map(_name_of, KEYS.values())}
    return StartAdapter(folder, str(values.get("base_model_name_or_path") or ""), lora, values.get("revision"))


def _name_of(key: str) -> str:
    return key.removeprefix("lora.")


def with_start_adapter(config: Config, start: StartAdapter) -> Config:
    """Return the config of a run that starts from an adapter, with the adapter's shape.

    Raises:
        ConfigError: a key that was set asks for another shape.
        UsageError: nothing names the base.
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
    """Refuse an adapter whose names or shapes do not match the base model; no weights are loaded.

    Raises:
        ModelError: it does not fit, or is damaged.
    """
    with one_load, quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        bare = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        try:
            load_adapter(add_adapter(bare, saved_adapter_config(folder)), folder)
        except ModelError as error:
            hint = (
                "Name the base on which it was made: --model NAME_OR_PATH. Use one with its own vocabulary "
                "merged into its base (PEFT's merge_and_unload): onward init NEW_RUN --model MERGED"
            )
            raise ModelError(error.what, where=folder, hint=error.hint or hint) from None


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
