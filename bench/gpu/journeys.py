"""What a run costs in addition to its steps: `journeys.py gap,stall,resume SHAPE`.

`gap` is the time between two files beyond a step; `stall` what a step waits for a commit, against a plain copy of the
same bytes; `resume` the time to the first step after a stop, against that of a new run.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from own_steps import onward_steps, onward_trainer, synchronize
from record import emit
from shapes import model_modules, saved_model, text_file
from speed import onward_modules
from turns import wait

FILES, STEPS, ROWS = 5, 6, 8


def settings(shape: str) -> dict[str, Any]:
    """Return the settings of a run over rows of 2,048 tokens (64 of the tiny shape)."""
    longest = 64 if shape == "tiny" else 2048
    return {"batch_size": ROWS, "max_length": longest, "warmup_steps": 0, "lora": {"rank": 16, "dropout": 0.0}}


def _files(shape: str, folder: Path, count: int) -> list[Path]:
    length = settings(shape)["max_length"] - 1  # and the token that ends a row
    return [text_file(folder / f"{n}.jsonl", STEPS * ROWS, (length, length), seed=n) for n in range(count)]


def gap(shape: str) -> None:
    """Report how long a run pauses between two files, in steps."""
    from onward import Run
    from onward.events import StepTaken

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = saved_model(shape, folder / "base")
        run = Run.create(folder / "run", str(base), later=True, **settings(shape))
        ends: list[tuple[int, float]] = []
        gc.freeze()  # as the command line does

        def observe(event: object) -> None:
            if isinstance(event, StepTaken):
                ends.append((event.step_in_file, time.perf_counter()))

        run.train(*_files(shape, folder, FILES), observe=observe)
        flush = _flush_seconds(folder / "flushed")
    pairs = list(pairwise(ends))
    step = statistics.median(after[1] - before[1] for before, after in pairs if after[0] > 1)
    between = statistics.median(after[1] - before[1] for before, after in pairs if after[0] == 1)
    steps = max(0.0, between - step) / step
    first = next(after[1] - before[1] for before, after in pairs if after[0] == 1)
    figures = {"step": step, "gap": between - step, "first": first - step, "flush": flush}
    emit("gap between files", shape=shape, **figures, steps=steps, goal=1.0, met=steps <= 1.0)


def _flush_seconds(path: Path) -> float:
    """Return the seconds it takes to write a page to the disk: part of a gap is waiting for that."""
    times: list[float] = []
    with path.open("wb", buffering=0) as file:
        for _ in range(20):
            file.write(bytes(4096))
            begun = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def stall(shape: str) -> None:
    """Report how long training waits for the copy of its state, against a plain copy of as many bytes.

    Training waits until the call has returned and the computing stream has done its part of the copy. What leaves the
    device on another stream does so behind training, and is waited for before the next round.
    """
    trainer = onward_trainer(shape, "full" if shape == "tiny" else "lora")
    for _ in onward_steps(trainer, shape, "packed", 1):
        pass
    state = trainer.state
    copy = state.snapshot()
    size = sum(tensor.nbytes for tensor in copy.tensors())
    pinned = torch.cuda.is_available()
    source = torch.zeros(size, dtype=torch.uint8, device="cuda" if pinned else "cpu")
    target = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)
    found: dict[str, list[float]] = {"state": [], "copy": []}
    for _ in range(10):
        for side in found:
            synchronize()
            begun = time.perf_counter()
            if side == "state":
                copy = state.snapshot(into=copy)
                if pinned:
                    torch.cuda.current_stream().synchronize()
            else:
                target.copy_(source, non_blocking=True)
                synchronize()
            found[side].append(time.perf_counter() - begun)
    seconds = {side: statistics.median(times) for side, times in found.items()}
    ratio = seconds["state"] / seconds["copy"]
    emit("stall of a commit", shape=shape, bytes=size, seconds=seconds, ratio=ratio, goal=1.3, met=ratio <= 1.3)


def resume(shape: str) -> None:
    """Report how long a process takes to its first step in a new run and in one that was stopped."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = saved_model(shape, folder / "base")
        (file,) = _files(shape, folder, 1)
        job = {"base": str(base), "run": str(folder / "run"), "file": str(file), "settings": settings(shape)}
        if "ONWARD_GPU_CHECK" not in os.environ:  # earlier checks of the suite have read everything
            _first_step({**job, "run": str(folder / "warm")})
        cold = _first_step({**job, "make": True})
        again = _first_step({**job, "file": None})
    ratio = again / cold
    emit("resume", shape=shape, cold=cold, resumed=again, ratio=ratio, goal=1.15, met=ratio <= 1.15)


def _first_step(job: dict[str, Any]) -> float:
    begun = time.time()
    command = [sys.executable, __file__, "step", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(done.stdout.split()[-1]) - begun


def take_steps(job: dict[str, Any]) -> None:
    """Train two steps of a file, stop, and print when the first one ended."""
    from onward import Run
    from onward.events import StepTaken
    from onward.service.wishes import Wishes

    root = Path(job["run"])
    run = (
        Run(root)
        if (root / "ledger.sqlite3").exists()
        else Run.create(root, job["base"], later=True, **job["settings"])
    )
    stop, first = Wishes(), list[float]()

    def observe(event: object) -> None:
        if isinstance(event, StepTaken):
            first.append(time.time())
            if len(first) == 2:
                stop.ask("bench")

    with contextlib.suppress(BaseException):
        run.train(*([job["file"]] if job["file"] else []), observe=observe, stop=stop)
    print(first[0])


def modules(what: str, shape: str) -> list[str]:
    """Return what to import before a turn: not in the processes of `resume`, whose start is what is measured."""
    if what == "step":
        return []
    if what == "resume":
        return model_modules(shape)
    run = ("onward.run", "onward.library.making", "onward.service.owner.daemon", "onward.service.owner.process")
    return [*onward_modules(shape), *run, "transformers.training_args", "transformers.trainer_callback"]


def main() -> None:
    """Measure one thing."""
    what, argument = sys.argv[1:3]
    if what == "step":
        take_steps(json.loads(argument))
        return
    for each in what.split(","):
        {"gap": gap, "stall": stall, "resume": resume}[each](argument)


if __name__ == "__main__":
    from onward import startup

    startup.set_environment()
    startup.keep_freed_memory()
    wait(*modules(*sys.argv[1:3]))
    main()
