"""Finds what would stop this run on this machine, before it does."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from onward.atomic import can_be_written
from onward.config import Config
from onward.config.text import read_config
from onward.data.templates.own_template import read_template
from onward.errors import DamagedState, ModelError, OnwardError, UsageError
from onward.layout import MANIFEST, RunLayout, step_of
from onward.service import moment
from onward.service.holder import is_held, read_heartbeat, read_holder
from onward.service.proof.access import in_words, unwritable, user_name, way_to_write
from onward.service.proof.memory import memory_in_words
from onward.service.settings import PUT_BACK, changes_in_words
from onward.store.disks import mount_of, refusal, require_locks, way_out
from onward.store.ledger import Ledger
from onward.store.lookup import typed
from onward.text import printable, quoted
from onward.training.admission.findings import FACT, REFUSABLE, Findings
from onward.training.checkpoints.checkpoint import inspect_checkpoint
from onward.training.device.environment import HALF, pick_device, pick_dtype
from onward.training.device.errors import LESS_MEMORY
from onward.training.model.base import base_of_run, digest_base
from onward.training.model.load import load_tokenizer
from onward.training.optimizers import optimizer_method

LITTLE_DISK = 2 << 30
"""Free bytes below which there is a warning, however small the checkpoints are."""
FEW_FILES = 1000
"""Files for which the disk must have room."""


@dataclass(frozen=True)
class Finding:
    """The result of one check; `level` is ok, warning or error."""

    level: str
    subject: str
    message: str
    hint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as plain values."""
        return asdict(self)


def examine(layout: RunLayout) -> list[Finding]:
    """Check the machine and, if there is one, the run in `layout`."""
    findings = list(_machine())
    try:
        layout.require()
        _require_ledger(layout)
    except DamagedState as error:
        return [*findings, Finding("error", "ledger", error.what, error.hint)]
    except UsageError as error:
        return [*findings, Finding("warning", "run", f"{error.what}: {error.where}", error.hint)]
    checks: list[tuple[str, Callable[[RunLayout], Iterator[Finding]]]] = [
        ("config", _config),
        ("identity", _identity),
        ("base model", _base),
        ("model", _admission),
        ("memory", _memory),
        ("ledger", _ledger),
        ("ledger's disk", _ledger_disk),
        ("access", _access),
        ("owner", _owner),
        ("state", _state),
        ("disk", _disk),
        ("inbox", _inbox),
        ("queue", _queue),
        ("trackers", _trackers),
    ]
    for subject, check in checks:
        try:
            findings += check(layout)
        except OnwardError as error:
            findings.append(Finding("error", subject, error.what, error.hint))
        except sqlite3.DatabaseError as error:
            findings.append(Finding("error", subject, str(error)))
        except OSError as error:
            place = f" [{error.filename}]" if error.filename else ""
            findings.append(Finding("error", subject, f"{error.strerror or error}{place}"))
    return findings


def _require_ledger(layout: RunLayout) -> None:
    """Refuse a file that is not a ledger; any other reason why it cannot be read is reported with the rest."""
    with contextlib.suppress(UsageError, sqlite3.DatabaseError, OSError):
        Ledger(layout.ledger, read_only=True).close()


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
    if device.type == "cpu" and pick_dtype(config.dtype, device) in HALF:
        hint = "Set dtype: float32 in a new run: on a CPU without hardware for it, this is many times faster"
        yield Finding("warning", "dtype", f"{config.dtype} is slow on a CPU", hint)
    if config.method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        yield Finding("error", "method", "qlora needs bitsandbytes", 'pip install "onward[qlora]"')
    try:
        optimizer_method(config).require(device)
    except ModelError as error:
        yield Finding("error", "optimizer", error.what, error.hint)


def _identity(layout: RunLayout) -> Iterator[Finding]:
    """Check the config against the locked keys; base model and tokenizer are checked elsewhere."""
    with Ledger(layout.ledger, read_only=True) as ledger:
        locked: dict[str, Any] = ledger.get("identity") or {}
        if ledger.newest_checkpoint() is None:
            return
    changes = read_config(layout.config).identity_changes(locked)
    changes.pop("model", None)
    if changes:
        yield Finding("error", "identity", f"locked keys were changed: {changes_in_words(changes)}", PUT_BACK)


def _base(layout: RunLayout) -> Iterator[Finding]:
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


