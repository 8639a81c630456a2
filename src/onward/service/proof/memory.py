"""How much of this machine's memory a step of a run takes, known before the first one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from onward.config import Config
from onward.config.text import read_config
from onward.digest import sha256_json
from onward.layout import RunLayout
from onward.service.session import Session, open_session
from onward.service.state.own_parts import start_folder
from onward.store.ledger import Ledger
from onward.text import how_many
from onward.training.device.environment import pick_device, pick_dtype
from onward.training.device.memory import read_usage
from onward.training.model.load import build_model
from onward.training.model.outline import outlined
from onward.training.model.quiet import quiet
from onward.training.optimizers import optimizer_method
from onward.training.state import TrainState
from onward.training.steps.economy import Economy, Learned
from onward.training.steps.loss import TargetLoss
from onward.training.steps.memory import FACT, USABLE, Profile, fits, largest_part, largest_texts, most_of
from onward.training.steps.model_memory import profile_of


def measure_memory(layout: RunLayout, ledger: Ledger) -> Profile:
    """Measure the model of a run as it is trained, and record the result in its ledger.

    Its weights are loaded only if its structure is not enough.

    Raises:
        OnwardError: the model cannot be loaded.
    """
    session = open_session(layout, ledger, report=lambda _: None)
    profile = _of_outline(session) or _of_model(session, start_folder(layout, ledger, session.config))
    ledger.put(**{FACT: {"key": _key(session.config), "profile": profile.to_dict()}})
    return profile


def _of_outline(session: Session) -> Profile | None:
    """Measure the model without its weights; None if that is not possible, as on a GPU, which has other kernels."""
    config, treatment = session.config, session.treatment
    if session.device.type != "cpu" or config.method == "qlora" or treatment is None:
        return None
    try:
        with quiet():
            base = AutoConfig.from_pretrained(session.base, local_files_only=True, trust_remote_code=False)
        with quiet(), outlined(base, config, session.dtype, treatment) as model:
            loss = TargetLoss(model, session.device, session.dtype, session.pad_id)
            return profile_of(model, optimizer_method(config), loss, config, session.device.type)
    except Exception:  # an operation needs actual values, such as the choice of experts
        return None


def _of_model(session: Session, start: Path | None) -> Profile:
    model = build_model(session.spec, checkpoint=start, treatment=session.treatment)
    state = TrainState.start(model, session.config)
    loss = TargetLoss(model, session.device, session.dtype, session.pad_id)
    return Economy(state, loss, session.config, session.device, Learned()).profile


def kept_profile(layout: RunLayout, config: Config) -> Profile | None:
    """Return what was measured of a run's model on this kind of device; None if nothing was."""
    with Ledger(layout.ledger, read_only=True) as ledger:
        kept: dict[str, Any] = ledger.get(FACT) or {}
    return Profile.of(kept["profile"]) if kept.get("key") == _key(config) else None


def memory_in_words(layout: RunLayout) -> tuple[str, bool] | None:
    """Return, in words, what a step of rows of full length takes on this machine, and whether it fits, as far as can be
    told; None if nothing was measured.
    """
    config = read_config(layout.config)
    profile = kept_profile(layout, config)
    if profile is None:
        return None
    device, setting = pick_device(), config.activation_checkpointing
    usage = read_usage(device)
    estimate = most_of(profile, config)
    lacks_room = profile.recomputed is not None and not fits(estimate, usage)
    how = "nothing is computed again"
    if setting == "on" or (setting == "auto" and lacks_room):
        estimate, how = most_of(profile, config, recompute=True), "layers are computed again"
    part, texts = largest_part(config), largest_texts(config)
    rows = f"parts of {len(part)} rows of {config.max_length:,} tokens"
    if texts:
        rows += f" or of {how_many(len(texts), 'anchor text')} of {config.anchor.tokens:,} tokens"
    here = "" if usage is None else f"; {usage.available / 1e9:.1f} GB of {usage.total / 1e9:.1f} GB available"
    room, copy = fits(estimate, usage), ""
    if device.type != "cpu":  # a CPU's estimate counts it
        main = read_usage(torch.device("cpu"))
        copy = f"; commits are copied to main memory, {profile.copied / 1e9:.2f} GB"
        if main is not None:
            copy += f" of {main.available / 1e9:.1f} GB available"
            room = room and profile.copied <= USABLE * main.available
    return f"{estimate}: {rows}, {how}{here}{copy}", room


def _key(config: Config) -> str:
    """Return a digest of what the measured figures depend on."""
    device = pick_device()
    kinds = [device.type, str(pick_dtype(config.dtype, device)), config.lora.dropout > 0.0]
    return sha256_json([config.identity(), *kinds])
