"""What a scheduler should start, independently of any scheduler's format."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onward.config.text import read_config
from onward.errors import UsageError
from onward.layout import LEDGER, MANIFEST, RunLayout, typed_path
from onward.service.outside.elastic import Devices, read_devices
from onward.service.outside.unit import THREADS, Host, require_printable
from onward.text import how_many, quoted

PERSON = (2, 4, 5)
"""Exit statuses that no restart can fix: the config is refused, another process owns the run, the state is damaged."""
NOTICE = 300
"""Seconds between a scheduler's notice and the end: time for a step and its commit."""
NAME_LENGTH = 40
THREADS_BESIDE_GPU = 4


@dataclass(frozen=True)
class Job:
    """One run, and the devices that train it.

    Args:
        run: its directory, absolute.
        base: the folder of its base model, if that is outside the run.
        devices: devices per node.
        on_cpu: whether devices are processes on CPU cores, not GPUs.
        threads: threads per device; the bits of CPU operations depend on them.
    """

    run: Path
    host: Host
    devices: Devices = field(default_factory=lambda: Devices(1, 1))
    nodes: int = 1
    on_cpu: bool = False
    threads: int = THREADS_BESIDE_GPU
    base: Path | None = None

    @property
    def name(self) -> str:
        """A name that every scheduler accepts: the folder's, and a part of the path's hash to keep two runs apart."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.run.name.lower()).strip("-")[:NAME_LENGTH].strip("-")
        return "-".join(part for part in ("onward", slug, hashlib.sha256(bytes(self.run)).hexdigest()[:6]) if part)

    @property
    def environment(self) -> dict[str, str]:
        """Variables that the processes need: where models are kept, and how many threads to use."""
        return {**self.host.kept, THREADS: str(self.threads)}

    def words(self, python: str, *, once: bool) -> list[str]:
        """Return the words of the command that owns the run on one node.

        Args:
            once: whether to end when nothing waits, and release the devices.
        """
        words = [python, "-P", "-m", "onward", "watch", "--run", str(self.run)]
        words += ["--once"] if once else []
        return words if self.devices.most == 1 else [*words, "--devices", as_asked(self.devices)]


def read_asked(text: str) -> Devices:
    """Return the devices that `N` or `A:B` asks for, whatever this machine has.

    Raises:
        UsageError: it is neither.
    """
    if text == "all":
        hint = "--devices 8, or --devices 2:8 for as many as there are."
        raise UsageError("a scheduler needs a number of devices, not all", where="--devices", hint=hint)
    return read_devices(text, lambda: None)


def require_parts(layout: RunLayout, devices: Devices, nodes: int) -> None:
    """Refuse more devices than a step has parts, before they are requested.

    Raises:
        UsageError: the run's config has fewer.
    """
    asked = devices.most * nodes
    if asked > 1 and asked > (parts := read_config(layout.config).parts):
        hint = (
            f"Set parts: {asked} in {quoted(layout.config)}; it takes effect at the next file, and bits depend on it."
        )
        what = f"{asked} devices cannot share a step of {how_many(parts, 'part')}"
        raise UsageError(what, where="--devices", hint=hint)


def as_asked(devices: Devices) -> str:
    """Return devices in the form that `--devices` takes."""
    return str(devices.most) if devices.least == devices.most else f"{devices.least}:{devices.most}"


def describe(layout: RunLayout, devices: Devices, nodes: int, *, on_cpu: bool | None, host: Host | None = None) -> Job:
    """Return the job of a run; what is not given is taken from its last checkpoint.

    Raises:
        UsageError: a path cannot be written into a text file line by line.
    """
    host = host or Host.here()
    run = layout.root.absolute()
    require_printable("job", str(run), host.python)
    made = _environment(layout)
    cpu = made.get("device") == "cpu" if on_cpu is None else on_cpu
    threads = _threads(made, host) or THREADS_BESIDE_GPU
    return Job(run, host, devices, nodes, cpu, threads, _base_elsewhere(layout))


def threads_of(layout: RunLayout, host: Host) -> int | None:
    """Return the threads of the last commit, or else those that the environment asks for; None if neither says."""
    return _threads(_environment(layout), host)


def _threads(made: Mapping[str, Any], host: Host) -> int | None:
    asked = host.environment.get(THREADS, "")
    return made.get("threads") or (int(asked) if asked.isdecimal() and int(asked) else None)


def require_whole(job: Job) -> None:
    """Refuse a run that would leave its ledger behind when copied to where it is trained.

    Raises:
        UsageError: the ledger is a link to a disk of this machine.
    """
    ledger = job.run / LEDGER
    if ledger.is_symlink():
        there, link = quoted(ledger.resolve()), quoted(ledger)
        hint = f"Copy the run to a disk of this machine, and there: rm {link} && mv {there}* {quoted(job.run)}/"
        raise UsageError("the ledger is a link, so a copy of the run would not have it", where=ledger, hint=hint)


def _environment(layout: RunLayout) -> Mapping[str, Any]:
    """Return the environment that the newest checkpoint was made in; empty if there is none, or none readable."""
    for folder in layout.checkpoints():
        try:
            found = json.loads((folder / MANIFEST).read_bytes())["environment"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return found if isinstance(found, dict) else {}
    return {}


def _base_elsewhere(layout: RunLayout) -> Path | None:
    """Return the folder of the base model if the config names one outside the run."""
    base = typed_path(read_config(layout.config).model)
    return base if base.is_absolute() and base.is_dir() and not base.is_relative_to(layout.root.absolute()) else None
