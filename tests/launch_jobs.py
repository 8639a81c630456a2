"""Runs to start elsewhere, and the programs that do it."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

from onward.layout import RunLayout
from onward.service.outside.elastic import Devices
from onward.service.outside.launch.job import Job, describe
from onward.service.outside.unit import Host

EIGHT = Devices(8, 8)
STUB = """\
#!/bin/sh
# A program that writes down its own name, its words and OMP_NUM_THREADS, waits for a signal if it is told to, and ends.
{{ printf '%s\\0' "${{0##*/}}" "$@" "threads=$OMP_NUM_THREADS"; printf '\\n\\0'; }} >> {log}
{then}
"""
WAITS = "trap 'kill $!; exit {status}' {name}; sleep 60 & echo ready > {ready}; wait"


class Programs:
    """A folder of programs to be found before others."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.ready = folder / "bin", folder / "log", folder / "ready"
        self.folder.mkdir()

    def add(self, name: str, then: str = "exit 0") -> None:
        """Add one that writes down what it is called with, and then does something."""
        path = self.folder / name
        path.write_text(STUB.format(log=shlex.quote(str(self.log)), then=then))
        path.chmod(0o755)

    def add_waiting(self, name: str, number: str, status: int = 0) -> None:
        """Add one that ends by a signal, and says when it waits for it."""
        self.add(name, WAITS.format(name=number, status=status, ready=shlex.quote(str(self.ready))))

    def environment(self, **more: str) -> dict[str, str]:
        """Return what a process finds them with."""
        return {"PATH": f"{self.folder}:{os.environ['PATH']}", "HOME": str(self.folder.parent), **more}

    @property
    def calls(self) -> list[list[str]]:
        """What was called, word by word."""
        text = self.log.read_text() if self.log.exists() else ""
        return [call.strip("\0").split("\0") for call in text.split("\n\0") if call]


def a_run(folder: Path, name: str = "run", model: str = "smollm2-135m") -> RunLayout:
    """What is looked at of a run: its config, and that it has a ledger."""
    layout = RunLayout(folder / name)
    layout.root.mkdir()
    layout.config.write_text(json.dumps({"model": model, "parts": 8}))
    layout.ledger.touch()
    return layout


def host(run: Path, **environment: str) -> Host:
    """A place whose Python's path is as hard to write as the run's."""
    return Host(os.geteuid(), 0o022, f"{run}/python", environment, "node1.example.org")


def job_of(layout: RunLayout, devices: Devices = EIGHT, nodes: int = 1, *, on_cpu: bool = False) -> Job:
    """The job of a run on eight GPUs."""
    return describe(layout, devices, nodes, on_cpu=on_cpu, host=host(layout.root, HF_HOME=f"{layout.root}/hub"))
