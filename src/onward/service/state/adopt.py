"""Adoption: a checkpoint of transformers' Trainer becomes a run, with its moments and its step, by parameter name."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from onward.atomic import TEMPORARY_PREFIX, fsync_file, remove_tree
from onward.config import IDENTITY_KEYS, Config
from onward.config_text import parse_config, render_yaml
from onward.errors import ConfigError, DamagedState, ModelError, UsageError
from onward.layout import RunLayout
from onward.service.admission import admit_new, keep
from onward.service.session import open_session
from onward.service.state.adopted import describe
from onward.service.state.commits import Commit, Commits
from onward.store.ledger import Ledger
from onward.training import huggingface
from onward.training.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from onward.training.admission.findings import Findings
from onward.training.base import OWN_BASE, WEIGHTS, resolve_base, with_stored_path
from onward.training.environment import pick_device, pick_dtype
from onward.training.handover import Probe
from onward.training.loading import load_moments, read_optimizer
from onward.training.model import build_model, load_tokenizer
from onward.training.optimizers import ADAMW, UnsupportedSetting, saved_groups
from onward.training.state import TrainState

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json",
    "merges.txt", "added_tokens.json", "tokenizer.model",
)  # fmt: skip
TOKENIZER_MARK = "tokenizer_config.json"
MODEL_FILES = (*WEIGHTS, "generation_config.json")


def adopt(
    checkpoint: Path, layout: RunLayout, model: str | None, settings: Mapping[str, Any], report: Callable[[str], None]
) -> list[str]:
    """Make the run in `layout` from `checkpoint`. Everything is loaded and checked before anything is made.

    Returns:
        What the run took over, what was set and what is unknown, one line each.

    Raises:
        UsageError: this is no Trainer checkpoint, or the directory holds a config already.
        DamagedState: its moments do not fit its model.
        ModelError: the base model or its tokenizer is missing or cannot be loaded.
    """
    if layout.config.exists():
        raise UsageError(
            "there is a config in this directory already", where=layout.config, hint="Name another directory."
        )
    step = _read_step(checkpoint)
    config = _read_config(checkpoint, model, settings)
    base = resolve_base(config.model, download=True, report=report)
    _require_tokenizer(checkpoint, base)
    device = pick_device()
    _, findings = admit_new(config, base, has_chosen_dropout=True, checkpoint=checkpoint)
    state = TrainState.start(_build(config, base, checkpoint, device, findings), config)
    load_moments(state, checkpoint / huggingface.OPTIMIZER)
    adam = state.view().adam_step()
    if not 0 < adam <= step:
        raise DamagedState(f"Adam counts {adam} steps, trainer_state.json {step}", where=checkpoint)
    state.counters.step, state.counters.adam_origin = step, step - adam
    if base == checkpoint.resolve():  # the Trainer may rotate it away: the run keeps a base of its own
        config = config.model_copy(update={"model": OWN_BASE})  # relative: the run can be moved
    else:
        config = with_stored_path(config, base, layout.root)
    _make(checkpoint, layout, config, state, findings, report)
    return describe(checkpoint, state.step, config, settings)


def _make(
    checkpoint: Path,
    layout: RunLayout,
    config: Config,
    state: TrainState,
    findings: Findings,
    report: Callable[[str], None],
) -> None:
    """Make the run's files, the ledger's name last, so that it makes the run."""
    layout.root.mkdir(parents=True, exist_ok=True)
    layout.make()
    if config.model == OWN_BASE:
        _copy(checkpoint, (*MODEL_FILES, *TOKENIZER_FILES), layout.root / OWN_BASE)
    elif (checkpoint / TOKENIZER_MARK).is_file():  # what the checkpoint was trained with
        _copy(checkpoint, ("config.json", *TOKENIZER_FILES), layout.root / "tokenizer")
    unfinished = layout.ledger.with_name(f"{TEMPORARY_PREFIX}{layout.ledger.name}")
    for left in layout.temporaries():
        remove_tree(left)
    with Ledger(unfinished, create=True) as ledger:
        ledger.put(run=uuid.uuid4().hex, state="idle", origin_step=state.step)
        keep(ledger, findings)
        session = open_session(layout, ledger, report=report, config=config)
        probe = Probe(state.model, config.seed, session.device, session.dtype)
        commit = Commit(state.model, state.view(), config, probe.of_model, session.facts())
        values = json.dumps(Commits(layout, ledger).commit(commit).manifest.measurement)
        ledger.add_handover(kind="adopt", step=state.step, before=values, after=values, difference=0.0, name="bitwise")
        ledger.add_event("info", f"adopted {checkpoint.absolute()} at step {state.step}", state.step)
    layout.config.write_text(render_yaml(config), encoding="utf-8")
    unfinished.rename(layout.ledger)


def _copy(source: Path, patterns: Iterable[str], target: Path) -> None:
    """Copy files: a link would follow a Trainer that writes the same checkpoint once more."""
    target.mkdir(exist_ok=True)
    for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
        shutil.copyfile(path, target / path.name)
        fsync_file(target / path.name)


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
    config = parse_config({**values, **settings}, where=checkpoint)
    _require_shape(parse_config(values, where=checkpoint), config)
    return config


def _require_shape(saved: Config, config: Config) -> None:
    """Refuse settings that ask for another shape than the checkpoint has; a 4-bit base under an adapter is none."""
    asked = {key: there for key, (_, there) in saved.differences(config).items() if key in IDENTITY_KEYS}
    refused = {key: asked[key] for key in asked if key == "method" or key.startswith("lora.")}
    if refused.get("method") == "qlora" and saved.method == "lora":
        del refused["method"]
    if refused:
        words = ", ".join(f"{key}={value}" for key, value in refused.items())
        raise ConfigError(f"the checkpoint has another shape than {words}", where="--set", hint="Leave these out.")


def _read_adapter(path: Path) -> dict[str, Any]:
    try:
        values = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DamagedState(f"{ADAPTER_CONFIG} cannot be read: {type(error).__name__}", where=path) from None
    if values.get("peft_type") != "LORA":
        raise ModelError(f"adapters of type {values.get('peft_type')} cannot go on here, LoRA can", where=path)
    if not (path.parent / ADAPTER_WEIGHTS).is_file():
        raise UsageError(f"{ADAPTER_WEIGHTS} is missing", where=path.parent)
    return values


def _optimizer_settings(path: Path) -> dict[str, Any]:
    saved = read_optimizer(path, mapped=True)
    try:
        return ADAMW.settings(saved_groups(saved)[0])
    except UnsupportedSetting as error:
        hint = "There is no config key for it. Train on with transformers, or start again: onward init NEW_RUN"
        raise UsageError(f"the checkpoint was trained with {error}", where=path, hint=hint) from None
    except (LookupError, TypeError, ValueError) as error:
        raise DamagedState(f"optimizer.pt is not that of AdamW: {type(error).__name__}: {error}", where=path) from None


def _build(config: Config, base: Path, checkpoint: Path, device: torch.device, findings: Findings) -> torch.nn.Module:
    dtype = pick_dtype(config.dtype, device)
    return build_model(config, base, device, dtype, checkpoint=checkpoint, treatment=findings.treatment)


def _require_tokenizer(checkpoint: Path, base: Path) -> None:
    own = (checkpoint / TOKENIZER_MARK).is_file()
    if not own and base == checkpoint.resolve():
        hint = "--model BASE names the folder of the model it was made from, which has one."
        raise UsageError("the checkpoint carries no tokenizer", where=checkpoint, hint=hint)
    load_tokenizer(checkpoint if own else base)
