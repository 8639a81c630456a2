"""Adoption: a checkpoint of transformers' Trainer becomes a run, with its moments and its step, by parameter name."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from onward.config import Config, parse_config, render_yaml
from onward.errors import DamagedState, ModelError, UsageError
from onward.layout import RunLayout
from onward.service.commits import Commits
from onward.service.session import open_session
from onward.store.ledger import Ledger
from onward.training import huggingface
from onward.training.base import resolve_base
from onward.training.checkpoint import load_moments
from onward.training.environment import pick_device, pick_dtype
from onward.training.handover import measure
from onward.training.model import ADAPTER_CONFIG, ADAPTER_WEIGHTS, build_model
from onward.training.optim import build_optimizer
from onward.training.state import TrainState

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json",
    "merges.txt", "added_tokens.json", "tokenizer.model",
)  # fmt: skip


def adopt(
    checkpoint: Path, layout: RunLayout, model: str | None, settings: Mapping[str, Any], report: Callable[[str], None]
) -> None:
    """Make the run in `layout` from `checkpoint`. Everything is loaded and checked before anything is made.

    Raises:
        UsageError: this is no Trainer checkpoint.
        DamagedState: its moments do not fit its model.
        ModelError: the base model cannot be had.
    """
    step = _read_step(checkpoint)
    config = _read_config(checkpoint, model, settings)
    base = resolve_base(config.model, download=True, report=report)
    device = pick_device()
    state = TrainState(*_with_optimizer(config, base, checkpoint, device))
    load_moments(state, checkpoint / huggingface.OPTIMIZER)
    adam = state.adam_step()
    if not 0 < adam <= step:
        raise DamagedState(f"Adam counts {adam} steps, trainer_state.json {step}", where=checkpoint)
    state.counters.step, state.counters.adam_origin = step, step - adam
    _make(checkpoint, layout, config, state, report)


def _make(
    checkpoint: Path, layout: RunLayout, config: Config, state: TrainState, report: Callable[[str], None]
) -> None:
    layout.root.mkdir(parents=True, exist_ok=True)
    layout.make()
    layout.config.write_text(render_yaml(config), encoding="utf-8")
    _bring_tokenizer(checkpoint, layout)
    with Ledger(layout.ledger) as ledger:
        ledger.put(run=uuid.uuid4().hex, state="idle", origin_step=state.step)
        session = open_session(layout, ledger, report=report, config=config)
        measurement = measure(state, config.seed, session.device, session.dtype)
        facts = session.facts()
        Commits(layout, ledger).commit(state, config, measurement, facts, [], None, file_id=None)
        values = json.dumps(measurement.to_dict())
        ledger.add_handover(
            kind="adopt", step=state.step, before=values, after=values, difference=0.0, **{"class": "bitwise"}
        )
        ledger.add_event("info", f"adopted {checkpoint.absolute()} at step {state.step}", state.step)


def _read_step(checkpoint: Path) -> int:
    if not checkpoint.is_dir():
        raise UsageError("there is no such checkpoint directory", where=checkpoint)
    if not (checkpoint / huggingface.OPTIMIZER).is_file():
        raise UsageError(
            "the checkpoint has no optimizer.pt, so there are no moments to go on with",
            where=checkpoint,
            hint="Name a checkpoint-N directory of Trainer; for weights alone: onward init NEW_RUN --model FOLDER",
        )
    try:
        return int(json.loads((checkpoint / huggingface.TRAINER_STATE).read_bytes())["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"trainer_state.json cannot be read: {type(error).__name__}", where=checkpoint,
            hint="Name a checkpoint-N directory that transformers' Trainer wrote.",
        ) from None  # fmt: skip


def _read_config(checkpoint: Path, model: str | None, settings: Mapping[str, Any]) -> Config:
    """Return the config that goes on where the checkpoint's Trainer stood; `settings` win."""
    values: dict[str, Any] = {"warmup_steps": 0, **_optimizer_settings(checkpoint / huggingface.OPTIMIZER)}
    adapter = checkpoint / ADAPTER_CONFIG
    if adapter.is_file():
        lora = _read_adapter(adapter)
        values |= {"method": "lora", "model": model or lora["base_model_name_or_path"]}
        values |= {"lora.rank": lora["r"], "lora.alpha": lora["lora_alpha"], "lora.dropout": lora["lora_dropout"]}
        values["lora.targets"] = lora["target_modules"]
    else:
        values |= {"method": "full", "model": model or str(checkpoint.absolute())}
    if not values["model"]:
        raise UsageError("the checkpoint does not name its base model", where=adapter, hint="--model NAME_OR_PATH")
    return parse_config({**values, **settings}, where=checkpoint)


def _read_adapter(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_bytes())
    if values.get("peft_type") != "LORA":
        raise ModelError(f"adapters of type {values.get('peft_type')} cannot go on here, LoRA can", where=path)
    if not (path.parent / ADAPTER_WEIGHTS).is_file():
        raise UsageError(f"{ADAPTER_WEIGHTS} is missing", where=path.parent)
    return values


def _optimizer_settings(path: Path) -> dict[str, Any]:
    try:
        saved = cast(dict[str, Any], torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        group = saved["param_groups"][0]
        return {
            "learning_rate": float(group.get("initial_lr", group["lr"])),
            "weight_decay": float(group["weight_decay"]),
            "betas": [float(beta) for beta in group["betas"]],
        }
    except Exception as error:
        raise DamagedState(f"optimizer.pt is not that of AdamW: {type(error).__name__}: {error}", where=path) from None


def _with_optimizer(
    config: Config, base: Path, checkpoint: Path, device: torch.device
) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    model = build_model(config, base, device, pick_dtype(config.dtype, device), checkpoint=checkpoint)
    return model, build_optimizer(model, config)


def _bring_tokenizer(checkpoint: Path, layout: RunLayout) -> None:
    """Keep the tokenizer that the checkpoint was trained with, if it carries one."""
    if not (checkpoint / "tokenizer_config.json").is_file():
        return
    folder = layout.root / "tokenizer"
    folder.mkdir()
    for name in TOKENIZER_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    if (checkpoint / "config.json").is_file():
        shutil.copyfile(checkpoint / "config.json", folder / "config.json")
