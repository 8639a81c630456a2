"""What this machine and run lack, said before it matters."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from onward.config import Config, read_config
from onward.errors import OnwardError
from onward.layout import RunLayout
from onward.service.holder import is_held, read_heartbeat, read_holder
from onward.service.session import base_folder
from onward.store.ledger import Ledger
from onward.training.base import digest_base
from onward.training.checkpoint import inspect_checkpoint
from onward.training.environment import pick_device, pick_dtype
from onward.training.model import load_tokenizer

LITTLE_DISK = 2 << 30


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `level` is ok, warning or error."""

    level: str
    subject: str
    message: str
    hint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as plain values."""
        return asdict(self)


def examine(layout: RunLayout) -> list[Finding]:
    """Look at the machine and, where there is one, at the run in `layout`."""
    findings = list(_machine())
    if not layout.ledger.exists():
        return [
            *findings,
            Finding("warning", "run", f"no run in {layout.root.absolute()}", "onward init DIR makes one"),
        ]
    looks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("config", lambda: _config(layout)),
        ("base model", lambda: _base(layout)),
        ("ledger", lambda: _ledger(layout)),
        ("state", lambda: _state(layout)),
        ("disk", lambda: _disk(layout)),
        ("inbox", lambda: _inbox(layout)),
    ]
    for subject, look in looks:
        try:
            findings += look()
        except OnwardError as error:
            findings.append(Finding("error", subject, error.what, error.hint))
    return findings


def _machine() -> Iterator[Finding]:
    names = ("torch", "transformers", "peft", "tokenizers", "safetensors")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    yield Finding("ok", "versions", versions)
    device = pick_device()
    if device.type == "cuda":
        yield Finding("ok", "device", torch.cuda.get_device_name(device))
        return
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding(
        "ok", "device", f"CPU ({capability}), {torch.get_num_threads()} threads; float32 is the fast type here"
    )


def _config(layout: RunLayout) -> Iterator[Finding]:
    config = read_config(layout.config)
    yield Finding("ok", "config", f"{layout.config.name} is valid: {config.method} on {config.model}")
    device = pick_device()
    if device.type == "cpu" and pick_dtype(config.dtype, device) is torch.bfloat16:
        hint = "dtype: float32 in a new run; on a CPU without bf16 units it is many times faster"
        yield Finding("warning", "dtype", "bfloat16 is slow on a CPU", hint)
    if config.method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        yield Finding("error", "method", "qlora needs bitsandbytes", 'pip install "onward[qlora]"')


def _base(layout: RunLayout) -> Iterator[Finding]:
    config = read_config(layout.config)
    base = base_folder(layout, config)
    digest = digest_base(base)
    with Ledger(layout.ledger, read_only=True) as ledger:
        recorded = (ledger.get("identity") or {}).get("base", digest)
    if digest != recorded:
        yield Finding("error", "base model", "changed on disk since this run began", "Put the original files back")
        return
    yield Finding("ok", "base model", f"{base} ({digest[:12]})")
    yield from _template(load_tokenizer(base))


def _template(tokenizer: Any) -> Iterator[Finding]:
    if tokenizer.chat_template is None:
        hint = "Chat rows will be refused; prompt/completion and text rows work"
        yield Finding("warning", "chat template", "the tokenizer has none", hint)


def _ledger(layout: RunLayout) -> Iterator[Finding]:
    with Ledger(layout.ledger, read_only=True) as ledger:
        answer = ledger.quick_check()
        problem = ledger.get("problem")
        fact = ledger.get("heartbeat")
    level = "ok" if answer == "ok" else "error"
    yield Finding(
        level, "ledger", "sound" if level == "ok" else answer, None if level == "ok" else "Restore it from a copy"
    )
    if problem:
        yield Finding("warning", "last failure", problem, "onward train goes on from the last commit")
    holder = read_holder(layout.lock)
    if is_held(layout.lock):
        yield Finding("ok", "lock", f"held by pid {holder['pid']} on {holder['host']}" if holder else "held")
        _, stuck = read_heartbeat(fact, time.time())
        if stuck:
            yield Finding("error", "heartbeat", stuck, "onward stop; if that does not help, kill it: commits are safe")


def _state(layout: RunLayout) -> Iterator[Finding]:
    for folder in [*layout.checkpoints(), *layout.restore_points()]:
        found = inspect_checkpoint(folder)
        place = str(folder.relative_to(layout.root))
        if found.verified is None:
            hint = "onward train goes back to the newest restore point that verifies and trains again from there"
            yield Finding("error", place, "; ".join(found.problems), hint)
        else:
            yield Finding("ok", place, f"{found.verified.size / 1e6:.1f} MB, verifies")


def _disk(layout: RunLayout) -> Iterator[Finding]:
    free = shutil.disk_usage(layout.root).free
    newest = next(iter(layout.checkpoints()), None)
    needed = sum(path.stat().st_size for path in newest.iterdir()) if newest else 0
    kept = _kept(layout) * needed
    message = (
        f"{free / 1e9:.1f} GB free; a checkpoint takes {needed / 1e6:.0f} MB, restore points up to {kept / 1e6:.0f} MB"
    )
    enough = free > max(kept, LITTLE_DISK)
    yield Finding(
        "ok" if enough else "warning", "disk", message, None if enough else "Free space or lower keep_boundaries"
    )


def _inbox(layout: RunLayout) -> Iterator[Finding]:
    if not layout.inbox.is_dir():
        yield Finding("warning", "inbox", "there is none", f"mkdir {layout.inbox}, or mount it again")
    elif not os.access(layout.inbox, os.W_OK):
        yield Finding("error", "inbox", "files cannot be taken out of it", "Make it writable for the daemon's user")
    else:
        yield Finding("ok", "inbox", "files can be taken out of it")


def _kept(layout: RunLayout) -> int:
    try:
        return read_config(layout.config).keep_boundaries + 1
    except OnwardError:
        return Config().keep_boundaries + 1
