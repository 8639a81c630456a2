"""A daemon in a process of its own, which tests wait for and ask as an operator would."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import tiny
import yaml
from faults import FULL_SIZE
from processes import as_it_is, start_command
from runs import new_run

from onward import Run
from onward.events import Event, StepTaken
from onward.service.owner.training.worker import Worker
from onward.service.wishes import Wishes

SETTINGS: dict[str, Any] = {
    "evaluation": {"share": 0},
    "batch_size": 2,
    "save_steps": 5,
    "max_length": 256,
    "learning_rate": 1e-2,
    "settle_seconds": 0.3,
    "disk_margin_mb": 1,
    "lora": {"rank": 4, "dropout": 0.1},
}
PATIENCE = 600.0 if FULL_SIZE else 60.0
LONG = 40
"""Rows of a file in the middle of which tests hold a daemon: more steps than any of them needs."""


@dataclass(frozen=True)
class Hold:
    """A process holds still after each step of a file from one on, while nothing is asked of it: no test can come too
    late.

    Args:
        step: the first step in a file at which it holds.
        let_go: a file that ends all holding once it exists.
    """

    step: int
    let_go: Path

    def __call__(self) -> None:
        """Arm the process that this is called in."""
        plain = Worker.train_next

        def train_next(worker: Worker) -> Iterator[Event]:
            for event in plain(worker):
                yield event
                if isinstance(event, StepTaken) and event.step_in_file >= self.step:
                    self._hold(worker.around.wishes)

        Worker.train_next = train_next  # type: ignore[method-assign]

    def _hold(self, asked: Wishes) -> None:
        while not (asked.pending or self.let_go.exists()):
            time.sleep(0.01)


def hold(run: Run, step: int = 3) -> Hold:
    """Return a function that holds a process of a run at a step."""
    return Hold(step, run.layout.root.parent / "let_go")


def rows_file(path: Path, rows: int, seed: int | None = None) -> Path:
    """Write `rows` chats, a function of the seed."""
    return tiny.write_jsonl(path, tiny.chat_rows(rows, seed=rows if seed is None else seed))


def watch(run: Run, *arguments: str, prepare: Callable[[], None] = as_it_is, log: Path | None = None) -> BaseProcess:
    """Start `onward watch` on a run; `prepare` is called in its process first, `log` gets what it prints."""
    log = log or run.layout.root.parent / "log"
    return start_command(log, "watch", "--run", run.layout.root, *arguments, prepare=prepare)


def variable(name: str, value: object) -> Callable[[], None]:
    """Return a function that sets a variable of the environment in the process that calls it."""
    return functools.partial(_set, name, str(value))


def _set(name: str, value: str) -> None:
    os.environ[name] = value


def configure(run: Run, **keys: Any) -> None:
    """Change keys of a run's config."""
    values = yaml.safe_load(run.layout.config.read_text())
    run.layout.config.write_text(yaml.safe_dump({**values, **keys}))


def seconds_to_end(process: BaseProcess, number: signal.Signals = signal.SIGTERM) -> float:
    """Signal a process and return how long it takes to end."""
    begun = time.monotonic()
    end(process, number)
    return time.monotonic() - begun


def until(holds: Callable[[], bool], process: BaseProcess | None = None) -> None:
    """Wait until something holds, for a while that is long enough on any machine."""
    ends = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < ends, "waited in vain"
        assert process is None or process.is_alive(), "the daemon ended"
        time.sleep(0.05)


def is_in(run: Run, name: str, step: int = 3) -> Callable[[], bool]:
    """Return whether a file is being trained and some of its steps are done."""

    def holds() -> bool:
        status = run.status()
        return status["file"] == name and status["file_step"] >= step and status["state"] == "training"

    return holds


def end(process: BaseProcess, number: signal.Signals = signal.SIGTERM) -> int | None:
    """Signal a process and return its exit status."""
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(PATIENCE)
    return process.exitcode


def done(run: Run) -> list[str]:
    """Names of the files that are done, in the order of the stream."""
    return [entry["name"] for entry in run.history() if entry["state"] == "done"]


def twin_of(run: Run, model: Path, files: list[Path]) -> Path:
    """Train files in one uninterrupted run of the same settings, in this process."""
    twin = new_run(run.layout.root.parent / "twin", model, **SETTINGS)
    twin.train(*files)
    return twin.layout.root