def _admission(layout: RunLayout) -> Iterator[Finding]:
    """Report what was proven about the model when the run was made."""
    with Ledger(layout.ledger, read_only=True) as ledger:
        findings = Findings.of(ledger.get(FACT))
    if findings is None:
        yield Finding("warning", "model", "it is not proven yet", "the next start proves it: onward train")
        return
    for line in findings.lines():
        yield Finding("warning" if line.startswith(REFUSABLE) else "ok", "model", line)


def _memory(layout: RunLayout) -> Iterator[Finding]:
    """Report what a step takes, without loading the model, because a process may be training."""
    found = memory_in_words(layout)
    if found is None:
        yield Finding("ok", "memory", "the memory of a step was not measured on this machine; onward init measures it")
        return
    words, has_room = found
    hint = f"{LESS_MEMORY} A smaller max_length or method: qlora also needs less"
    yield Finding("ok" if has_room else "warning", "memory", words, None if has_room else hint)


def _ledger(layout: RunLayout) -> Iterator[Finding]:
    with Ledger(layout.ledger, read_only=True) as ledger:
        answer = ledger.quick_check()
        if answer != "ok":
            yield Finding("error", "ledger", answer, "Restore it from a copy")
        elif ledger.get("run") is None:
            empty = layout.empty_ledger()
            yield Finding("error", "ledger", empty.what, empty.hint)
        else:
            yield Finding("ok", "ledger", "sound")


def _ledger_disk(layout: RunLayout) -> Iterator[Finding]:
    """Report which disk the ledger is on; one that other machines use is an error, with a remedy."""
    mount = mount_of(layout.ledger)
    if mount is None:
        yield Finding(
            "ok", "ledger's disk", "the system does not say what kind of disk it is; machines must not share it"
        )
    elif mount.is_shared:
        yield Finding("error", "ledger's disk", refusal(mount), way_out(layout))
    elif not mount.is_local:
        what = f"{mount}, which may or may not be a local disk; only processes on this machine may use the run"
        yield Finding("warning", "ledger's disk", what, way_out(layout))
    else:
        yield Finding("ok", "ledger's disk", f"{mount}, a local disk")
    if layout.lock.exists():
        with layout.lock.open("rb") as file:
            require_locks(file.fileno(), layout.root.absolute())


def _access(layout: RunLayout) -> Iterator[Finding]:
    """Name what this user may not write although training must; whoever looks at another's run is told so."""
    closed, owner = unwritable(layout), layout.root.stat().st_uid
    if closed and owner == os.geteuid():
        yield Finding("error", "access", in_words(layout, closed), way_to_write(layout, closed))
    elif closed:
        hint = f"To train, add or control, be the user who owns the run: {user_name(owner)}"
        yield Finding("warning", "access", in_words(layout, closed), hint)


def _owner(layout: RunLayout) -> Iterator[Finding]:
    """Report who owns the run, whether it makes progress, and what keeps it from continuing."""
    with Ledger(layout.ledger, read_only=True) as ledger:
        state, problem, paused = ledger.get("state"), ledger.get("problem"), ledger.get("paused")
        fact = ledger.get("heartbeat")
    if paused is not None:
        yield Finding("ok", "paused", "paused by an operator", "onward resume goes on")
    elif problem and state == "failed":
        yield Finding("warning", "last failure", problem, "onward train tries again, from the last commit")
    elif problem:
        yield Finding("warning", str(state), problem)
    holder = read_holder(layout.lock)
    if is_held(layout.lock):
        yield Finding("ok", "lock", f"held by pid {holder['pid']} on {holder['host']}" if holder else "held")
        _, stuck = read_heartbeat(fact, time.time())
        if stuck:
            hint = "onward stop; if that does not help, kill it: what was committed is safe"
            yield Finding("error", "heartbeat", stuck, hint)


def _state(layout: RunLayout) -> Iterator[Finding]:
    with Ledger(layout.ledger, read_only=True) as ledger:
        for folder in [*layout.checkpoints(), *layout.restore_points()]:
            yield _checkpoint(folder, str(folder.relative_to(layout.root)), ledger)
        moment.require_present(layout, ledger)


