"""The admission of a run's model: made once, kept in the ledger, and read by everything that builds the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from onward.config import Config
from onward.errors import ModelError
from onward.service.session import Session
from onward.store.ledger import Ledger
from onward.training.admission.admit import admit
from onward.training.admission.findings import FACT, LAID, Findings
from onward.training.admission.remedies import working_config
from onward.training.device.environment import pick_device, pick_dtype, require_whole_teams
from onward.training.model.spec import ModelSpec, environment_of


def admit_new(
    config: Config, base: Path, *, has_chosen_dropout: bool, checkpoint: Path | None
) -> tuple[Config, Findings]:
    """Prove the model of a run that is about to be made; return the config with settings that work, and the findings.

    Args:
        base: folder of the base model.
        has_chosen_dropout: whether the user chose `lora.dropout`; then it is not changed.
        checkpoint: folder to take trained weights and the adapter's config from.

    Raises:
        ModelError: something about the model cannot be proven.
        ConfigError: a setting does not fit it.
    """
    spec = spec_of_proof(config, base, pick_device())
    require_whole_teams(spec.device)
    try:
        return config, admit(spec, checkpoint=checkpoint)
    except ModelError as error:
        if checkpoint is not None or not str(error.where).startswith("lora"):
            raise
        working, changed = working_config(config, base, has_chosen_dropout)
        if not changed:
            raise
    return working, admit(replace(spec, config=working), settings=changed)


def spec_of_proof(config: Config, base: Path, device: torch.device) -> ModelSpec:
    """Return what a model is proven with where a device would train it: one that is sharded fits into main memory only.

    Args:
        base: folder of the base model.
    """
    device = torch.device("cpu") if config.sharding == "full" else device
    return ModelSpec(config, base, device, pick_dtype(config.dtype, device))


def keep(ledger: Ledger, findings: Findings) -> None:
    """Record what an admission found."""
    ledger.put(**{FACT: findings.to_dict()})


def admit_at_start(session: Session, *, has_trained: bool, again: bool, start: Path | None = None) -> None:
    """Prove the model of a run that has no findings yet, made with `--later` or by an earlier release.

    A run that has trained continues as it did: what would refuse a new run is a warning.

    Args:
        again: also prove a model once more if what its proof depends on has changed: libraries, type of device, compute
            type.
        start: folder of the adapter that a new run starts from.

    Raises:
        ModelError: weights are missing; or, in a run that has not trained, something cannot be proven.
    """
    findings = Findings.of(session.ledger.get(FACT))
    if findings is not None:
        if again:
            _prove_again(session, findings, has_trained=has_trained, start=start)
        return
    spec = spec_of_proof(session.config, session.base, session.device)
    found = admit(spec, checkpoint=start, strict=not has_trained)
    keep(session.ledger, found)
    for warning in found.warnings:
        _warn(session.ledger, warning)


def _prove_again(session: Session, findings: Findings, *, has_trained: bool, start: Path | None) -> None:
    """Prove a model if its findings are of other surroundings, in which the proof might come out otherwise.

    A run that has trained gets another layout of its rows if the one that it has is not proven any more.
    """
    spec = spec_of_proof(session.config, session.base, session.device)
    here = environment_of(spec)
    changes = findings.changes_to(here)
    if not changes:
        return
    try:
        found = admit(spec, checkpoint=start, settings=dict(findings.settings))
    except ModelError as error:
        if not has_trained:
            raise
        keep(session.ledger, replace(findings, warnings=(error.what,), environment=here))
        _warn(session.ledger, error.what)
        return
    found = findings.confirmed(found) if has_trained else found
    keep(session.ledger, found)
    event = f"the model was proven again, since it had been with {changes}: {LAID[found.rows]}"
    session.ledger.add_event("info", event, kind="admission")


def _warn(ledger: Ledger, warning: str) -> None:
    ledger.add_event("warning", f"a new run of this model would be refused: {warning}", kind="admission")
