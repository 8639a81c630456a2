"""What of the config, the base model and its proof would stop a run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onward.config import Config
from onward.config.text import read_config
from onward.data.templates.own_template import read_template
from onward.errors import ModelError
from onward.layout import RunLayout
from onward.service.admission import spec_of_proof
from onward.service.proof.doctor.finding import Finding
from onward.service.settings import PUT_BACK, changes_in_words
from onward.store.ledger import Ledger
from onward.training.admission.findings import FACT, REFUSABLE, Findings
from onward.training.device.environment import HALF, pick_device, pick_dtype
from onward.training.model.base import base_of_run, digest_base
from onward.training.model.load import load_tokenizer
from onward.training.model.spec import environment_of
from onward.training.optimizers import optimizer_method


def check_config(layout: RunLayout) -> Iterator[Finding]:
    """Report whether the config is valid, and what it asks for that this machine lacks or is slow at."""
    config = read_config(layout.config)
    yield Finding("ok", "config", f"{layout.config.name} is valid: {config.method} on {config.model}")
    device = pick_device()
    if device.type == "cpu" and pick_dtype(config.dtype, device) in HALF:
        hint = "Set dtype: float32 in a new run: on a CPU without hardware for it, this is many times faster"
        yield Finding("warning", "dtype", f"{config.dtype} is slow on a CPU", hint)
    if config.method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        yield Finding("error", "method", "qlora needs bitsandbytes", 'pip install "onward[qlora]"')
    try:
        optimizer_method(config).require(device)
    except ModelError as error:
        yield Finding("error", "optimizer", error.what, error.hint)


def check_identity(layout: RunLayout) -> Iterator[Finding]:
    """Check the config against the locked keys; base model and tokenizer are checked elsewhere."""
    with Ledger(layout.ledger, read_only=True) as ledger:
        locked: dict[str, Any] = ledger.get("identity") or {}
        if ledger.newest_checkpoint() is None:
            return
    changes = read_config(layout.config).identity_changes(locked)
    changes.pop("model", None)
    if changes:
        yield Finding("error", "identity", f"locked keys were changed: {changes_in_words(changes)}", PUT_BACK)


def check_base(layout: RunLayout) -> Iterator[Finding]:
    """Compare the base model with the one that the run was made of."""
    config = read_config(layout.config)
    base = base_of_run(layout.root, config.model)
    digest = digest_base(base)
    with Ledger(layout.ledger, read_only=True) as ledger:
        recorded = (ledger.get("identity") or {}).get("base", digest)
    if digest != recorded:
        yield Finding("error", "base model", "changed on disk since this run began", "Restore the original files")
        return
    yield Finding("ok", "base model", f"{base} ({digest[:12]})")
    yield from _template(layout, config, base)


def _template(layout: RunLayout, config: Config, base: Path) -> Iterator[Finding]:
    if read_template(config.chat_template, layout.root) is not None:
        yield Finding("ok", "chat template", f"{config.chat_template}, the run's own")
    elif load_tokenizer(layout.tokenizer(base)).chat_template is None:
        hint = "Chat rows will be refused; prompt/completion and text rows work. onward init --set chat_template=FILE"
        yield Finding("warning", "chat template", "the tokenizer has none", hint)


def check_admission(layout: RunLayout) -> Iterator[Finding]:
    """Report what was proven about the model, and whether the next start proves it again."""
    with Ledger(layout.ledger, read_only=True) as ledger:
        findings = Findings.of(ledger.get(FACT))
    if findings is None:
        yield Finding("warning", "model", "it is not proven yet", "the next start proves it: onward train")
        return
    for line in findings.lines():
        yield Finding("warning" if line.startswith(REFUSABLE) else "ok", "model", line)
    config = read_config(layout.config)
    spec = spec_of_proof(config, base_of_run(layout.root, config.model), pick_device())
    if changes := findings.changes_to(environment_of(spec)):
        yield Finding(
            "warning", "model", f"it was proven with {changes}", "the next start proves it again: onward train"
        )