def _checkpoint(folder: Path, place: str, ledger: Ledger) -> Finding:
    """Check one checkpoint against the ledger."""
    run, step = ledger.get("run"), ledger.committed_step()
    if not (folder / MANIFEST).exists():
        hint = f"Move it out of the run; to continue from it: onward adopt {quoted(folder)} --run NEW_RUN"
        return Finding("warning", place, f"not made by Onward: it has no {MANIFEST}", hint)
    found = inspect_checkpoint(folder)
    manifest = found.verified
    if manifest is None:
        hint = "onward train goes back to the newest restore point that verifies, and trains again from there"
        return Finding("error", place, "; ".join(found.problems), hint)
    if manifest.run != run:
        hint = f"Restore the ledger that it belongs to, or: onward adopt {quoted(folder)} --run NEW_RUN"
        return Finding("error", place, f"belongs to another run than the ledger, which is at step {step}", hint)
    if moment.is_of_another_moment(ledger, folder):
        what = f"the ledger, which is at step {step}, knows nothing of it: they are not from the same moment"
        return Finding("error", place, what, moment.way_out(folder))
    if manifest.step != step_of(folder):
        what = f"a copy of step {manifest.step}, not made by this run under this name, and left alone"
        return Finding("warning", place, what, "Move it out of the run")
    if manifest.step > step:
        hint = "onward train brings the ledger up to date; onward verify shows whether something is missing"
        return Finding("warning", place, f"newer than the ledger, which is at step {step}", hint)
    return Finding("ok", place, f"{manifest.size / 1e6:.1f} MB, verifies")


def _disk(layout: RunLayout) -> Iterator[Finding]:
    free = shutil.disk_usage(layout.root).free
    needed = sum(path.stat().st_size for newest in layout.checkpoints()[:1] for path in newest.iterdir())
    config = _config_or_defaults(layout)
    kept = (config.keep_boundaries + 1) * needed
    message = (
        f"{free / 1e9:.1f} GB free; a checkpoint takes {needed / 1e6:.0f} MB, restore points up to {kept / 1e6:.0f} MB"
    )
    level, hint = "ok", None
    if free < needed + (config.disk_margin_mb << 20):
        level, hint = "error", "Free some space: training pauses until there is room for the next checkpoint"
    elif not can_be_written(layout.root, needed):
        level, hint = "error", "Free some of your quota, which allows less: training pauses until there is room"
    elif free <= max(kept, LITTLE_DISK):
        level, hint = "warning", "Free some space, or lower keep_boundaries"
    yield Finding(level, "disk", message, hint)
    yield from _inodes(layout)


def _inodes(layout: RunLayout) -> Iterator[Finding]:
    """Report disks with room for bytes but none for files; some file systems do not count files."""
    disk = os.statvfs(layout.root)
    if disk.f_files and disk.f_favail < FEW_FILES:
        hint = "Remove files from this disk; each checkpoint makes about ten"
        yield Finding("warning", "disk", f"room for only {disk.f_favail} more files (inodes)", hint)


def _inbox(layout: RunLayout) -> Iterator[Finding]:
    if not layout.inbox.is_dir():
        yield Finding("warning", "inbox", "there is none", f"mkdir {quoted(layout.inbox)}, or mount it again")
    elif os.access(layout.inbox, os.W_OK):
        yield Finding("ok", "inbox", "files can be taken out of it")
    elif layout.root.stat().st_uid != os.geteuid():
        yield Finding("ok", "inbox", "belongs to another user; whether its owner can take files out was not tested")
    else:
        yield Finding("error", "inbox", "files cannot be taken out of it", f"chmod u+rwx {quoted(layout.inbox)}")


def _queue(layout: RunLayout) -> Iterator[Finding]:
    """Name the files at which a process ended before it could say what is wrong with them."""
    with Ledger(layout.ledger, read_only=True) as ledger:
        stuck = [row for row in ledger.files("arriving", "queued") if row.attempts > 0]
    for row in stuck:
        message = f"checking {printable(row.name)} was begun {row.attempts} times and never finished"
        yield Finding("warning", "queue", message, f"onward skip {typed(row.name)} takes it out")


def _config_or_defaults(layout: RunLayout) -> Config:
    try:
        return read_config(layout.config)
    except OnwardError:
        return Config()


def _trackers(layout: RunLayout) -> Iterator[Finding]:
    """Report how far each tracker has got; one that fails delays nothing."""
    names = read_config(layout.config).track
    if not names:
        return
    with Ledger(layout.ledger, read_only=True) as ledger:
        rows = {row.name: row for row in ledger.trackers()}
        behind = {name: rows[name].problem for name in names if name in rows and rows[name].problem}
    for name, problem in behind.items():
        yield Finding("warning", f"tracker {name}", str(problem), "onward track tries again and says what fails")
    told = [f"{name}: step {max(rows[name].step, 0)}" if name in rows else f"{name}: nothing yet" for name in names]
    yield Finding("ok", "trackers", f"sent so far: {', '.join(told)}")
